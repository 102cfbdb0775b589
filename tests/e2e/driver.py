"""A real server in a process of its own, and a page of it in a real browser.

What the drivers of both pages share.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

__all__ = ["PageDriver", "ServerProcess", "browser", "chromium"]

START_SECONDS = 240
# What a driver without a graphics card says of reading pixels back.
_HARMLESS = "GL Driver Message"


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@contextlib.contextmanager
def browser(*flags: str) -> Iterator[Browser]:
    """A headless Chromium of the system, without a graphics card if no flags say otherwise."""
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers lack; the pages are our own.
        started = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", *(flags or ("--disable-gpu",))]
        )
        try:
            yield started
        finally:
            started.close()


class ServerProcess:
    """A server of ours, ready when this returns.

    Args:
        port: of this machine; 0 for a free one.
        profiles: where what is taught is kept; a folder that goes with the server if none is given.
        environment: of the process, besides this one's; None takes a variable away.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        profiles: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.port = port or _free_port()
        self._own = tempfile.TemporaryDirectory(prefix="profiles-")
        self.profiles = profiles or Path(self._own.name)
        self.url = f"http://127.0.0.1:{self.port}/"
        variables = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "ENN_PROFILES": str(self.profiles),
            **(environment or {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, *self.command()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in variables.items() if value is not None},
        )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def command(self) -> Sequence[str]:
        """Arguments of Python that start the server on `self.port`."""
        raise NotImplementedError

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


class PageDriver:
    """A page as its visitors see it. Everything they would not expect is kept in `problems`.

    Args:
        context: a browser's context: what one visitor's browser remembers.
        url: of a running server.
        query: of the address, as in "?q=dog".
        wait_ms: how long anything may take.
    """

    def __init__(self, context: BrowserContext, url: str, query: str = "", *, wait_ms: int) -> None:
        self.context = context
        self.context.set_default_timeout(wait_ms)
        self.page: Page = self.context.new_page()
        self.url = url
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.goto(url + query)

    def _console(self, message: Any) -> None:
        if message.type in {"error", "warning"} and _HARMLESS not in message.text:
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.problems.append(f"request to elsewhere: {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def close(self, *, context: bool = True) -> None:
        self.page.close()
        if context:
            self.context.close()

    def tab(self, name: str) -> None:
        self.page.click(f"role=tab[name='{name}']")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
