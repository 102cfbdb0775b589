"""Teaching: what a lesson changes, what it reports, what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from index_cases import TinyTestModel
from places import CASES
from teaching_cases import PICTURES, QUERY, bits, open_profile, ranked

import retrieval
from retrieval.queries import QueryError
from retrieval.search import Searcher, open_index
from retrieval.teach import fitting, guard
from retrieval.teach.fitting import Fit
from retrieval.teach.teacher import Teacher, TeachError

RULES = pytest.mark.parametrize("rule", ["adapter", "local"])


def mean_place(ids, chosen):
    return np.mean([ids.index(each) for each in chosen])


@RULES
def test_good_pictures_move_up_and_bad_ones_down(searcher, rule):
    before = ranked(searcher)
    good, bad = before[25:30], before[:3]
    lesson = searcher.teach(QUERY, good, bad, rule=rule, force=True)
    after = ranked(searcher)
    assert mean_place(after, good) < mean_place(before, good)
    assert mean_place(after, bad) > mean_place(before, bad)
    assert ranked(searcher, taught=False) == before
    assert (lesson.entry, lesson.query, lesson.rule, lesson.refused) == (1, QUERY, rule, None)
    assert (set(lesson.good), set(lesson.bad), lesson.ignored) == (set(good), set(bad), {})
    assert 0 <= lesson.overlap_total <= 1
    assert lesson.seconds > 0


@RULES
def test_it_is_remembered_by_the_next_process(gallery, searcher, rule):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[25:30], ids[:3], rule=rule, force=True)
    with open_profile(gallery) as again:
        assert bits(again.teacher) == bits(searcher.teacher)
        assert ranked(again) == ranked(searcher)
        assert again.teacher.rule == rule
    with open_profile(gallery, "someone-else") as other:
        assert ranked(other) == ids


@RULES
def test_a_preview_does_nothing_and_says_the_same(searcher, profiles, rule):
    ids = ranked(searcher)
    arguments = (QUERY, ids[25:30], ids[:3])
    shown = searcher.preview(*arguments, rule=rule)
    assert shown.entry is None
    assert not profiles.exists()
    assert ranked(searcher) == ids
    done = searcher.teach(*arguments, rule=rule, force=True)
    for name in ("good", "bad", "overlap", "overlap_total", "worse", "kept_text"):
        assert getattr(shown, name) == getattr(done, name)


def test_a_draft_can_be_looked_at(searcher):
    ids = ranked(searcher)
    _, mapping = searcher.teacher.draft(searcher.index, QUERY, ids[25:30], ids[:3])
    c = searcher.query_vector(QUERY)
    promised = [id_ for id_, _ in searcher.index.search(mapping.map(c[None])[0], PICTURES)]
    searcher.teach(QUERY, ids[25:30], ids[:3], force=True)
    assert ranked(searcher) == promised


def test_scores_stay_cosines(searcher):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[25:30], ids[:3], force=True)
    plain, taught = (searcher.query_vector(QUERY, taught=t) for t in (False, True))
    assert np.linalg.norm(taught) == pytest.approx(np.linalg.norm(plain), rel=1e-5)


def test_marks_of_one_query_add_up_and_replace_each_other(searcher):
    ids = ranked(searcher)
    searcher.teach(QUERY, [ids[20]], [ids[0], ids[1]], force=True)
    searcher.teach(f"  {QUERY.replace(' ', '  ')} ", [ids[0], ids[30]], force=True)
    lesson = searcher.teach(QUERY, unmark=[ids[20]], force=True)
    expected = {ids[0]: True, ids[30]: True, ids[1]: False}
    assert searcher.teacher.marks(QUERY) == expected
    assert searcher.teacher.marks(QUERY, searcher.index) == expected
    assert (set(lesson.good), set(lesson.bad)) == ({ids[0], ids[30]}, {ids[1]})
    assert len(searcher.teacher) == 1
    same_marks_at_once = open_profile(searcher.index.path, "other")
    with same_marks_at_once:
        same_marks_at_once.teach(QUERY, [ids[0], ids[30]], [ids[1]], force=True)
        # In another order of marks the fit may round otherwise.
        np.testing.assert_allclose(
            same_marks_at_once.query_vector(QUERY), searcher.query_vector(QUERY), atol=2e-3
        )


@RULES
def test_without_any_marks_left_a_query_is_as_before(searcher, rule):
    ids = ranked(searcher)
    searcher.teach(QUERY, [ids[20]], rule=rule, force=True)
    searcher.teach(QUERY, unmark=[ids[20]], force=True)
    assert ranked(searcher) == ids
    assert len(searcher.teacher) == 0
    assert searcher.effects() == []


def test_composite_queries_can_be_taught(searcher):
    query = "2:red thing - blue thing"
    before = ranked(searcher, query)
    searcher.teach(query, before[30:33], before[:2], force=True)
    after = ranked(searcher, query)
    assert mean_place(after, before[30:33]) < mean_place(before, before[30:33])


def test_a_picture_as_a_query_is_not_mapped(searcher, gallery):
    ids = ranked(searcher)
    before = searcher.query_vector(image=gallery / "7.png")
    both = searcher.query_vector(QUERY, gallery / "7.png")
    similar = [hit.id for hit in searcher.similar(3, k=9)]
    searcher.teach(QUERY, ids[25:30], ids[:3], force=True)
    np.testing.assert_array_equal(searcher.query_vector(image=gallery / "7.png"), before)
    assert [hit.id for hit in searcher.similar(3, k=9)] == similar
    assert not np.allclose(searcher.query_vector(QUERY, gallery / "7.png"), both, atol=1e-3)


def test_under_a_changed_spectrum_a_picture_still_finds_itself(searcher, gallery):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[25:30], ids[:3], rule="local", force=True)
    assert searcher.teacher.delta is not None
    best = searcher.search(image=gallery / "7.png", k=1)[0]
    assert best.path.name == "7.png"
    assert best.score == pytest.approx(1, abs=1e-5)


def test_effects_are_ranks_without_and_with_teaching(searcher):
    ids = ranked(searcher)
    good, bad = ids[25:30], ids[:3]
    searcher.teach(QUERY, good, bad, force=True)
    searcher.teach("something else", [5], force=True)
    first, second = searcher.effects()
    after = ranked(searcher)
    assert (first.query, first.good, first.bad) == (QUERY, 5, 3)
    # The stored query is rounded to half precision: neighbours may swap places.
    assert first.good_before == pytest.approx(mean_place(ids, good) + 1, abs=0.5)
    assert first.good_after == pytest.approx(mean_place(after, good) + 1, abs=0.5)
    assert first.bad_before == pytest.approx(mean_place(ids, bad) + 1, abs=0.5)
    assert first.bad_after == pytest.approx(mean_place(after, bad) + 1, abs=0.5)
    assert math.isnan(second.bad_before)


# --- the guard -----------------------------------------------------------------------------------


def test_a_lesson_that_hurts_others_is_refused_unless_forced(searcher, profiles, monkeypatch):
    ids = ranked(searcher)
    monkeypatch.setattr(guard, "LEAST_OVERLAP", 1.01)  # nothing is good enough
    lesson = searcher.teach(QUERY, ids[40:45], ids[:3])
    assert lesson.entry is None
    assert "%" in lesson.refused
    assert "\n" not in lesson.refused
    assert not profiles.exists()  # not even an empty profile
    assert ranked(searcher) == ids
    assert searcher.preview(QUERY, ids[40:45], ids[:3]).refused == lesson.refused
    forced = searcher.teach(QUERY, ids[40:45], ids[:3], force=True)
    assert (forced.entry, forced.refused) == (1, None)
    assert searcher.teach("more", ids[40:45], ids[:3]).refused
    assert len(searcher.history()) == 1


def test_a_lesson_that_contradicts_earlier_ones_is_announced(searcher):
    ids = ranked(searcher)
    searcher.teach("dog", ids[:6], ids[30:36], force=True)
    # Nearly the same direction, opposite marks: whoever teaches this must hear of it.
    searcher.model.text_vectors = lambda texts: TinyTestModel.text_vectors(
        searcher.model, ["dog" if text == "hound" else text for text in texts]
    )
    lesson = searcher.preview("hound", ids[30:36], ids[:6])
    assert lesson.worse
    query, before, after = lesson.worse[0]
    assert query == "dog"
    assert before > after + 0.1
    assert "earlier" in lesson.refused


def test_a_query_whose_words_do_better_keeps_them(searcher, monkeypatch):
    def keep(c, good, bad, collection=None):
        return Fit(np.asarray(c) / np.linalg.norm(c), True, 0.8, 0.7)

    monkeypatch.setattr(fitting, "fit_direction", keep)
    ids = ranked(searcher)
    lesson = searcher.teach(QUERY, ids[:2])
    assert (lesson.kept_text, lesson.marks_before, lesson.marks_after) == (True, 0.8, 0.7)
    np.testing.assert_allclose(
        searcher.query_vector(QUERY), searcher.query_vector(QUERY, taught=False), atol=1e-3
    )
    assert searcher.history()[0].kept_text


# --- what cannot be taught -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "unmark", "message"),
    [
        ([], [], [], "nothing is marked"),
        ([1], [1], [], "1 cannot be both good and bad"),
        ([1], [], [1], "1 cannot be both good and unmark"),
        ([10**9], [], [], "no searchable picture has the id 1000000000"),
        ([], [61, 62, 63, 64, 65, 66, 67], [], "61, 62, 63, 64, 65 and 2 more"),
        ([-1], [], [], "no id"),
        ([2**70], [], [], "no id"),
        ([1.5], [], [], "whole numbers"),
        (["1"], [], [], "whole numbers"),
        ("12", [], [], "list of ids"),
        (5, [], [], "list of ids"),
        ([], [], [7], "7 has no mark"),
        (range(10_001), [], [], "at most 10,000"),
    ],
)
def test_marks_that_make_no_sense_are_refused_in_one_line(
    searcher, profiles, good, bad, unmark, message
):
    for call in (searcher.teach, searcher.preview):
        with pytest.raises(TeachError, match=message) as caught:
            call(QUERY, good, bad, unmark=unmark)
        assert "\n" not in str(caught.value)
    assert not profiles.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("x" * 100_000, "100,000 characters; at most 10,000"),
        ("a \ud800 b", "no text"),
        (None, "only words"),
        (" - ", "empty"),
        ("red - red", "cancel"),
    ],
)
def test_queries_that_cannot_be_taught_are_refused_in_one_line(searcher, profiles, text, message):
    with pytest.raises((TeachError, QueryError), match=message) as caught:
        searcher.teach(text, [1])
    assert "\n" not in str(caught.value)
    assert not profiles.exists()


def test_a_query_without_a_direction_is_refused(searcher):
    for value in (np.nan, 0.0):
        searcher.model.text_vectors = lambda texts, value=value: np.full(
            (len(texts), 16), value, np.float32
        )
        with pytest.raises(TeachError, match="no direction"):
            searcher.teach(QUERY, [1])


def test_a_profile_keeps_to_one_rule(searcher):
    with pytest.raises(TeachError, match="adapter, local"):
        searcher.teach(QUERY, [1], rule="loco")
    searcher.teach(QUERY, [1], rule="local", force=True)
    with pytest.raises(TeachError, match="'local'"):
        searcher.teach(QUERY, [2], rule="adapter")
    assert searcher.teach(QUERY, [2], force=True).rule == "local"
    searcher.forget()
    assert searcher.teach(QUERY, [2], rule="adapter", force=True).rule == "adapter"


def test_without_a_profile_nothing_can_be_taught(gallery, profiles):
    with open_index(gallery, TinyTestModel()) as plain:
        for call in (
            lambda: plain.teach("x", [1]),
            lambda: plain.preview("x", [1]),
            plain.undo,
            plain.history,
            plain.forget,
            plain.effects,
        ):
            with pytest.raises(TeachError, match="profile="):
                call()
    assert not profiles.exists()


# --- what is touched -----------------------------------------------------------------------------


def test_opening_and_looking_writes_nothing(gallery, profiles):
    with open_index(gallery, TinyTestModel(), profile="me") as opened:
        opened.search("x")
        assert opened.history() == []
        assert opened.effects() == []
        assert opened.forget() == 0
        assert opened.teacher.marks("x") == {}
        assert opened.teacher.rule is None
        with pytest.raises(TeachError, match="nothing"):
            opened.undo()
        with pytest.raises(TeachError, match="nothing"):
            opened.teacher.export(gallery / "out.json")
    assert not profiles.exists()


def test_a_search_without_a_profile_loads_no_teaching(gallery):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import retrieval\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from index_cases import TinyTestModel\n"
        "with retrieval.open_index(sys.argv[1], TinyTestModel()) as photos: photos.search('x')\n"
        "assert not {'retrieval.teach.teacher', 'enn_core.lessons.journal'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, gallery, CASES], check=True, timeout=120)


def test_one_index_serves_several_profiles(searcher, gallery):
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[25:30], ids[:3], force=True)
    with Teacher.open(searcher.model, "other") as teacher:
        other = searcher.with_teacher(teacher)
        assert isinstance(other, Searcher)
        assert other.index is searcher.index
        assert ranked(other) == ids
        assert ranked(searcher.with_teacher(None)) == ids
        assert ranked(searcher) != ids


def test_the_package_exports_what_teaching_needs():
    for name in ("Teacher", "TeachError", "Lesson", "HistoryEntry", "Effect", "ProfileError"):
        assert getattr(retrieval, name).__name__ == name
