"""Makes the README's pictures: the search page with the sample gallery, as a visitor sees it.

    python benchmarks/screenshots.py [--out docs/images] [NAME ...]

Needs Chromium (Debian: apt-get install chromium fonts-dejavu-core). The pages are driven by the
same code as the tests in tests/e2e.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from search_driver import SearchPage, Server, browser, chromium  # noqa: E402

SIZE = {"width": 1200, "height": 800}
GALLERY = ROOT / "apps" / "gallery"
SKY = {f"{name}.webp" for name in ("gc_saturn", "gc_mars", "gc_jupiter", "gc_earth", "gc_sun")}
TAUGHT = {  # words that the model reads badly, and pictures that were meant
    "things to repair with": ("gc_pliers", "gc_hammer_on_blue"),
    "something to eat": ("tp_mince_pie",),
}


def search(page: SearchPage) -> None:
    page.search("musicians playing on a stage")


def teach(page: SearchPage, profile: str = "me") -> None:
    page.profile(profile)
    page.search("in space")
    for what, wanted in (("good", SKY), ("good", SKY), ("good", SKY)):
        page.mark(next(n for n in page.names if n in wanted and n not in page.marks), what)
    for _ in range(2):
        page.mark(next(n for n in page.names if n not in SKY and n not in page.marks), "bad")


def taught(page: SearchPage) -> None:
    teach(page, "family")
    for query, good in TAUGHT.items():
        page.search(query)
        for name in good:
            page.mark(f"{name}.webp", "good")
    page.taught("something to eat")


def search_dark(page: SearchPage) -> None:
    page.search("a bridge at night with city lights")


def captions(page: SearchPage) -> None:
    page.tab("Captions")
    page.choose_picture(GALLERY / "gc_horse_herd.webp", "#enn-subject")
    page.page.wait_for_selector("#enn-ranking .enn-captions li")


def larger(page: SearchPage) -> None:
    page.search("a bird flying in the air")
    page.open(0)
    page.page.wait_for_function(
        "document.querySelector('.enn-dialog img').src.includes('pictures/large/')"
    )


def index(page: SearchPage) -> None:
    page.tab("Collection")
    page.page.wait_for_selector(".enn-tile")
    page.page.click("#enn-update")
    page.page.wait_for_selector("#enn-job >> text=Up to date")


def phone(page: SearchPage) -> None:
    page.search("horses in a field")


SHOTS: dict[str, tuple[Callable[[SearchPage], None], dict]] = {
    "search": (search, {"viewport": SIZE}),
    "teach": (teach, {"viewport": SIZE}),
    "taught": (taught, {"viewport": {"width": 1200, "height": 880}}),
    "search_dark": (search_dark, {"viewport": SIZE, "color_scheme": "dark"}),
    "captions": (captions, {"viewport": SIZE}),
    "larger": (larger, {"viewport": SIZE}),
    "index": (index, {"viewport": {"width": 1200, "height": 520}}),
    "phone": (phone, {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 1.5}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(SHOTS)}; default: all")
    options = parser.parse_args()
    unknown = set(options.names) - set(SHOTS)
    if unknown:
        parser.error(f"no picture is called {sorted(unknown)[0]!r}; there are {', '.join(SHOTS)}")
    if chromium() is None:
        print("no Chromium found; run: apt-get install chromium fonts-dejavu-core", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    server = Server()
    problems: list[str] = []
    try:
        with browser() as chrome:
            for name in options.names or SHOTS:
                prepare, context = SHOTS[name]
                page = SearchPage(chrome.new_context(**context), server)
                prepare(page)
                page.wait_pictures()
                page.page.mouse.move(0, 0)
                page.page.evaluate("scrollTo(0, 0)")
                page.page.wait_for_timeout(400)  # transitions
                target = options.out / f"{name}.webp"
                save(page.page.screenshot(), target)
                print(f"{target} {target.stat().st_size // 1000} KB")
                problems += page.problems
                page.close()
    finally:
        server.kill()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def save(png: bytes, target: Path) -> None:
    """WebP shows photos and small letters well in a tenth of a PNG's bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").save(target, quality=80, method=6)


if __name__ == "__main__":
    sys.exit(main())
