"""The brain page in a real browser: from a scan to a taught age and back."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")
pytest.importorskip("monai")

from brain_driver import BrainPage, BrainServer, webgl_browser
from live_brain_server import LiveBrainServer
from places import DATA, ROOT
from playwright.sync_api import Browser

HEADS = sorted((DATA / "ixi_hh" / "heads_2mm").glob("*.nii.gz"))
# What the visitor sees at the bottom of the window.
ON_TOP_BELOW = """() => document.elementFromPoint(innerWidth / 2, innerHeight - 12)
    .closest('.enn-warning')?.querySelector('b').textContent"""
WEIGHTS = ROOT / "neuro" / "weights" / "brain-age-ixi.safetensors"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBrainServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENN_PROFILES", str(tmp_path_factory.mktemp("profiles")))
        patch.delenv("ENN_DATA", raising=False)
        running = LiveBrainServer(tmp_path_factory.mktemp("sessions"))
        yield running
        running.stop()


@pytest.fixture(scope="module")
def webgl() -> Iterator[Browser]:
    with webgl_browser() as started:
        yield started


@pytest.fixture
def visit(webgl: Browser, live: LiveBrainServer) -> Iterator[Callable[..., BrainPage]]:
    """Opens the page as a new visitor; fails if anything unexpected happens there."""
    pages: list[BrainPage] = []

    def open_page(**options: Any) -> BrainPage:
        # Every frame of a smooth scroll costs without a graphics card.
        context = webgl.new_context(reduced_motion="reduce", **options)
        pages.append(BrainPage(context, live.url))
        return pages[-1]

    yield open_page
    problems = [problem for page in pages for problem in page.problems]
    for page in pages:
        page.close()
    assert not problems, problems


def test_from_a_scan_to_a_taught_age_and_back(visit, live, tmp_path):
    page = visit(viewport={"width": 1000, "height": 760}, accept_downloads=True)
    assert page.page.title() == "Eigen Brain"
    assert page.page.is_visible("text=Research use, not a medical device")
    page.sample("MNI152")
    first = page.wait_age()
    assert "interval" in page.page.inner_text("#enn-stage")
    assert "no person" in page.page.inner_text("#enn-stage")

    # The viewer scrolls: by the wheel, and by its sliders.
    page.wait_viewer()
    where = page.page.inner_text(".enn-where")
    canvas = page.page.locator(".enn-canvas canvas")
    box = canvas.bounding_box()
    assert box is not None
    page.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.page.mouse.wheel(0, 300)
    page.page.wait_for_function(
        "before => document.querySelector('.enn-where').textContent !== before", arg=where
    )
    where = page.page.inner_text(".enn-where")
    page.page.locator("[data-axis='2']").fill("0.3")
    page.page.wait_for_function(
        "before => document.querySelector('.enn-where').textContent !== before", arg=where
    )
    quality = page.page.inner_text("#enn-quality")
    assert "overlap with the template" in quality

    # A second scan, as a file.
    template = next(iter(live.offered.values())).path
    page.upload({"name": "Ann Müller.nii", "mimeType": "", "buffer": template.read_bytes()}, "mni")
    page.page.wait_for_selector(".enn-scan[data-state=ready] >> text=Ann Müller")
    page.page.wait_for_selector("#enn-form [data-part=name][value='Ann Müller']")
    assert page.wait_age() == first

    # Only a preview: nothing is stored.
    told = page.preview(first + 8)
    assert "MNI152 template" in told
    assert "The scan itself is not stored" in told
    assert page.age == first
    assert not list(Path(os.environ["ENN_PROFILES"]).rglob("*.sqlite"))
    assert f"looks younger than {first + 8:.1f}" in page.page.inner_text("#enn-stage")
    for place in (0, 10_000):  # however far one scrolls
        page.page.evaluate("place => window.scrollTo(0, place)", place)
        assert page.page.evaluate(ON_TOP_BELOW) == "Research use, not a medical device."
    page.page.click("#enn-lesson-box [data-do=dismiss]")
    page.page.wait_for_selector(".enn-preview-lesson", state="detached")

    # What is typed until the answer is there stays.
    page.page.evaluate(
        """() => {
          document.querySelector("#enn-form [type=submit]").click();
          const input = document.querySelector("#enn-form [data-part=age]");
          input.focus();
          input.value = "77";
          input.dispatchEvent(new Event("input", { bubbles: true }));
        }"""
    )
    page.page.wait_for_selector(".enn-preview-lesson")
    assert page.page.input_value("#enn-form [data-part=age]") == "77"
    assert page.page.evaluate("document.activeElement.dataset.part") == "age"

    page.preview(first + 8)
    page.accept()
    taught = page.age
    assert taught > first
    assert "by teaching" in page.page.inner_text("#enn-stage")
    assert f"{taught:.1f} years" in page.scans[1]
    page.tab("All scans")
    with page.page.expect_download() as download:
        page.page.click("#enn-all [data-do=csv]")
    download.value.save_as(tmp_path / "ages.csv")
    with open(tmp_path / "ages.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["scan"] for row in rows] == ["MNI152 template", "Ann Müller"]
    assert float(rows[1]["predicted_age"]) == pytest.approx(taught, abs=0.06)
    assert float(rows[1]["before_teaching"]) == pytest.approx(first, abs=0.06)

    # What another profile was taught counts there alone.
    page.tab("Site profiles")
    assert "Ann Müller" in page.page.inner_text("#enn-site .enn-history")
    page.page.fill("#enn-site [data-part=name]", "scanner-b")
    page.page.press("#enn-site [data-part=name]", "Enter")
    page.page.wait_for_selector("#enn-site [data-profile=scanner-b]")
    page.tab("Scan")
    assert page.age == first
    page.tab("Site profiles")
    page.page.select_option("#enn-site select", "default")
    page.page.wait_for_selector("#enn-site form[data-profile=default]")
    page.page.click("#enn-site [data-do=undo]")
    page.page.wait_for_selector("#enn-site .enn-undone")
    page.tab("Scan")
    assert page.age == first

    # As narrow as a phone, and in the dark.
    page.page.set_viewport_size({"width": 390, "height": 800})
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
    page.page.click("[data-do=theme]")
    assert page.page.evaluate("document.body.classList.contains('dark')")
    assert page.page.is_visible("text=Research use, not a medical device")

    # Deleting a scan deletes its files.
    (session,) = live.sessions._sessions.values()
    assert len(list(session.folder.iterdir())) == 2
    assert not list(session.folder.rglob("scan"))
    page.page.click("[aria-label='Delete Ann Müller']")
    page.page.wait_for_selector(".enn-scan >> text=Ann Müller", state="detached")
    assert len(list(session.folder.iterdir())) == 1


def test_what_is_no_scan_is_refused_in_one_line_also_after_a_reload(visit):
    page = visit()
    page.upload({"name": "<img src=x>.nii", "mimeType": "", "buffer": b"no scan at all" * 100})
    page.page.wait_for_selector("#enn-stage .enn-refused")
    page.page.reload()
    page.page.wait_for_selector("#enn-stage .enn-refused")
    told = page.page.inner_text("#enn-stage")
    assert "No age is given" in told
    assert "<img src=x>" in told
    assert "/" not in told
    assert page.page.locator("#enn-form form").count() == 0


@pytest.mark.slow
@pytest.mark.skipif(not HEADS, reason=f"no IXI heads under {DATA} (set ENN_DATA)")
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="this checkout has no shipped brain-age model")
def test_a_real_head_from_upload_to_undo(webgl, tmp_path):
    sessions = tmp_path / "tmp"
    sessions.mkdir()
    server = BrainServer(temporary=sessions)
    try:
        page = BrainPage(webgl.new_context(viewport={"width": 1280, "height": 900}), server.url)
        page.upload(HEADS[:2])
        page.page.wait_for_selector("#enn-stage .enn-steps [data-state=done]")
        page.page.wait_for_function(
            "document.querySelectorAll('.enn-scan[data-state=ready]').length === 2", timeout=240_000
        )
        page.choose(HEADS[0].name[:9])
        first = page.wait_age()
        assert 15 < first < 95
        page.wait_viewer()
        match = re.search(r"(\d\.\d\d)\s+overlap", page.page.inner_text("#enn-quality"))
        assert match is not None
        assert float(match[1]) > 0.9
        page.preview(first + 6)
        assert HEADS[1].name[:9] in page.lesson
        page.accept()
        assert page.age > first
        page.undo()
        assert page.age == first
        assert not page.problems
        page.close()
        assert server.stop() == 0
        output = server.output()
        assert "IXI" not in output
        assert "Traceback" not in output
        assert not list(sessions.glob("enn-brain-*"))
    finally:
        server.kill()


def test_ten_tabs_of_one_browser_load_and_work_and_an_outage_passes(webgl, live):
    context = webgl.new_context(reduced_motion="reduce")
    try:
        pages = [BrainPage(context, live.url) for _ in range(10)]
        for page in pages:  # every one of them is answered
            page.tab("Site profiles")
            page.page.fill("#enn-site [data-part=name]", "here")
            page.page.press("#enn-site [data-part=name]", "Enter")
            page.page.wait_for_selector("#enn-site [data-profile=here]")
        assert not [problem for page in pages for problem in page.problems]
        page = pages[-1]
        page.tab("Scan")
        context.set_offline(True)
        with page.page.expect_event("requestfailed"):
            page.sample("MNI152")
        with page.page.expect_event("load"):  # by itself
            context.set_offline(False)
        page.sample("MNI152")
        age = page.wait_age()

        # An age that was told while the server was away is learned once it is back.
        page.preview(age + 5)
        context.set_offline(True)
        with page.page.expect_event("requestfailed"):
            page.page.click("#enn-lesson-box [data-do=accept]")
        with page.page.expect_event("load"):
            context.set_offline(False)
        page.page.wait_for_selector(".enn-lesson:has-text('Learned')")
        assert page.page.evaluate("sessionStorage.getItem('enn-brain-lesson')") is None
        page.tab("Site profiles")
        assert page.page.locator("#enn-site .enn-history li").count() == 1
    finally:
        context.close()
