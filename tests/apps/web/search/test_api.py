"""The page's public HTTP API, through gradio_client and a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("gradio_client")
pytest.importorskip("faiss")

from gradio_client import Client
from gradio_client.exceptions import AppError
from live_server import LiveServer
from places import GALLERY, ROOT

from apps.web.search.api import ENDPOINTS
from apps.web.visitors import COOKIE
from retrieval.index.eigen_index import EigenIndex
from retrieval.model.loading import load

PHOTOS = sorted(GALLERY.glob("*.webp"))[::5]
DOCUMENT = ROOT / "docs" / "web-api.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLE_URL = "http://127.0.0.1:7860/"


USERS = {"ann": "s3cret", "bob": "b"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LiveServer]]:
    """One server for this machine, one with passwords, one that is open to others."""
    folder = tmp_path_factory.mktemp("Fotos & mehr")
    for path in PHOTOS:
        shutil.copy(path, folder / path.name)
    model = load()
    with EigenIndex.create(folder / ".enn-index", model, root=folder) as index:
        index.update(folder, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENN_PROFILES", str(folder / "profiles"))
        running = {
            "local": LiveServer(folder, model),
            "login": LiveServer(folder, model, users=USERS),
            "open": LiveServer(folder, model, loopback=False),
        }
        yield running
        for server in running.values():
            server.stop()


@pytest.fixture(scope="module")
def server(servers: dict[str, LiveServer]) -> LiveServer:
    return servers["local"]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Client:
    return _client(server)


@pytest.fixture
def profiles(servers) -> Path:
    return Path(os.environ["ENN_PROFILES"])


def _client(server: LiveServer, **options: Any) -> Client:
    return Client(server.url, analytics_enabled=False, verbose=False, **options)


def _ids(client: Client, text: str, **options: Any) -> list[int]:
    return [hit["id"] for hit in client.predict(text, **options, api_name="/search")]


def test_the_document_runs(servers, capsys):
    blocks = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(blocks) == 5
    known: dict[str, Any] = {}
    for number, (block, place) in enumerate(
        zip(blocks, ("local", "local", "local", "login", "open"), strict=True), 1
    ):
        code = block.replace(EXAMPLE_URL, servers[place].url)
        exec(compile(code, f"{DOCUMENT.name}, block {number}", "exec"), known)
    assert known["untaught"] != known["now"]
    assert str(ROOT) not in capsys.readouterr().out


def test_searching_tells_what_was_found_and_where(client):
    (place,) = client.predict(api_name="/collections")
    assert place["number"] == 0
    assert place["pictures"] == len(PHOTOS)
    hits = client.predict("a horse", k=7, api_name="/search")
    assert len(hits) == 7
    assert [hit["score"] for hit in hits] == sorted((h["score"] for h in hits), reverse=True)
    assert all((GALLERY / hit["file"]).is_file() for hit in hits)
    assert all(hit["width"] > 0 and hit["height"] > 0 for hit in hits)


def test_teaching_previewing_undoing_and_forgetting(client):
    profile, text = "round-trip", "something green"
    before = _ids(client, text, profile=profile)
    marks = {"good": [before[5]], "bad": [before[0]], "profile": profile}
    seen = client.predict(text, **marks, api_name="/preview")
    assert seen["entry"] is None
    assert client.predict(profile=profile, api_name="/history") == []
    assert _ids(client, text, profile=profile) == before

    lesson = client.predict(text, **marks, api_name="/teach")
    assert lesson["entry"] is not None
    assert (lesson["good"], lesson["bad"]) == ([before[5]], [before[0]])
    assert lesson["overlap"] == seen["overlap"]
    after = _ids(client, text, profile=profile)
    assert after.index(before[5]) < 5
    assert _ids(client, text, profile=profile, taught=False) == before
    assert _ids(client, text, profile="somebody-else") == before
    (entry,) = client.predict(profile=profile, api_name="/history")
    assert (entry["query"], entry["active"]) == (text, True)

    client.predict(text, unmark=[before[0]], profile=profile, api_name="/teach")
    client.predict(profile=profile, api_name="/undo")
    assert _ids(client, text, profile=profile) == after  # to the last bit, hence in order
    undone = client.predict(entry=lesson["entry"], profile=profile, api_name="/undo")
    assert undone["active"] is False
    assert _ids(client, text, profile=profile) == before
    assert client.predict(profile=profile, api_name="/forget") == 2
    assert client.predict(profile=profile, api_name="/history") == []


@pytest.mark.parametrize(
    ("endpoint", "arguments", "says"),
    [
        ("search", {"text": "  "}, "empty"),
        ("search", {"text": 5}, "empty"),
        ("search", {"text": "-"}, "empty"),
        ("search", {"text": "x" * 10_001}, "10,001 characters"),
        ("search", {"text": "a", "k": 0}, "from 1 to 1000"),
        ("search", {"text": "a", "k": True}, "from 1 to 1000"),
        ("search", {"text": "a", "k": 1.5}, "from 1 to 1000"),
        ("search", {"text": "a", "collection": 1}, "collection is 1"),
        ("search", {"text": "a", "collection": -1}, "collection is -1"),
        ("search", {"text": "a", "profile": "../up"}, "profile"),
        ("search", {"text": "a", "profile": ["x"]}, "profile"),
        ("teach", {"text": "a"}, "mark"),
        ("teach", {"text": "a", "good": [10**9]}, "1000000000"),
        ("teach", {"text": "a", "good": [10**30]}, "integer"),
        ("teach", {"text": "a", "good": ["1"]}, "integer"),
        ("teach", {"text": "a", "good": {"a": 1}}, "list"),
        ("teach", {"text": "a", "good": [1], "bad": [1]}, "1"),
        ("teach", {"text": "a", "good": [1] * 10_001}, "10,000"),
        ("undo", {"entry": 12345, "profile": "nobody"}, "nothing"),
        ("undo", {"entry": "1"}, "integer"),
    ],
)
def test_what_cannot_be_done_is_one_line(client, endpoint, arguments, says):
    with pytest.raises(AppError) as error:
        client.predict(**arguments, api_name=f"/{endpoint}")
    text = str(error.value)
    assert says in text
    assert "\n" not in text
    assert str(ROOT) not in text


def test_nothing_was_written_by_what_was_refused(client, profiles):
    assert client.predict(profile="nobody", api_name="/history") == []
    assert not (profiles / "local" / "nobody").exists()


def test_only_the_documented_endpoints_are_public(server):
    with urllib.request.urlopen(server.url + "config") as reply:
        config = json.load(reply)
    public = {d["api_name"] for d in config["dependencies"] if d["api_visibility"] != "private"}
    assert public == set(ENDPOINTS)
    described = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`/{name}`" in described for name in ENDPOINTS)


def test_files_cannot_be_named_in_arguments(client, server):
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, 5], "fn_index": _number(server, "search")}).encode()
    assert _post(server, "gradio_api/queue/join", body) == 400
    # The way past the queue does not exist.
    for path in ("gradio_api/run/search", "gradio_api/api/search", "gradio_api/call/search"):
        assert _post(server, path, b'{"data": ["a"]}') == 404


def test_foreign_sites_cannot_teach(server):
    number = _number(server, "teach")
    body = json.dumps({"data": ["a", [1]], "fn_index": number, "session_hash": "x"}).encode()
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert _post(server, "gradio_api/queue/join", body, **headers) == 403


def test_logins_never_see_each_other(servers):
    ann, bob = (_client(servers["login"], httpx_kwargs={"auth": login}) for login in USERS.items())
    _two_people(ann, bob)
    with pytest.raises(Exception, match="credentials were not provided"):
        _client(servers["login"])


def test_visitors_of_an_open_server_never_see_each_other(servers, profiles):
    server, cookies = servers["open"], []
    for _ in range(2):
        with urllib.request.urlopen(server.url) as reply:
            cookies.append(reply.headers["set-cookie"].partition(";")[0])
    assert cookies[0] != cookies[1]
    ann, bob = (_client(server, headers={"Cookie": cookie}) for cookie in cookies)
    local = {path.name for path in (profiles / "local").glob("*")}
    _two_people(ann, bob)
    stranger = _client(server)
    assert len(_ids(stranger, "a bird")) == 20
    with pytest.raises(AppError, match=COOKIE):
        stranger.predict("a bird", good=[1], api_name="/teach")
    assert {path.name for path in (profiles / "local").glob("*")} == local


def _two_people(ann: Client, bob: Client) -> None:
    text = "a bird"
    before = _ids(bob, text)
    ann.predict(text, good=[before[9]], bad=before[:2], api_name="/teach")
    assert _ids(ann, text).index(before[9]) < 9
    assert _ids(bob, text) == before
    assert bob.predict(api_name="/history") == []
    with pytest.raises(AppError):
        bob.predict(entry=1, api_name="/undo")
    assert bob.predict(api_name="/forget") == 0
    assert len(ann.predict(api_name="/history")) == 1


def _number(server: LiveServer, name: str) -> int:
    with urllib.request.urlopen(server.url + "config") as reply:
        config = json.load(reply)
    return next(d["id"] for d in config["dependencies"] if d["api_name"] == name)


def _post(server: LiveServer, path: str, body: bytes, **headers: str) -> int:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    request = urllib.request.Request(
        server.url + path, body, {"Content-Type": "application/json", **named}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


# -- taking a profile along: files that the page offers -------------------------------------------


def test_a_profile_travels_as_a_file(client, server):
    text = "something blue"
    before = _ids(client, text, profile="traveller")
    client.predict(text, good=before[4:6], profile="traveller", api_name="/teach")
    with urllib.request.urlopen(server.url + "teaching/0/traveller") as reply:
        data = reply.read()
        assert "attachment" in reply.headers["content-disposition"]
        assert reply.headers["cache-control"] == "no-store"
    assert b"/tmp" not in data
    status, answer = _send(server, "teaching/0/arrived", data)
    assert (status, answer) == (200, {"imported": 1})
    assert _ids(client, text, profile="arrived") == _ids(client, text, profile="traveller")
    assert _send(server, "teaching/0/arrived", data) == (200, {"imported": 0})


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"format": 1}', b"\0" * 999]
)
def test_other_files_are_refused_in_one_line(server, profiles, data):
    status, answer = _send(server, "teaching/0/hostile", data)
    assert status == 422
    assert "\n" not in answer["error"]
    assert "/tmp" not in answer["error"]


def test_profiles_of_others_cannot_be_downloaded(servers):
    for path in ("teaching/0/nothing-here", "teaching/7/default", "teaching/0/..%2f..%2fx"):
        assert _get(servers["local"], path) in (404, 422), path
    assert _get(servers["local"], "teaching/0/../../etc/passwd") == 404
    assert _get(servers["login"], "teaching/0/default") == 401
    assert _get(servers["open"], "teaching/0/default") == 422  # nobody in particular
    assert _send(servers["open"], "teaching/0/default", b"{}")[0] == 422
    assert _send(servers["local"], "teaching/0/x", b"{}", Origin="http://evil.example")[0] == 403


def _get(server: LiveServer, path: str) -> int:
    try:
        with urllib.request.urlopen(server.url + path, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def _send(server: LiveServer, path: str, data: bytes, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return int(reply.status), json.loads(reply.read())
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if error.code == 422 else {}
