"""Invariant 5: after any sequence of changes, updates, crashes and resumes, the index answers like
one that was just built."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from index_cases import (
    TinyTestModel,
    assert_like_fresh,
    assert_same_ranking,
    assert_sound,
    photo,
    queries,
    ranking,
)
from index_crash_cases import Server

from retrieval.index import writer
from retrieval.index.eigen_index import EigenIndex

SEEDS = st.integers(0, 12)  # few contents, so that copies and returns happen
NAMES = st.sampled_from(
    [f"{folder}{name}.png" for folder in ("", "sub/", "süb é/") for name in ("a", "b", "c", "d")]
)
ANY = st.integers(0, 1000)


class IndexMachine(RuleBasedStateMachine):
    """A photo folder that changes, its index, and a reader that looks now and then."""

    server: Server

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="enn-test-"))
        self.root = self.folder / "photos"
        photo(self.root / "a.png", 0)
        self.model = TinyTestModel()
        self.index = EigenIndex.create(self.folder / "index", self.model)
        self.reader = EigenIndex.open(self.folder / "index")
        self.builds = 0

    def teardown(self) -> None:
        self.index.close()
        self.reader.close()
        shutil.rmtree(self.folder)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*.png") if path.is_file())

    # --- what happens to the folder ------------------------------------------------------------

    @rule(name=NAMES, seed=SEEDS)
    def write(self, name: str, seed: int) -> None:
        photo(self.root / name, seed)

    @precondition(lambda self: self.files())
    @rule(which=ANY, name=NAMES)
    def move(self, which: int, name: str) -> None:
        files = self.files()
        (self.root / name).parent.mkdir(exist_ok=True)
        files[which % len(files)].replace(self.root / name)

    @precondition(lambda self: self.files())
    @rule(which=ANY, name=NAMES)
    def copy(self, which: int, name: str) -> None:
        files = self.files()
        source = files[which % len(files)]
        (self.root / name).parent.mkdir(exist_ok=True)
        if source != self.root / name:
            shutil.copy2(source, self.root / name)  # same time as its source

    @precondition(lambda self: len(self.files()) > 1)
    @rule(first=ANY, second=ANY)
    def swap(self, first: int, second: int) -> None:
        files = self.files()
        one, two = files[first % len(files)], files[second % len(files)]
        if one != two:
            spare = self.root / "spare"
            one.rename(spare)
            two.rename(one)
            spare.rename(two)
            os.utime(one)
            os.utime(two)

    @precondition(lambda self: self.files())
    @rule(which=ANY)
    def delete(self, which: int) -> None:
        files = self.files()
        files[which % len(files)].unlink()

    @precondition(lambda self: self.files())
    @rule(which=ANY)
    def damage(self, which: int) -> None:
        files = self.files()
        files[which % len(files)].write_bytes(b"\x89PNG damaged")

    # --- what happens to the index -------------------------------------------------------------

    @rule(batch_size=st.integers(1, 5))
    def update(self, batch_size: int) -> None:
        self.index.update(self.root, self.model, batch_size=batch_size, prune=True)
        assert_sound(self.index, self.root)

    @rule(step=st.integers(1, 60))
    def killed_update(self, step: int) -> None:
        self.server.run("update_until", step, self.root, self.folder / "index")
        self.index.refresh()

    @rule(ids=st.lists(st.integers(1, 12), max_size=3))
    def remove(self, ids: list[int]) -> None:
        self.index.remove(ids)

    @rule()
    def compact(self) -> None:
        before = ranking(self.index, queries(1)[0])
        self.index.compact()
        assert_same_ranking(ranking(self.index, queries(1)[0]), before)

    @rule(step=st.integers(1, 20))
    def killed_compaction(self, step: int) -> None:
        before = ranking(self.index, queries(1)[0])
        self.server.run("compact_until", step, self.folder / "index")
        self.index.refresh()
        assert_same_ranking(ranking(self.index, queries(1)[0]), before)

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = EigenIndex.open(self.folder / "index", model=self.model)

    @rule()
    def look(self) -> None:
        self.reader.refresh()
        q = queries(1)[0]
        assert self.reader.search(q, 50) == self.index.search(q, 50)

    @rule()
    def compare(self) -> None:
        self.index.update(self.root, self.model, prune=True)
        self.builds += 1
        assert_like_fresh(self.index, self.root, self.folder / f"fresh {self.builds}")

    @invariant()
    def every_result_has_a_row(self) -> None:
        if hasattr(self, "index"):
            found = self.index.search(queries(1)[0], 100)
            assert len(found) == len(self.index) == len({id_ for id_, _ in found})
            assert {self.index.entry(id_).state for id_, _ in found} <= {"indexed"}


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL_SNAPSHOT="4")
    yield server
    server.close()


@pytest.mark.parametrize("examples", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_any_history_ends_like_a_fresh_build(server, monkeypatch, examples: int) -> None:
    # So that part of the vectors stays in the catalog between snapshots.
    monkeypatch.setattr(writer, "SMALL_SNAPSHOT", 4)
    monkeypatch.setattr(writer, "PENDING_SHARE", 0.3)
    monkeypatch.setattr(IndexMachine, "server", server, raising=False)
    run_state_machine_as_test(
        IndexMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )
