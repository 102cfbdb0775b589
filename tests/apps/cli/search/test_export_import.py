"""`enn search export` and `import` of lessons; files that are none are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from animal_photos import BAD, GOOD, OTHERS, QUERY, ranking
from cli_cases import document, refused, run

pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("here")


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


@pytest.mark.parametrize(
    "name", ["x.csv", "x.txt", "x.JSONL", "x.npy", "lessons.json.bak", "x.xlsx"]
)
def test_other_endings_are_refused_before_anything_is_written(good, tmp_path, name):
    assert "valid is .json (lessons)" in refused("export", tmp_path / name)
    assert run("teach", QUERY, "--good", good).code == 0
    for options in ((), ("--profile", "default"), ("--force",)):
        line = refused("export", tmp_path / name, *options)
        assert name in line
        assert ".json (lessons)" in line
        assert ".parquet (vectors)" in line
    assert not (tmp_path / name).exists()
    assert document("export", tmp_path / "x.JSON")["lessons"] == 1


def test_hostile_files_are_refused_in_one_line(good, tmp_path, profiles):
    assert run("teach", QUERY, "--good", good, "--profile", "victim").code == 0
    file = tmp_path / "e.json"
    assert run("export", file, "--profile", "victim").code == 0
    content = json.loads(file.read_text())
    del content["sha256"]
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
