"""Teaching under hostile marks, and by several processes and threads at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_cases import TinyTestModel
from places import CASES
from teaching_cases import PICTURES, QUERY, bits, make_gallery, open_profile, ranked

from retrieval.eigen_coordinates import scores
from retrieval.index import snapshot
from retrieval.index.catalog import Catalog, Entry
from retrieval.index.eigen_index import EigenIndex
from retrieval.search import Searcher
from retrieval.teach.teacher import Teacher, TeachError

RULES = pytest.mark.parametrize("rule", ["adapter", "local"])
EVERY = range(1, PICTURES + 1)


def assert_sound(searcher) -> None:
    assert sorted(ranked(searcher)) == sorted(searcher.index.ids())
    q = searcher.query_vector(QUERY)
    assert np.isfinite(q).all()
    assert np.isfinite(searcher.teacher.map(np.eye(16))).all()


@RULES
@pytest.mark.parametrize(
    ("good", "bad"),
    [(EVERY, []), ([], EVERY), ([1], EVERY[1:]), (EVERY[1:], [1]), ([1], []), ([], [1])],
)
def test_all_good_and_all_bad(searcher, rule, good, bad):
    searcher.teach(QUERY, good, bad, rule=rule, force=True)
    assert_sound(searcher)


@RULES
def test_contradicting_marks_end_with_the_last_ones(searcher, gallery, rule):
    for turn in range(6):
        sides = ([1, 2, 3], [4, 5, 6])
        searcher.teach(QUERY, sides[turn % 2], sides[1 - turn % 2], rule=rule, force=True)
    assert_sound(searcher)
    assert searcher.teacher.marks(QUERY) == {
        4: True,
        5: True,
        6: True,
        1: False,
        2: False,
        3: False,
    }


def test_twins_of_different_marks(tmp_path, profiles):
    root = make_gallery(tmp_path / "photos", 6)
    shutil.copy(root / "0.png", root / "again.png")
    with open_profile(root) as searcher:
        searcher.index.update(root, searcher.model)
        ids = {entry.path: entry.id for entry in searcher.index.entries()}
        searcher.teach(QUERY, [ids["0.png"]], [ids["again.png"]], force=True)
        assert_sound(searcher)


@RULES
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=30), signs=st.dictionaries(st.integers(-2, 70), st.sampled_from("gbu"))
)
def test_any_words_and_ids_are_taught_or_refused_in_one_line(searcher, rule, text, signs):
    chosen = {kind: [id_ for id_, sign in signs.items() if sign == kind] for kind in "gbu"}
    count = len(searcher.history())
    try:
        searcher.teach(text, chosen["g"], chosen["b"], unmark=chosen["u"], rule=rule, force=True)
        problem = ""
    except ValueError as error:
        problem = str(error)
    assert "\n" not in problem
    assert len(problem) < 300
    assert len(searcher.history()) == count + (not problem)
    assert_sound(searcher)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """An index of 10,200 vectors without pictures."""
    folder = tmp_path_factory.mktemp("large")
    model = TinyTestModel()
    EigenIndex.create(folder, model).close()
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    name = "vectors-1.faiss"
    digests = snapshot.write(folder, name, np.arange(1, 10_201), [vectors], 16)
    with contextlib.closing(Catalog.open(folder, write=True)) as catalog, catalog.writing():
        for number in range(10_200):
            catalog.put(Entry(0, f"{number}.jpg"))
        catalog.commit_snapshot(name, None, digests.packed, 1)
    return folder


@RULES
def test_ten_thousand_marks(large, profiles, rule):
    with open_profile(large) as searcher:
        lesson = searcher.teach(QUERY, range(1, 5001), range(5001, 10_001), rule=rule, force=True)
        assert len(lesson.good) + len(lesson.bad) == 10_000
        before = bits(searcher.teacher)
        with pytest.raises(TeachError, match="at most 10,000"):
            searcher.teach(QUERY, [10_001])
        searcher.teach(QUERY, [10_001], unmark=[1], force=True)
        with open_profile(large) as again:
            assert bits(again.teacher) == bits(searcher.teacher) != before
        assert searcher.undo().entry == 2
        assert bits(searcher.teacher) == before
        assert len(searcher.teacher.marks(QUERY, searcher.index)) == 10_000


def test_a_changed_spectrum_is_ranked_exactly_however_often(large, profiles):
    """Norms under a spectrum are kept; rankings must equal a plain computation all the same."""
    rng = np.random.default_rng(1)
    spectra = [np.exp(rng.normal(size=16)).astype(np.float32) for _ in range(7)]
    spectra[1][3] = 0
    spectra[2] *= -1
    with EigenIndex.open(large) as index:
        ids = index.ids()
        stored = index.vectors(ids)
        for turn in (0, 1, 0, 2, 3, 4, 5, 6, 0, 1, 6):
            q = rng.normal(size=16).astype(np.float32)
            truth = scores(q, stored, spectra[turn])
            found = index.search(q, 15, delta=spectra[turn])
            order = np.lexsort((ids, -truth))[:15]
            assert [id_ for id_, _ in found] == ids[order].tolist()
            np.testing.assert_allclose([s for _, s in found], truth[order], atol=1e-5)


def test_an_empty_index_can_be_asked(tmp_path, profiles):
    model = TinyTestModel()
    with EigenIndex.create(tmp_path / "index", model) as index:
        searcher = Searcher(index, model, Teacher.open(model, "me"))
        assert searcher.search("x") == []
        assert searcher.effects() == []
        with pytest.raises(TeachError, match="no searchable picture"):
            searcher.teach("x", [1])


# --- at once -------------------------------------------------------------------------------------


_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from teaching_cases import open_profile
from pathlib import Path
with open_profile(Path(sys.argv[2])) as searcher:
    for number in range(5):
        searcher.teach(f"{sys.argv[3]} {number}", [number + 1], [number + 20], force=True)
        searcher.teach("shared", [int(sys.argv[4]) + number], force=True)
"""


