"""Whose turn it is where visitors wait for something that all of them share.

Who waits is known by a `Seat`. Places come up in turns: to the network that was served longest ago,
there to the visitor who was, there to the one who came first. And nobody takes all the places to
wait in: a visitor has a few, and a network half of them, since cookies are free.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple

__all__ = ["Places", "Seat", "TooMany", "Turns", "check_share"]

_REMEMBERED = 4096


class TooMany(ValueError):
    """No more may wait; one line, fit to show."""


class Seat(NamedTuple):
    """Who waits: the network that they come from ("" on the own machine), and who of it."""

    network: str
    visitor: str


class Turns:
    """Picks who is next; for one thread at a time."""

    def __init__(self) -> None:
        self._served: OrderedDict[object, int] = OrderedDict()
        self._count = 0

    def copy(self) -> Turns:
        """Those who were served, to see what would come."""
        other = Turns()
        other._served, other._count = self._served.copy(), self._count
        return other

    def next(self, waiting: Sequence[Seat]) -> int:
        """Number of the one whose turn it is, of at least one, in the order of their coming."""
        last = self._served.get
        return min(
            range(len(waiting)),
            key=lambda n: (last(waiting[n].network, 0), last(waiting[n], 0), n),
        )

    def serve(self, seat: Seat) -> None:
        """Somebody got their turn."""
        self._count += 1
        for key in (seat.network, seat):
            self._served[key] = self._count
            self._served.move_to_end(key)
        while len(self._served) > _REMEMBERED:
            self._served.popitem(last=False)


def check_share(waiting: Iterable[Seat], seat: Seat, *, most: int, each: int, what: str) -> None:
    """Raises TooMany if one more would be too many of a visitor, of a network, or in all.

    Args:
        waiting: those who wait already.
        seat: who comes.
        most, each: how many may wait in all, and of one visitor.
        what: what waits, in the plural.
    """
    waiting = list(waiting)
    own = sum(other == seat for other in waiting)
    near = sum(other.network == seat.network for other in waiting) if seat.network else 0
    if own >= each:
        raise TooMany(f"{own} of your {what} are waiting already; try again when they are through")
    if near >= most // 2:
        raise TooMany(
            f"{near} {what} from your network are waiting already; try again in some minutes"
        )
    if len(waiting) >= most:
        raise TooMany(f"{len(waiting)} {what} are waiting already; try again in some minutes")


class Places:
    """So many places in one event loop, given in turns.

    Args:
        count: of places.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[Seat, asyncio.Future[None]]] = []
        self._turns = Turns()

    @contextlib.asynccontextmanager
    async def place(self, seat: Seat) -> AsyncIterator[contextlib.ExitStack]:
        """Waits for a place; closing what it gives gives the place back before the end."""
        if self._free:
            self._free -= 1
            self._turns.serve(seat)
        else:
            await self._wait(seat)
        with contextlib.ExitStack() as held:
            held.callback(self._give_back)
            yield held

    async def _wait(self, seat: Seat) -> None:
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((seat, given))
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._give_back()
            else:
                self._waiting.remove((seat, given))
            raise

    def _give_back(self) -> None:
        waiting = [entry for entry in self._waiting if not entry[1].done()]
        if not waiting:
            self._free += 1
            return
        entry = waiting[self._turns.next([seat for seat, _ in waiting])]
        self._waiting.remove(entry)
        self._turns.serve(entry[0])
        entry[1].set_result(None)
