"""The public names of `enn_core.lessons`: what users taught, on disk, and what absorbs it.

Needs numpy besides torch, so `import enn_core` leaves it out; import it by name.
"""

from enn_core.lessons.adapter import RidgeAdapter
from enn_core.lessons.errors import (
    JournalBusy,
    JournalCorrupt,
    JournalError,
    JournalMismatch,
    JournalMissing,
)
from enn_core.lessons.events import TEACH, Event, latest
from enn_core.lessons.journal import Journal, Writing
from enn_core.lessons.profile import Profile
from enn_core.lessons.recursive_projector import RecursiveProjector

__all__ = [
    "TEACH",
    "Event",
    "Journal",
    "JournalBusy",
    "JournalCorrupt",
    "JournalError",
    "JournalMismatch",
    "JournalMissing",
    "Profile",
    "RecursiveProjector",
    "RidgeAdapter",
    "Writing",
    "latest",
]
