"""Hugging Face's hub: asked only for what is not here, and never waited for in vain.

huggingface_hub asks an unreachable hub six times per file, which takes 23 s to more than a minute.
So one request with a deadline goes first. Downloads themselves keep its patient timeouts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

__all__ = ["answers", "is_out_of_reach", "local_first"]

_T = TypeVar("_T")

SECONDS = 2.0
"""How long the hub may take for its first answer, name lookup included."""

# Where open_clip keeps what does not come from the hub.
_OTHER_CACHE = Path("~/.cache/clip")

# A proxy whose own way out is broken; huggingface_hub would ask again and again.
_AWAY = (502, 503, 504)


def local_first(make: Callable[[], _T]) -> _T:
    """What `make` makes of local files, else of what it may fetch, if the hub answers.

    Raises:
        Exception: whatever `make` raises; of the try without a hub, if there is none.
    """
    try:
        with _offline():
            return make()
    except Exception:
        if not answers():
            raise
    return make()


def answers() -> bool:
    """Whether the hub says anything in time; HF_HUB_ETAG_TIMEOUT gives a slow line longer."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    given = constants.HF_HUB_ETAG_TIMEOUT
    seconds = SECONDS if given == constants.DEFAULT_ETAG_TIMEOUT else float(given)
    heard = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            response = get_session().head(constants.ENDPOINT, timeout=seconds)
            if response.status_code not in _AWAY:
                heard.set()

    # Looking a name up knows no deadline; a thread can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return heard.is_set()


def is_out_of_reach(sources: Iterable[str]) -> bool:
    """Whether published weights can be had from none of their sources: nothing of them is here, and
    no hub answers.

    Args:
        sources: as `published.sources_of` gives them.
    """
    from huggingface_hub import constants

    for source in sources:
        folder, name = Path(constants.HF_HUB_CACHE), f"models--{source.replace('/', '--')}"
        if "://" in source:
            folder, name = _OTHER_CACHE.expanduser(), source.rpartition("/")[2]
        if (folder / name).exists():
            return False
    return not answers()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous
