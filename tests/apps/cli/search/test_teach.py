"""`enn search teach`: the real command on real photos; and mistakes at all that belongs to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from animal_photos import BAD, GOOD, QUERY, everything_below, ranking
from cli_cases import document, refused, run
from hypothesis import given
from hypothesis import strategies as st

from apps.cli.options import ManyValues
from apps.cli.search.teach import _ids

pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("here")


def test_five_marks_are_learned_remembered_and_undone(good, bad, ids, no_guard):
    before = ranking()
    assert run("query", QUERY).err == ""
    done = run("teach", QUERY, "--good", good, "--bad", bad)
    assert done.code == 0, done.err
    assert f"lesson 1 of profile default: '{QUERY}' (3 good, 2 bad)" in done.out
    assert "other searches: " in done.out
    row = next(line for line in done.out.splitlines() if "gc_mountain_goat" in line)
    old, new = before.index(ids["gc_mountain_goat"]) + 1, ranking().index(ids["gc_mountain_goat"])
    assert row.split()[:5] == [str(ids["gc_mountain_goat"]), str(old), "->", str(new + 1), "good"]
    after = document("query", QUERY, "-k", "99")
    assert (after["profile"], after["changed"]) == ("default", True)
    places = {Path(hit["path"]).stem: i for i, hit in enumerate(after["results"])}
    assert max(places[name] for name in GOOD) < min(places[name] for name in BAD)
    # A word of it for people, on stderr, and the way to see it without.
    said = run("query", *QUERY.split())
    assert said.err == (
        f"changed by what profile default was taught about '{QUERY}' (100%); "
        "--no-profile shows it without\n"
    )
    assert after["follows"] == [{"query": QUERY, "share": 1.0}]
    plain = run("query", QUERY, "--no-profile")
    assert (plain.code, plain.err) == (0, "")
    assert ranking(QUERY, "--no-profile") == before
    assert ranking(QUERY, "--profile", "default") == ranking()
    # In other words.
    assert ranking("beasts with horns") != ranking("beasts with horns", "--no-profile")

    undone = run("undo")
    assert undone.code == 0
    assert f"lesson 1 of profile default is undone: '{QUERY}': good {good}; bad {bad}" in undone.out
    assert ranking() == before
    assert "nothing left to undo" in refused("undo")
    assert "undone already" in refused("undo", "1")


def test_json_of_a_lesson_tells_everything(good, bad, ids, no_guard):
    told = document("teach", QUERY, "--good", good, "--bad", bad, "-k", "99")
    assert (told["lesson"], told["profile"], told["rule"]) == (1, "default", "lookup")
    assert (told["preview"], told["refused"], told["ignored"]) == (False, None, [])
    assert ",".join(map(str, told["good"])) == good
    before, after = ranking(QUERY, "--no-profile"), ranking()
    expected = [
        (id_, before.index(id_) + 1, place)
        for place, id_ in enumerate(after, 1)
        if before.index(id_) + 1 != place
    ]
    assert [(m["id"], m["before"], m["after"]) for m in told["moved"]] == expected
    marks = {move["id"]: move["mark"] for move in told["moved"]}
    assert {mark for id_, mark in marks.items() if id_ in told["bad"]} <= {"bad"}
    assert all(Path(move["path"]).is_file() for move in told["moved"])
    # Marks of one lesson are too few for a test of their own; JSON has no NaN.
    again = document("teach", "something else", "--good", str(ids["gc_duck"]))
    assert (again["lesson"], again["marks_before"]) == (2, None)


def test_what_the_model_does_not_read_is_told(good, monkeypatch, no_guard):
    from retrieval.model import loading as models

    # Counted per model, which here outlives the command.
    monkeypatch.setattr(models.load(models.MINI)._text._minilm, "truncated", 0)
    done = run("teach", "a long story about a dog " * 100, "--good", good)
    assert done.code == 0
    assert "warning: the query is longer than the" in done.err


def test_few_places_are_compared_but_marked_pictures_always(good, ids, no_guard):
    last = ranking()[-1]
    told = document("teach", QUERY, "--good", str(last), "-k", "1")
    assert last in [move["id"] for move in told["moved"]]
    assert run("teach", QUERY, "--good", str(last)).out.count("nothing moves among the best 10")


@pytest.mark.parametrize("form", ["commas", "words", "repeated", "spaces", "mixed"])
def test_marks_can_be_written_as_one_likes(form, good, ids):
    a, b, c = good.split(",")
    given = {
        "commas": ["--good", f"{a},{b},{c}"],
        "words": [f"--good={a}", b, c],
        "repeated": ["--good", a, "--good", b, "--good", c],
        "spaces": ["--good", f" {a} {b},  {c} "],
        "mixed": ["--good", f"{a},", b, "--good", f"{c},{a}"],
    }[form]
    told = document("teach", "--preview", *given, "--bad", str(ids["gc_duck"]), "with", "horns")
    assert ",".join(map(str, told["good"])) == good
    assert (told["bad"], told["query"]) == ([ids["gc_duck"]], "with horns")


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1), st.data())
def test_ids_in_any_form(values, data):
    ends = st.sampled_from([",", " ", ", ", " ,, ", "\t"])
    text = "".join(f"{value}{data.draw(ends)}" for value in values)
    assert _ids("--good", [text]) == values
    assert _ids("--good", [str(value) for value in values]) == values
    words = list(ManyValues(name="teach")._repeated(["--good", *map(str, values), "a cat"]))
    assert words[:-1] == [word for value in values for word in ("--good", str(value))]


def test_preview_shows_the_same_moves_and_writes_nothing(good, bad, profiles, no_guard):
    lesson = ["teach", QUERY, "--good", good, "--bad", bad]
    shown = document(*lesson, "--preview")
    assert (shown["lesson"], shown["preview"]) == (None, True)
    assert not profiles.exists()
    assert "nothing is written" in run(*lesson, "--preview").out
    assert document(*lesson)["moved"] == shown["moved"] != []
    files = everything_below(profiles)
    assert document("teach", QUERY, "--unmark", good, "--preview")["good"] == []
    assert everything_below(profiles) == files
    assert [each["active"] for each in document("history")] == [True]


def test_a_refused_lesson_writes_nothing_unless_forced(good, profiles, strict_guard):
    done = run("teach", QUERY, "--good", good)
    assert (done.code, done.out) == (1, "")
    assert "generic queries would change" in done.err
    assert "%" in done.err
    assert "--force learns it anyway" in done.err
    assert not profiles.exists()
    told = document("teach", QUERY, "--good", good, code=1)
    assert told["lesson"] is None
    assert "not learned" in told["refused"]
    shown = run("teach", QUERY, "--good", good, "--preview")
    assert shown.code == 1
    assert "would be refused: not learned" in shown.err
    assert "->" in shown.out
    assert "exclude each other" in refused("teach", QUERY, "--good", good, "--preview", "--force")
    forced = document("teach", QUERY, "--good", good, "--force")
    assert (forced["lesson"], forced["refused"]) == (1, None)
    assert len(document("history")) == 1


def test_a_query_that_is_kept_is_told_in_plain_words(good, monkeypatch):
    from retrieval.teach.fitting import Fit

    def kept(c: Any, *_: Any, **__: Any) -> Fit:
        return Fit(target=c, kept_text=True, before=0.9, after=0.6)

    monkeypatch.setattr("retrieval.teach.fitting.fit_direction", kept)
    done = run("teach", QUERY, "--good", good)
    assert done.code == 0
    assert "the search as it is fits your marks as well as anything learned from them" in done.out
    assert "nothing moves" in done.out
    assert "query kept as it is" in run("history").out
    assert document("query", QUERY)["changed"] is False
    assert run("query", QUERY).err == ""


def test_earlier_queries_that_lose_are_named(good, bad, monkeypatch, no_guard):
    monkeypatch.setattr("retrieval.teach.guard._NOTEWORTHY", -2.0)
    assert run("teach", QUERY, "--good", good, "--bad", bad).code == 0
    lesson = ["teach", "a swimming animal", "--good", bad]
    assert document(*lesson, "--preview")["worse"][0]["query"] == QUERY
    assert f"less in line with its own marks: '{QUERY}' (" in run(*lesson).out


def test_marks_are_taken_back(good, bad, ids, no_guard):
    plain = ranking()
    assert run("teach", QUERY, "--good", good, "--bad", bad).code == 0
    fish = str(ids["gc_goldfish"])
    assert fish not in map(str, document("teach", QUERY, "--unmark", fish)["bad"])
    assert "has no mark for this query" in refused("teach", QUERY, "--unmark", fish)
    assert f"unmark {fish}" in run("history").out
    told = document("teach", QUERY, "--unmark", good, bad.split(",")[0])
    assert (told["good"], told["bad"]) == ([], [])
    assert ranking() == plain


def test_the_local_rule_is_a_property_of_a_profile(good, bad, no_guard):
    lesson = ["teach", QUERY, "--good", good, "--bad", bad]
    told = document(*lesson, "--rule", "local", "--profile", "steps")
    assert told["rule"] == "local"
    assert document(*lesson, "--profile", "steps")["rule"] == "local"
    assert "is taught by the rule 'local'" in refused(
        *lesson, "--rule", "adapter", "--profile", "steps"
    )
    assert document("query", QUERY, "--profile", "steps")["changed"] is True
    assert document("query", "--image", "gc_duck.webp", "--profile", "steps")["profile"] == "steps"
    assert document("profiles")[0]["rule"] == "local"


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(ids, tmp_path, monkeypatch):
    duck = str(ids["gc_duck"])
    cases: list[tuple[list[str | Path], str]] = [
        (["teach", "x"], "nothing is marked"),
        (["teach", "x"], "with --good or --bad"),
        (["teach", "--good", duck], "nothing to teach about"),
        (["teach", "gc_duck.webp", "--image", "gc_duck.webp", "--good", duck], "give one"),
        (["teach", "x", "--like", duck, "--good", duck], "--like stands alone"),
        (["teach", "--like", "4711", "--good", duck], "no searchable picture has the id 4711"),
        (["teach", "--image", "nosuch.jpg", "--good", duck], "there is no file"),
        (["teach", " ", "--good", duck], "nothing to teach about"),
        (["teach", "x" * 100_000, "--good", duck], "100,000 characters"),
        (["teach", "x - x", "--good", duck], "query"),
        (["teach", "9999:x", "--good", duck], "weight 9999 is out of range"),
        (["teach", os.fsdecode(b"caf\xe9"), "--good", duck], "no text"),
        (["teach", "x", "--good", "12a"], "--good '12a' is no id"),
        (["teach", "x", "--good", "-3"], "--good '-3' is no id"),
        (["teach", "x", "--good", "²"], "is no id"),
        (["teach", "x", "--good", ", ,"], "--good is empty"),
        (["teach", "x", "--good", "9" * 19], "id"),
        (["teach", "x", "--good", "9" * 5000], "is no id"),
        (["teach", "x", "--good", "4711"], "no searchable picture has the id 4711"),
        (["teach", "x", "--good", duck, "--bad", duck], "cannot be both good and bad"),
        (["teach", "x", "--bad", *map(str, range(20_000))], "10,000"),
        (["teach", "x", "--unmark", duck], "has no mark for this query"),
        (["teach", "x", "--good", duck, "--rule", "magic"], "valid: lookup, adapter, local"),
        (["teach", "-x", "--good", duck], "put `--` before"),
        (["teach", "x", "--good", duck, "--index", "nowhere"], "there is no directory"),
        (["undo"], "nothing was taught yet"),
        (["undo", "0"], "Invalid value"),
        (["undo", "one"], "Invalid value"),
        (["forget", "--yes"], "nothing was taught yet"),
        (["forget", "-x"], "put `--` before"),
        (["export", "no/out.json"], "there is no directory"),
        (["export", "."], "is a directory"),
    ]
    for args, expected in cases:
        assert expected in refused(*args), args
    monkeypatch.chdir(tmp_path)
    for name in ("history", "undo", "forget", "profiles"):
        assert "no index in" in refused(name)


# --- at the same time --------------------------------------------------------------------------

_TEACHING = """
import sys
from apps.cli.main import app
for number in range(8):
    code = app(["search", "teach", f"bird {number}", "--good", sys.argv[1], "--force", "--json"],
               standalone_mode=False)
    assert code == 0, code
    print("taught", file=sys.stderr, flush=True)
"""


def test_two_processes_teach_one_profile(good, bad, no_guard):
    other = subprocess.Popen(
        [sys.executable, "-c", _TEACHING, good],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert other.stderr is not None
    assert other.stderr.readline() == "taught\n"
    ours = [document("teach", f"cat {i}", "--good", bad)["lesson"] for i in range(8)]
    out, err = other.communicate(timeout=300)
    assert (other.returncode, err) == (0, "taught\n" * 7)
    theirs = [json.loads(part + "}")["lesson"] for part in out.split("\n}\n")[:-1]]
    assert sorted(ours + theirs) == list(range(1, 17))
    lessons = document("history")
    assert [each["lesson"] for each in lessons if each["query"].startswith("cat")] == ours
    assert [each["lesson"] for each in lessons if each["query"].startswith("bird")] == theirs
    assert document("profiles")[0]["queries"] == 16
