"""A collection: results as cards, files behind tokens, background updates."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("fastapi")
from colour_model import Colours
from PIL import Image

from apps.web.search.collection import Collection, UpdateRunning, share
from apps.web.search.pictures import ImageRef
from retrieval.index.eigen_index import EigenIndex
from retrieval.search import Searcher
from retrieval.teach.teacher import Teacher


@pytest.fixture
def collection(folder, tmp_path):
    model = Colours()
    index = EigenIndex.create(tmp_path / "index", model, root=folder)
    index.update(folder, model)
    searcher = Searcher(index, model)
    yield Collection(
        "Bilder",
        searcher,
        folder,
        number=3,
        token=lambda ref: f"{ref.collection}-{ref.id}-{ref.version}",
        credits={"0 red.png": "Ann, CC0"},
    )
    index.close()


def test_cards_best_first(collection):
    cards = collection.cards(collection.find("red", k=3))
    assert {card.path for card in cards[:2]} == {"0 red.png", "1 darkred.png"}
    assert cards[0].share == 1.0
    assert all(0 <= card.share <= 1 for card in cards)
    assert {card.credit for card in cards if card.path == "0 red.png"} == {"Ann, CC0"}
    assert cards[0].token.startswith("3-")
    assert (cards[0].width, cards[0].height) == (8, 6)


def test_more_like_one_leaves_itself_out(collection):
    id_ = next(e.id for e in collection.index.entries("indexed") if "navy" in e.path)
    cards = collection.cards(collection.find("", like=id_, k=5))
    assert len(cards) == 5
    assert cards[0].path == "3 blue.png"
    assert all("navy" not in card.path for card in cards)


def test_cards_tell_marks_and_what_moved(collection):
    found = collection.find("red", k=3)
    first, second, third = found.ids
    cards = collection.cards(found, marks={first: True, second: False}, before=(second, first))
    assert [card.mark for card in cards] == [True, False, None]
    assert [card.moved for card in cards] == [1, -1, 0]
    assert [card.new for card in cards] == [False, False, True]
    assert third not in (first, second)


@pytest.mark.parametrize("rule", ["adapter", "local"])
def test_what_was_taught_counts_when_asked(collection, tmp_path, rule):
    teacher = Teacher.open(collection.model, path=tmp_path / "taught.sqlite")
    before = collection.find("something", k=6)
    good = before.ids[-1]
    teacher.teach(collection.index, "something", good=[good], rule=rule, force=True)
    after = collection.find("something", k=6, teacher=teacher)
    assert after.ids.index(good) <= before.ids.index(good)
    assert after.hits != before.hits
    assert collection.find("something", k=6) == before
    scores = [score for _, score in after.hits]
    assert min(scores) - 1e-6 <= after.average <= max(scores) + 1e-6


@pytest.mark.parametrize("asked", ["like", "upload"])
def test_a_taught_spectrum_counts_for_pictures_too(collection, folder, asked):
    delta = np.array([3, 0.5, 0.1], np.float32)
    taught = SimpleNamespace(
        delta=delta, map=lambda rows: rows, recall=lambda kind, asked, rows: rows
    )
    teacher = SimpleNamespace(
        refresh=lambda: False, mapping=taught, answering=lambda asked, kind: []
    )
    searcher = collection._searcher.with_teacher(teacher)
    id_ = next(e.id for e in collection.index.entries("indexed") if "yellow" in e.path)
    image = (folder / "5 yellow.png").read_bytes()
    if asked == "like":
        found = collection.find("", like=id_, k=5, teacher=teacher)
        expected, untaught = searcher.similar(id_, 5), searcher.similar(id_, 5, taught=False)
    else:
        found = collection.find("", image, k=5, teacher=teacher)
        expected, untaught = (searcher.search(image=image, k=5, taught=t) for t in (True, False))
    assert found.hits == tuple((hit.id, hit.score) for hit in expected)
    assert found.hits != tuple((hit.id, hit.score) for hit in untaught)
    vector = collection.index.vectors([id_])[0] * delta
    images = collection.index.vectors(collection.index.ids()) * delta
    cosines = images @ vector / np.linalg.norm(images, axis=1) / np.linalg.norm(vector)
    assert found.average == pytest.approx(cosines.mean(), abs=1e-6)


def test_a_look_into_the_collection(collection):
    assert len(collection.browse(4)) == 4
    assert len(collection.browse(100)) == len(collection) == 6
    assert all(card.score is None for card in collection.browse(4))


def test_skipped_files_have_reasons(collection):
    assert [path for path, _ in collection.skipped(10)] == ["broken.jpg"]
    assert all(reason for _, reason in collection.skipped(10))


def test_files_are_read_by_reference(collection, folder):
    id_ = int(collection.index.ids()[0])
    ref = collection.ref(id_)
    data, same = collection.read(ref)
    assert same
    assert data == (folder / collection.index.entry(id_).path).read_bytes()
    assert collection.read(ImageRef(3, id_, "f" * 14))[1] is False
    (folder / collection.index.entry(id_).path).write_bytes(b"changed")
    assert collection.read(ref) == (b"changed", False)
    (folder / collection.index.entry(id_).path).unlink()
    with pytest.raises(OSError, match="No such file"):
        collection.read(ref)
    with pytest.raises(LookupError):
        collection.read(ImageRef(3, 10_000, "0" * 14))


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.png", "a/../../outside.png"])
def test_paths_outside_the_folder_are_refused(collection, path, monkeypatch):
    entry = SimpleNamespace(path=path, state="indexed", sha256="0" * 64, id=1)
    monkeypatch.setattr(collection._searcher.index, "entry", lambda id_: entry)
    with pytest.raises(LookupError, match="outside"):
        collection.read(ImageRef(3, 1, "0" * 14))


def test_an_update_runs_beside_searches_and_is_announced(collection, folder):
    model = collection.model
    shutil.copy(folder / "0 red.png", folder / "copy.png")
    for name in ("film.mp4", "notes.txt"):
        (folder / name).write_bytes(b"other")
    Image.new("RGB", (8, 6), "white").save(folder / "white.png")
    model.go.clear()
    collection.start_update()
    assert collection.job.active
    with pytest.raises(UpdateRunning):
        collection.start_update()
    assert len(collection.cards(collection.find("red", k=3))) == 3
    model.go.set()
    assert collection.wait(30)
    assert collection.job.state == "done", collection.job.text
    assert "2 new" in collection.job.text
    assert "No pictures: 1 .mp4 (video), 1 .txt." in collection.job.text
    assert len(collection.browse(100)) == 8


def test_an_update_can_be_cancelled_and_taken_up_again(collection, folder):
    for number in range(200):
        Image.new("RGB", (8, 6), (number, 99, 99)).save(folder / f"new {number}.png")
    collection.model.go.clear()
    collection.start_update()
    collection.cancel_update()
    assert collection.job.state == "cancelling"
    collection.model.go.set()
    assert collection.wait(30)
    assert collection.job.state == "cancelled", collection.job.text
    collection.start_update()
    assert collection.wait(60)
    assert collection.job.state == "done"
    assert len(collection.browse(1000)) == 206


def test_a_failing_update_is_one_line(collection, folder):
    shutil.rmtree(folder)
    collection.start_update()
    assert collection.wait(30)
    assert collection.job.state == "failed"
    assert "\n" not in collection.job.text


def test_an_empty_mount_keeps_the_index_and_says_so(collection, folder):
    before = len(collection)
    for file in folder.iterdir():
        file.unlink()
    collection.start_update()
    assert collection.wait(30)
    assert collection.job.state == "failed"
    assert "pictures are gone, so the index keeps them" in collection.job.text
    assert len(collection.browse(100)) == len(collection) == before


def test_without_a_folder_there_is_no_update(collection):
    collection.root = None
    with pytest.raises(ValueError, match="folder"):
        collection.start_update()


def test_share():
    assert share(0.5, 0.0, 0.5) == 1
    assert share(0.25, 0.0, 0.5) == 0.5
    assert share(-1, 0, 1) == 0
    assert share(0.3, 0.3, 0.3) == 1
