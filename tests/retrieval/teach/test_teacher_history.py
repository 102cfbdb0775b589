"""History: undo, forget, export and import, and marks of pictures that are gone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from index_cases import TinyTestModel, photo
from teaching_cases import QUERY, bits, make_gallery, open_profile, ranked

from enn_core.lessons.errors import JournalCorrupt, JournalMismatch
from retrieval.index.eigen_index import EigenIndex
from retrieval.teach.teacher import Teacher, TeachError

RULES = pytest.mark.parametrize("rule", ["adapter", "local"])


@RULES
def test_undo_restores_the_earlier_bits(searcher, rule):
    ids = ranked(searcher)
    states = [bits(searcher.teacher)]
    lessons = [(QUERY, ids[20:23], ids[:2]), ("other", ids[4:6], []), (QUERY, [ids[50]], [])]
    for text, good, bad in lessons:
        searcher.teach(text, good, bad, rule=rule, force=True)
        states.append(bits(searcher.teacher))
    assert len(set(states)) == 4
    for count in (2, 1, 0):
        undone = searcher.undo()
        assert (undone.entry, undone.active) == (count + 1, False)
        assert bits(searcher.teacher) == states[count]
    with pytest.raises(TeachError, match="nothing left"):
        searcher.undo()
    assert [entry.active for entry in searcher.history()] == [False] * 3


def test_undoing_another_query_leaves_the_first_as_taught_alone(searcher, gallery):
    ids = ranked(searcher)
    searcher.teach("other", ids[4:6], ids[9:12], force=True)
    searcher.teach(QUERY, ids[20:23], ids[:2], force=True)
    searcher.undo(1)
    with open_profile(gallery, "alone") as alone:
        alone.teach(QUERY, ids[20:23], ids[:2], force=True)
        assert bits(alone.teacher) == bits(searcher.teacher)


@RULES
def test_undoing_an_early_lesson_fits_the_later_ones_again(searcher, gallery, rule):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[20:23], ids[:2], rule=rule, force=True)
    searcher.teach(QUERY, [ids[40]], [ids[5]], rule=rule, force=True)
    searcher.undo(1)
    with open_profile(gallery, "alone") as alone:
        alone.teach(QUERY, [ids[40]], [ids[5]], rule=rule, force=True)
        assert bits(alone.teacher) == bits(searcher.teacher)
    with open_profile(gallery) as again:
        assert bits(again.teacher) == bits(searcher.teacher)
    assert [entry.entry for entry in searcher.history()] == [1, 2]
    assert searcher.teacher.marks(QUERY) == {ids[40]: True, ids[5]: False}
    searcher.undo(2)
    assert ranked(searcher) == ids


def test_an_early_lesson_cannot_be_undone_without_the_pictures_of_the_others(searcher, tmp_path):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[20:23], ids[:2], force=True)
    searcher.teach(QUERY, [ids[40]], force=True)
    before = bits(searcher.teacher)
    elsewhere = make_gallery(tmp_path / "elsewhere", 5, first=100)
    with open_profile(elsewhere) as other:
        for call in (lambda: other.undo(1), lambda: other.teacher.undo(1)):
            with pytest.raises(TeachError, match="index that they were marked in"):
                call()
        assert bits(other.teacher) == before
        assert [entry.active for entry in other.history()] == [True, True]
        other.undo(2)  # needs no pictures
    searcher.undo(1)
    assert ranked(searcher) == ids


@pytest.mark.parametrize(("entry", "message"), [(7, "no lesson 7"), (1, "undone already")])
def test_what_cannot_be_undone_says_so(searcher, entry, message):
    searcher.teach(QUERY, [1], force=True)
    searcher.teach(QUERY, [2], force=True)
    searcher.undo(1)
    with pytest.raises(TeachError, match=message):
        searcher.undo(entry)


def test_history_tells_what_was_asked_for(searcher):
    searcher.teach(QUERY, [3, 1], [2], force=True)
    searcher.teach(QUERY, [2], unmark=[3], force=True)
    first, second = searcher.history()
    assert (set(first.good), first.bad, first.unmarked) == ({1, 3}, (2,), ())
    assert (second.good, second.bad, second.unmarked) == ((2,), (), (3,))
    assert first.query == QUERY
    assert first.at <= second.at
    assert first.active
    assert second.active


# --- forgetting ----------------------------------------------------------------------------------


def test_forgetting_a_query_is_as_if_it_was_never_taught(searcher, gallery, profiles):
    ids = ranked(searcher)
    secret = "a very private query"
    searcher.teach("other", ids[4:6], ids[9:12], force=True)
    searcher.teach(secret, ids[20:23], ids[:2], force=True)
    searcher.teach(secret, [ids[30]], force=True)
    searcher.undo(2)
    assert searcher.forget(f" {secret}  ") == 2
    assert [entry.query for entry in searcher.history()] == ["other"]
    assert searcher.forget(secret) == 0
    for file in profiles.rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes()
    with open_profile(gallery, "alone") as alone:
        alone.teach("other", ids[4:6], ids[9:12], force=True)
        assert bits(alone.teacher) == bits(searcher.teacher)
    assert searcher.forget() == 1
    assert searcher.history() == []
    assert ranked(searcher) == ids


def test_numbers_of_forgotten_lessons_are_not_used_again(searcher):
    searcher.teach(QUERY, [1], force=True)
    searcher.forget()
    assert searcher.teach(QUERY, [1], force=True).entry == 2


# --- pictures that change ------------------------------------------------------------------------


def test_marks_of_deleted_and_replaced_pictures_are_left_out(tmp_path, profiles):
    root = make_gallery(tmp_path / "photos", 12)
    with open_profile(root) as searcher:
        by_name = {entry.path: entry.id for entry in searcher.index.entries()}
        deleted, replaced, kept = (by_name[f"{seed}.png"] for seed in (0, 1, 2))
        searcher.teach(QUERY, [deleted, replaced, kept], [by_name["3.png"]], force=True)
        taught = bits(searcher.teacher)
        (root / "0.png").unlink()
        photo(root / "1.png", 77)
        searcher.index.update(root, searcher.model)
        assert bits(searcher.teacher) == taught
        assert searcher.teacher.marks(QUERY) == {
            deleted: True, replaced: True, kept: True, by_name["3.png"]: False
        }  # fmt: skip
        assert searcher.teacher.marks(QUERY, searcher.index) == {
            kept: True, by_name["3.png"]: False
        }  # fmt: skip
        (effect,) = searcher.effects()
        assert (effect.good, effect.bad) == (1, 1)
        with pytest.raises(TeachError, match=f"the id {deleted}"):
            searcher.teach(QUERY, [deleted])
        lesson = searcher.teach(QUERY, [by_name["4.png"]], force=True)
        assert set(lesson.good) == {kept, by_name["4.png"]}
        assert set(lesson.ignored) == {deleted, replaced}
        assert "another picture" in lesson.ignored[replaced]
        # The replaced picture is a new one, with a mark of its own.
        lesson = searcher.teach(QUERY, [], [replaced], force=True)
        assert replaced in lesson.bad
        searcher.teach(QUERY, unmark=[replaced, deleted], force=True)
        assert set(searcher.teacher.marks(QUERY)) == {kept, by_name["3.png"], by_name["4.png"]}


def test_what_was_learned_elsewhere_is_kept_where_its_pictures_are_not(searcher, tmp_path):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[40:45], ids[:5], force=True)
    c, taught = (searcher.query_vector(QUERY, taught=t) for t in (False, True))
    elsewhere = make_gallery(tmp_path / "elsewhere", 20, first=100)
    with open_profile(elsewhere) as other:
        lesson = other.teach(QUERY, [3], force=True)
        assert len(lesson.ignored) == 10 - (3 in lesson.ignored)
        after = other.query_vector(QUERY)
    assert after @ taught > after @ c


def test_a_rebuilt_index_knows_the_same_pictures(tmp_path, profiles):
    root = make_gallery(tmp_path / "photos", 20)
    with open_profile(root) as searcher:
        ids = ranked(searcher)
        searcher.teach(QUERY, ids[8:11], ids[:2], force=True)
        expected = ranked(searcher)
        names = {id_: searcher.index.entry(id_).path for id_ in ids}
    shutil.rmtree(root / ".enn-index")
    model = TinyTestModel()
    EigenIndex.create(root / ".enn-index", model, root=root).close()
    with open_profile(root) as again:
        again.index.update(root, model)
        found = [again.index.entry(id_).path for id_ in ranked(again)]
    assert found == [names[id_] for id_ in expected]


# --- files ---------------------------------------------------------------------------------------


@RULES
def test_export_and_import_carry_everything(searcher, gallery, tmp_path, rule):
    ids = ranked(searcher)
    for text, good, bad in [(QUERY, ids[20:23], ids[:2]), ("b", ids[3:5], []), ("b", [7], [8])]:
        searcher.teach(text, good, bad, rule=rule, force=True)
    searcher.undo(2)
    file = tmp_path / "taught.json"
    assert searcher.teacher.export(file) == 3
    with open_profile(gallery, "copy") as copy:
        assert copy.teacher.import_(file) >= 3
        assert bits(copy.teacher) == bits(searcher.teacher)
        assert [e.active for e in copy.history()] == [True, False, True]
        assert copy.teacher.import_(file) == 0
        assert bits(copy.teacher) == bits(searcher.teacher)


def test_lessons_of_two_files_come_together(searcher, gallery, tmp_path):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[20:23], ids[:2], force=True)
    searcher.teach("mine", [ids[30]], force=True)
    file = tmp_path / "taught.json"
    searcher.teacher.export(file)
    with open_profile(gallery, "copy") as copy:
        copy.teach(QUERY, [ids[50]], [ids[4]], force=True)
        copy.teacher.import_(file)
        assert len(copy.teacher) == 2
        assert set(copy.teacher.marks(QUERY)) == {*ids[20:23], *ids[:2], ids[50], ids[4]}
        lesson = copy.teach(QUERY, [ids[51]], force=True)
        assert set(lesson.good) == {*ids[20:23], ids[50], ids[51]}


def test_a_file_by_another_rule_or_model_is_refused(searcher, gallery, tmp_path):
    searcher.teach(QUERY, [1], [2], force=True)
    file = tmp_path / "taught.json"
    searcher.teacher.export(file)
    with open_profile(gallery, "copy") as copy:
        copy.teach(QUERY, [1], [2], rule="local", force=True)
        before = bits(copy.teacher)
        with pytest.raises(TeachError, match="local, lookup"):
            copy.teacher.import_(file)
        assert bits(copy.teacher) == before
        assert len(copy.history()) == 1
    with Teacher.open(TinyTestModel(seed=1), "third") as third, pytest.raises(JournalMismatch):
        third.import_(file)


def damage(change):
    def damaged(content):
        change(content["events"][0])

    return damaged


def set_array(event, values):
    """A direction that is none."""
    import base64

    data = np.asarray(values, "<f2")
    event["arrays"]["b"] = {
        "dtype": "float16",
        "shape": list(data.shape),
        "data": base64.b64encode(data.tobytes()).decode(),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(kind="lesson"),
        lambda e: e.update(subject="  spaced   out "),
        lambda e: e.update(subject=""),
        lambda e: e["details"].update(rule="loco"),
        lambda e: e["details"].pop("rule"),
        lambda e: e["details"].update(rule=["adapter"]),
        lambda e: e["details"].update(marks=5),
        lambda e: e["details"].update(marks=[[1, "x"]]),
        lambda e: e["details"].update(marks=[[True, "x", 1]]),
        lambda e: e["details"].update(marks=[[2**80, "x", 1]]),
        lambda e: e["details"].update(marks=[[-1, "x", 1]]),
        lambda e: e["details"].update(marks=[[1, "x" * 1000, 1]]),
        lambda e: e["details"].update(marks=[[1, "x", 2]]),
        lambda e: e["details"].update(marks=[[1, "x", 1]] * 30_001),
        lambda e: e["details"].update(rule="local"),
        lambda e: e["details"].update(marks_left="many"),
        lambda e: e["details"].update(kept_text="yes"),
        lambda e: e["arrays"].pop("c"),
        lambda e: e["arrays"].update(extra=e["arrays"]["c"]),
        lambda e: set_array(e, np.full(16, 1000)),
        lambda e: set_array(e, np.zeros(16)),
        lambda e: set_array(e, np.ones((2, 16)) / 4),
    ],
)
def test_a_hostile_file_is_refused_and_leaves_nothing(searcher, gallery, tmp_path, change):
    searcher.teach(QUERY, [1, 2], [3], force=True)
    file = tmp_path / "taught.json"
    searcher.teacher.export(file)
    content = json.loads(file.read_text())
    del content["sha256"]
    damage(change)(content)
    file.write_text(json.dumps(content))
    with open_profile(gallery, "copy") as copy:
        with pytest.raises(JournalCorrupt) as caught:
            copy.teacher.import_(file)
        assert "\n" not in str(caught.value)
        assert not copy.teacher.path.exists()
        copy.teach(QUERY, [5], force=True)
        before = bits(copy.teacher)
        with pytest.raises(JournalCorrupt):
            copy.teacher.import_(file)
        assert bits(copy.teacher) == before
        assert len(copy.history()) == 1


def test_importing_no_file_makes_no_profile(searcher, tmp_path, profiles):
    from enn_core.lessons.errors import JournalError

    with pytest.raises(JournalError):
        searcher.teacher.import_(tmp_path / "missing.json")
    assert not profiles.exists()
