"""The open site profiles of a server: one per person and profile."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from enn_core.lessons.places import (
    LOCAL,
    ProfileError,
    check_name,
    journal_name,
    list_journals,
)

if TYPE_CHECKING:
    from neuro.age.predict import BrainAge
    from neuro.teach import Site

__all__ = ["PROFILES_EACH", "Sites"]

OPEN = 64
PROFILES_EACH = 50
"""Profiles of one visitor of a server that others can reach."""


class Sites:
    """Opens site profiles on demand and keeps those used last.

    Args:
        brain: the model that is taught.
    """

    def __init__(self, brain: BrainAge) -> None:
        self._brain = brain
        self._open: OrderedDict[tuple[str, str], Site] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, scope: str, profile: str) -> Site:
        """A profile; nothing is written until it is taught something.

        Raises:
            ProfileError: the name cannot be a profile's, or there are too many already.
            ValueError, OSError: what was taught cannot be read.
        """
        from neuro.teach import Site

        key = (scope, check_name(profile))
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            names = self.names(scope)
            if scope != LOCAL and profile not in names and len(names) >= PROFILES_EACH:
                raise ProfileError(
                    f"there are {len(names)} profiles already, the most that one visitor may "
                    "have; choose one of them, or forget one"
                )
            site = Site.open(self._brain, profile, scope=scope)
            self._open[key] = site
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return site

    def names(self, scope: str) -> list[str]:
        """Profiles that were taught something, in alphabetical order."""
        return list_journals(journal_name("brain", self._brain.sha256), scope)
