"""`enn search history`, `undo`, `forget` and `profiles`, after lessons on real photos."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from animal_photos import QUERY, everything_below, ranking
from cli_cases import document, refused, run
from small_disk import fill, small_disk

pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("here")


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


def test_a_damaged_lesson_is_listed_and_can_be_forgotten(good, bad, profiles, no_guard):
    assert run("teach", QUERY, "--good", good).code == 0
    assert run("teach", "a bird", "--good", good, "--bad", bad).code == 0
    taught = ranking("a bird")
    file = document("profiles")[0]["file"]
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE events SET details = replace(details, '1', '2') WHERE seq = 1")
    assert "entry 1 is damaged" in refused("query", "a bird")
    assert "entry 1 is damaged" in refused("undo", "2")
    done = run("history")
    assert (done.code, done.out.split()[0]) == (1, "2")
    assert "lesson 1 is damaged" in done.err
    assert QUERY in done.err
    assert [each["lesson"] for each in document("history", code=1)] == [2]
    assert run("forget", QUERY, "--yes").out.startswith("1 lesson on ")
    assert [each["lesson"] for each in document("history")] == [2]
    assert set(ranking("a bird")) == set(taught)
    assert run("forget", "--yes").out.startswith("1 lesson of profile default")


def test_a_full_disk_hides_nothing(good, photos, tmp_path, monkeypatch, no_guard):
    with small_disk(tmp_path / "disk", 8) as disk:
        monkeypatch.setenv("ENN_PROFILES", str(disk / "profiles"))
        shutil.copytree(photos, disk / "photos")
        monkeypatch.chdir(disk / "photos")
        assert run("teach", QUERY, "--good", good).code == 0
        taught, told = ranking(QUERY), document("history")
        fill(disk)
        assert ranking(QUERY) == taught
        assert document("query", QUERY)["profile"] == "default"
        assert document("history") == told
        assert run("export", tmp_path / "lessons.json").code == 0
        for command in (["teach", "a bird", "--good", good], ["undo"]):
            assert "the disk is full" in refused(*command)
        assert "1 lesson" in run("forget", "--yes").out
        assert document("history") == []
        monkeypatch.chdir(tmp_path)
