"""How much a visitor may send, keep and ask for, and what holds requests to it.

Whoever wants to raise a limit finds its number here; the pages tell browsers the same numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

__all__ = [
    "ALL_SCANS_BYTES",
    "API_CHARACTERS",
    "API_IDS",
    "API_RESULTS",
    "ARRIVING_BYTES",
    "BODY_RATE",
    "BODY_SECONDS",
    "BRAIN_LESSONS_BYTES",
    "CAPTION_LINES",
    "CONNECTIONS",
    "CONNECTIONS_EACH",
    "HEAD_SECONDS",
    "LARGE_REQUESTS",
    "MARKED_PICTURES",
    "OPEN_PROFILES",
    "OPEN_TABS",
    "PICTURE_BYTES",
    "PICTURE_PIXELS",
    "PROFILES_EACH",
    "QUERY_CHARACTERS",
    "QUEUED",
    "QUEUED_EACH",
    "READ_RATE",
    "READ_SECONDS",
    "REQUEST_BYTES",
    "SCANS_EACH",
    "SCAN_BYTES",
    "SEARCH_LESSONS_BYTES",
    "SESSIONS",
    "SESSIONS_EACH",
    "SESSIONS_NEAR",
    "SESSIONS_SURE",
    "STREAM_SECONDS",
    "THREADS",
    "WAITING_EACH",
    "WAITING_SCANS",
    "Arriving",
    "Held",
    "Refusal",
    "hold",
]

# --- connections and requests ---------------------------------------------------------------------

CONNECTIONS = 1024  # open at once
CONNECTIONS_EACH = 128  # from one network
HEAD_SECONDS = 10.0  # for a request's head to arrive
READ_SECONDS = 30.0  # for a piece of an answer to be read
READ_RATE = 1024  # bytes per second of it
REQUEST_BYTES = 2**20  # of a request that brings no file
LARGE_REQUESTS = 8  # larger ones that are worked on at once, once they are here
THREADS = 16  # of the server's 40, for pictures and files that take a while
BODY_SECONDS = 30.0  # for a body to arrive, and more for what has come at
BODY_RATE = 16 * 1024  # bytes per second
STREAM_SECONDS = 1800.0  # for a whole body
ARRIVING_BYTES = 2**30  # of bodies that are not worked on yet; half of them from one network
# Tabs that Gradio keeps something of, some 50 KB each. None needs it: their browsers keep it.
OPEN_TABS = 256
QUEUED = 128  # clicks and searches that wait
QUEUED_EACH = 16  # of one visitor of a server that others can reach

# --- files that visitors upload -------------------------------------------------------------------

PICTURE_BYTES = 20 * 2**20
PICTURE_PIXELS = 128_000_000  # phones make photos of 108 megapixels
SCAN_BYTES = 256 * 2**20
ALL_SCANS_BYTES = 8 * 2**30  # of the uploads of all sessions
# Larger files of lessons go through the command line.
SEARCH_LESSONS_BYTES = 16 * 2**20  # some 2,000 lessons
BRAIN_LESSONS_BYTES = 256 * 2**20  # some 300 lessons

# --- scans and profiles that a server keeps -------------------------------------------------------

SESSIONS = 64
SESSIONS_EACH = 32  # of one visitor of a server that others can reach
SESSIONS_NEAR = 48  # of one network; with others there, as large a part of what they leave
SESSIONS_SURE = 4  # of one network, while there is room at all
SCANS_EACH = 40  # of a session
WAITING_SCANS = 24  # of all sessions
WAITING_EACH = 8  # of one visitor of a server that others can reach
PROFILES_EACH = 50  # of one visitor of a server that others can reach
OPEN_PROFILES = 64  # of all visitors; a lesson about a scan takes most of 1 MB of memory

# --- searches -------------------------------------------------------------------------------------

QUERY_CHARACTERS = 500  # the text tower reads fewer words than that
CAPTION_LINES = 200
MARKED_PICTURES = 192  # at once: no more are shown
API_CHARACTERS = 10_000
API_IDS = 10_000
API_RESULTS = 1000


@dataclass(frozen=True)
class Refusal:
    """A request that goes no further, and the line that it is answered with."""

    status: int
    text: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    slow: bool = False

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (self.text + "\n").encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
            *self.headers,
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body}
        )


_SHORT = 64 * 1024  # bytes of a body that memory keeps while it arrives
_NO_ROOM = Refusal(503, "Too much is being uploaded at the moment; try again in a minute.")


class Arriving:
    """Counts the bytes of bodies that are kept while they arrive.

    Args:
        most: bytes of all; half of them from one network.
    """

    def __init__(self, most: int = ARRIVING_BYTES) -> None:
        self._most = most
        self._kept: dict[str, int] = {}

    def change(self, network: str, size: int) -> bool:
        """Adds `size` bytes, which may be negative; whether they are within bounds."""
        kept = self._kept.pop(network, 0) + size
        if kept:
            self._kept[network] = kept
        return kept <= self._most // 2 and sum(self._kept.values()) <= self._most


@dataclass(frozen=True)
class Held:
    """A request within its limits: what to hand on, and what lets go of its body."""

    scope: Scope
    receive: Receive
    let_go: Callable[[], None] = lambda: None


async def hold(
    scope: Scope,
    receive: Receive,
    max_body: int,
    *,
    stream: bool = False,
    json_body: bool = False,
    arriving: Arriving | None = None,
    network: str = "",
) -> Held | Refusal:
    """Holds a request's body to its limits.

    A body that is not streamed is in a temporary file when this returns, and read from it when it
    is asked for: what only trickles in takes no memory and no place.

    Args:
        scope, receive: of the request.
        max_body: bytes.
        stream, json_body: see `apps.web.server.Route`.
        arriving: counts bodies that are kept.
        network: where it comes from.

    Returns:
        What to hand on in their place, or why the request is refused.
    """
    if stream:
        return _check_length(scope, max_body) or Held(scope, _in_time(receive))
    arriving = arriving or Arriving()
    kept = _Kept(arriving, network)
    try:
        refused = await _keep_body(kept, receive, scope, max_body)
        if refused is None and json_body:
            refused = kept.as_json()
    except BaseException:
        kept.close()
        raise
    if refused is not None:
        kept.close()
        return refused
    drop = {b"content-length", b"transfer-encoding"}
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in drop]
    headers = [*headers, (b"content-length", str(kept.size).encode())]
    return Held({**scope, "headers": headers}, _replay(kept, receive), kept.close)


class _Kept:
    """A body in a temporary file, or in memory while it is short."""

    def __init__(self, arriving: Arriving, network: str) -> None:
        self.size = 0
        self._arriving = arriving
        self._network = network
        self._file: IO[bytes] | None = tempfile.SpooledTemporaryFile(_SHORT)  # noqa: SIM115

    def add(self, piece: bytes) -> bool:
        """Whether there was room for it."""
        self.size += len(piece)
        if self._file is None or not self._arriving.change(self._network, len(piece)):
            return False
        self._file.write(piece)
        return True

    def rewind(self) -> None:
        """The body is whole; raises OSError if the disk is full."""
        if self._file is not None:
            self._file.seek(0)

    def take(self) -> bytes:
        """The whole body; it is kept no longer."""
        if self._file is None:
            return b""
        body = self._file.read()
        self.close()
        return body

    def as_json(self) -> Refusal | None:
        """Writes it anew, see `_plain_json`."""
        body = _plain_json(self.take())
        if isinstance(body, Refusal):
            return body
        self.size = 0
        self._file = tempfile.SpooledTemporaryFile(_SHORT)  # noqa: SIM115
        if not self.add(body):
            return _NO_ROOM
        self.rewind()
        return None

    def close(self) -> None:
        """Deletes it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            self._arriving.change(self._network, -self.size)


