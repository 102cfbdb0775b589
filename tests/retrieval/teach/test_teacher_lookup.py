"""Profiles under the rule "lookup": pictures as questions, reach, and former profiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from teaching_cases import QUERY, bits, open_profile, ranked

from enn_core.lessons.errors import JournalCorrupt
from retrieval.teach import guard
from retrieval.teach.teacher import TeachError


def places(searcher, ids, **asked):
    found = [hit.id for hit in searcher.search(**asked, k=len(searcher.index))]
    return np.mean([found.index(id_) for id_ in ids])


def test_a_search_with_a_picture_can_be_taught_and_undone(searcher, gallery):
    picture = gallery / "7.png"
    ids = [hit.id for hit in searcher.search(image=picture, k=60)]
    words = searcher.query_vector(QUERY)
    before = searcher.query_vector(image=picture)
    lesson = searcher.teach(image=picture, good=ids[30:35], bad=ids[1:4], force=True)
    assert (lesson.shown, lesson.rule) == ("[7.png]", "lookup")
    assert places(searcher, ids[30:35], image=picture) < 30
    # Known by its content: bytes, another name, and as "more like this".
    for image in (picture.read_bytes(), str(picture)):
        assert [h.id for h in searcher.search(image=image)] == [
            h.id for h in searcher.search(image=picture)
        ]
    np.testing.assert_array_equal(searcher.query_vector(QUERY), words)
    assert searcher.answering(image=picture) == [("[7.png]", pytest.approx(1, abs=1e-3))]
    assert searcher.answering(QUERY) == []
    searcher.undo()
    np.testing.assert_array_equal(searcher.query_vector(image=picture), before)


def test_bytes_files_and_indexed_pictures_share_their_lessons(searcher, gallery):
    picture = gallery / "7.png"
    own = searcher.search(image=picture, k=1)[0].id
    lines = {
        searcher.teach(image=picture, good=[3], force=True).query,
        searcher.teach(image=picture.read_bytes(), good=[4], force=True).query,
        searcher.teach(like=own, good=[5], force=True).query,
    }
    assert len(lines) == 1
    assert searcher.teacher.marks(lines.pop()) == {3: True, 4: True, 5: True}


def test_words_beside_a_picture_are_a_query_of_their_own(searcher, gallery):
    picture = gallery / "7.png"
    ids = [hit.id for hit in searcher.search(QUERY, image=picture, k=60)]
    alone, words = searcher.query_vector(image=picture), searcher.query_vector(QUERY)
    lesson = searcher.teach(QUERY, ids[30:35], ids[:3], image=picture, force=True)
    assert lesson.shown == f"[7.png] {QUERY}"
    assert places(searcher, ids[30:35], text=QUERY, image=picture) < 28
    np.testing.assert_array_equal(searcher.query_vector(image=picture), alone)
    np.testing.assert_array_equal(searcher.query_vector(QUERY), words)
    # It keeps its answer when its words are taught something else.
    held = searcher.query_vector(QUERY, picture)
    searcher.teach(QUERY, ids[20:25], ids[30:33], force=True)
    np.testing.assert_allclose(searcher.query_vector(QUERY, picture), held, atol=1e-3)


def test_lessons_on_pictures_survive_a_replay_an_export_and_a_refit(searcher, gallery, tmp_path):
    picture = gallery / "7.png"
    searcher.teach(image=picture, good=[3, 4], bad=[9], force=True)
    searcher.teach(image=picture, good=[5], force=True)
    searcher.teach("snow", good=[5], force=True)
    held = searcher.query_vector(image=picture)
    searcher.teacher.export(tmp_path / "out.json")
    with open_profile(gallery, "other") as other:
        assert other.teacher.import_(tmp_path / "out.json") == 3
        np.testing.assert_array_equal(other.query_vector(image=picture), held)
        # Another lesson stands on what is left of the first two.
        other.undo(1)
        assert other.answering(image=picture)[0][0] == "[7.png]"
    with open_profile(gallery) as again:
        assert bits(again.teacher) == bits(searcher.teacher)
        np.testing.assert_array_equal(again.query_vector(image=picture), held)
    assert [entry.shown for entry in searcher.history()] == ["[7.png]", "[7.png]", "snow"]
    assert searcher.forget(searcher.history()[0].query) == 2
    assert searcher.answering(image=picture) == []


@pytest.mark.parametrize("image", [b"no picture", b""])
def test_what_is_no_picture_is_refused_in_a_line(searcher, image):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        searcher.teach(image=image, good=[1])
    assert searcher.history() == []


def test_questions_that_are_none_are_refused(searcher, gallery):
    for asked in ({}, {"like": 4711}, {"text": QUERY, "like": 3}, {"text": " "}):
        with pytest.raises(TeachError):
            searcher.teach(**asked, good=[1])


def test_an_odd_file_name_is_told_as_one_line(searcher, tmp_path):
    odd = tmp_path / "a\nb] c\x1b[31m.png"
    Image.new("RGB", (40, 40), "red").save(odd)
    lesson = searcher.teach(image=odd, good=[1, 2], force=True)
    assert lesson.shown.isprintable()
    assert searcher.history()[0].shown == lesson.shown


@pytest.mark.parametrize("rule", ["adapter", "local"])
def test_other_rules_know_words_alone(searcher, gallery, rule):
    searcher.teach(QUERY, [1, 2], [3], rule=rule, force=True)
    with pytest.raises(TeachError, match="words alone"):
        searcher.teach(image=gallery / "7.png", good=[1])


# --- what a lesson reaches -----------------------------------------------------------------------


def test_a_lesson_tells_which_generic_queries_move(searcher):
    ids = ranked(searcher)
    lesson = searcher.teach("a snake", ids[20:25], ids[:3], force=True)
    names = dict(lesson.reaches)
    assert lesson.untouched + len(names) == len(guard.protected_queries())
    assert names  # "a snake" is one of them
    moved = [
        name
        for name in names
        if not np.array_equal(
            searcher.query_vector(name), searcher.query_vector(name, taught=False)
        )
    ]
    assert moved == list(names)
    assert searcher.answering(moved[0])[0][0] == "a snake"


# --- former profiles -----------------------------------------------------------------------------


def taught_before(searcher) -> None:
    ids = ranked(searcher)
    searcher.teach(QUERY, ids[20:25], ids[:3], rule="adapter", force=True)
    searcher.teach("snow", ids[30:33], ids[4:6], force=True)


def test_a_former_profile_keeps_its_rule_until_it_is_upgraded(searcher, gallery):
    taught_before(searcher)
    assert searcher.teacher.rule == "adapter"
    before = bits(searcher.teacher)
    preview = searcher.teacher.upgrade(searcher.index, preview=True)
    assert (preview.queries, preview.done) == (2, False)
    assert bits(searcher.teacher) == before
    with open_profile(gallery) as again:
        assert bits(again.teacher) == before
    own = searcher.query_vector(QUERY)
    done = searcher.teacher.upgrade(searcher.index)
    assert (done.queries, done.overlap, done.done) == (2, preview.overlap, True)
    assert searcher.teacher.rule == "lookup"
    np.testing.assert_allclose(searcher.query_vector(QUERY), own, atol=2e-3)
    assert [entry.rule for entry in searcher.history()] == ["adapter", "adapter"]
    with pytest.raises(TeachError, match="nothing to upgrade"):
        searcher.teacher.upgrade(searcher.index)
    # Another process sees it, and an undo of a former lesson is one of the look-up.
    with open_profile(gallery) as again:
        assert bits(again.teacher) == bits(searcher.teacher)
        again.undo(1)
        assert again.teacher.rule == "lookup"
        np.testing.assert_array_equal(
            again.query_vector(QUERY), again.query_vector(QUERY, taught=False)
        )


def test_an_upgraded_profile_is_exported_and_erased_as_a_whole(searcher, gallery, tmp_path):
    taught_before(searcher)
    searcher.teacher.upgrade(searcher.index)
    searcher.teacher.export(tmp_path / "out.json")
    with open_profile(gallery, "other") as other:
        other.teacher.import_(tmp_path / "out.json")
        assert other.teacher.rule == "lookup"
        assert bits(other.teacher) == bits(searcher.teacher)
    assert searcher.forget() == 2
    assert searcher.teacher.rule is None


def test_imports_never_change_the_rule_of_a_profile(searcher, gallery, tmp_path):
    taught_before(searcher)
    searcher.teacher.export(tmp_path / "old.json")
    with open_profile(gallery, "new") as new:
        new.teach("a cat", [1], [2], force=True)
        new.teacher.export(tmp_path / "new.json")
        new.teacher.import_(tmp_path / "old.json")  # looked up beside the others
        assert new.teacher.rule == "lookup"
        assert len(new.history()) == 3
    before = bits(searcher.teacher)
    with pytest.raises(TeachError, match="upgrade --lessons"):
        searcher.teacher.import_(tmp_path / "new.json")
    assert bits(searcher.teacher) == before


@pytest.mark.parametrize(
    "change",
    [
        {"near": [0.9, 0.1]},
        {"near": [0.1]},
        {"near": ["x", "y"]},
        {"near": None},
        {"kind": "sound"},
        {"picture": 7},
        {"picture": "x" * 1000},
        {"rule": "adapter"},
    ],
)
def test_a_file_with_nonsense_about_a_picture_is_refused(searcher, gallery, tmp_path, change):
    searcher.teach(image=gallery / "7.png", good=[3], force=True)
    searcher.teacher.export(tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    details = content["events"][0]["details"]
    content["events"][0]["details"] = details | change
    del content["sha256"]
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps(content))
    with open_profile(gallery, "other") as other:
        with pytest.raises(JournalCorrupt, match="nothing was imported"):
            other.teacher.import_(forged)
        content["events"][0]["details"] = details
        forged.write_text(json.dumps(content))
        assert other.teacher.import_(forged) == 1  # it was the change that was refused
