"""Makes the README's pictures: the search page with the sample gallery, and the brain page with the
MNI152 template (an average, no person), as a visitor sees them.

    python benchmarks/screenshots.py [--out docs/images] [--model FILE] [NAME ...]

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
from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from brain_driver import BrainPage, BrainServer, webgl_browser  # noqa: E402
from driver import browser, chromium  # noqa: E402
from search_driver import SearchPage, Server  # noqa: E402

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


def other_contrast() -> dict:
    """The template as another scanner might show it: a second scan to look at."""
    import nibabel
    import numpy as np

    from neuro.scans.template import MNI_AFFINE, load_template

    brain = load_template()[0]
    changed = (brain / brain.max()) ** 0.8
    content = nibabel.Nifti1Image(changed.astype(np.float32), MNI_AFFINE).to_bytes()
    return {"name": "template, gamma 0.8.nii", "mimeType": "", "buffer": content}


def brain(page: BrainPage) -> None:
    page.sample("MNI152")
    page.wait_age()
    page.wait_viewer()
    page.page.click("#enn-viewer [data-do=explain]")
    page.page.wait_for_function(
        "document.querySelector('.enn-canvas canvas').dataset.ready?.includes('explanation')"
    )
    page.page.evaluate("document.querySelector('#enn-tabs').scrollIntoView()")


def brain_teach(page: BrainPage) -> None:
    page.sample("MNI152")
    page.wait_age()
    page.upload(other_contrast(), "mni")
    page.page.wait_for_selector(".enn-scan[data-state=ready] >> text=gamma 0.8")
    page.preview(round(page.wait_age() + 6))
    page.wait_viewer()
    page.page.evaluate("document.querySelector('#enn-form').scrollIntoView()")


def brain_dark(page: BrainPage) -> None:
    page.sample("MNI152")
    page.wait_age()
    page.wait_viewer()


def brain_phone(page: BrainPage) -> None:
    page.sample("MNI152")
    page.wait_age()
    page.wait_viewer()
    page.page.evaluate("document.querySelector('#enn-stage').scrollIntoView()")


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

BRAIN_SHOTS: dict[str, tuple[Callable[[BrainPage], None], dict]] = {
    "brain": (brain, {"viewport": {"width": 1200, "height": 860}}),
    "brain_teach": (brain_teach, {"viewport": {"width": 1200, "height": 860}}),
    "brain_dark": (
        brain_dark,
        {"viewport": {"width": 1200, "height": 860}, "color_scheme": "dark"},
    ),
    "brain_phone": (
        brain_phone,
        {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 1.5},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the README's pictures.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--model", type=Path, help="of the brain page; default: the shipped one")
    names = ", ".join([*SHOTS, *BRAIN_SHOTS])
    parser.add_argument("names", nargs="*", help=f"which of {names}; default: all")
    options = parser.parse_args()
    known = [*SHOTS, *BRAIN_SHOTS]
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"no picture is called {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    if chromium() is None:
        print("no Chromium found; run: apt-get install chromium fonts-dejavu-core", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.names or known
    problems = search_shots([name for name in wanted if name in SHOTS], options.out)
    problems += brain_shots(
        [name for name in wanted if name in BRAIN_SHOTS], options.out, options.model
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def search_shots(names: list[str], out: Path) -> list[str]:
    """Pictures of the search page; returns what was unexpected."""
    problems: list[str] = []
    if not names:
        return problems
    server = Server()
    try:
        with browser() as chrome:
            for name in names:
                prepare, context = SHOTS[name]
                page = SearchPage(chrome.new_context(**context), server)
                prepare(page)
                page.wait_pictures()
                page.page.evaluate("scrollTo(0, 0)")
                shoot(page.page, out / f"{name}.webp")
                problems += page.problems
                page.close()
    finally:
        server.kill()
    return problems


def brain_shots(names: list[str], out: Path, model: Path | None) -> list[str]:
    """Pictures of the brain page; returns what was unexpected."""
    problems: list[str] = []
    if not names:
        return problems
    server = BrainServer(model)
    try:
        with webgl_browser() as chrome:
            for name in names:
                prepare, context = BRAIN_SHOTS[name]
                page = BrainPage(chrome.new_context(**context), server.url)
                prepare(page)
                shoot(page.page, out / f"{name}.webp")
                problems += page.problems
                page.close()
    finally:
        server.kill()
    return problems


def shoot(page: Page, target: Path) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)  # transitions
    save(page.screenshot(), target)
    print(f"{target} {target.stat().st_size // 1000} KB")


def save(png: bytes, target: Path) -> None:
    """WebP shows photos and small letters well in a tenth of a PNG's bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").save(target, quality=80, method=6)


if __name__ == "__main__":
    sys.exit(main())
