"""Starts the real search server and drives its page in a real browser.

Used by the tests of this folder and by `benchmarks/screenshots.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driver import PageDriver, ServerProcess
from playwright.sync_api import BrowserContext

__all__ = ["SearchPage", "Server"]

WAIT_MS = 30_000  # generous: the machine may be busy; nothing waits this long when all is well


class Server(ServerProcess):
    """`serve(...)` in a process of its own on a free port of this machine.

    Args:
        folders: of pictures; none for the sample gallery.
        profiles, port: see `ServerProcess`.
        auth_file: see `serve`.
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
        self.folders, self.auth_file, self.everybody = folders, auth_file, everybody
        super().__init__(port=port, profiles=profiles)

    def command(self) -> Sequence[str]:
        code = (
            "import sys; from pathlib import Path; from apps.web.search.serve import serve; "
            f"serve(None, [Path(p) for p in {[str(folder) for folder in self.folders]!r}], "
            f"port={self.port}, host={('0.0.0.0' if self.everybody else '127.0.0.1')!r}, "
            f"auth_file={str(self.auth_file) if self.auth_file else None!r})"
        )
        return ["-c", code]


class SearchPage(PageDriver):
    """The search page.

    Args:
        context, query: see `PageDriver`.
        server: a running server.
    """

    def __init__(self, context: BrowserContext, server: Server, query: str = "") -> None:
        super().__init__(context, server.url, query, wait_ms=WAIT_MS)
        self.server = server
        self.page.wait_for_selector("#enn-results :is(.enn-card, .enn-message)")

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