def test_two_processes_on_one_profile_take_turns(gallery, profiles):
    environment = {**os.environ, "ENN_PROFILES": str(profiles), "OMP_NUM_THREADS": "1"}
    with open_profile(gallery) as searcher:
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, str(CASES), str(gallery), name, first],
                env=environment,
            )
            for name, first in (("a", "30"), ("b", "45"))
        ]
        while any(writer.poll() is None for writer in writers):
            searcher.search(QUERY)  # reads beside them
            threading.Event().wait(0.02)
        assert [writer.wait() for writer in writers] == [0, 0]
        assert len(searcher.history()) == 20
        assert len(searcher.teacher) == 11
        assert len(searcher.teacher.marks("shared")) == 10
        with open_profile(gallery) as again:
            assert bits(again.teacher) == bits(searcher.teacher)
            lesson = again.teach("shared", [1], force=True)
            assert len(lesson.good) == 11


def test_many_threads_share_a_teacher(searcher, gallery):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                searcher.teach(f"query {number}", [number * 4 + turn + 1], [50], force=True)
                searcher.search(QUERY)
                searcher.teacher.marks(f"query {number}")
                if turn == 2:
                    searcher.undo()
                    searcher.preview("x", [1])
                    searcher.history()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    history = searcher.history()
    assert len(history) == 24
    assert sum(entry.active for entry in history) == 18
    with open_profile(gallery) as again:
        assert bits(again.teacher) == bits(searcher.teacher)


def test_what_another_process_does_is_seen_at_the_next_search(searcher, gallery):
    ids = ranked(searcher)
    with open_profile(gallery) as other:
        other.teach(QUERY, ids[40:44], ids[:4], force=True)
        assert ranked(searcher) == ranked(other) != ids
        assert not searcher.teacher.refresh()
        other.undo()
        assert searcher.teacher.refresh()
        assert ranked(searcher) == ids
        other.teach("more", [1], force=True)
        other.forget()
        assert searcher.history() == []


def test_a_profile_whose_file_is_deleted_is_new_again(searcher, profiles):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[40:44], ids[:4], force=True)
    shutil.rmtree(profiles)
    assert ranked(searcher) == ids
    assert searcher.history() == []
    assert not profiles.exists()
    assert searcher.teach(QUERY, ids[40:44], ids[:4], force=True).entry == 1
    assert len(searcher.history()) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(searcher, profiles):
    profiles.mkdir()
    profiles.chmod(0o500)
    with pytest.raises((RuntimeError, OSError)) as caught:
        searcher.teach(QUERY, [1], force=True)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_way_is_one_line(searcher, profiles):
    profiles.write_text("not a folder")
    with pytest.raises(RuntimeError) as caught:
        searcher.teach(QUERY, [1], force=True)
    assert "\n" not in str(caught.value)
    assert ranked(searcher)
