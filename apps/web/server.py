"""Runs a web page safely: who may connect, and which routes exist.

Gradio brings some sixty routes (file serving, a proxy, uploads, run history, ...) of which a page
uses a handful. `Guard` stands in front of the whole application and lets only named routes
through, so a route that a page does not need cannot be reached, whatever it does.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import errno
import hmac
import ipaddress
import os
import re
import socket
import stat
import sys
import threading
import webbrowser
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web.limits import (
    CONNECTIONS_EACH,
    LARGE_REQUESTS,
    OPEN_TABS,
    REQUEST_BYTES,
    THREADS,
    Arriving,
    Held,
    Refusal,
    hold,
)
from apps.web.turns import Places
from apps.web.visitors import Visitor, Visitors, network_of, remember

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from apps.web.connections import Proxies

__all__ = [
    "GRADIO_ROUTES",
    "AuthFileError",
    "Guard",
    "Route",
    "ServerError",
    "check_port",
    "configuration",
    "mount_page",
    "page_id",
    "prepare_environment",
    "read_auth_file",
    "run",
]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class ServerError(OSError):
    """The server could not start; the message is one line, fit to show to a user."""


class AuthFileError(ValueError):
    """The file with names and passwords is unusable."""


@dataclass(frozen=True)
class Route:
    """One kind of request that is let through.

    Args:
        method: "GET" (which includes HEAD) or "POST".
        pattern: regular expression for the whole decoded path.
        max_body: bytes; longer requests get 413.
        json_body: parse and re-write the body as JSON before the application sees it.
        stream: hand the body on piece by piece as it arrives; its length has to be told before.
        forever: what it serves never changes under the same name, so browsers may keep it.
        public: answer without a password, even when the server has an auth file.
        turns: answering takes a thread for a while, which visitors take in turns.
        begins_visit: a browser that is not known yet may be given its cookie with the answer.
    """

    method: str
    pattern: str
    max_body: int = 0
    json_body: bool = False
    stream: bool = False
    forever: bool = False
    public: bool = False
    turns: bool = False
    begins_visit: bool = False


# What a Gradio 6 page without file components needs, and nothing else.
GRADIO_ROUTES: tuple[Route, ...] = (
    Route("GET", r"/", begins_visit=True),
    Route(
        "GET",
        r"/(?:config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(?:/\d+)?)",
    ),
    Route("GET", r"/(?:static|svelte)/(?:[\w.@+~-]+/)*[\w.@+~-]+"),
    # These file names contain a hash of the content.
    Route("GET", r"/assets/(?:[\w.@+~-]+/)*[\w.@+~-]+", forever=True),
    Route("GET", r"/gradio_api/(?:info/?|startup-events|theme\.css|queue/data|app_id)"),
    Route(
        "POST", r"/gradio_api/queue/join", max_body=REQUEST_BYTES, json_body=True, begins_visit=True
    ),
    Route("POST", r"/gradio_api/(?:cancel|reset)/?", max_body=REQUEST_BYTES, json_body=True),
)

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    # Gradio compiles its templates in the page, hence 'unsafe-eval'; everything comes from here.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        b"connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        b"form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


def prepare_environment() -> None:
    """Switches off everything that would phone home; call before importing gradio."""
    for name in (
        "GRADIO_ANALYTICS_ENABLED",
        "GRADIO_RUN_HISTORY",
        "GRADIO_SHARE",
        "GRADIO_MCP_SERVER",
        "GRADIO_SSR_MODE",
    ):
        os.environ[name] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"


def read_auth_file(
    path: str | Path, *, warn: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Reads `user:password` lines; blank lines and lines starting with # are ignored.

    Args:
        path: a text file (UTF-8).
        warn: told when others on this machine can read the file; default prints to stderr.

    Raises:
        AuthFileError: unreadable, no users, or a line without a colon. Passwords are never echoed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise AuthFileError(
            f"cannot read the auth file {path}: {reason}; give a text file of user:password lines"
        ) from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        (warn or _warn)(f"other users of this machine can read {path}; run: chmod 600 '{path}'")
    users: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        user, colon, password = line.partition(":")
        if not colon or not user.strip() or not password:
            raise AuthFileError(f"line {number} of {path} is not of the form user:password")
        users[user.strip()] = password
    if not users:
        raise AuthFileError(f"{path} names nobody; add lines of the form user:password")
    return users


class Guard:
    """ASGI middleware: allowed hosts, passwords, allowed routes, body limits, security headers.

    Tells the application behind it who the visitor is (see `apps.web.visitors`).

    Args:
        app: the application behind it.
        routes: what exists; anything else is 404.
        users: name -> password for HTTP Basic, or None for an open server.
        hosts: names accepted in the Host header, or None for any. Naming them keeps another web
            site from reaching a server on this machine through DNS rebinding.
        visitors: tells visitors apart.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Iterable[Route],
        users: Mapping[str, str] | None = None,
        hosts: frozenset[str] | None = None,
        visitors: Visitors | None = None,
    ) -> None:
        self.app = app
        self.visitors = visitors or Visitors(passwords=users is not None)
        self.routes = [(route, re.compile(route.pattern)) for route in routes]
        self.hosts = hosts
        self.large_requests = Places(LARGE_REQUESTS)  # bounds the memory that uploads take
        self.threads = Places(THREADS)
        self.arriving = Arriving()
        self.open_requests: Counter[str] = Counter()  # by network
        self.digests = (
            None
            if users is None
            else [(_digest(name), _digest(password)) for name, password in users.items()]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours uses websockets
            return
        network = network_of(scope["client"][0]) if scope.get("client") else ""
        self.open_requests[network] += 1
        try:
            await self._answer(scope, receive, send, network)
        finally:
            self.open_requests[network] -= 1
            if not self.open_requests[network]:
                del self.open_requests[network]

    async def _answer(self, scope: Scope, receive: Receive, send: Send, network: str) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        login = self._login(headers.get(b"authorization", ""))
        refusal = self._refusal(scope, headers, login)
        # Connections are counted before; these may share one, through a proxy.
        if self.open_requests[network] > CONNECTIONS_EACH:
            refusal = Refusal(503, "Too many requests from your network are open; try again.")
        keep = isinstance(refusal, Route) and refusal.forever
        visitor = Visitor(None)
        if isinstance(refusal, Route):
            visitor = self.visitors.identify(
                login, headers, page=refusal.begins_visit, network=network
            )
        cookie = visitor.set_cookie
        place = contextlib.ExitStack()

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                place.close()  # however slowly the answer is read
                added = list(SECURITY_HEADERS)
                if cookie:
                    added.append((b"set-cookie", cookie.encode()))
                if keep and message["status"] == 200:
                    added.append((b"cache-control", b"private, max-age=31536000, immutable"))
                ours = {name for name, _ in added}
                kept = [h for h in message.get("headers", []) if h[0].lower() not in ours]
                message = {**message, "headers": [*kept, *added]}
            await send(message)

        if isinstance(refusal, Refusal):
            if refusal.slow:
                await asyncio.sleep(0.5)  # makes guessing passwords slow
            await refusal.answer(scope, receive, send_safely)
            return
        route = refusal
        scope = remember(scope, visitor)
        held: Held | Refusal = Held(scope, receive)
        if scope["method"] == "POST":
            held = await hold(
                scope,
                receive,
                route.max_body,
                stream=route.stream,
                json_body=route.json_body,
                arriving=self.arriving,
                network=network,
            )
        if isinstance(held, Refusal):
            await held.answer(scope, receive, send_safely)
            return
        places = self.threads if route.turns else None
        if route.max_body > REQUEST_BYTES and not route.stream:
            places = self.large_requests  # and only now that the body is here
        try:
            if places is None:
                await self.app(held.scope, held.receive, send_safely)
                return
            async with places.place(visitor.seat) as taken:
                place.push(taken)
                await self.app(held.scope, held.receive, send_safely)
        finally:
            held.let_go()

    def _refusal(
        self, scope: Scope, headers: Mapping[bytes, str], login: str | None
    ) -> Refusal | Route:
        """The matching route, or why the request is refused."""
        host = _host_name(headers.get(b"host", ""))
        if self.hosts is not None and host not in self.hosts:
            return Refusal(403, "This server answers only to its own address.")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"]
        route = next((r for r, p in self.routes if r.method == method and p.fullmatch(path)), None)
        if route is not None and route.public:
            return route
        if self.digests is not None and login is None:
            return Refusal(
                401,
                "Please sign in.",
                headers=((b"www-authenticate", b'Basic realm="Eigen Suite", charset="UTF-8"'),),
                slow=b"authorization" in headers,
            )
        if route is None or ".." in path.split("/"):
            return Refusal(404, "There is nothing here.")
        origin = headers.get(b"origin")
        foreign = headers.get(b"sec-fetch-site") in {"cross-site", "same-site"} or (
            origin is not None and origin.partition("://")[2] != headers.get(b"host")
        )
        if method == "POST" and foreign:
            return Refusal(403, "Requests from other web sites are refused.")
        return route

    def _login(self, authorization: str) -> str | None:
        """Who signs in with a header, None if nobody of the auth file does."""
        scheme, _, payload = authorization.partition(" ")
        if scheme.lower() != "basic" or self.digests is None:
            return None
        try:
            name, _, password = base64.b64decode(payload, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        given = (_digest(name), _digest(password))
        # Every entry is compared in full, so the time tells nothing about names or passwords.
        matches = [
            hmac.compare_digest(given[0], n) & hmac.compare_digest(given[1], p)
            for n, p in self.digests
        ]
        return name if any(matches) else None


def page_id(identity: str) -> int:
    """The number by which an open page knows, after an outage, whether its server still is the one.

    Args:
        identity: of what is served, the same at every start of the server.
    """
    known = f"{version('eigen-suite')} {identity}"
    # Browsers count exactly up to 2**53.
    return int(sha256(known.encode()).hexdigest()[:13], 16)


def mount_page(app: FastAPI, page: Any, *, theme: Any, head: str) -> FastAPI:
    """Put a page of Gradio on an application, without what pages do not need, and add /healthz.

    Args:
        app: with the page's own routes.
        page: `gradio.Blocks`; its queue is shared out among visitors.
        theme, head: see `gradio.mount_gradio_app`.
    """
    import gradio as gr

    from apps.web.queue import share_queue

    share_queue(page)
    page.state_session_capacity = OPEN_TABS

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        head=head,
        favicon_path=str(Path(__file__).parent / "assets" / "favicon.png"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,  # no component takes files; uploads have their own route
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )


def check_port(host: str, port: int, forwarded_allow_ips: str = "") -> None:
    """Raises what `run` would of addresses; for a check before slow work."""
    from apps.web.connections import Proxies

    Proxies(forwarded_allow_ips)
    _listen(host, port).close()


def run(
    app: Any,
    *,
    routes: Sequence[Route],
    host: str = "127.0.0.1",
    port: int = 7860,
    auth_file: str | Path | None = None,
    title: str = "The page",
    visitors_can: str = "search, see these pictures and teach",
    open_browser: bool = False,
    forwarded_allow_ips: str = "",
) -> None:
    """Serves `app` until Ctrl+C; returns when the server has stopped.

    Args:
        app: a FastAPI application, already holding the mounted page.
        routes: what may be reached (see `Guard`).
        host: address to listen on; anything but loopback should come with an auth file.
        port: 1 to 65535, or 0 for any free port (the printed URL tells which).
        auth_file: file of `user:password` lines, or None.
        title: how the page is called in the line printed on stdout.
        visitors_can: what the warning says of a server that is open to others.
        open_browser: open the page in the default browser once it answers.
        forwarded_allow_ips: proxies that are trusted to tell whom they ask for, see
            `apps.web.connections.Proxies`.

    Raises:
        ServerError: port taken, address not of this machine, and the like.
        ValueError: the proxies are no addresses.
        AuthFileError: unusable auth file.
    """
    import uvicorn

    from apps.web.connections import Proxies

    proxies = Proxies(forwarded_allow_ips)
    users = read_auth_file(auth_file) if auth_file is not None else None
    local = _is_loopback(host)
    if not local and users is None:
        _warn(
            f"anyone who can reach {host}:{port} can {visitors_can}; "
            "use --auth-file FILE to ask for a password"
        )
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    hosts = LOOPBACK_NAMES | {host.lower()} if local else None
    visitors = Visitors(passwords=users is not None, loopback=local)
    guarded = Guard(app, routes=routes, users=users, hosts=hosts, visitors=visitors)
    shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/"

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"{title} is ready: {url}  (Ctrl+C stops it)", flush=True)
                if open_browser:
                    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    config = configuration(guarded, proxies)
    with listener, contextlib.suppress(KeyboardInterrupt):
        Announcing(config).run(sockets=[listener])


def configuration(guarded: Guard, proxies: Proxies, **bounds: Any) -> uvicorn.Config:
    """How uvicorn serves what is behind a guard.

    Args:
        guarded: the guard.
        proxies: that are trusted to tell whom they ask for.
        bounds: others than usual, see `apps.web.connections.Connections`.
    """
    import uvicorn

    from apps.web.connections import Connections

    return uvicorn.Config(
        guarded,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Connections(proxies=proxies, **bounds).protocol(),
        ws="none",
        proxy_headers=bool(proxies.given),
        forwarded_allow_ips=proxies.given,
        lifespan="on",
        timeout_keep_alive=10,
        # Open event streams never end by themselves.
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=64 * 1024,
    )


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def _host_name(header: str) -> str:
    """ "[::1]:7860" -> "::1", "LocalHost:80" -> "localhost"."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ServerError(f"port {port} does not exist; choose one from 1 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        # Without this a restarted server waits a minute for old connections to time out.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is in use; choose another one with --port"
        elif error.errno == errno.EACCES:
            text = f"port {port} needs administrator rights; choose one above 1024 with --port"
        else:
            text = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ServerError(text) from error
    return listener


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
