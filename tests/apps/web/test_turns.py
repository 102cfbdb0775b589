"""Shares and turns: of places, and of Gradio's queue."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio")
import gradio as gr
import uvicorn
from fastapi import FastAPI

from apps.web import limits, server
from apps.web.connections import Proxies
from apps.web.server import Guard
from apps.web.turns import Places, Seat, TooMany, Turns, check_share
from apps.web.visitors import COOKIE, Visitors


def _order(waiting: list[Seat]) -> list[Seat]:
    turns, rest, order = Turns(), list(waiting), []
    while rest:
        order.append(rest.pop(turns.next(rest)))
        turns.serve(order[-1])
    return order


def test_networks_take_turns_then_visitors_then_who_came_first():
    many = [Seat("1", "ann")] * 3 + [Seat("1", "bob"), Seat("2", "eve"), Seat("2", "eve")]
    order = _order(many)
    assert [seat.visitor for seat in order] == ["ann", "eve", "bob", "eve", "ann", "ann"]


def test_visitors_that_one_network_makes_up_delay_another_by_one_turn():
    flood = [Seat("1", str(n)) for n in range(50)]
    assert _order([*flood, Seat("2", "ann")])[1] == Seat("2", "ann")


def test_shares_are_of_a_visitor_of_a_network_and_of_all():
    most = {"most": 8, "each": 3, "what": "scans"}
    ann, home = Seat("1", "ann"), [Seat("1", str(n)) for n in range(4)]
    check_share([ann] * 2, ann, **most)
    with pytest.raises(TooMany, match="your scans"):
        check_share([ann] * 3, ann, **most)
    with pytest.raises(TooMany, match="network"):
        check_share(home, ann, **most)
    check_share(home, Seat("2", "bob"), **most)
    with pytest.raises(TooMany, match="8 scans"):
        check_share([Seat(str(n), "") for n in range(8)], ann, **most)
    check_share([Seat("", "local")] * 7, Seat("", "local"), most=8, each=8, what="scans")


def test_places_are_given_in_turns_and_none_is_lost():
    async def act() -> list[str]:
        places, order = Places(1), []

        async def work(name: str) -> None:
            async with places.place(Seat(name, name)) as taken:
                order.append(name)
                await asyncio.sleep(0)
                taken.close()  # before the end
                await asyncio.sleep(0)

        async with places.place(Seat("ann", "ann")):
            waiting = [asyncio.create_task(work(name)) for name in "aaab"]
            gone = asyncio.create_task(work("gone"))
            await asyncio.sleep(0)
            gone.cancel()
        await asyncio.wait(waiting)
        given = asyncio.create_task(work("given"))
        async with places.place(Seat("c", "c")):
            await asyncio.sleep(0)
        given.cancel()  # just as it gets its place
        await asyncio.wait([given, gone])
        await work("last")
        return order

    order = asyncio.run(asyncio.wait_for(act(), 10))
    assert order[:2] == ["a", "b"]
    assert order[-1] == "last"
    assert "gone" not in order


class _Page:
    """A page whose one button waits for a gate."""

    def __init__(self, **visitors) -> None:
        self.gate = threading.Event()
        self.did: list[str] = []

        def wait(name: str) -> str:
            self.gate.wait(30)
            self.did.append(name)
            return name

        with gr.Blocks() as blocks:
            name = gr.Textbox()
            gr.Button().click(wait, name, name)
        blocks.queue(max_size=limits.QUEUED, default_concurrency_limit=1)
        app = server.mount_page(FastAPI(), blocks, theme=None, head="")
        users = {"ann": "1", "bob": "2"} if visitors.get("passwords") else None
        guard = Guard(app, routes=server.GRADIO_ROUTES, users=users, visitors=Visitors(**visitors))
        self.listener = server._listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(server.configuration(guard, Proxies()))
        run = {"sockets": [self.listener]}
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs=run, daemon=True)
        self.thread.start()

    def join(self, name: str, **headers: str) -> tuple[int, str]:
        """Presses the button; the tab is called as the name."""
        body = {"data": [name], "fn_index": 0, "session_hash": f"tab{name.split()[0]}"}
        headers["content-type"] = "application/json"
        request = urllib.request.Request(
            f"{self.url}/gradio_api/queue/join", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self) -> None:
        self.gate.set()
        self.uvicorn.should_exit = True
        self.thread.join(20)
        self.listener.close()


@pytest.fixture
def start() -> Iterator[type[_Page]]:
    running = []

    def begin(**visitors):
        running.append(_Page(**visitors))
        return running[-1]

    yield begin
    for each in running:
        each.stop()


def _cookie() -> dict[str, str]:
    return {"cookie": f"{COOKIE}={secrets.token_urlsafe(32)}"}


PASSWORDS = ({"authorization": "Basic YW5uOjE="}, {"authorization": "Basic Ym9iOjI="})


@pytest.mark.parametrize("passwords", [False, True])
def test_one_visitor_fills_no_queue_and_another_waits_for_one_turn(start, passwords):
    page = start(passwords=passwords, loopback=False)
    ann, bob = PASSWORDS if passwords else (_cookie(), _cookie())
    codes = [page.join(f"ann {n}", **ann)[0] for n in range(limits.QUEUED_EACH + 10)]
    assert codes[: limits.QUEUED_EACH] == [200] * limits.QUEUED_EACH
    code, text = page.join("ann", **ann)
    assert code == 503
    assert "try again" in text
    assert page.join("bob", **bob)[0] == 200
    page.gate.set()
    while "bob" not in page.did:
        assert page.thread.is_alive()
        time.sleep(0.02)
    assert page.did.index("bob") <= 2


def test_made_up_visitors_of_one_network_fill_half(start):
    page = start(loopback=False)
    codes = [page.join(str(n), **_cookie())[0] for n in range(limits.QUEUED)]
    assert limits.QUEUED // 2 <= codes.count(200) <= limits.QUEUED // 2 + 2


def test_on_the_own_machine_a_tab_fills_half(start):
    page = start()
    codes = [page.join(f"one {n}")[0] for n in range(limits.QUEUED // 2 + 3)]
    assert codes.count(503) >= 1
    assert page.join("two")[0] == 200
