"""What is damaged is told without changing anything, and a repair gives back the same answers."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel, age, assert_sound, photo, queries

from retrieval.index import writer
from retrieval.index.check import check_index, repair_index
from retrieval.index.eigen_index import EigenIndex
from retrieval.index.manifest import IndexCorrupt, NoIndex

Q = queries(1)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photos with an index: a snapshot of two blocks, an ANN, pending, removed and kept rows."""
    root, model = tmp_path_factory.mktemp("made"), TinyTestModel()
    for number in range(300):
        photo(root / f"{number}.png", number)
    age(root)
    with (
        pytest.MonkeyPatch.context() as patch,
        EigenIndex.create(root / ".enn-index", model) as index,
    ):
        index.ann_from = 16
        index.update(root, model)
        patch.setattr(writer, "SMALL_SNAPSHOT", 0)
        patch.setattr(writer, "PENDING_SHARE", 10.0)
        photo(root / "new.png", 1000)
        photo(root / "3.png", 1001)
        (root / "4.png").unlink()
        age(root)
        index.update(root, model)
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "photos")
    return tmp_path / "photos"


class Loads:
    """Gives the model, and counts."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.model = TinyTestModel()

    def __call__(self, name: str) -> TinyTestModel:
        self.names.append(name)
        return self.model


def answers(root: Path) -> list:
    with EigenIndex.open(root) as index:
        found = [index.search(Q, len(index)), index.search(Q, 9, ids=index.ids()[::3])]
        paths = {entry.id: entry.path for entry in index.entries()}
        return [[(paths[id_], score) for id_, score in hits] for hits in found]


def contents(root: Path) -> dict[str, bytes]:
    folder = root / ".enn-index"
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.endswith(("-wal", "-shm"))
    }


def sql(*statements: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "catalog.sqlite")) as db, db:
            for statement in statements:
                db.execute(statement)

    return damage


def overwrite(name: str, at: int, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at : at + len(data)] = data
        (folder / name).write_bytes(content)

    return damage


def misspelt(folder: Path) -> None:
    """SQLite opens no file whose tables have definitions that make no sense."""
    content = (folder / C).read_bytes()
    assert b"CREATE TABLE pending" in content
    (folder / C).write_bytes(content.replace(b"CREATE TABLE pending", b"CREAVE TABLE pending"))


def foreign(folder: Path) -> None:
    root, model = folder.parents[1] / "others", TinyTestModel()
    for number in range(300):
        photo(root / f"{number}.png", 2000 + number)
    age(root)
    with EigenIndex.create(root / ".enn-index", model) as index:
        index.update(root, model)
    shutil.copy(root / ".enn-index" / "vectors-1.faiss", folder)


def untriggered(folder: Path) -> None:
    """Rows of pictures vanish."""
    with closing(sqlite3.connect(folder / "catalog.sqlite")) as db, db:
        db.execute("DROP TRIGGER images_out")
        db.execute("DELETE FROM images WHERE id IN (10, 11, 12)")


def unlinked(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


V, A, C, M = "vectors-1.faiss", "ann-1.faiss", "catalog.sqlite", "manifest.json"


@pytest.mark.parametrize(
    ("damage", "file", "part", "images"),
    [
        (overwrite(V, 17_000, b"\0\xff\0"), V, "blocks 1 of", 44),
        (overwrite(V, 300, bytes(8192)), V, "blocks 0 of", 254),
        (foreign, V, "blocks 0, 1 of", 298),
        (unlinked(V), V, "", 298),
        (overwrite(V, 0, b"oops"), V, "", 298),
        (unlinked(A), A, "", 0),
        (overwrite(A, 700, b"\1\2\3"), A, "", 0),
        (unlinked(M), M, "", 0),
        (overwrite(M, 20, b"#"), M, "", 0),
        (sql("UPDATE pending SET vector = zeroblob(64) WHERE id IN (SELECT max(id) FROM pending)"),
         C, "pending", 1),
        (misspelt, C, "", 0),
        (sql("DELETE FROM removed"), C, "removed", 0),
        (sql("UPDATE kept SET vector = zeroblob(64)"), C, "kept", 0),
        (sql("UPDATE meta SET value = 'vectors-7.faiss' WHERE key = 'snapshot'"), C, "snapshot", 0),
        (sql("UPDATE meta SET value = 1 WHERE key = 'generation'"), C, "generation", 0),
        (sql("UPDATE sums SET total = 0 WHERE name = 'images'"), C, "images", 0),
    ],
)  # fmt: skip
def test_damage_is_told_and_repaired(root, damage, file, part, images) -> None:
    good, model = answers(root), Loads()
    assert check_index(root) == []
    if part == "removed":
        with closing(sqlite3.connect(root / ".enn-index" / C)) as db, db:
            db.execute("DROP TRIGGER removed_out")
    damage(root / ".enn-index")
    before = contents(root)
    told = check_index(root / ".enn-index")
    assert contents(root) == before
    assert [Path(each.file).name for each in told] == [file]
    assert told[0].part.startswith(part)
    assert not told[0].repaired
    assert "--repair" in told[0].remedy
    steps: list[tuple[int, int]] = []
    done = repair_index(root, model, lambda *step: steps.append(step))
    assert [(each.file, each.part, each.repaired) for each in done] == [
        (each.file, each.part, True) for each in told
    ]
    assert (model.model.images, len(model.names)) == (images, images > 0)
    assert steps[-1:] == ([(images, images)] if images else [])
    assert check_index(root) == []
    assert answers(root) == good
    with EigenIndex.open(root, model=model.model) as index:
        report = index.update(root, model.model)
        assert (report.embedded, report.added, report.changed) == (0, 0, 0)
        assert_sound(index, root)


@pytest.mark.parametrize(
    "damage", [sql("UPDATE images SET path = 'x' || id WHERE id IN (10, 11, 12)"), untriggered]
)
def test_rows_that_are_lost_come_back_with_the_next_update(root, damage) -> None:
    good, model = answers(root), Loads()
    damage(root / ".enn-index")
    assert [each.part.split()[0] for each in check_index(root)] == ["images"] * len(
        check_index(root)
    )
    assert all(each.repaired for each in repair_index(root, model))
    assert model.names == []
    assert len(answers(root)[0]) == len(good[0]) - 3
    with EigenIndex.open(root, model=model.model) as index:
        report = index.update(root, model.model)
        assert (report.added, report.embedded) == (3, 3)
        assert max(index.ids()) > 302
        assert_sound(index, root)
    assert sorted(answers(root)[0]) == sorted(good[0])
    assert check_index(root) == []


def test_pictures_that_are_gone_are_left_to_the_next_update(root) -> None:
    model = Loads()
    overwrite(V, 17_000, b"\0\xff\0")(root / ".enn-index")
    photo(root / "99.png", 5000)
    (root / "98.png").unlink()
    done = repair_index(root, model)
    assert [each.repaired for each in done] == [True, False]
    assert "98.png" in done[1].lost
    assert "99.png" in done[1].lost
    assert model.model.images == 42
    with EigenIndex.open(root, model=model.model) as index:
        assert (
            "its vector was damaged"
            in {entry.path: entry.error for entry in index.skipped()}["99.png"]
        )
        report = index.update(root, model.model)
        assert report.embedded == 1
        assert len(index.skipped()) == 0
        assert_sound(index, root)


@pytest.mark.parametrize(
    "seeds", [range(8), pytest.param(range(8, 100), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damage_everywhere_ends_sound(root, seeds) -> None:
    """Any flips: the repair never raises, and what is answered then is right."""
    model, before = TinyTestModel(), contents(root)
    for seed in seeds:
        choice = random.Random(seed)
        for name in (V, A, C, M):
            data = bytearray(before[name])
            if choice.random() < 0.6:
                for _ in range(choice.randint(1, 3)):
                    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
            (root / ".enn-index" / name).write_bytes(data)
        for path in (root / ".enn-index").iterdir():
            if path.name not in before:
                path.unlink()
        told = check_index(root)
        done = repair_index(root, lambda _: model)
        assert bool(told) == bool(done)
        assert not any("\n" in each.lost for each in told)
        if check_index(root):
            assert not all(each.repaired for each in done)
            continue
        with EigenIndex.open(root, model=model) as index:
            index.update(root, model)
            assert len(index) == 300
            assert_sound(index, root)


class Rounding(TinyTestModel):
    """As models do, computes the last bits of a vector otherwise in another batch."""

    def image_vectors(self, pixels):
        noise = np.random.default_rng(len(pixels)).normal(size=(len(pixels), self.dim))
        return super().image_vectors(pixels) * (1 + 3e-8 * noise.astype(np.float32))


@pytest.mark.parametrize(
    "data", [b"\x80", b"\0\0\0\0", bytes(7), None, bytes(2000)], ids=lambda data: repr(data)[:12]
)
def test_rounding_of_other_batches_is_not_seen(tmp_path, data) -> None:
    """One bit, one number, two numbers, and rows of them."""
    root, model = tmp_path, Rounding()
    for number in range(20):
        photo(root / f"{number}.png", number)
    age(root)
    with EigenIndex.create(root / ".enn-index", model) as index:
        index.update(root, model, batch_size=7)
        ids = index.ids()
        good = index.vectors(ids).tobytes()
        rough = index.vectors(ids)
    file = root / ".enn-index" / V
    before = file.read_bytes()
    at = before.index(good[64:128])
    flipped = bytes([before[at + 2] ^ 4]) if data is None else data
    overwrite(V, at if data is not None else at + 2, flipped)(root / ".enn-index")
    assert file.read_bytes() != before
    assert [each.repaired for each in repair_index(root, lambda _: model)] == [True]
    with EigenIndex.open(root) as index:
        if data is None or len(data) < 10:
            assert index.vectors(ids).tobytes() == good
        else:
            np.testing.assert_allclose(index.vectors(ids), rough, atol=2e-7)


def test_an_index_of_an_older_version_is_checked(v0_1) -> None:
    root = v0_1 / "photos"
    before = contents(root)
    assert check_index(root) == []
    assert repair_index(root, Loads()) == []
    assert contents(root).keys() | {"write.lock"} == before.keys() | {"write.lock"}
    overwrite(V, 300, b"\xff\xff\xff\xff")(root / ".enn-index")
    (told,) = check_index(root)
    assert "1 images" in told.lost
    model = Loads()
    done = repair_index(root, model)
    assert [each.repaired for each in done] == [True]
    assert model.model.images == 1
    with EigenIndex.open(root, model=model.model) as index:
        assert len(index) == 24
        assert_sound(index, root)


def test_what_cannot_be_repaired_is_left_alone(root, tmp_path) -> None:
    with pytest.raises(NoIndex):
        check_index(tmp_path)
    folder = root / ".enn-index"
    overwrite(C, 0, b"no catalog")(folder)
    before = contents(root)
    (told,) = repair_index(root, Loads())
    assert "it cannot be read" in told.lost
    assert (told.repaired, "index the folder again" in told.remedy) == (False, True)
    assert contents(root).keys() | {"write.lock"} == before.keys() | {"write.lock"}
    with pytest.raises(IndexCorrupt, match="enn check"):
        EigenIndex.open(root)
