"""Many silent, slow and greedy clients at a started server: real sockets, and an honest request."""

from __future__ import annotations

import base64
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio")
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from apps.web import limits, server
from apps.web.connections import Connections, Proxies
from apps.web.server import Guard, Route
from apps.web.turns import Places

ROUTES = (
    Route("GET", "/healthz", public=True),
    Route("GET", "/page"),
    Route("GET", "/large", turns=True),
    Route("GET", "/who"),
    Route("POST", "/uploads", max_body=20 * 2**20),
    Route("POST", "/stream", max_body=20 * 2**20, stream=True),
    Route("POST", "/json", max_body=limits.REQUEST_BYTES, json_body=True),
)
USERS = {"ann": "secret"}
LOGIN = "Authorization: Basic " + base64.b64encode(b"ann:secret").decode() + "\r\n"


class _Server:
    """A guard and a small application; `bounds` are those of `Connections`."""

    def __init__(self, users: dict[str, str] | None = None, proxies: str = "", **bounds) -> None:
        app = FastAPI()

        @app.get("/healthz")
        @app.get("/page")
        def page() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/who")
        def who(request: Request) -> str:
            return request.client.host if request.client else ""

        @app.get("/large")
        def large(pieces: bool = False) -> Response:
            if pieces:
                return StreamingResponse(b"x" * 2**20 for _ in range(16))
            return Response(b"x" * 16 * 2**20)

        @app.post("/uploads")
        @app.post("/stream")
        @app.post("/json")
        async def upload(request: Request) -> Response:
            try:
                return JSONResponse({"size": len(await request.body())})
            except ClientDisconnect:
                return Response(status_code=400)

        self.guard = Guard(app, routes=ROUTES, users=users)
        config = server.configuration(self.guard, Proxies(proxies), **bounds)
        self.listener = server._listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.uvicorn = uvicorn.Server(config)
        run = {"sockets": [self.listener]}
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs=run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.sockets: list[socket.socket] = []

    def connect(self, sent: str | bytes = b"", receive_bytes: int | None = None) -> socket.socket:
        """A connection that stays open until the end."""
        one = socket.socket()
        if receive_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one.settimeout(20)
        one.connect(self.address)
        self.sockets.append(one)
        with contextlib.suppress(ConnectionError):
            one.sendall(sent.encode() if isinstance(sent, str) else sent)
        return one

    def ask(self, request: str | bytes, source: str = "127.0.0.1") -> bytes:
        """All that is answered to one request that closes the connection."""
        if source != "127.0.0.1" and sys.platform != "linux":
            pytest.skip("only Linux has more than one address of its own")
        with socket.create_connection(self.address, 20, source_address=(source, 0)) as one:
            one.sendall(request.encode() if isinstance(request, str) else request)
            return _rest(one)

    def stop(self) -> None:
        for one in self.sockets:
            one.close()
        self.uvicorn.should_exit = True
        self.thread.join(20)
        self.listener.close()


@pytest.fixture
def start() -> Iterator[type[_Server]]:
    running = []

    def begin(*args, **options):
        running.append(_Server(*args, **options))
        return running[-1]

    yield begin
    for each in running:
        each.stop()


