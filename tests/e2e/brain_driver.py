"""Starts the real brain server and drives its page in a real browser.

Used by the tests of this folder and by `benchmarks/screenshots.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from search_driver import START_SECONDS, _free_port, chromium

__all__ = ["BrainPage", "BrainServer", "webgl_browser"]

WAIT_MS = 120_000  # a head takes many seconds when the machine is busy


@contextlib.contextmanager
def webgl_browser() -> Iterator[Browser]:
    """A headless Chromium that computes WebGL, and nothing else of the page, by software GL."""
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    flags += ["--enable-unsafe-swiftshader", "--disable-gpu-compositing"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=flags)
        try:
            yield started
        finally:
            started.close()


class BrainServer:
    """`enn demo brain` in a process of its own on a free port of this machine.

    Args:
        model: a model file; None for the shipped one.
        profiles: where what is taught is kept; a folder that goes with the server if none is given.
        data: ENN_DATA of the server; none by default.
        temporary: folder in which the server keeps sessions; the system's by default.
    """

    def __init__(
        self,
        model: Path | None = None,
        *,
        profiles: Path | None = None,
        data: Path | None = None,
        temporary: Path | None = None,
    ) -> None:
        self.port = _free_port()
        self._own = tempfile.TemporaryDirectory(prefix="profiles-")
        self.profiles = profiles or Path(self._own.name)
        self.url = f"http://127.0.0.1:{self.port}/"
        environment = {k: v for k, v in os.environ.items() if k != "ENN_DATA"}
        environment |= {"PYTHONUNBUFFERED": "1", "ENN_PROFILES": str(self.profiles)}
        if data is not None:
            environment["ENN_DATA"] = str(data)
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        options = ["--port", str(self.port)]
        if model is not None:
            options += ["--model", str(model)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apps.cli", "demo", "brain", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.output()}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "healthz", timeout=2).close()
                return
            time.sleep(0.2)
        raise TimeoutError(f"no answer from {self.url} within {START_SECONDS} s")

    def kill(self) -> None:
        """kill -9, as a crash would."""
        self.process.kill()
        self.process.wait()
        self._own.cleanup()

    def stop(self) -> int:
        """Ctrl+C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        finally:
            self.kill()

    def output(self) -> str:
        """What an ended server printed."""
        assert self.process.stdout is not None
        return self.process.stdout.read().decode(errors="replace")


class BrainPage:
    """The page as its visitors see it. Everything they would not expect is kept in `problems`.

    Args:
        context: a browser's context: what one visitor's browser remembers.
        url: of a running server.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.url = url
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.goto(url)
        self.page.wait_for_selector("#enn-add .enn-add")

    def _console(self, message: Any) -> None:
        # Reading pixels back is slow without a graphics card, which Chromium tells.
        if message.type in {"error", "warning"} and "GL Driver Message" not in message.text:
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"request to elsewhere: {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def close(self) -> None:
        self.page.close()
        self.context.close()

    # -- what is on the page -------------------------------------------------------------------

    @property
    def age(self) -> float:
        """The predicted age that is shown."""
        return float(self.page.inner_text("#enn-stage [data-part=age]"))

    @property
    def scans(self) -> list[str]:
        """The session's scans, each "name\\nage or state"."""
        return self.page.locator(".enn-scan [data-do=choose]").all_inner_texts()

    @property
    def lesson(self) -> str:
        return self.page.inner_text("#enn-lesson-box")

    def wait_age(self) -> float:
        """Waits until an age is shown."""
        self.page.wait_for_selector("#enn-stage [data-part=age]")
        return self.age

    def wait_viewer(self) -> None:
        """Waits until the viewer has drawn the brain."""
        self.page.wait_for_function(
            "document.querySelector('.enn-canvas canvas')?.dataset.ready?.includes('brain.nii')"
        )

    # -- what a visitor does -------------------------------------------------------------------

    def upload(self, file: Path | dict[str, Any] | list[Path], kind: str = "head") -> None:
        self.page.select_option("#enn-add [data-part=kind]", kind)
        self.page.set_input_files("#enn-add input[type=file]", file)  # type: ignore[arg-type]

    def sample(self, name: str) -> None:
        self.page.click(f"#enn-add .enn-chip:has-text('{name}')")

    def choose(self, name: str) -> None:
        self.page.click(f".enn-scan [data-do=choose]:has-text('{name}')")
        self.page.wait_for_selector(f".enn-scan [aria-pressed=true]:has-text('{name}')")

    def preview(self, age: float) -> str:
        """Tells the true age and waits for the preview."""
        self.page.fill("#enn-form [data-part=age]", f"{age:g}")
        self.page.click("#enn-form button[type=submit]")
        self.page.wait_for_selector(f".enn-preview-lesson[data-age='{age:g}']")
        return self.lesson

    def accept(self) -> None:
        self.page.click("#enn-lesson-box [data-do=accept]")
        self.page.wait_for_selector("#enn-lesson-box .enn-told:has-text('Learned')")

    def undo(self) -> None:
        self.page.click("#enn-lesson-box [data-do=undo]")
        self.page.wait_for_selector("#enn-lesson-box .enn-told:has-text('Undone')")

    def tab(self, name: str) -> None:
        self.page.click(f"role=tab[name='{name}']")
