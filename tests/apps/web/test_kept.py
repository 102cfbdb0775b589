"""What browsers keep of a page: read as what strangers send; and what a server keeps of tabs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

pytest.importorskip("gradio")

import gradio as gr
from gradio.routes import App
from hypothesis import given
from hypothesis import strategies as st

from apps.web.brain.handlers import Screen as BrainScreen
from apps.web.brain.handlers import read_screen as read_brain_screen
from apps.web.brain.handlers import write_screen as write_brain_screen
from apps.web.kept import MOST_CHARACTERS, read_object
from apps.web.limits import OPEN_TABS
from apps.web.queue import share_queue
from apps.web.search.handlers import Marks, Query, Screen
from apps.web.search.kept_screen import read_opening, read_query, read_screen, write
from apps.web.server import page_id

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NAMES = ["query", "profile", "taught", "ids", "refused", "place", "session", "chosen", "state"]


def test_screens_come_back_as_they_were_sent():
    marks = Marks(1, Query("red", "y" * 43), (1,), (2,), (3,), "0" * 32, "mine")
    query = Query("a red thing", like="x" * 43)
    screen = Screen(query, "mine", False, (5, 3, 1), marks, "0123456789abcdef")
    assert read_screen(write(screen)) == screen
    assert read_query(write(query)) == query
    of_before = json.loads(write(replace(screen, refused=replace(marks, query=Query("red")))))
    of_before["refused"]["text"] = of_before["refused"].pop("query")["text"]
    assert read_screen(json.dumps(of_before)).refused == replace(marks, query=Query("red"))
    brain = BrainScreen("token", 3, "site", "0a")
    assert read_brain_screen(write_brain_screen(brain)) == brain


@given(ANYTHING | st.dictionaries(st.sampled_from(NAMES), ANYTHING))
def test_anything_else_is_a_new_page(value):
    for text in (value, json.dumps(value), json.dumps({"shown": json.dumps(value)})):
        screen = read_screen(text)
        assert read_screen(write(screen)) == screen
        brain = read_brain_screen(text)
        assert read_brain_screen(write_brain_screen(brain)) == brain
        read_opening(text)


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a": 1}' + " " * MOST_CHARACTERS, None, "[1]"])
def test_what_is_deep_large_or_no_object_is_empty(text):
    assert read_object(text) == {}


def test_a_page_has_the_same_number_at_every_start_and_another_one_for_another_index():
    assert page_id("an index") == page_id("an index") < 2**53
    assert page_id("an index") != page_id("another")


def test_500_tabs_leave_what_a_server_keeps_bounded():
    with gr.Blocks() as page:
        box = gr.Textbox()
        box.submit(lambda text: text, box, box)
    page.queue()
    share_queue(page)
    page.state_session_capacity = OPEN_TABS
    app = App.create_app(page)
    queue = page._queue

    async def visit() -> None:
        for number in range(500):
            tab = f"tab{number}"
            app.state_holder[tab]
            queue.pending_event_ids_session[tab] = set()
            queue.pending_messages_per_session[tab] = asyncio.Queue()
            queue._forget_idle_tabs()

    asyncio.run(visit())
    assert len(app.state_holder.session_data) <= OPEN_TABS
    assert len(app.state_holder.time_last_used) <= OPEN_TABS
    assert len(queue.pending_event_ids_session) <= OPEN_TABS
    assert len(queue.pending_messages_per_session) <= OPEN_TABS
    # One that waits for an answer stays.
    queue.pending_event_ids_session = {"first": {"event"}, **queue.pending_event_ids_session}
    queue._forget_idle_tabs()
    assert "first" in queue.pending_event_ids_session
