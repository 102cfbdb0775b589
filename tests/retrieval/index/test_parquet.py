"""Parquet out and in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from index_cases import (
    TinyTestModel,
    age,
    assert_like_fresh,
    assert_same_ranking,
    photo,
    queries,
    ranking,
)

from retrieval.index.eigen_index import EigenIndex, IndexMismatch
from retrieval.index.parquet import ImportFileError, manifest_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def model() -> TinyTestModel:
    return TinyTestModel()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number in range(12):
        photo(root / "süb dir" / f"{number}.png", number)
    age(root)
    return root


@pytest.fixture
def index(root: Path, model: TinyTestModel, tmp_path: Path) -> EigenIndex:
    index = EigenIndex.create(tmp_path / "index", model)
    index.update(root, model)
    (root / "süb dir" / "3.png").unlink()
    (root / "bad.jpg").write_bytes(b"")
    index.update(root, model)
    return index


@pytest.fixture
def exported(index: EigenIndex, tmp_path: Path) -> Path:
    path = tmp_path / "ex port é.parquet"
    assert index.export_parquet(path) == 11
    return path


def edited(exported: Path, column: str, values: list, kind=None) -> Path:
    """A copy of the export with one column replaced."""
    table = pq.read_table(exported)
    place = table.schema.get_field_index(column)
    kind = kind or table.schema.field(column).type
    changed = table.set_column(place, pa.field(column, kind), pa.array(values, kind))
    path = exported.with_name("edited.parquet")
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    return path


def test_export_is_plain_parquet(index, exported) -> None:
    table = pq.read_table(exported)
    assert table.column_names == [
        *("id", "path", "path_bytes", "sha256", "size", "mtime_ns", "read_ns"),
        *("width", "height", "vector"),
    ]
    assert table["id"].to_pylist() == index.ids().tolist()
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_array_equal(vectors, index.vectors(index.ids()))
    assert table["path"].to_pylist() == [index.entry(int(id_)).path for id_ in index.ids()]
    assert manifest_of(exported).as_dict() == index.manifest
    assert sorted(os.listdir(exported.parent)) == ["ex port é.parquet", "index", "photos"]


def test_import_into_a_new_index_needs_no_embedding(index, exported, root, model, tmp_path) -> None:
    new = EigenIndex.create(tmp_path / "new", manifest_of(exported))
    assert new.import_parquet(exported) == 11
    q = queries(1)[0]
    assert_same_ranking(ranking(new, q), ranking(index, q))
    assert new.ids().tolist() == index.ids().tolist()
    report = new.update(root, model)
    assert (report.unchanged, report.embedded, report.added) == (11, 0, 0)
    assert_like_fresh(new, root, tmp_path / "fresh")


def test_import_merges_by_path(index, exported, root, model, tmp_path) -> None:
    other = EigenIndex.create(tmp_path / "other", model)
    photo(tmp_path / "elsewhere" / "süb dir" / "5.png", 500)
    photo(tmp_path / "elsewhere" / "own.png", 501)
    other.update(tmp_path / "elsewhere", model)
    own = {entry.path: entry.id for entry in other.entries()}
    assert other.import_parquet(exported) == 11
    assert len(other) == 12
    now = {entry.path: entry.id for entry in other.entries()}
    assert now["own.png"] == own["own.png"]
    assert now["süb dir/5.png"] == own["süb dir/5.png"]
    vector = other.vectors([now["süb dir/5.png"]])
    here = {entry.path: entry.id for entry in index.entries("indexed")}
    np.testing.assert_array_equal(vector, index.vectors([here["süb dir/5.png"]]))
    assert other.import_parquet(exported) == 11
    assert len(other) == 12


def test_paths_that_are_not_utf8_survive(root, model, tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        photo(root / name, 70)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    index.export_parquet(tmp_path / "o.parquet")
    new = EigenIndex.create(tmp_path / "j", model)
    new.import_parquet(tmp_path / "o.parquet")
    assert name in {entry.path for entry in new.entries()}


def test_another_model_is_refused(exported, tmp_path) -> None:
    other = EigenIndex.create(tmp_path / "other", TinyTestModel(seed=1))
    with pytest.raises(IndexMismatch, match="this file is of tiny-test-model-0"):
        other.import_parquet(exported)
    assert len(other) == 0


def short(row: list[float]) -> list[float]:
    return row[:-1]


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        ("vector", lambda row: [float("nan"), *row[1:]], "norm nan instead of 1"),
        ("vector", lambda row: [2 * value for value in row], "norm 2 instead of 1"),
        ("vector", lambda row: [0.0] * len(row), "norm 0 instead of 1"),
        ("path", lambda _: "/etc/passwd", "not relative"),
        ("path", lambda _: "a/../../b.jpg", "not a plain path"),
        ("path", lambda _: "a//b.jpg", "not a plain path"),
        ("path", lambda _: "", "not relative"),
        ("path", lambda _: None, "not relative"),
        ("path", lambda _: "süb dir/1.png", "twice"),
        ("sha256", lambda _: "xyz", "hexadecimal"),
        ("sha256", lambda _: "00", "64 digits"),
        ("id", lambda _: -1, "not positive"),
        ("id", lambda _: None, "not positive"),
    ],
)
def test_unfit_rows_stop_the_import_before_it_begins(
    index, exported, model, tmp_path, column: str, change, reason: str
) -> None:
    values = pq.read_table(exported)[column].to_pylist()
    values[7] = change(values[7])
    new = EigenIndex.create(tmp_path / "new", model)
    with pytest.raises(ImportFileError, match=reason) as caught:
        new.import_parquet(edited(exported, column, values))
    assert "\n" not in str(caught.value)
    assert len(new) == 0


def test_vectors_of_another_length(exported, model, tmp_path) -> None:
    values = [row[:-1] for row in pq.read_table(exported)["vector"].to_pylist()]
    new = EigenIndex.create(tmp_path / "new", model)
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 15)):
        with pytest.raises(ImportFileError, match="not 16 numbers long"):
            new.import_parquet(edited(exported, "vector", values, kind))


def test_absurd_ids_are_replaced(exported, model, tmp_path, root) -> None:
    values = pq.read_table(exported)["id"].to_pylist()
    values[3] = 2**62
    new = EigenIndex.create(tmp_path / "new", model)
    assert new.import_parquet(edited(exported, "id", values)) == 11
    assert max(new.ids()) < 100
    assert new.update(root, model).embedded == 0


def test_files_that_are_no_export(exported, model, tmp_path) -> None:
    new = EigenIndex.create(tmp_path / "new", model)
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "cut").write_bytes(exported.read_bytes()[:-100])
    pq.write_table(pa.table({"id": [1]}), tmp_path / "plain")
    for name, reason in {
        "junk": "cannot be read as Parquet",
        "cut": "cannot be read as Parquet",
        "plain": "not an exported index",
    }.items():
        with pytest.raises(ImportFileError, match=reason):
            new.import_parquet(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        new.import_parquet(tmp_path / "none")


def test_missing_columns(exported, model, tmp_path) -> None:
    table = pq.read_table(exported).drop_columns(["sha256"])
    pq.write_table(table, tmp_path / "less.parquet")
    new = EigenIndex.create(tmp_path / "new", model)
    with pytest.raises(ImportFileError, match="lacks the column sha256"):
        new.import_parquet(tmp_path / "less.parquet")


def test_export_to_an_impossible_place_leaves_nothing(index, tmp_path) -> None:
    with pytest.raises(OSError, match="No such file"):
        index.export_parquet(tmp_path / "none" / "x.parquet")
    (tmp_path / "taken.parquet").mkdir()
    with pytest.raises(OSError, match="directory"):
        index.export_parquet(tmp_path / "taken.parquet")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_told_in_one_line_or_change_nothing(
    seed, index, exported, model, tmp_path
) -> None:
    draw = np.random.default_rng(seed)
    content = bytearray(exported.read_bytes())
    for place in draw.integers(len(content), size=1 + seed % 3):
        content[place] ^= int(draw.integers(1, 256))
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    other = EigenIndex.create(tmp_path / "other", model)
    told = None
    try:
        other.import_parquet(damaged)
    except (ImportFileError, IndexMismatch) as error:
        told = str(error)
    if told is None:
        assert_same_ranking(ranking(other, queries()[0]), ranking(index, queries()[0]))
    else:
        assert ("damaged.parquet" in told or "this file" in told, "\n" in told) == (True, False)
        assert len(other) == 0


def test_no_index_is_made_of_a_damaged_manifest(exported, tmp_path) -> None:
    whole = exported.read_bytes()
    good = manifest_of(exported)
    end = len(whole) - 8
    begin = end - int.from_bytes(whole[-8:-4], "little")
    draw = np.random.default_rng(0)
    damaged = tmp_path / "damaged.parquet"
    lines = []
    for place in draw.integers(begin, end, size=300):
        content = bytearray(whole)
        content[place] ^= 1 << int(draw.integers(8))
        damaged.write_bytes(content)
        try:
            assert manifest_of(damaged) == good
        except (ImportFileError, IndexMismatch) as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert all("damaged.parquet" in line and "\n" not in line for line in lines)


def test_an_export_without_a_digest_is_imported(exported, model, tmp_path) -> None:
    """As 0.1 wrote it."""
    table = pq.read_table(exported)
    metadata = {b"eigen-index": table.schema.metadata[b"eigen-index"]}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "old.parquet")
    other = EigenIndex.create(tmp_path / "other", model)
    assert other.import_parquet(tmp_path / "old.parquet") == 11
