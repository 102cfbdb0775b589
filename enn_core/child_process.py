"""What a process that was started for work has to do first."""

from __future__ import annotations

import os
import signal
from multiprocessing import parent_process
from threading import Thread

__all__ = ["follow_parent"]


def follow_parent() -> None:
    """Leave Ctrl-C to the process that started this one, and end when that one has ended.

    A process that is killed cannot tell its own to end: they would keep their memory, and whatever
    reads the output they share would wait.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
