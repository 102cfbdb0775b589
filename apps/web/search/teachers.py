"""The open teachers of a server: one per person, profile and model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from retrieval.teach.profiles import LOCAL, ProfileError, check_name, list_profiles

if TYPE_CHECKING:
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import Teacher

__all__ = ["PROFILES_EACH", "Teachers"]

OPEN = 128
PROFILES_EACH = 50
"""Profiles of one visitor of a server that others can reach."""


class Teachers:
    """Opens teachers on demand and keeps those used last."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str, str], Teacher] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: RetrievalModel, scope: str, profile: str) -> Teacher:
        """The teacher of a profile; nothing is written until it is taught something.

        Raises:
            ProfileError: the name cannot be a profile's, or there are too many already.
            RuntimeError, ValueError, OSError: what was taught cannot be read.
        """
        from retrieval.teach.teacher import Teacher

        key = (scope, check_name(profile), str(model.fingerprint()["weights"]))
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            names = list_profiles(model, scope)
            if scope != LOCAL and profile not in names and len(names) >= PROFILES_EACH:
                raise ProfileError(
                    f"there are {len(names)} profiles already, the most that one visitor may "
                    "have; choose one of them, or forget one"
                )
            teacher = Teacher.open(model, profile, scope=scope)
            self._open[key] = teacher
            # One that falls out may be in use: it closes when its last user lets go.
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return teacher

    def names(self, model: RetrievalModel, scope: str | None) -> list[str]:
        """Profiles that were taught something, in alphabetical order."""
        return list_profiles(model, scope) if scope is not None else []
