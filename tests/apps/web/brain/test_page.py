"""The brain page without a browser: sessions, uploads, files, refusals, and what is escaped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
pytest.importorskip("monai")

import gradio as gr
import nibabel
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from live_brain_server import LiveBrainServer, tiny_brain
from starlette.requests import Request

from apps.web.brain import html as brain_html
from apps.web.brain import session as brain_session
from apps.web.brain import taught_html as brain_taught_html
from apps.web.brain.files import BRAIN_ROUTES, NIIVUE
from apps.web.brain.handlers import BrainHandlers, Screen
from apps.web.brain.serve import session_csv
from apps.web.brain.session import Desk, Scan, SessionError, Sessions, clean_label
from apps.web.brain.worker import Worker, WorkerError
from apps.web.limits import (
    ALL_SCANS_BYTES,
    SCAN_BYTES,
    SESSIONS,
    SESSIONS_EACH,
    SESSIONS_NEAR,
    WAITING_EACH,
)
from apps.web.private_folder import make_private_folder
from apps.web.turns import Seat
from apps.web.visitors import Shelf, Visitor, remember
from enn_core.lessons.places import LOCAL
from neuro.age.predict import Estimate
from neuro.scans.quality import Flag
from neuro.scans.template import MNI_AFFINE, MNI_SHAPE
from neuro.teach import Lesson, Site, journal_of

EVIL = "<img src=x onerror=alert(1)> \"quoted\" 'too' ${1}"
SCANS, STAGE, QUALITY, FORM, LESSON, TABLE, TAUGHT, TIMER, SCREEN = range(9)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBrainServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENN_PROFILES", str(tmp_path_factory.mktemp("profiles")))
        patch.delenv("ENN_DATA", raising=False)
        running = LiveBrainServer(tmp_path_factory.mktemp("sessions"))
        yield running
        running.stop()


@pytest.fixture
def page(live: LiveBrainServer) -> BrainHandlers:
    sites = Shelf(journal_of, Site.open)
    return BrainHandlers(live.brain, live.sessions, live.desk, sites, live.offered)


def _request(scope: str | None = "local") -> gr.Request:
    inner = Request(remember({"type": "http", "headers": [], "query_string": b""}, Visitor(scope)))
    return gr.Request(request=inner, session_hash="tab")


def _event(data: object) -> gr.EventData:
    event = gr.EventData(None, data)
    event._data = data
    return event


def _open(page: BrainHandlers, scope: str = "local") -> Screen:
    return page.open("", Screen(), _request(scope))[1 + SCREEN]


def _ready(live: LiveBrainServer, screen: Screen, number: int) -> Scan:
    """A scan when the work on it is over."""
    scan = live.sessions.get(screen.session, "local").get(number)
    end = time.monotonic() + 120
    while scan.busy:
        assert time.monotonic() < end
        time.sleep(0.02)
    return scan


def _send(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def _upload(live: LiveBrainServer, screen: Screen, data: bytes, query: str = "") -> tuple[int, Any]:
    status, body, _ = _send(f"{live.url}brain/uploads/{screen.session}?{query}", data)
    return status, json.loads(body)


def _volume(values: np.ndarray) -> bytes:
    return nibabel.Nifti1Image(values, MNI_AFFINE).to_bytes()


# --- uploads and files -------------------------------------------------------------------------


def test_an_upload_becomes_a_predicted_age_and_leaves_no_file_of_its_own(live, page):
    screen = _open(page)
    template = next(iter(live.offered.values())).path.read_bytes()
    status, answer = _upload(live, screen, template, "name=a/b/Ann%20M.nii.gz&kind=mni")
    assert (status, answer) == (200, {"scan": 1})
    scan = _ready(live, screen, 1)
    assert (scan.state, scan.error, scan.label) == ("ready", "", "Ann M")
    assert sorted(path.name for path in scan.folder.iterdir()) == [
        "brain.nii.gz",
        "head.nii.gz",
        "planes.png",
    ]
    files = f"{live.url}brain/files/{screen.session}/1/"
    for name in ("brain.nii.gz", "head.nii.gz", "planes.png"):
        status, body, headers = _send(files + name)
        assert status == 200
        assert len(body) > 1000
    status, body, headers = _send(f"{live.url}brain/tables/{screen.session}?profile=default")
    assert headers["Content-Disposition"] == 'attachment; filename="brain-ages.csv"'
    (row,) = csv.DictReader(io.StringIO(body.decode()))
    assert row["scan"] == "Ann M"
    assert 0 <= float(row["interval_low"]) < float(row["predicted_age"])
    shown = page.show(screen, _request())
    assert f">{scan.looked.seen.raw_age:.1f}<" in shown[STAGE]
    assert "Ann M" in shown[SCANS]
    folder = live.sessions.get(screen.session, "local").folder
    live.sessions.end(screen.session, "local")
    assert not folder.exists()
    assert _send(files + "planes.png")[0] == 404
    assert "session has ended" in page.show(screen, _request())[LESSON]


@pytest.mark.parametrize("name", ["scan", "..%2fscan", "explanation.nii.gz", "..", "head.nii", ""])
def test_only_files_of_the_list_are_served(live, page, name):
    screen = _open(page)
    session = live.sessions.get(screen.session, "local")
    scan = session.add("x", "mni")
    scan.source.write_bytes(b"secret")
    assert _send(f"{live.url}brain/files/{screen.session}/{scan.number}/{name}")[0] == 404


def test_niivue_is_served_and_kept(live):
    status, body, headers = _send(f"{live.url}brain/{NIIVUE}")
    assert status == 200
    assert len(body) > 2_000_000
    assert "immutable" in headers["Cache-Control"]
    assert _send(f"{live.url}brain/LICENSES.txt")[0] == 404


def test_uploads_have_a_length_and_a_limit(live, page):
    screen = _open(page)
    place = urlsplit(live.url)
    head = f"POST /brain/uploads/{screen.session} HTTP/1.1\r\nHost: {place.netloc}\r\n"
    for length, status in (
        (f"Content-Length: {SCAN_BYTES + 1}", b" 413 "),
        ("Transfer-Encoding: chunked", b" 411 "),
    ):
        with socket.create_connection((place.hostname, place.port), timeout=20) as line:
            line.sendall(f"{head}{length}\r\n\r\n".encode())
            assert status in line.recv(100)
    # An upload that ends early leaves nothing behind.
    with socket.create_connection((place.hostname, place.port), timeout=20) as line:
        line.sendall(f"{head}Content-Length: 1000\r\n\r\nbeginning".encode())
        time.sleep(0.3)
    session = live.sessions.get(screen.session, "local")
    end = time.monotonic() + 20
    while session.scans or any(session.folder.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert _upload(live, Screen(session="x" * 32), b"data")[0] == 422
    status, answer = _upload(live, screen, b"data", "kind=foot")
    assert status == 422
    assert "'foot'" in answer["error"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"nothing of use" * 100, "a NIfTI"),
        (b"\x1f\x8b" + bytes(500), ""),
        (_volume(np.zeros((4, 4), np.uint8)), ""),
        (_volume(np.full(MNI_SHAPE, np.nan, np.float32)), ""),
    ],
)
def test_hostile_files_end_in_one_line(live, page, data, said):
    screen = _open(page)
    status, answer = _upload(live, screen, data, "kind=mni&name=x")
    assert status == 200
    scan = _ready(live, screen, answer["scan"])
    assert scan.state == "failed"
    assert said in scan.error
    assert "\n" not in scan.error
    assert str(scan.folder) not in scan.error
    assert not scan.source.exists()
    shown = page.show(screen, _request())
    assert "No age is given" in shown[STAGE]
    assert (shown[QUALITY], shown[FORM]) == ("", "")


def test_what_overlaps_no_brain_gets_a_reason_and_never_an_age(live, page):
    screen = _open(page)
    values = np.zeros(MNI_SHAPE, np.uint8)
    values[2:50, 2:60, 2:30] = np.random.default_rng(0).integers(100, 200, (48, 58, 28))
    _, answer = _upload(live, screen, _volume(values), "kind=mni")
    scan = _ready(live, screen, answer["scan"])
    assert scan.state == "ready"
    shown = page.show(screen, _request())
    assert "No age is given" in shown[STAGE]
    assert "overlaps the template" in shown[STAGE]
    assert 'data-part="age"' not in shown[STAGE]
    assert "years" not in shown[STAGE] + shown[SCANS]
    assert shown[FORM] == ""
    session = live.sessions.get(screen.session, "local")
    (row,) = csv.DictReader(io.StringIO(session_csv(live.brain, session, None)))
    assert row["predicted_age"] == row["before_teaching"] == row["bias_corrected"] == ""
    assert "overlaps" in row["error"]
    # As `enn brain predict` has it; the names alone are what earlier tables had.
    assert row["flags"].startswith("registration: the brain overlaps")
    assert row["qc_flags"].split()[0] == "registration"
    # Nor can it be taught by a request that the page would not send.
    data = {"scan": scan.number, "age": "50", "name": "x", "profile": "default", "force": True}
    told = page.accept(screen, _request(), _event(data))[LESSON]
    assert "Learned" not in told


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_scan(live, tmp_path):
    worker = live.desk._worker
    template = next(iter(live.offered.values())).path
    with pytest.raises(WorkerError, match="ended the process"):
        worker.prepare(
            template, "mni", tmp_path, lambda _: os.kill(worker._process.pid, signal.SIGKILL)
        )
    steps: list[str] = []
    prepared = worker.prepare(template, "mni", tmp_path, steps.append)
    assert prepared.image.shape == MNI_SHAPE
    assert steps[:2] == ["reading", "head.nii.gz"]


# --- sessions ----------------------------------------------------------------------------------


def test_sessions_are_their_owners_and_end_with_the_tab(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.web.brain.session.CLOSED_SECONDS", 0.0)
    sessions = Sessions(tmp_path / "root")
    (tmp_path / "root").mkdir()
    try:
        session = sessions.open(None, "ann")
        assert sessions.open(session.token, "ann") is session
        assert sessions.open(session.token, "bob") is not session
        with pytest.raises(SessionError, match="ended"):
            sessions.get(session.token, "bob")
        # Loaded again: the new tab comes before the old one is known to be gone.
        sessions.enter("old", session)
        sessions.enter("new", session)
        sessions.leave("old", session.token, "ann")
        sessions.sweep()
        assert sessions.get(session.token, "ann") is session
        with pytest.raises(SessionError):
            sessions.leave("new", session.token, "bob")
        sessions.leave("new", session.token, "ann")
        sessions.leave("new", session.token, "ann")
        sessions.sweep()
        assert not session.folder.exists()
        with pytest.raises(SessionError):
            sessions.get(session.token, "ann")
    finally:
        sessions.close()
    assert not (tmp_path / "root").exists()


def test_what_a_killed_server_left_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, lock = make_private_folder("enn-test-")
    second, other = make_private_folder("enn-test-")
    assert first.is_dir()  # the first one lives
    lock.close()  # as when its process is killed
    third, last = make_private_folder("enn-test-")
    assert not first.exists()
    assert second.is_dir()
    assert third.stat().st_mode & 0o077 == 0
    other.close()
    last.close()


@given(st.text(max_size=200))
def test_labels_are_one_short_line_without_folders(name):
    label = clean_label(name)
    assert 0 < len(label) <= 60
    assert label.isprintable()
    assert "/" not in label
    assert "\\" not in label


# --- handlers ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["scan", "age", "name", "profile", "entry", "force", "key"]),
                inner,
                max_size=6,
            )
        ),
    ),
    what=st.sampled_from(
        ["added", "sample", "choose", "remove", "gap", "preview", "accept", "undo", "profile"]
    ),
)
def test_whatever_a_browser_sends_is_answered(live, data, what):
    page = BrainHandlers(
        live.brain, live.sessions, live.desk, Shelf(journal_of, Site.open), live.offered
    )
    screen = Screen(session=live.sessions.open(None, "local").token)
    assert len(getattr(page, what)(screen, _request(), _event(data))) == 9
    live.sessions.end(screen.session, "local")


def test_others_profiles_and_sessions_are_out_of_reach(live, page):
    screen = _open(page)
    assert "session has ended" in page.show(screen, _request("user-0123"))[LESSON]
    assert "cookie" in page.show(screen, _request(None))[LESSON]


def test_a_model_that_cannot_be_taught_predicts(live, tmp_path):
    brain = tiny_brain()
    brain.model.population = None
    desk = Desk(brain, live.desk._worker)
    page = BrainHandlers(brain, live.sessions, desk, Shelf(journal_of, Site.open), live.offered)
    screen = _open(page)
    screen = page.sample(screen, _request(), _event({"key": "mni152"}))[SCREEN]
    _ready(live, screen, 1)
    shown = page.show(screen, _request())
    assert 'data-part="age"' in shown[STAGE]
    assert "no statistics of its training scans" in shown[FORM]


def test_a_profile_is_taught_exported_forgotten_and_imported(live, page):
    screen = _open(page)
    screen = page.sample(screen, _request(), _event({"key": "mni152"}))[SCREEN]
    scan = _ready(live, screen, 1)
    assert scan.looked is not None
    age = f"{scan.looked.seen.raw_age + 5:.1f}"
    told = {"scan": 1, "age": age, "name": "Ann", "profile": "default", "force": False}
    preview = page.preview(screen, _request(), _event(told))
    assert "What it would change" in preview[LESSON]
    assert not page.sites.names(live.brain, "local")
    learned = page.accept(screen, _request(), _event(told))
    assert "Learned: Ann is" in learned[LESSON]
    assert "Ann" in learned[TAUGHT]
    status, data, headers = _send(f"{live.url}brain/profiles/default")
    assert status == 200
    assert "brain-default.json" in headers["Content-Disposition"]
    forgotten = page.forget(screen, _request(), _event({"profile": "default"}))
    assert "Forgotten: 1 lesson." in forgotten[LESSON]
    assert "Ann" not in forgotten[TAUGHT]
    status, answer, _ = _send(f"{live.url}brain/profiles/default", data)
    assert (status, json.loads(answer)) == (200, {"imported": 1})
    assert "Ann" in page.show(screen, _request())[TAUGHT]
    status, answer, _ = _send(f"{live.url}brain/profiles/default", b"nothing of use")
    assert status == 422
    assert str(live.sessions.root) not in json.loads(answer)["error"]
    page.forget(screen, _request(), _event({"profile": "default"}))


def test_a_preview_leaves_the_scan_as_it_was(live, page):
    screen = _open(page)
    screen = page.sample(screen, _request(), _event({"key": "mni152"}))[SCREEN]
    scan = _ready(live, screen, 1)
    own = scan.label
    flags = scan.looked.seen.flags

    def kept(age: float | None, name: str) -> None:
        assert (scan.age, scan.label, scan.looked.seen.age) == (age, name, age)
        session = live.sessions.get(screen.session, "local")
        (row,) = csv.DictReader(io.StringIO(session_csv(live.brain, session, None)))
        assert row["age"] == ("" if age is None else str(float(age)))

    odd = {"scan": 1, "age": "3", "name": "Odd", "profile": "default", "force": False}
    previewed = page.preview(screen, _request(), _event(odd))
    assert 'data-name="Odd"' in previewed[LESSON]
    assert "3.0" in previewed[STAGE]  # the gap that would be
    kept(None, own)
    # A lesson that is refused is shown as a preview again.
    assert "Teach anyway" in page.accept(screen, _request(), _event(odd))[LESSON]
    kept(None, own)
    assert "Odd" not in page.show(screen, _request())[STAGE]
    assert scan.looked.seen.flags == flags
    page.gap(screen, _request(), _event({"scan": 1, "age": "50", "name": "Ann"}))
    kept(50, "Ann")
    page.preview(screen, _request(), _event(odd))
    kept(50, "Ann")
    assert "Odd" not in page.show(screen, _request())[TABLE]


# --- HTML --------------------------------------------------------------------------------------


def test_names_are_escaped_everywhere(tmp_path):
    scan = Scan(1, EVIL, "head", tmp_path, tmp_path / "scan", note=EVIL)
    estimate = Estimate(60.0, 50.0, 70.0, 55.0, 58.0, 2.0, [], 0.5)
    lesson = Lesson(
        None, EVIL, 60.0, 50.0, 55.0, np.array([40.0]), np.array([41.0]), 0.2, EVIL, 1000, 0.1
    )
    pages = (
        brain_html.scans_html([(scan, EVIL)], 1),
        brain_html.result_html(scan, estimate, trained=(20.0, 82.0), profile=EVIL, confidence=0.9),
        brain_html.failed_html(EVIL, EVIL),
        brain_html.refused_html(EVIL, EVIL),
        brain_html.table_html([[EVIL, EVIL]], [EVIL], EVIL),
        brain_html.add_html("t", [brain_html.Sample(EVIL, EVIL, EVIL)] * 2, 1),
        brain_taught_html.form_html(scan, EVIL, 1, problem=EVIL),
        brain_taught_html.preview_html(lesson, scan, [scan], EVIL),
        brain_taught_html.profiles_html([EVIL], EVIL),
        brain_taught_html.lesson_html(EVIL, undo=1, profile=EVIL),
    )
    for page in pages:
        assert "<img src=x" not in page
        assert "&lt;img" in page


def test_flags_stand_beside_the_number(tmp_path):
    scan = Scan(1, "a", "head", tmp_path, tmp_path / "scan")
    flags = [Flag("brain_volume", "the brain has 650 mL"), Flag("coarse", EVIL)]
    doubtful = Estimate(60.0, 50.0, 70.0, 55.0, None, 2.0, flags, 0.5, uncorrected="it is flagged")
    said = brain_html.result_html(scan, doubtful, trained=(20.0, 82.0), profile="p", confidence=0.9)
    beside = said.partition("</b> years")[2].partition("</p>")[0]
    assert "brain volume" in beside
    assert "the brain has 650 mL" in beside
    assert "<img src=x" not in said
    assert "Not corrected for the model's bias with age: it is flagged" in said
    fine = Estimate(60.0, 50.0, 70.0, 55.0, 58.0, 2.0, [], 0.5)
    said = brain_html.result_html(scan, fine, trained=(20.0, 82.0), profile="p", confidence=0.9)
    assert "Doubtful" not in said
    assert "Corrected for the model" in said


def test_further_uploads_leave_the_scan_that_is_looked_at(live, page):
    screen = _open(page)
    session = live.sessions.get(screen.session, "local")
    first, second, third = (session.add(name, "head") for name in "abc")
    first.state, second.state, third.state = "waiting", "waiting", "waiting"
    screen = page.added(screen, _request(), _event({"scan": first.number}))[SCREEN]
    assert screen.chosen == first.number  # nothing was shown before
    first.state = "working"
    screen = page.added(screen, _request(), _event({"scan": second.number}))[SCREEN]
    assert screen.chosen == first.number
    early = replace(screen, chosen=None)
    assert page.added(early, _request(), _event({"scan": second.number}))[SCREEN].chosen == (
        first.number
    )
    first.state, second.state = "failed", "working"
    screen = page.added(screen, _request(), _event({"scan": third.number}))[SCREEN]
    assert screen.chosen == first.number
    second.state = third.state = "failed"
    fourth = session.add("d", "head")
    shown = page.added(screen, _request(), _event({"scan": fourth.number}))
    assert shown[SCREEN].chosen == fourth.number  # it is its turn at once
    # Of files given together the first is shown: the next ones arrive while it is looked at.
    fourth.state, fifth = "failed", session.add("e", "head")
    further = _event({"scan": fifth.number, "after": fourth.number})
    assert page.added(shown[SCREEN], _request(), further)[SCREEN].chosen == fourth.number
    early = replace(shown[SCREEN], chosen=None)
    assert page.added(early, _request(), further)[SCREEN].chosen == fourth.number
    session.remove(fourth.number)
    assert page.added(early, _request(), further)[SCREEN].chosen == fifth.number
    live.sessions.end(screen.session, "local")


def test_the_axis_holds_every_age():
    estimate = Estimate(118.0, 95.0, 131.0, 118.0, None, None, [], 0.5)
    svg = brain_html.axis_svg(estimate, 4.0, (20.0, 82.0))
    assert ">140<" in svg
    assert "predicted 118.0, interval 95 to 131, true age 4.0" in svg


def test_gaps_in_words():
    assert brain_html.gap_text(3.14, 60.3) == "Gap <b>+3.1 years</b>: looks older than 60.3"
    assert "younger" in brain_html.gap_text(-2, 60)
    assert "+" not in brain_html.gap_text(0.01, 60)


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path):
    sessions = Sessions(tmp_path)
    session = sessions.open(None, "local")
    session.add("=1+1", "head").error = "failed"
    text = session_csv(tiny_brain(), session, None)
    assert "'=1+1" in text
    sessions.close()


def test_uploads_are_streamed_and_nothing_else_is_open():
    posts = [route for route in BRAIN_ROUTES if route.method == "POST"]
    assert [route.pattern for route in posts if not route.stream] == ["/brain/left"]
    assert not any(route.public for route in BRAIN_ROUTES)
    assert Path(NIIVUE).name == NIIVUE


# --- who has to go, and who waits --------------------------------------------------------------


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Sessions]:
    (tmp_path / "root").mkdir()
    running = Sessions(tmp_path / "root")
    yield running
    running.close()


def test_no_session_with_scans_ends_for_a_newcomer(sessions):
    opened = [sessions.open(None, f"visitor-{n}", f"192.0.2.{n}") for n in range(SESSIONS)]
    scans = [session.add("a", "head") for session in opened[:-2]]
    new = sessions.open(None, "new", "198.51.100.1")  # an empty one has gone, the older of two
    with pytest.raises(SessionError, match="ended"):
        sessions.get(opened[-2].token, opened[-2].owner)
    with pytest.raises(SessionError, match="load the page again"):
        opened[-2].add("late", "head")
    for session in (opened[-1], new):
        scans.append(session.add("a", "head"))
    for n in range(100):
        with pytest.raises(SessionError, match="no room for another session"):
            sessions.open(None, f"late-{n}", "198.51.100.2")
    assert all(scan.folder.is_dir() for scan in scans)
    opened[0].remove(1)
    sessions.open(None, "late", "198.51.100.2")


def test_a_visitor_and_a_network_have_a_share_of_the_sessions(sessions):
    def fill(owner: str, network: str, count: int) -> None:
        for n in range(count):
            sessions.open(None, owner.format(n), network).add("a", "head")

    fill("ann", "192.0.2.1", SESSIONS_EACH)
    with pytest.raises(SessionError, match="you have"):
        sessions.open(None, "ann", "192.0.2.9")
    fill("cookie-{}", "192.0.2.1", SESSIONS_NEAR - SESSIONS_EACH)
    with pytest.raises(SessionError, match="your network"):
        sessions.open(None, "cookie", "192.0.2.1")
    sessions.open(None, "bob", "192.0.2.2").add("a", "head")


@pytest.mark.parametrize("in_turn", [False, True])
def test_cookies_of_two_networks_leave_room_for_others(sessions, in_turn):
    """They cost nothing, and what holds a scan is never ended for a newcomer."""
    crowds = ["192.0.2.1", "192.0.2.2"]
    tries = [network for network in crowds for _ in range(SESSIONS)]
    for n, network in enumerate(tries if in_turn else crowds * SESSIONS):
        with contextlib.suppress(SessionError):
            sessions.open(None, f"cookie-{n}", network).add("a", "head")
    for n in range(4):
        sessions.open(None, f"honest-{n}", "198.51.100.1").add("a", "head")


def test_a_crowd_of_empty_sessions_makes_room(sessions):
    for n in range(4 * SESSIONS):
        sessions.open(None, f"cookie-{n}", f"192.0.2.{n % 5}")
    for n in range(4):
        sessions.open(None, f"honest-{n}", "198.51.100.1").add("a", "head")


def test_the_room_is_measured_by_one_walk(sessions, monkeypatch):
    opened = [sessions.open(None, f"visitor-{n}", f"192.0.2.{n}") for n in range(3)]
    for session in opened:
        (session.folder / "scan").write_bytes(bytes(1000))
    (sessions.root / "import").write_bytes(bytes(500))
    looked = []
    size = brain_session._size
    monkeypatch.setattr(brain_session, "_size", lambda path: looked.append(path) or size(path))
    far, near = (sessions.room(seat) for seat in (Seat("elsewhere", "x"), opened[0].seat))
    assert far - near == 1000
    assert sessions.room(Seat("", LOCAL)) == ALL_SCANS_BYTES - 3500
    assert len(looked) == len(set(looked)) * 3


def test_the_page_of_who_finds_no_room_says_so_in_one_line(live, page, sessions, monkeypatch):
    monkeypatch.setattr("apps.web.brain.session.SESSIONS", 1)
    page.sessions = sessions
    sessions.open(None, "ann").add("a", "head")
    add, *_ = page.open("", Screen(), _request("late"))
    assert "no room for another session: all 1 hold scans" in add


def test_scans_are_worked_on_in_turns_and_each_visitor_has_a_share(tmp_path, monkeypatch):
    began, gate, done = threading.Event(), threading.Event(), []

    class Slow(Worker):
        def prepare(self, path, kind, folder, on_step):
            began.set()
            gate.wait(30)
            done.append(folder.name)
            raise WorkerError("enough")

    def scan(name: str, seat: Seat) -> Scan:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "scan").touch()
        return Scan(1, name, "head", folder, folder / "scan", seat=seat)

    desk = Desk(tiny_brain(), Slow())
    try:
        ann, bob, eve = Seat("1", "ann"), Seat("1", "bob"), Seat("2", "eve")
        desk.submit(scan("ann", ann))
        assert began.wait(30)
        for n in range(WAITING_EACH):
            desk.submit(scan(f"ann-{n}", ann))
        with pytest.raises(SessionError, match="your scans"):
            desk.submit(scan("ann-more", ann))
        waiting = scan("bob", bob)
        desk.submit(waiting)
        desk.submit(scan("eve", eve))
        assert desk.ahead(waiting) == 2
        cancelled = scan("eve-gone", eve)
        desk.submit(cancelled)
        cancelled.cancelled = True
        gate.set()
        end = time.monotonic() + 30
        while len(done) < WAITING_EACH + 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert done[:4] == ["ann", "eve", "bob", "ann-0"]
    finally:
        desk.close()


def test_many_uploads_at_once_stay_within_the_room_for_all(live, page, monkeypatch):
    screen = _open(page)
    monkeypatch.setattr("apps.web.brain.files._LOOK_BYTES", 1000)
    rooms = iter([10**6])
    monkeypatch.setattr(live.sessions, "room", lambda seat: next(rooms, -1))
    status, answer = _upload(live, screen, b"x" * 5000)
    assert status == 422
    assert "no room" in answer["error"]
    assert live.sessions.get(screen.session, "local").scans == {}