def _too_large(max_body: int) -> Refusal:
    return Refusal(413, f"Requests here may have {max_body // 1024} KB at most.")


def _length(scope: Scope) -> int | None:
    """The length that a request tells of its body, None if it does not."""
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value.lstrip(b"0")[:16] or b"0")  # more digits are too many, whichever
    return None


def _check_length(scope: Scope, max_body: int) -> Refusal | None:
    """What is wrong with the length of a body that is streamed; the server holds it to that."""
    length = _length(scope)
    if length is None or any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"]):
        return Refusal(411, "The length of what is sent has to be told before.")
    return _too_large(max_body) if length > max_body else None


class _Patience:
    """How long the next piece of a body may take: all of it, at BODY_RATE after BODY_SECONDS."""

    def __init__(self) -> None:
        self._received = 0
        self._waited = 0.0
        self._end = asyncio.get_running_loop().time() + STREAM_SECONDS

    async def next(self, receive: Receive) -> Message:
        """The next piece; raises TimeoutError."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = BODY_SECONDS + self._received / BODY_RATE - self._waited
        async with asyncio.timeout(max(0.0, min(left, self._end - began, BODY_SECONDS))):
            message = await receive()
        self._waited += loop.time() - began
        self._received += len(message.get("body", b""))
        return message


def _in_time(receive: Receive) -> Receive:
    """Ends a body that stalls, trickles or takes too long, as if the sender had gone."""
    patience = _Patience()
    whole = False

    async def next_piece() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await patience.next(receive)
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = message["type"] != "http.request" or not message.get("more_body")
        return message

    return next_piece


async def _keep_body(kept: _Kept, receive: Receive, scope: Scope, max_body: int) -> Refusal | None:
    """Keeps the whole body, at most `max_body` bytes of it, or tells what is wrong with it."""
    if (_length(scope) or 0) > max_body:
        return _too_large(max_body)
    patience = _Patience()
    while True:
        try:
            message = await patience.next(receive)
        except TimeoutError:
            return Refusal(408, "The request took too long to arrive.")
        if message["type"] == "http.disconnect":
            return Refusal(400, "The request ended early.")
        piece = message.get("body", b"")
        if kept.size + len(piece) > max_body:
            return _too_large(max_body)
        try:
            if not kept.add(piece):
                return _NO_ROOM
            if not message.get("more_body"):
                kept.rewind()
                return None
        except OSError:
            return Refusal(503, "The server has no room left on its disk.")


def _plain_json(body: bytes) -> bytes | Refusal:
    """The body re-written as JSON, refused when it describes a file.

    Gradio fetches or opens `{"path": ..., "meta": ...}` objects in the input of *any* component,
    web addresses included. Pages behind this guard have no file components, so such an object is
    an attack; writing the parsed value anew leaves no room for a second reading of the same bytes.
    """
    try:
        value = json.loads(body)
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                if "path" in item and "meta" in item:
                    return Refusal(400, "Files cannot be named in a request.")
                pending.extend(item.values())
            elif isinstance(item, list):
                pending.extend(item)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return Refusal(400, "The request is not valid JSON.")


def _replay(kept: _Kept, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": kept.take(), "more_body": False}

    return replay
