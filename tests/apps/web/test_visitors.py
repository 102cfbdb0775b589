"""Who a request comes from, and that nobody is taken for somebody else."""

from __future__ import annotations

import base64

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from apps.web import server
from apps.web.server import Guard, Route
from apps.web.visitors import COOKIE, LOCAL, UnknownVisitor, Visitor, Visitors, visitor_of

ROUTES = (
    Route("GET", "/", begins_visit=True),
    Route("GET", "/who"),
    Route("POST", "/who", max_body=100, begins_visit=True),
    Route("GET", "/healthz", public=True),
)


def _client(visitors: Visitors, users: dict[str, str] | None = None) -> TestClient:
    app = FastAPI()

    def who(request: Request) -> dict[str, str | None]:
        return {"scope": visitor_of(request).scope}

    for path in ("/", "/who", "/healthz"):
        app.get(path)(who)
    app.post("/who")(who)
    guard = Guard(app, routes=ROUTES, users=users, visitors=visitors)
    return TestClient(guard, base_url="http://photos.example:7860")


def _scope(client: TestClient, path: str = "/who", **options) -> str | None:
    return client.get(path, **options).json()["scope"]


def test_on_the_own_machine_everybody_is_the_owner():
    client = _client(Visitors())
    assert _scope(client) == LOCAL
    reply = client.get("/")
    assert "set-cookie" not in reply.headers


def test_logins_have_places_of_their_own():
    users = {"ann": "a", "bob": "b", "Ann": "c"}
    client = _client(Visitors(passwords=True), users)
    scopes = {name: _scope(client, auth=(name, password)) for name, password in users.items()}
    assert len(set(scopes.values())) == 3
    assert all(scope is not None and scope.startswith("user-") for scope in scopes.values())
    assert _scope(client, auth=("ann", "a")) == scopes["ann"]
    # A cookie changes nothing for somebody who signed in.
    header = {"cookie": f"{COOKIE}={'x' * 43}"}
    assert _scope(client, auth=("ann", "a"), headers=header) == scopes["ann"]
    # What needs no password knows nobody.
    assert _scope(client, "/healthz") is None


def test_browsers_are_told_apart_by_a_cookie():
    ann, bob = _client(Visitors(loopback=False)), _client(Visitors(loopback=False))
    assert _scope(ann) is None
    reply = ann.get("/")
    given = reply.headers["set-cookie"]
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given
    assert reply.json()["scope"] is None  # what it sent did not tell who it is
    bob.get("/")
    scopes = (_scope(ann), _scope(bob))
    assert all(scope is not None and scope.startswith("visitor-") for scope in scopes)
    assert scopes[0] != scopes[1]
    secret = given.partition("=")[2].partition(";")[0]
    assert secret not in str(scopes[0])
    # Coming back keeps it, and lets it live on.
    assert secret in ann.get("/").headers["set-cookie"]
    assert _scope(ann) == scopes[0]


def test_a_link_from_elsewhere_does_not_replace_the_cookie():
    """SameSite=Strict: such a request lacks the cookie though the browser has one."""
    client = _client(Visitors(loopback=False))
    for site in ("cross-site", "same-site"):
        assert "set-cookie" not in client.get("/", headers={"sec-fetch-site": site}).headers
    # The page's first own request then brings it, or is given one.
    reply = client.post("/who", content=b"", headers={"sec-fetch-site": "same-origin"})
    assert reply.json()["scope"] is None
    assert COOKIE in reply.headers["set-cookie"]
    assert _scope(client) is not None


@pytest.mark.parametrize(
    "value", ["", "short", "x" * 42, "x" * 44, "../" + "x" * 40, "x" * 42 + "!", '"' + "x" * 42]
)
def test_odd_cookies_are_nobody(value):
    client = _client(Visitors(loopback=False))
    assert _scope(client, headers={"cookie": f"a=b; {COOKIE}={value}; c"}) is None


def test_other_cookies_do_not_disturb():
    client = _client(Visitors(loopback=False))
    header = {"cookie": f"a=b; {COOKIE}={'x' * 43}; {COOKIE}-two={'y' * 43}"}
    assert _scope(client, headers=header) == _scope(
        client, headers={"cookie": f"{COOKIE}={'x' * 43}"}
    )


def test_refusals_give_no_cookie():
    client = _client(Visitors(loopback=False))
    assert "set-cookie" not in client.get("/nothing").headers
    basic = base64.b64encode(b"ann:wrong").decode()
    signed = _client(Visitors(passwords=True), {"ann": "a"})
    reply = signed.get("/", headers={"authorization": f"Basic {basic}"})
    assert reply.status_code == 401
    assert "set-cookie" not in reply.headers


def test_nothing_can_be_remembered_for_nobody():
    with pytest.raises(UnknownVisitor, match=COOKIE) as error:
        Visitor(None).known()
    assert "\n" not in str(error.value)
    assert Visitor("local").known() == "local"


def test_a_request_that_no_guard_has_seen_is_nobody():
    request = Request({"type": "http", "headers": []})
    assert visitor_of(request).scope is None


@pytest.mark.parametrize(
    ("host", "users", "scope"),
    [("127.0.0.1", None, LOCAL), ("0.0.0.0", None, None), ("127.0.0.1", {"ann": "a"}, None)],
)
def test_the_server_chooses_how_to_tell(host, users, scope):
    visitors = Visitors(passwords=users is not None, loopback=server._is_loopback(host))
    assert visitors.identify(None, {}).scope == scope
