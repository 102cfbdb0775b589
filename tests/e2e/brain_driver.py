"""Starts the real brain server and drives its page in a real browser.

Used by the tests of this folder and by `benchmarks/screenshots.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driver import PageDriver, ServerProcess, browser
from playwright.sync_api import Browser, BrowserContext

__all__ = ["BrainPage", "BrainServer", "webgl_browser"]

WAIT_MS = 120_000  # a head takes many seconds when the machine is busy


def webgl_browser() -> contextlib.AbstractContextManager[Browser]:
    """A headless Chromium that computes WebGL, and nothing else of the page, by software GL.

    Screenshots may lack parts of a canvas or of what is fixed in the window; without
    `--disable-gpu-compositing` they are whole, and the tests slow.
    """
    return browser(
        "--use-gl=angle",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--disable-gpu-compositing",
    )


class BrainServer(ServerProcess):
    """`enn demo brain` in a process of its own on a free port of this machine.

    Args:
        model: a model file; None for the shipped one.
        profiles: see `ServerProcess`.
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
        self.model = model
        environment = {"ENN_DATA": None if data is None else str(data)}
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        super().__init__(profiles=profiles, environment=environment)

    def command(self) -> Sequence[str]:
        model = [] if self.model is None else ["--model", str(self.model)]
        return ["-m", "apps.cli", "demo", "brain", "--port", str(self.port), *model]


class BrainPage(PageDriver):
    """The brain-age page.

    Args:
        context, url: see `PageDriver`.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        super().__init__(context, url, wait_ms=WAIT_MS)
        self.page.wait_for_selector("#enn-add .enn-add")

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
