"""Starts the real search server and drives its page in a real browser.

Used by the tests of this folder and by `benchmarks/screenshots.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

__all__ = ["SearchPage", "Server", "browser", "chromium"]

START_SECONDS = 240
WAIT_MS = 30_000  # generous: the machine may be busy; nothing waits this long when all is well


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system."""
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers lack; the pages are our own.
        started = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield started
        finally:
            started.close()


class Server:
    """`serve(...)` in a process of its own on a free port of this machine.

    Args:
        folders: of pictures; none for the sample gallery.
        profiles: where what is taught is kept; a folder that goes with the server if none is given.
        auth_file, port: see `serve`.
        everybody: listen on all addresses, as an open server for others would.
    """

    def __init__(
        self,
        *folders: Path,
        profiles: Path | None = None,
        auth_file: Path | None = None,
        port: int = 0,
        everybody: bool = False,
    ) -> None:
        self.port = port or _free_port()
        self._temporary = None if profiles else tempfile.TemporaryDirectory(prefix="profiles-")
        self.profiles = Path(profiles or self._temporary.name)  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{self.port}/"
        names = [str(folder) for folder in folders]
        code = (
            "import sys; from pathlib import Path; from apps.search_demo import serve; "
            f"serve(None, [Path(p) for p in {names!r}], port={self.port}, "
            f"host={('0.0.0.0' if everybody else '127.0.0.1')!r}, "
            f"auth_file={str(auth_file) if auth_file else None!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "ENN_PROFILES": str(self.profiles),
            },
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

    def get(self, path: str, **headers: str) -> int:
        """Status of a GET request."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    def kill(self) -> None:
        """kill -9, as a crash would."""
        self.process.kill()
        self.process.wait()
        if self._temporary is not None:
            self._temporary.cleanup()

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


class SearchPage:
    """The page as its visitors see it. Everything they would not expect is kept in `problems`.

    Args:
        context: a browser's context: what one visitor's browser remembers.
        server: a running server.
        query: of the address, as in "?q=dog".
    """

    def __init__(self, context: BrowserContext, server: Server, query: str = "") -> None:
        self.context = context
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.server = server
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.goto(server.url + query)
        self.page.wait_for_selector("#enn-results :is(.enn-card, .enn-message)")

    def _console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.server.url, "data:", "blob:")):
            self.problems.append(f"request to elsewhere: {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def close(self, *, context: bool = True) -> None:
        self.page.close()
        if context:
            self.context.close()

    # -- what is on the page -------------------------------------------------------------------

    @property
    def status(self) -> str:
        return self.page.inner_text("#enn-status .enn-status > span")

    @property
    def names(self) -> list[str]:
        """File names of the results, best first."""
        return self.page.eval_on_selector_all(".enn-card", "all => all.map(c => c.dataset.name)")

    @property
    def marks(self) -> dict[str, str]:
        """ "good" or "bad" by file name, as the server has acknowledged them."""
        return self.page.eval_on_selector_all(
            ".enn-card[data-mark]",
            "all => Object.fromEntries(all.map(c => [c.dataset.name, c.dataset.mark]))",
        )

    @property
    def lesson(self) -> str:
        """What the page told about the last mark."""
        return self.page.inner_text("#enn-lesson")

    @property
    def dark(self) -> bool:
        return bool(self.page.evaluate("document.body.classList.contains('dark')"))

    def wait_status(self, text: str) -> None:
        """Waits until the line above the results holds `text`."""
        self.page.wait_for_selector(f"#enn-status .enn-status:has-text({_quoted(text)})")

    def wait_pictures(self) -> None:
        """Waits until every picture in view has arrived."""
        self.page.wait_for_function(
            """() => [...document.querySelectorAll('.enn-card img')].every(i =>
                 i.getBoundingClientRect().top > innerHeight || (i.complete && i.naturalWidth))"""
        )

    # -- what a visitor does -------------------------------------------------------------------

    def search(self, text: str) -> None:
        """Types a query and presses Enter."""
        self.page.fill("#enn-text :is(textarea, input)", text)
        self.page.press("#enn-text :is(textarea, input)", "Enter")
        self.wait_status(f"“{text}”")

    def choose_picture(self, file: Path | dict[str, Any], where: str = "#enn-picker") -> None:
        self.page.set_input_files(f"{where} input[type=file]", file)  # type: ignore[arg-type]

    def open(self, position: int) -> None:
        """Opens the larger view of a result, counted from 0."""
        self.page.click(f".enn-card >> nth={position} >> .enn-open")
        self.page.wait_for_selector(".enn-dialog[open]")

    def mark(self, name: str, what: str) -> None:
        """Clicks a picture's thumb and waits until the server has answered."""
        thumb = f".enn-card[data-name={_quoted(name)}] .enn-thumb[data-do={what}]"
        self.page.click(thumb)
        self.wait_marked(name, what)

    def wait_marked(self, name: str, what: str | None) -> None:
        """Waits until a picture that is shown is marked so; None for not at all."""
        self.page.wait_for_function(
            """([name, what]) => {
                 const card = [...document.querySelectorAll('.enn-card')]
                   .find(c => c.dataset.name === name);
                 return card && (card.dataset.mark ?? null) === what
                   && !document.querySelector('.enn-pending'); }""",
            arg=[name, what],
        )

    def wait_lesson(self, text: str) -> None:
        self.page.wait_for_selector(f"#enn-lesson:has-text({_quoted(text)})")

    def tab(self, name: str) -> None:
        self.page.click(f"role=tab[name='{name}']")

    def taught(self, text: str) -> str:
        """Opens the tab of what was taught, waits for a text there, and returns all of it."""
        self.tab("Taught")
        self.page.wait_for_selector(f"#enn-taught:has-text({_quoted(text)})")
        return self.page.inner_text("#enn-taught")

    def profile(self, name: str) -> None:
        """Begins or chooses a profile."""
        self.tab("Taught")
        self.page.fill("#enn-taught [data-part=name]", name)
        self.page.press("#enn-taught [data-part=name]", "Enter")
        self.page.wait_for_selector(f"#enn-taught [data-profile={_quoted(name)}]")
        self.tab("Search")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
