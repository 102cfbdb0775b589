"""Indexes of an older format: readers see today's, the next writer makes it, nothing is lost."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import migration_cases as cases
import pytest
from index_cases import TinyTestModel, assert_same_ranking, assert_sound, queries, ranking
from migration_cases import copy_of, next_format, notes, rows, run

from enn_core.files.digests import sealed
from enn_core.files.migrations import Content
from retrieval.index import catalog, manifest
from retrieval.index.catalog import Catalog
from retrieval.index.eigen_index import EigenIndex, IndexMismatch
from retrieval.index.parquet import ImportFileError

TODAY, MANIFEST = catalog.FORMAT, manifest.FORMAT
posix = pytest.mark.skipif(os.name == "nt", reason="kills and limits the POSIX way")


@pytest.fixture
def folder(v0_1) -> Path:
    return v0_1 / "photos" / ".enn-index"


@pytest.fixture
def file(folder) -> Path:
    return folder / "catalog.sqlite"


@pytest.fixture
def next_version(monkeypatch) -> None:
    monkeypatch.setattr(catalog, "FORMAT", next_format("images", TODAY))
    renamed = Content(*MANIFEST.steps, lambda content: {**content, "model": "new"})
    monkeypatch.setattr(manifest, "FORMAT", renamed)


def contents(folder: Path) -> dict[str, bytes]:
    """All files; a log that is empty is as good as none."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.endswith(("-wal", "-shm"))
    }


def check(folder: Path, expected: dict) -> None:
    with EigenIndex.open(folder, model=TinyTestModel()) as index:
        assert {entry.path: entry.id for entry in index.entries("indexed")} == expected["ids"]
        want = [tuple(row) for row in expected["ranking"]]
        assert_same_ranking(ranking(index, queries()[0]), want)


def test_a_reader_changes_nothing(folder, expected, next_version):
    before = contents(folder)
    check(folder, expected["index"])
    with closing(Catalog.open(folder)) as opened:
        assert opened.detached
        assert {row[0][:5] for row in opened.rows("SELECT note FROM images")} == {"noted"}
    with EigenIndex.open(folder) as index:
        assert (index.manifest["format"], index.manifest["model"]) == (3, "new")
        assert not index.refresh()
    assert contents(folder) == before


def test_a_reader_sees_what_an_older_writer_publishes(folder, expected, monkeypatch):
    older, count = EigenIndex.open(folder), len(expected["index"]["ids"])
    load_once, left = EigenIndex._load_once, [2]

    def write() -> None:
        with monkeypatch.context() as now:
            now.setattr(catalog, "FORMAT", TODAY)
            now.setattr(manifest, "FORMAT", MANIFEST)
            with older._writer() as writer:
                with writer.catalog.writing():
                    writer.catalog.mark_deleted(int(older.ids()[left[0]]))
                writer.publish(force=True)

    def later(index, previous):
        """After the catalog was copied into memory."""
        if left[0]:
            left[0] -= 1
            write()
        return load_once(index, previous)

    monkeypatch.setattr(catalog, "FORMAT", next_format("images", TODAY))
    monkeypatch.setattr(EigenIndex, "_load_once", later)
    with EigenIndex.open(folder) as index:
        assert (left, len(index)) == ([0], count - 2)
        left[0] = 3
        write()
        assert index.refresh()
        assert (left, len(index)) == ([0], count - 4)
    older.close()


def test_the_next_writer_changes_it_once(folder, file, expected, next_version):
    model, before = TinyTestModel(), rows(file, "images")
    reader = EigenIndex.open(folder)
    for change in (["5.png"], []):
        with EigenIndex.open(folder, model=model) as index:
            index.update(None, model)
            assert notes(file, "images") == [("noted0000000",)] * len(before)
        assert json.loads((folder / "manifest.json").read_text())["format"] == 3
        assert rows(copy_of(file), "images") == before
        assert notes(copy_of(file), "images") == []
        assert (reader.refresh(), reader._catalog.detached) == (bool(change), False)
    check(folder, expected["index"])
    assert_sound(reader, folder.parent)
    reader.close()


