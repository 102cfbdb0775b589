"""Feedback: the journal of what users taught, and the maps that absorb it.

Knows nothing of images, text or brains. Needs numpy besides torch, so `import enn_core` leaves it
out; import it by name.
"""

from enn_core.feedback.adapter import RidgeAdapter
from enn_core.feedback.events import TEACH, Event, latest
from enn_core.feedback.journal import (
    Journal,
    JournalBusy,
    JournalCorrupt,
    JournalError,
    JournalMismatch,
    JournalMissing,
    Writing,
)
from enn_core.feedback.profile import Profile
from enn_core.feedback.projector import RecursiveProjector

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
