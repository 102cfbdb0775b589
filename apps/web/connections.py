"""Connections of the servers: how many, how long one may be silent, and whose have to go.

uvicorn waits for a request's head without end, and where it has a limit it counts silent
connections as work. Here a head has a deadline; what a client leaves unread, one as well; and where
too many connections are open, those that wait for a head make room, the longest waiting first.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from apps.web.limits import (
    CONNECTIONS,
    CONNECTIONS_EACH,
    HEAD_SECONDS,
    READ_RATE,
    READ_SECONDS,
)
from apps.web.visitors import network_of

__all__ = ["Connections", "Proxies"]

_DESCRIPTORS_KEPT = 96  # for the index, the journals, the standard streams, and what libraries open


class Proxies:
    """The addresses that are trusted to tell for whom they ask (`X-Forwarded-For`).

    Args:
        given: IP addresses and networks, with commas between; "*" for all; "" for none.

    Raises:
        ValueError: something else is given.
    """

    def __init__(self, given: str = "") -> None:
        self.given = given.strip()
        self._all = self.given == "*"
        parts = [] if self._all else [part.strip() for part in given.split(",") if part.strip()]
        try:
            self._networks = [ipaddress.ip_network(part) for part in parts]
        except ValueError as error:
            raise ValueError(
                f"got the proxies {given!r}: {error}; give IP addresses or networks such as "
                "192.0.2.7,10.0.0.0/8"
            ) from None

    def __contains__(self, address: str) -> bool:
        try:
            return self._all or any(ipaddress.ip_address(address) in n for n in self._networks)
        except ValueError:
            return False


class Connections:
    """The open connections of one server.

    Args:
        most: open at once. Fewer where the system allows the process fewer files.
        each: open at once from one network; proxies may open more.
        head_seconds: until the head of a request has to be there.
        read_seconds: how often an answer that the client does not read is looked at.
        proxies: see `Proxies`.
    """

    def __init__(
        self,
        *,
        most: int = CONNECTIONS,
        each: int = CONNECTIONS_EACH,
        head_seconds: float = HEAD_SECONDS,
        read_seconds: float = READ_SECONDS,
        proxies: Proxies | None = None,
    ) -> None:
        # An upload takes a file beside its connection.
        self.most = max(8, min(most, (_descriptors(2 * most) - _DESCRIPTORS_KEPT) // 2))
        self.each = max(4, min(each, self.most // 2))
        self.head_seconds = head_seconds
        self.read_seconds = read_seconds
        self.proxies = proxies or Proxies()
        self._open: dict[str, dict[_Connection, None]] = {}
        self._count = 0

    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn makes one of for each connection."""
        return type("Connection", (_Connection,), {"_book": self})

    def enter(self, connection: _Connection, address: str) -> bool:
        """Whether there is room for one more; others may have to go for it."""
        network = network_of(address)
        mine = self._open.get(network, {})
        if len(mine) >= self.each and address not in self.proxies:
            if not _make_room(mine):
                return False
        elif self._count >= self.most:
            crowds = sorted(self._open.values(), key=len, reverse=True)
            if not any(_make_room(crowd) for crowd in crowds):
                return False
        self._open.setdefault(network, {})[connection] = None
        self._count += 1
        return True

    def leave(self, connection: _Connection, address: str) -> None:
        """One is over."""
        network = network_of(address)
        mine = self._open.get(network, {})
        if connection in mine:
            del mine[connection]
            self._count -= 1
            if not mine:
                del self._open[network]


class _Connection(H11Protocol):
    """One connection, with deadlines."""

    _book: Connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._address = ""
        self._timer: asyncio.TimerHandle | None = None
        self._unread: int | None = None  # bytes of answers, when they were last looked at
        self._began = False  # the next head
        self.since = self.loop.time()  # it waits for a head, or works on a request
        self.received = 0  # bytes, since then

    # -- what others ask ---------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nobody works on a request of it."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether nothing is lost if it goes."""
        return self.idle and not self.transport.get_write_buffer_size()

    @property
    def arrives(self) -> bool:
        """Whether the body of a request has been on its way for a while."""
        return not self.idle and self.cycle.more_body and self.loop.time() - self.since > 0.2

    @property
    def rate(self) -> float:
        """Bytes per second of what arrives."""
        return self.received / max(self.loop.time() - self.since, 1e-3)

    def drop(self) -> None:
        """Ends it at once."""
        self._book.leave(self, self._address)
        self.transport.abort()

    # -- what uvicorn and asyncio call -------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        if not self._book.enter(self, self._address):
            transport.write(_answer("503 Service Unavailable", "Too many connections are open."))
            transport.close()
        self._watch(self._book.head_seconds)

    def data_received(self, data: bytes) -> None:
        was_idle = self.idle
        if was_idle and self.cycle is not None and not self._began:
            # The silence between two requests is not the head's.
            self._began = True
            self._watch(self._book.head_seconds)
        self.received += len(data)
        super().data_received(data)
        if was_idle and not self.idle:
            self.since, self.received = self.loop.time(), 0
            self._unwatch()

    def on_response_complete(self) -> None:
        self.since, self.received, self._began = self.loop.time(), 0, False
        super().on_response_complete()
        if self.idle:
            self._watch(self._book.head_seconds)
        else:  # the next request had come already
            self._unwatch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self._book.read_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.idle:
            self._unwatch()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP; whoever works on its request must not answer, too."""
        if not self.idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered like any other, and strangers write no log."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._book.leave(self, self._address)
        super().connection_lost(exc)

    # -- deadlines ---------------------------------------------------------------------------

    def _watch(self, seconds: float) -> None:
        self._unwatch()
        self._timer = self.loop.call_later(seconds, self._late, seconds)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._unread = None, None

    def _late(self, seconds: float) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread:
            before = self._unread
            if before is not None and before - unread < READ_RATE * seconds:
                self.drop()
                return
            self._watch(self._book.read_seconds)
            self._unread = unread
        elif self.idle and not self.transport.is_closing():
            if self._began or self.received:
                self.transport.write(_answer("408 Request Timeout", "The request took too long."))
            self.transport.close()
            self._watch(seconds)
        elif self.transport.is_closing():
            self.drop()


def _make_room(connections: Iterable[_Connection]) -> bool:
    """Ends the one that waits longest for a head; else the body that arrives slowest."""
    connections = list(connections)
    victim = min((c for c in connections if c.waits), key=lambda c: c.since, default=None)
    if victim is None:
        victim = min((c for c in connections if c.arrives), key=lambda c: c.rate, default=None)
    if victim is None:
        return False
    victim.drop()
    return True


def _answer(status: str, text: str) -> bytes:
    body = text + "\n"
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}"
    ).encode()


def _descriptors(wanted: int) -> int:
    """How many files this process may open; asks the system for more if that is few."""
    try:
        import resource
    except ImportError:  # Windows
        return 2 * wanted + _DESCRIPTORS_KEPT
    wanted += _DESCRIPTORS_KEPT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    more = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    except (OSError, ValueError):
        return soft
    return more