def test_a_newer_index_is_refused_in_one_line(folder, file, v0_1, monkeypatch):
    model = TinyTestModel()
    open_before = EigenIndex.open(folder)
    with monkeypatch.context() as later:
        later.setattr(catalog, "FORMAT", next_format("images", TODAY))
        with EigenIndex.open(folder, model=model) as index:
            index.update(None, model)
    line = "^the index's catalog has format 4, this version reads 1 to 3; update the software$"
    for use in (
        lambda: EigenIndex.open(folder),
        open_before.refresh,
        lambda: open_before.update(None, model),
    ):
        with pytest.raises(IndexMismatch, match=line):
            use()
    open_before.close()
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(sealed({**content, "format": 3})))
    line = "^the index has format 3, this version reads 1 to 2; update the software$"
    with pytest.raises(IndexMismatch, match=line):
        EigenIndex.open(folder)


def test_a_newer_export_is_refused_in_one_line(folder, v0_1, monkeypatch, tmp_path):
    with monkeypatch.context() as later:
        later.setattr(manifest, "FORMAT", Content(*MANIFEST.steps, lambda content: content))
        with EigenIndex.open(folder) as index:
            index.export_parquet(tmp_path / "new.parquet")
    with (
        EigenIndex.create(tmp_path / "index", TinyTestModel()) as index,
        pytest.raises(
            ImportFileError, match=r"^[^\n]* has format 3, this version reads 1 to 2; update"
        ),
    ):
        index.import_parquet(tmp_path / "new.parquet")


def test_new_indexes_are_of_the_newest_format(tmp_path, next_version):
    EigenIndex.create(tmp_path / "index", TinyTestModel()).close()
    with closing(Catalog.open(tmp_path / "index")) as opened:
        assert not opened.detached
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["format"] == 3


@posix
def test_killed_at_any_instant(file, folder, expected):
    for path in folder.parent.glob("*.*"):
        if path.is_file():
            path.unlink()
    cases.kill_at_any_instant(cases.open_index, file, "images", stride=3)
    assert json.loads((folder / "manifest.json").read_text())["format"] == 3


@posix
def test_two_writers_at_once(file):
    count = len(rows(file, "images"))
    both = [cases.start(cases.slowly, cases.open_index, file) for _ in range(2)]
    for process in both:
        process.join(60)
    # The index has one writer: the second is told so, unless it came after.
    assert sorted(process.exitcode for process in both) in ([0, 0], [0, 1])
    assert notes(file, "images") == [("noted0000000",)] * count
    assert notes(copy_of(file), "images") == []


@posix
@pytest.mark.parametrize("limit", [20_000, 41_000, 60_000])
def test_a_full_disk(file, folder, expected, limit):
    before = rows(file, "images")
    line = "cannot be written .* is safe"
    assert run(cases.within, limit, line, cases.open_index, file) == 0
    assert notes(file, "images") == []
    assert rows(file, "images") == before
    assert copy_of(file).exists() == (limit > 41_000 - 1)
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
    check(folder, expected["index"])
    assert run(cases.open_index, file) == 0
    assert len(notes(file, "images")) == len(before)


def read_as_nobody(folder: Path, expected: dict) -> None:
    TinyTestModel()  # imports what nobody may not read
    cases.nobody()
    catalog.FORMAT = next_format("images", TODAY)
    check(folder, expected)


@posix
def test_a_read_only_folder(folder, expected):
    before = contents(folder)
    with cases.shown_to_all(folder.parent) as photos:
        shown = photos / folder.name
        assert run(read_as_nobody, shown, expected["index"]) == 0
        line = "cannot be written"
        assert run(cases.as_nobody, line, cases.open_index, shown / "catalog.sqlite") == 0
        assert contents(shown) == before
