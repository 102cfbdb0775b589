"""Gradio's queue with shares and turns: nobody fills it, and nobody waits for another's many."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from gradio.queueing import Queue
from gradio.server_messages import EventMessage, ServerMessage

from apps.web.limits import OPEN_TABS, QUEUED, QUEUED_EACH
from apps.web.turns import Seat, TooMany, Turns, check_share
from apps.web.visitors import LOCAL, visitor_of

if TYPE_CHECKING:
    import gradio as gr
    from gradio.queueing import Event

__all__ = ["FairQueue", "share_queue"]


_REMEMBERED = 2000
_CLOSING_SECONDS = 0.25  # within which a tab may still have to hear that its stream is closed
_LATER_SECONDS = 0.05


class FairQueue(Queue):
    """Holds what visitors wait for to their share, and takes it in turns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._turns = Turns()
        self._answered: OrderedDict[str, float] = OrderedDict()  # by tab: its last answer

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """Puts an event in line, or refuses it."""
        tab = body.session_hash
        seat = _seat(request, tab)
        events = [e for line in self.event_queue_per_concurrency_id.values() for e in line.queue]
        each = QUEUED // 2 if visitor_of(request).scope == LOCAL else QUEUED_EACH
        try:
            check_share(
                map(_seat_of, events), seat, most=QUEUED, each=each, what="clicks and searches"
            )
        except TooMany as error:
            return False, str(error), "queue_full"
        # The stream of a tab is closed with the last answer that it waits for. A tab that hears
        # first that its next event is in line waits for its answer on the stream that closes.
        last = self._answered.get(tab, -1.0)
        closing = not self.pending_event_ids_session.get(tab)
        self._forget_idle_tabs()
        pushed = await super().push(body, request, username)
        if closing and time.monotonic() - last < _CLOSING_SECONDS:
            await asyncio.sleep(_LATER_SECONDS)
        return pushed

    def _forget_idle_tabs(self) -> None:
        """Keeps something of OPEN_TABS at most, and of those that wait for an answer."""
        tabs = self.pending_event_ids_session
        for tab in list(tabs)[: max(0, len(tabs) - OPEN_TABS)]:
            if not tabs[tab]:
                del tabs[tab]
                self.pending_messages_per_session.pop(tab, None)

    def send_message(self, event: Event, event_message: EventMessage) -> None:
        """Sends a message to a tab."""
        super().send_message(event, event_message)
        if event_message.msg == ServerMessage.process_completed:
            self._answered[event.session_hash] = time.monotonic()
            self._answered.move_to_end(event.session_hash)
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)

    def get_events(self) -> Any:
        """The next events to work on."""
        for line in self.event_queue_per_concurrency_id.values():
            limit = line.concurrency_limit
            if len(line.queue) > 1 and (limit is None or line.current_concurrency < limit):
                number = self._turns.next([_seat_of(event) for event in line.queue])
                line.queue.insert(0, line.queue.pop(number))
        found = super().get_events()
        if found is not None:
            for event in found[0]:
                self._turns.serve(_seat_of(event))
        return found


def share_queue(page: gr.Blocks) -> None:
    """Gives a page with a queue one that is shared; before it is mounted."""
    old = page._queue
    page._queue = FairQueue(
        live_updates=old.live_updates,
        concurrency_count=old.max_thread_count,
        update_intervals=old.update_intervals,
        max_size=old.max_size,
        blocks=page,
        default_concurrency_limit=old.default_concurrency_limit,
    )


def _seat_of(event: Event) -> Seat:
    return _seat(event.request, event.session_hash)


def _seat(request: Any, tab: str | None) -> Seat:
    """On the own machine tabs take turns; elsewhere visitors, who may have many."""
    visitor = visitor_of(request)
    return Seat("", tab or "") if visitor.scope == LOCAL else visitor.seat