def _rest(one: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := one.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def _get(path: str = "/page", *, login: str = "", more: str = "") -> str:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{login}{more}Connection: close\r\n\r\n"


def _post(path: str, length: int, body: bytes = b"", *, login: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{login}Content-Length: {length}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _code(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize(
    ("users", "sent"), [(None, ""), (USERS, ""), (USERS, "GET /page HTTP/1.1\r\nHost: x\r\nX-A: ")]
)
def test_silent_and_half_open_connections_take_nothing_from_an_honest_request(start, users, sent):
    running = start(users)
    for _ in range(300):
        running.connect(sent)
    assert _code(running.ask(_get(login=LOGIN if users else ""))) == 200
    assert _code(running.ask(_get("/healthz"))) == 200


def test_a_kept_connection_that_waits_makes_room_and_one_at_work_does_not(start):
    running = start(each=4)
    ask = "GET /page HTTP/1.1\r\nHost: x\r\n\r\n"
    kept = running.connect(ask)
    answer = b""
    while not answer.endswith(b"}"):
        answer += kept.recv(2**16)
    working = [running.connect(_post("/stream", 100, b"x")) for _ in range(3)]
    assert _code(running.ask(_get())) == 200
    assert kept.recv(1) == b""
    for one in working:
        one.sendall(b"x" * 99)
        assert _code(_rest(one)) == 200


def test_where_all_connections_are_at_work_the_newcomer_is_refused_and_others_are_not(start):
    running = start(each=4)
    ask = "GET /large?pieces=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    for _ in range(4):
        assert running.connect(ask, receive_bytes=4096).recv(1)  # and no more of it
    assert _code(running.ask(_get())) in {0, 503}
    assert _code(running.ask(_get(), source="127.0.0.2")) == 200


def test_bodies_that_only_trickle_make_room_for_a_request(start):
    running = start(each=8)
    for _ in range(8):
        running.connect(_post("/stream", 10**6, b"x"))
    time.sleep(0.4)
    assert _code(running.ask(_get())) == 200


def test_in_all_the_network_with_most_connections_makes_room(start):
    running = start(most=8, each=100)
    honest = running.connect("GET /page HTTP/1.1\r\nHost: x\r\nX-A: ")
    for _ in range(30):
        with contextlib.suppress(OSError):
            one = socket.create_connection(running.address, 5, source_address=("127.0.0.2", 0))
            running.sockets.append(one)
    assert _code(running.ask(_get(), source="127.0.0.3")) == 200
    honest.sendall(b"b\r\nConnection: close\r\n\r\n")
    assert _code(_rest(honest)) == 200


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "GET /page HTTP/1.1\r\nHost: x\r\nX-A: ",
        "GET /page HTTP/1.1\r\nHost: x\r\n\r\nGET /pa",  # after an answer
        "GET /page HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx",  # answered before its end
    ],
)
def test_a_head_has_a_deadline(start, sent):
    running = start(head_seconds=0.3)
    slow = running.connect(sent)
    end = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while sent and not end.wait(0.1):
                slow.sendall(b"a")

    threading.Thread(target=trickle, daemon=True).start()
    answer = _rest(slow)  # ends, else the socket's timeout raises
    end.set()
    assert (b" 408 " in answer) == bool(sent)
    assert _code(running.ask(_get())) == 200


def test_a_request_that_takes_longer_than_a_head_may_is_answered(start):
    running = start(head_seconds=0.2)
    slow = running.connect(_post("/stream", 4, b"x"))
    for _ in range(3):
        time.sleep(0.2)
        slow.sendall(b"x")
    assert _code(_rest(slow)) == 200


@pytest.mark.parametrize("login", ["", LOGIN])
def test_bodies_that_trickle_hold_up_no_other(start, login):
    running = start(USERS if login else None)
    trickling = [
        running.connect(_post("/uploads", 2**21, b"x" * 1000, login=login)) for _ in range(40)
    ]
    body = bytes(range(256)) * 2**13
    answer = running.ask(_post("/uploads", len(body), body, login=login))
    assert answer.endswith(b'{"size":%d}' % len(body))
    trickling[0].sendall(b"x" * (2**21 - 1000))  # slow, but whole in the end
    assert _rest(trickling[0]).endswith(b'{"size":%d}' % 2**21)


@pytest.mark.parametrize("path", ["/uploads", "/stream", "/json"])
def test_a_body_that_trickles_has_an_end(start, monkeypatch, path):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    running = start()
    slow = running.connect(_post(path, 10**6))
    with contextlib.suppress(OSError):
        for _ in range(30):
            slow.sendall(b" ")
            time.sleep(0.05)
    assert b" 200 " not in _rest(slow)
    assert running.guard.arriving._kept == {}


def test_bodies_on_their_way_have_a_bound_for_a_network_and_for_all(start):
    running = start()
    running.guard.arriving = limits.Arriving(2**21)
    held = running.connect(_post("/uploads", 2**21, b"x" * (2**20 - 100)))
    time.sleep(0.2)
    body = b"x" * 2000
    assert b"Too much is being uploaded" in running.ask(_post("/uploads", 2000, body))
    answer = running.ask(_post("/uploads", 2000, body), source="127.0.0.2")
    assert answer.endswith(b'{"size":2000}')
    held.close()


@pytest.mark.parametrize("path", ["/large", "/large?pieces=1"])
def test_an_answer_that_is_not_read_has_an_end(start, path):
    running = start(read_seconds=0.2, head_seconds=0.2)
    unread = running.connect(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n", receive_bytes=4096)
    end = time.monotonic() + 15
    while not running.uvicorn.server_state.connections:
        time.sleep(0.01)
    while running.uvicorn.server_state.connections:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(_rest(unread)) < 16 * 2**20
    # Who reads gets all of it, however long it takes.
    one = running.connect(_get(path), receive_bytes=4096)
    assert len(_rest(one)) > 16 * 2**20


def test_a_proxy_that_is_trusted_opens_as_many_as_it_needs_and_tells_for_whom(start, monkeypatch):
    running = start(proxies="127.0.0.0/8", each=4)
    for _ in range(8):
        running.connect(_post("/stream", 100, b"x"))
    forwarded = "X-Forwarded-For: 192.0.2.7\r\n"
    assert b"192.0.2.7" in running.ask(_get("/who", more=forwarded))
    monkeypatch.setattr(server, "CONNECTIONS_EACH", 1)
    slow = _post("/stream", 100, b"x").replace(b"Host: x\r\n", b"Host: x\r\n" + forwarded.encode())
    running.connect(slow)
    time.sleep(0.2)
    assert _code(running.ask(_get("/who", more=forwarded))) == 503
    assert _code(running.ask(_get("/who", more=forwarded.replace(".7", ".8")))) == 200


def test_threads_are_taken_in_turns_and_who_reads_slowly_keeps_none(start):
    running = start()
    running.guard.threads = Places(2)
    unread = [running.connect("GET /large HTTP/1.1\r\nHost: x\r\n\r\n", 4096) for _ in range(5)]
    assert _code(running.ask(_get("/large"), source="127.0.0.2")) == 200
    for one in unread:
        one.close()


def test_an_upgrade_is_a_request_like_any_other(start, capfd):
    running = start()
    upgrade = "Upgrade: websocket\r\nConnection: upgrade\r\n"
    one = running.connect(_get(more=upgrade).replace("Connection: close\r\n", ""))
    assert _code(one.recv(100)) == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", ["/uploads", "/stream", "/page"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_body_that_is_no_http_is_answered_once_and_leaves_no_trace(start, capfd, path, at_once):
    server = start()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    one = server.connect(head + b"ZZ\r\n" if at_once else head + b"1\r\na\r\n")
    if not at_once:
        with contextlib.suppress(ConnectionError):
            one.sendall(b"ZZ\r\n")
    assert _code(_rest(one)) in (0, 400, 404, 405, 411)
    assert _code(server.ask(_get())) == 200
    server.stop()
    text = capfd.readouterr().err
    assert "Traceback" not in text, text


def test_who_is_no_trusted_proxy_speaks_for_itself(start):
    running = start(proxies="192.0.2.1")
    assert b"127.0.0.1" in running.ask(_get("/who", more="X-Forwarded-For: 192.0.2.7\r\n"))


@pytest.mark.parametrize("given", ["proxy.example", "10.0.0.0/99", "10.0.0.1,*"])
def test_proxies_that_are_no_addresses_are_one_line(given):
    with pytest.raises(ValueError, match="give IP addresses or networks") as error:
        Proxies(given)
    assert "\n" not in str(error.value)


def test_one_network_never_has_more_than_half():
    for most in (10, 100, 2000):
        book = Connections(most=most, each=10_000)
        assert book.each <= book.most // 2
