"""How much a visitor may send, keep and ask for, and what holds requests to it.

Whoever wants to raise a limit finds its number here; the pages tell browsers the same numbers.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

__all__ = [
    "ALL_SCANS_BYTES",
    "API_CHARACTERS",
    "API_IDS",
    "API_RESULTS",
    "BODY_SECONDS",
    "BRAIN_LESSONS_BYTES",
    "CAPTION_LINES",
    "LARGE_REQUESTS",
    "MARKED_PICTURES",
    "OPEN_PROFILES",
    "PICTURE_BYTES",
    "PICTURE_PIXELS",
    "PROFILES_EACH",
    "QUERY_CHARACTERS",
    "REQUEST_BYTES",
    "SCANS_EACH",
    "SCAN_BYTES",
    "SEARCH_LESSONS_BYTES",
    "SESSIONS",
    "STREAM_SECONDS",
    "WAITING_SCANS",
    "Refusal",
    "hold",
]

# --- requests ------------------------------------------------------------------------------------

REQUEST_BYTES = 2**20  # of a request that brings no file
LARGE_REQUESTS = 8  # larger ones held in memory at once
BODY_SECONDS = 30  # for a whole body to arrive, or the next piece of one that is streamed
STREAM_SECONDS = 1800  # for a whole body that is streamed

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
SCANS_EACH = 40  # of a session
WAITING_SCANS = 24  # of all sessions
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


async def hold(
    scope: Scope, receive: Receive, max_body: int, *, stream: bool = False, json_body: bool = False
) -> tuple[Scope, Receive] | Refusal:
    """Holds a request's body to its limits.

    Args:
        scope, receive: of the request.
        max_body: bytes.
        stream, json_body: see `apps.web.server.Route`.

    Returns:
        What to hand on in their place, or why the request is refused.
    """
    if stream:
        return _check_length(scope, max_body) or (scope, _in_time(receive))
    body = await _read_body(receive, scope, max_body)
    if json_body and isinstance(body, bytes):
        body = _plain_json(body)
    if isinstance(body, Refusal):
        return body
    drop = {b"content-length", b"transfer-encoding"}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in drop]
    headers = [*kept, (b"content-length", str(len(body)).encode())]
    return {**scope, "headers": headers}, _replay(body, receive)


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


def _in_time(receive: Receive) -> Receive:
    """Ends a body that stalls or takes too long, as if the sender had gone."""
    end = asyncio.get_running_loop().time() + STREAM_SECONDS
    whole = False

    async def next_piece() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            left = end - asyncio.get_running_loop().time()
            async with asyncio.timeout(min(BODY_SECONDS, max(0.0, left))):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = message["type"] != "http.request" or not message.get("more_body")
        return message

    return next_piece


async def _read_body(receive: Receive, scope: Scope, max_body: int) -> bytes | Refusal:
    """The whole body, at most `max_body` bytes of it and within BODY_SECONDS."""
    too_large = _too_large(max_body)
    if (_length(scope) or 0) > max_body:
        return too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return Refusal(400, "The request ended early.")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_body:
                    return too_large
                if not message.get("more_body"):
                    break
    except TimeoutError:
        return Refusal(408, "The request took too long to arrive.")
    return b"".join(parts)


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


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
