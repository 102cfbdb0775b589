"""The guard in front of the pages: routes, hosts, passwords, limits; and starting to listen."""

from __future__ import annotations

import json
import os
import socket

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from apps.web import limits, server
from apps.web.server import AuthFileError, Guard, Route, ServerError, read_auth_file

ROUTES = (
    Route("GET", "/open"),
    Route("GET", "/healthz", public=True),
    Route("POST", "/json", max_body=200_000, json_body=True),
    Route("POST", "/bytes", max_body=1000),
    *server.GRADIO_ROUTES,
)


def _client(**options: object) -> TestClient:
    app = FastAPI()

    @app.get("/{path:path}")
    def everything(path: str) -> dict[str, str]:
        return {"path": path}

    @app.post("/{path:path}")
    async def receive(path: str, request: Request) -> dict[str, object]:
        body = await request.body()
        return {"size": len(body), "length": request.headers["content-length"]}

    guard = Guard(app, routes=ROUTES, **options)  # type: ignore[arg-type]
    return TestClient(guard, base_url="http://127.0.0.1:7860", raise_server_exceptions=True)


def test_named_routes_pass_with_security_headers():
    reply = _client().get("/open")
    assert reply.status_code == 200
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/secret",
        "/open/more",
        "/file=/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/upload",
        "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/assets/../../etc/passwd",
        "/assets/..%2f..%2fetc/passwd",
        "/assets//etc/passwd",
        "/static/%2e%2e/secret",
        "/docs",
        "/openapi.json",
    ],
)
def test_other_routes_do_not_exist(path):
    assert _client().get(path).status_code == 404
    assert _client().post(path).status_code == 404


@pytest.mark.parametrize("method", ["put", "delete", "patch", "options"])
def test_other_methods_do_not_exist(method):
    assert _client().request(method, "/open").status_code == 404


def test_refusals_have_security_headers_too():
    assert _client().get("/secret").headers["x-frame-options"] == "DENY"


def test_a_foreign_host_header_is_refused():
    client = _client(hosts=server.LOOPBACK_NAMES)
    for good in ("127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860"):
        assert client.get("/open", headers={"host": good}).status_code == 200, good
    for bad in ("evil.example", "127.0.0.1.evil.example:7860", "[::2]:7860", ""):
        assert client.get("/open", headers={"host": bad}).status_code == 403, bad


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_posts_from_other_sites_are_refused(headers):
    reply = _client().post("/json", json={}, headers={"host": "127.0.0.1:7860", **headers})
    assert reply.status_code == 403


def test_posts_of_the_page_itself_pass():
    headers = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert _client().post("/json", json={"data": []}, headers=headers).status_code == 200


def test_too_large_bodies_are_refused_with_and_without_a_length():
    client = _client()
    assert client.post("/bytes", content=b"x" * 1000).json()["size"] == 1000
    assert client.post("/bytes", content=b"x" * 1001).status_code == 413
    chunks = (b"x" * 600 for _ in range(2))
    assert client.post("/bytes", content=chunks).status_code == 413
    for digits in ("9" * 30, "0" * 30 + "9" * 15):
        assert limits._length({"headers": [(b"content-length", digits.encode())]}) > 2**40
    assert limits._length({"headers": [(b"content-length", b"000")]}) == 0
    lie = {"content-length": "9" * 30}
    assert client.post("/bytes", content=b"x", headers=lie).status_code == 413


@pytest.mark.parametrize(
    "value",
    [
        {"path": "http://example.com/", "meta": {"_type": "gradio.FileData"}},
        {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]},
        {"data": [[{"x": {"meta": None, "path": 1}}]]},
    ],
)
def test_objects_that_name_files_are_refused(value):
    assert _client().post("/json", json=value).status_code == 400


def test_escapes_do_not_hide_a_file():
    body = '{"data": [{"\\u0070ath": "/etc/passwd", "m\\u0065ta": {}}]}'
    assert _client().post("/json", content=body).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": }'])
def test_broken_json_is_refused(body):
    assert _client().post("/json", content=body).status_code == 400


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_reaches_the_application_unchanged(value):
    body = limits._plain_json(json.dumps(value).encode())
    assert isinstance(body, bytes)
    assert json.loads(body) == value


def test_everything_but_health_needs_the_password():
    client = _client(users={"ann": "s3cret:with:colons", "bob": "pässword"})
    assert client.get("/healthz").status_code == 200
    for path in ("/open", "/config", "/assets/x.js", "/nowhere"):
        reply = client.get(path)
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"].startswith("Basic ")
    assert client.get("/open", auth=("ann", "s3cret:with:colons")).status_code == 200
    assert client.get("/open", auth=(b"bob", "pässword".encode())).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !!!", "Bearer abc", "Basic YW5u", "Basic YW5uOg==", "Basic /////w=="],
)
def test_bad_credentials_are_refused(header, monkeypatch):
    async def no_wait(_: float) -> None: ...

    monkeypatch.setattr(server.asyncio, "sleep", no_wait)
    client = _client(users={"ann": "s3cret"})
    assert client.get("/open", headers={"authorization": header}).status_code == 401
    assert client.get("/open", auth=("ann", "bob")).status_code == 401
    assert client.get("/open", auth=("s3cret", "ann")).status_code == 401


def _auth_file(tmp_path, text, mode=0o600):
    path = tmp_path / "ünïcode users.txt"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_auth_file_is_read(tmp_path):
    path = _auth_file(tmp_path, "# people\n\n ann : pass word\nbob:a:b\n")
    assert read_auth_file(path) == {"ann": " pass word", "bob": "a:b"}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_auth_file_readable_by_others_is_announced(tmp_path):
    said: list[str] = []
    read_auth_file(_auth_file(tmp_path, "ann:x", 0o644), warn=said.append)
    assert len(said) == 1
    assert "chmod 600" in said[0]
    read_auth_file(_auth_file(tmp_path, "ann:x", 0o600), warn=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("text", ["", "# nobody\n", "ann\n", ":x\n", "ann:\n", "ok:1\nhunter2\n"])
def test_unusable_auth_files_are_errors_that_echo_no_password(tmp_path, text):
    with pytest.raises(AuthFileError) as error:
        read_auth_file(_auth_file(tmp_path, text))
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_binary_auth_file(tmp_path):
    with pytest.raises(AuthFileError, match="cannot read"):
        read_auth_file(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AuthFileError, match="UTF-8"):
        read_auth_file(tmp_path / "binary", warn=lambda _: None)


def test_a_busy_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} .* in use"):
            server.check_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70000), ("203.0.113.77", 7860), ("no such host", 7860)]
)
def test_impossible_addresses_are_one_line(host, port):
    with pytest.raises(ServerError) as error:
        server.check_port(host, port)
    assert "\n" not in str(error.value)


def test_loopback_is_recognised():
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert server._is_loopback(host), host
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        assert not server._is_loopback(host), host
