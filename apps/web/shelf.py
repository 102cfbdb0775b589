"""The open profiles of a server: one per person, profile and model, and not without bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from apps.web.limits import OPEN_PROFILES, PROFILES_EACH
from enn_core.lessons.places import LOCAL, ProfileError, check_name, list_journals
from enn_core.lessons.profile import Profile

__all__ = ["Shelf"]

M = TypeVar("M")
P = TypeVar("P", bound=Profile[Any])


class Shelf(Generic[M, P]):
    """Opens profiles on demand and keeps those used last.

    Args:
        journal_of: file name of the journals of a model's profiles.
        open_profile: opens the profile (model, name, scope=...), like `Teacher.open`.
    """

    def __init__(self, journal_of: Callable[[M], str], open_profile: Callable[..., P]) -> None:
        self._journal_of = journal_of
        self._open_profile = open_profile
        self._open: OrderedDict[tuple[str, str, str], P] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, model: M, scope: str, profile: str) -> P:
        """A profile of a model; nothing is written until it is taught something.

        Raises:
            ProfileError: the name cannot be a profile's, or there are too many already.
            RuntimeError, ValueError, OSError: what was taught cannot be read.
        """
        key = (scope, check_name(profile), self._journal_of(model))
        with self._lock:
            if key not in self._open:
                names = self.names(model, scope)
                if scope != LOCAL and profile not in names and len(names) >= PROFILES_EACH:
                    raise ProfileError(
                        f"there are {len(names)} profiles already, the most that one visitor may "
                        "have; choose one of them, or forget one"
                    )
                self._open[key] = self._open_profile(model, profile, scope=scope)
                # One that falls out may be in use: it closes when its last user lets go.
                if len(self._open) > OPEN_PROFILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def names(self, model: M, scope: str | None) -> list[str]:
        """Profiles that were taught something, in alphabetical order; nobody (None) has any."""
        return list_journals(self._journal_of(model), scope) if scope is not None else []
