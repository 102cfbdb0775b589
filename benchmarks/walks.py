"""How far three everyday acts move between the project's files: the data's way through the house.

    python benchmarks/walks.py [--pairs 12]

A mark on the search page, a scan's age, three image files to vectors; each once before, so that
caches and imports are not counted. A call counts where it enters a function of the four packages, a
move where that lies in another file than the thread's last one. Every thread that Python starts
meanwhile is watched. Writes `benchmarks/results/walks.csv`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
from record import write_rows
from starlette.requests import Request

import retrieval
from apps.web.search.collection import Collection
from apps.web.search.handlers import Screen
from apps.web.search.pictures import Pictures, Uploads
from apps.web.search.taught_handlers import TaughtHandlers
from apps.web.visitors import LOCAL, Shelf, Visitor, remember
from neuro.age.predict import BrainAge
from neuro.scans.batch import prepare_scan
from neuro.scans.preprocess import Preprocessor
from retrieval.teach.profiles import DEFAULT, journal_of
from retrieval.teach.teacher import Teacher

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("ENN_DATA", ROOT.parent / "shared" / "data"))
GALLERY = ROOT / "apps" / "gallery"
PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("enn_core", "retrieval", "neuro", "apps"))
QUERY = "a bird flying in the air"


Act = Callable[[], object]


@dataclass
class Walk:
    """What was called during one act.

    Attributes:
        calls: by file, relative to the checkout.
        ways: by thread, the files in the order of entering.
    """

    calls: Counter[str] = field(default_factory=Counter)
    ways: dict[int, list[str]] = field(default_factory=dict)

    def watch(self, act: Act) -> Walk:
        """Watch one act in all threads."""
        threading.setprofile(self._saw)
        sys.setprofile(self._saw)
        try:
            act()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        return self

    def _saw(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGES):
            file = file[len(str(ROOT)) + 1 :]
            self.calls[file] += 1
            way = self.ways.setdefault(threading.get_ident(), [])
            if not way or way[-1] != file:
                way.append(file)

    @property
    def moves(self) -> int:
        return sum(len(way) - 1 for way in self.ways.values())

    def tell(self, name: str, pairs: int) -> dict[str, Any]:
        """Print it; returns its row of the table."""
        row = {
            "what": name,
            "files": len(self.calls),
            "calls": self.calls.total(),
            "moves": self.moves,
            "threads": len(self.ways),
        }
        print(row)
        for way in self.ways.values():
            print("  order:", " > ".join(dict.fromkeys(way)))
        steps = (step for way in self.ways.values() for step in pairwise(way))
        for (a, b), often in Counter(steps).most_common(pairs):
            print(f"  {often:4d}  {a} -> {b}")
        return row


def a_mark(folder: Path) -> Callable[[], Act]:
    """Thumbs up for the next picture of a search, as the page's script sends it."""
    os.environ["ENN_PROFILES"] = str(folder / "profiles")
    model = retrieval.load()
    with retrieval.EigenIndex.create(folder / "index", model, root=GALLERY) as index:
        index.update(GALLERY, model)
    pictures = Pictures(lambda ref: collection.read(ref))
    searcher = retrieval.open_index(folder / "index", model)
    collection = Collection("the sample gallery", searcher, GALLERY, token=pictures.token)
    page = TaughtHandlers(
        [collection], pictures, Uploads(), Shelf(journal_of, Teacher.open), "Eigen Search"
    )
    scope = {"type": "http", "headers": [], "query_string": b""}
    request = gr.Request(request=Request(remember(scope, Visitor(LOCAL))))
    screen = page.search_text(QUERY, 0, 24, Screen(), request)[-1]
    tokens = iter([pictures.token(collection.ref(id_)) for id_ in screen.ids])

    def ready() -> Act:
        event = gr.EventData(None, None)
        marks = {next(tokens): "good"}
        data = {"marks": marks, "query": QUERY, "profile": DEFAULT, "answer": 1}
        event._data = data
        return lambda: page.mark(0, 24, screen, request, event)

    return ready


def a_scan(_: Path) -> Callable[[], Act]:
    """A brain's age, from a file to the interval."""
    path = min((DATA / "ixi_hh" / "heads_2mm").glob("*.nii.gz"))
    brain, preprocessor = BrainAge.load(), Preprocessor()

    def age() -> object:
        prepared, _ = prepare_scan(path, "head", preprocessor=preprocessor)
        return brain.estimate(brain.look(prepared))

    return lambda: age


def three_images(folder: Path) -> Callable[[], Act]:
    """Three photos to vectors in a new index of theirs."""
    model = retrieval.load()
    photos = folder / "photos"
    photos.mkdir()
    for file in sorted(GALLERY.glob("*.webp"))[:3]:
        shutil.copy2(file, photos)
    numbers = count()

    def ready() -> Act:
        place = folder / f"photos-{next(numbers)}"
        index = retrieval.EigenIndex.create(place, model, root=photos)
        return lambda: index.update(photos, model)

    return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of files to print")
    pairs = parser.parse_args().pairs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, act in (("a mark", a_mark), ("a scan", a_scan), ("three images", three_images)):
            ready = act(Path(folder))
            ready()()
            rows.append(Walk().watch(ready()).tell(name, pairs))
    print(write_rows("walks", rows))


if __name__ == "__main__":
    main()
