"""`enn search teach` and what belongs to it: the real commands on real photos."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_cases import GALLERY, document, load_models_once, refused, run
from hypothesis import given
from hypothesis import strategies as st

from apps.cli.options import ManyValues
from apps.cli.search.teach import _ids

pytest.importorskip("faiss")
QUERY = "animal with horns"
GOOD, BAD = ("gc_bison", "gc_nubian_ibex", "gc_mountain_goat"), ("gc_discus_fish", "gc_goldfish")
OTHERS = ("gc_calf", "gc_moose", "gc_panda", "gc_pika", "gc_boarfish", "gc_kangaroo", "gc_alpaca")
OTHERS += ("gc_duck", "gc_mars", "gc_kitten_on_box", "gc_giraffe_head", "gc_horse_herd")


@pytest.fixture(autouse=True, scope="module")
def _model_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        load_models_once(patch)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teach") / "Fotos – Ünï 日本"
    folder.mkdir()
    for name in (*GOOD, *BAD, *OTHERS):
        shutil.copy(GALLERY / f"{name}.webp", folder)
    assert run("index", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def ids(photos) -> dict[str, int]:
    """Ids by file name without ending."""
    found = document("query", "anything", "--index", photos, "-k", "99")["results"]
    return {Path(hit["path"]).stem: hit["id"] for hit in found}


@pytest.fixture
def profiles(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture(autouse=True)
def here(photos, profiles, monkeypatch) -> Path:
    """Everything is found from the current folder."""
    monkeypatch.chdir(photos)
    return photos


@pytest.fixture
def good(ids) -> str:
    return ",".join(str(ids[name]) for name in GOOD)


@pytest.fixture
def bad(ids) -> str:
    return ",".join(str(ids[name]) for name in BAD)


def ranking(query: str = QUERY, *options: str) -> list[int]:
    return [hit["id"] for hit in document("query", query, "-k", "99", *options)["results"]]


def everything_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture
def no_guard(monkeypatch) -> None:
    """Of a dozen pictures any lesson may move a large share."""
    monkeypatch.setattr("retrieval.teach.guard.LEAST_OVERLAP", 0.0)
    monkeypatch.setattr("retrieval.teach.guard.MOST_AGREEMENT_LOST", 1.0)


@pytest.fixture
def strict_guard(monkeypatch) -> None:
    monkeypatch.setattr("retrieval.teach.guard.LEAST_OVERLAP", 1.1)


# --- teach and undo ----------------------------------------------------------------------------


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
    assert said.err == "changed by what profile default was taught; --no-profile shows it without\n"
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
    assert (told["lesson"], told["profile"], told["rule"]) == (1, "default", "adapter")
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

    monkeypatch.setattr("retrieval.teach.teacher.fit_direction", kept)
    done = run("teach", QUERY, "--good", good)
    assert done.code == 0
    assert "the words alone fit your marks as well as anything learned from them" in done.out
    assert "nothing moves" in done.out
    assert "query kept as it is" in run("history").out
    assert document("query", QUERY)["changed"] is False
    assert run("query", QUERY).err == ""


def test_earlier_queries_that_lose_are_named(good, bad, monkeypatch, no_guard):
    monkeypatch.setattr("retrieval.teach.teacher._NOTEWORTHY", -2.0)
    assert run("teach", QUERY, "--good", good, "--bad", bad).code == 0
    lesson = ["teach", "a swimming animal", "--good", bad]
    assert document(*lesson, "--preview")["worse"][0]["query"] == QUERY
    assert f"less in line with its own marks: '{QUERY}' (" in run(*lesson).out


def test_undo_of_a_middle_lesson_is_as_if_it_had_not_been(good, bad, ids, no_guard):
    duck = str(ids["gc_duck"])
    assert run("teach", QUERY, "--good", good).code == 0
    assert run("teach", "a bird", "--good", duck).code == 0
    first = ranking(QUERY), ranking("a bird")
    assert run("teach", QUERY, "--bad", bad).code == 0
    assert run("teach", "a bird", "--bad", bad).code == 0
    assert run("undo", "3").code == 0
    assert run("undo", "4").code == 0
    assert (ranking(QUERY), ranking("a bird")) == first
    # The first of two lessons on one query: what remains is fitted again.
    assert run("teach", QUERY, "--bad", bad).code == 0
    assert run("undo", "1").code == 0
    both = ranking(QUERY)
    assert run("teach", "a bird", "--good", duck, "--profile", "other").code == 0
    assert run("teach", QUERY, "--bad", bad, "--profile", "other").code == 0
    assert ranking(QUERY, "--profile", "other") == both
    told = document("history")
    assert [each["lesson"] for each in told if each["active"]] == [2, told[-1]["lesson"]]
    assert run("history").out.count("(undone)") == 3
    assert "there is no lesson 99" in refused("undo", "99")


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


# --- profiles ----------------------------------------------------------------------------------


def test_profiles_are_kept_apart(good, bad, profiles, no_guard):
    assert run("profiles").err.count("no profile in") == 1
    assert document("profiles") == []
    assert document("history") == []
    assert "nothing was taught yet" in run("history").err
    plain = ranking()
    assert ranking(QUERY, "--profile", "default") == plain
    assert run("teach", QUERY, "--good", good, "--profile", "anna").code == 0
    assert run("teach", QUERY, "--good", bad, "--profile", "Bob.2").code == 0
    assert ranking() == plain
    assert document("query", QUERY)["profile"] is None
    assert ranking(QUERY, "--profile", "anna") != ranking(QUERY, "--profile", "Bob.2")
    rows = document("profiles")
    assert [(row["profile"], row["lessons"], row["queries"]) for row in rows] == [
        ("Bob.2", 1, 1),
        ("anna", 1, 1),
    ]
    assert all(Path(row["file"]).is_relative_to(profiles) for row in rows)
    assert "anna             1 lesson on 1 query" in run("profiles").out
    assert "for this index's model: Bob.2, anna;" in refused("query", "x", "--profile", "B")
    for command in (["query", "x"], ["history"], ["undo"], ["forget", "--yes"], ["export", "x.js"]):
        assert "there is no profile 'nobody'" in refused(*command, "--profile", "nobody")
    assert "exclude each other" in refused("query", "x", "--profile", "anna", "--no-profile")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", ".hidden", "a/b", "a\\b", "a b", "ä", "x" * 65, "a\nb", "dot."]
)
def test_names_that_no_profile_can_have(name, good, profiles):
    file = profiles.parent / "f.json"
    file.write_text("{}")
    teach, import_ = ["teach", "x", "--good", good], ["import", str(file)]
    for command in (["query", "x"], teach, ["history"], import_):
        assert "cannot be a profile's name" in refused(*command, "--profile", name)
    assert not profiles.exists()


def test_what_was_taught_outlives_the_index(good, bad, tmp_path, photos, monkeypatch, no_guard):
    assert run("teach", QUERY, "--good", good, "--bad", bad).code == 0
    taught = [Path(hit["path"]).name for hit in document("query", QUERY)["results"]]
    copy = tmp_path / "elsewhere"
    shutil.copytree(photos, copy, ignore=shutil.ignore_patterns(".enn-index"))
    assert run("index", copy).code == 0
    monkeypatch.chdir(copy)
    assert [Path(hit["path"]).name for hit in document("query", QUERY)["results"]] == taught


def test_a_damaged_profile_does_not_stop_searching(good, profiles, ids):
    assert run("teach", QUERY, "--good", good).code == 0
    file = Path(document("profiles")[0]["file"])
    for path in file.parent.iterdir():
        path.unlink()
    file.write_bytes(b"no journal" * 1000)
    assert "--no-profile searches without" in refused("query", QUERY)
    assert run("query", QUERY, "--no-profile").code == 0
    assert str(file) in refused("history")
    assert str(file) in refused("teach", QUERY, "--good", good)
    assert run("teach", QUERY, "--good", good, "--profile", "other").code == 0
    done = run("profiles")
    assert (done.code, done.out.split()[0]) == (1, "other")
    assert "profile default cannot be read: " in done.err


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_what_was_taught_is_private(good, profiles):
    assert run("teach", QUERY, "--good", good).code == 0
    assert run("export", profiles / "out.json").code == 0
    files = [path for path in profiles.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((profiles / "local" / "default").stat().st_mode) & 0o077 == 0


def test_a_place_that_cannot_be_written(good, profiles):
    profiles.write_text("a file where a directory should be")
    assert document("history") == []
    line = refused("teach", QUERY, "--good", good)
    assert "profiles" in line


# --- forget ------------------------------------------------------------------------------------


def test_forget_leaves_nothing_readable(good, ids, profiles, no_guard):
    secret = "xylophone of my aunt Quetzalcoatl"
    duck = str(ids["gc_duck"])
    assert run("teach", "a bird", "--good", duck).code == 0
    birds = ranking("a bird")
    assert run("teach", secret, "--good", good).code == 0
    assert run("teach", secret, "--bad", duck).code == 0
    assert b"Quetzalcoatl" in everything_below(profiles)
    assert "--yes" in refused("forget", secret)
    assert "has no lesson on 'xylophone'" in refused("forget", "xylophone")
    assert document("forget", *secret.split(), "--yes")["forgotten"] == 2
    assert b"Quetzalcoatl" not in everything_below(profiles)
    assert [each["query"] for each in document("history")] == ["a bird"]
    assert ranking("a bird") == birds
    assert "has no lesson on" in refused("forget", secret, "--yes")

    assert "1 lesson of profile default would be erased" in refused("forget")
    assert "1 lesson of profile default erased" in run("forget", "--yes").out
    assert b"a bird" not in everything_below(profiles)
    assert document("history") == []
    assert document("query", "a bird")["changed"] is False
    assert document("forget", "--yes")["forgotten"] == 0
    # Numbers are never used again.
    assert document("teach", "a bird", "--good", duck)["lesson"] == 4


def test_forget_asks_at_a_terminal(good, monkeypatch):
    asked = []
    monkeypatch.setattr("apps.cli.terminal._is_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text))
    assert run("teach", QUERY, "--good", good).code == 0
    assert run("forget").code == 0
    assert asked == ["Erase 1 lesson of profile default for good?"]


# --- export and import -------------------------------------------------------------------------


def test_export_and_import_into_another_profile(good, bad, tmp_path, no_guard):
    file = tmp_path / "was ich lehrte é.json"
    assert run("teach", QUERY, "--good", good).code == 0
    assert run("teach", QUERY, "--bad", bad).code == 0
    assert run("teach", "a bird", "--good", bad).code == 0
    assert run("undo").code == 0
    assert document("export", file)["lessons"] == 3
    assert "--force" in refused("export", file)
    assert run("export", file, "--force", "--profile", "default").code == 0
    made = document("import", file, "--profile", "copy")
    assert (made["profile"], made["lessons"], made["total"]) == ("copy", 3, 3)
    assert ranking(QUERY, "--profile", "copy") == ranking()

    def told(*options: str) -> list[dict[str, Any]]:
        return document("history", *options)

    assert told("--profile", "copy") == told()
    assert (
        "0 lessons imported into profile copy, which has 3"
        in run("import", file, "--profile", "copy").out
    )
    # Into one that was taught otherwise, and back out of it.
    assert run("teach", "a planet", "--good", bad, "--profile", "anna").code == 0
    assert document("import", file, "--profile", "anna")["total"] == 4
    assert ranking(QUERY, "--profile", "anna") != ranking(QUERY, "--no-profile")
    assert run("forget", "--yes").code == 0
    assert document("import", file)["lessons"] == 3
    assert ranking(QUERY) == ranking(QUERY, "--profile", "copy")


def test_a_name_that_ends_in_parquet_means_vectors(good, tmp_path):
    vectors, lessons = tmp_path / "v.PARQUET", tmp_path / "lessons"
    assert "nothing was taught yet that could be exported" in refused("export", lessons)
    assert run("teach", QUERY, "--good", good).code == 0
    assert document("export", vectors)["images"] == len((*GOOD, *BAD, *OTHERS))
    assert document("export", lessons)["lessons"] == 1
    assert "another ending" in refused("export", vectors, "--profile", "default", "--force")
    # Import goes by what is inside.
    os.rename(vectors, tmp_path / "v.json")
    os.rename(lessons, tmp_path / "lessons.parquet")
    vectors, lessons = tmp_path / "v.json", tmp_path / "lessons.parquet"
    assert document("import", vectors, "--index", tmp_path / "new")["images"]
    assert document("import", lessons, "--profile", "x")["lessons"] == 1
    assert "leave --profile out" in refused("import", vectors, "--profile", "x")
    assert "leave --folder out" in refused("import", lessons, "--folder", ".")


def test_hostile_files_are_refused_in_one_line(good, tmp_path, profiles):
    assert run("teach", QUERY, "--good", good, "--profile", "victim").code == 0
    file = tmp_path / "e.json"
    assert run("export", file, "--profile", "victim").code == 0
    content = json.loads(file.read_text())
    before = document("history", "--profile", "victim")

    def changed(**values: Any) -> str:
        return json.dumps(content | values)

    event = content["events"][0]
    wrong = {"dtype": "float16", "shape": [2], "data": "AAAAAA=="}
    details = event["details"]
    cases: dict[str, str | bytes] = {
        "empty": b"",
        "nothing": b"{}",
        "a list": b"[1, 2]",
        "binary": bytes(range(256)) * 10,
        "cut off": file.read_bytes()[:-100],
        "deep": b'{"a":' * 100_000,
        "a number": b'{"format": "enn-feedback", "version": 1e400}',
        "future": changed(version=2),
        "another model": changed(identity=content["identity"] | {"weights": "0" * 64}),
        "no events": changed(events={}),
        "twice": changed(events=[event, event]),
        "wrong numbers": changed(events=[event | {"arrays": {"c": wrong}}]),
        "other marks": changed(events=[event | {"details": details | {"marks": [[1, "x", 5]]}}]),
        "other rule": changed(events=[event | {"details": details | {"rule": "evil"}}]),
        "control": changed(events=[event | {"kind": "\x1b[2J"}]),
        "half Parquet": b"PAR1" + b"\0" * 100,
        "the journal": Path(document("profiles")[0]["file"]).read_bytes(),
    }
    for name, data in cases.items():
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        line = refused("import", file)
        assert str(file) in line or "nothing was imported" in line, name
        assert line[:-1].isprintable(), name
        if not name.startswith("half"):
            refused("import", file, "--profile", "victim")
    assert document("history", "--profile", "victim") == before
    assert [row["profile"] for row in document("profiles")] == ["victim"]
    assert "is no file" in refused("import", tmp_path)
    assert "No such file" in refused("import", tmp_path / "none.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "is no file" in refused("import", tmp_path / "pipe")


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(ids, tmp_path, monkeypatch):
    duck = str(ids["gc_duck"])
    cases: list[tuple[list[str | Path], str]] = [
        (["teach", "x"], "nothing is marked"),
        (["teach", "--good", duck], "Missing argument 'TEXT'"),
        (["teach", " ", "--good", duck], "the query is empty"),
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
        (["teach", "x", "--good", duck, "--rule", "magic"], "valid: adapter, local"),
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
