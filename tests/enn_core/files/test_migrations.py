"""Formats: steps in order, each once; a killed, hindered or doubled one leaves a whole journal."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import sqlite3
import stat
from pathlib import Path

import local_toys
import migration_cases as cases
import pytest
import torch
from migration_cases import copy_of, next_format, notes, rows, run

from enn_core import local
from enn_core.feedback import Journal, JournalCorrupt, JournalError
from enn_core.files import migrations
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.lab.classify import run as classifier
from enn_core.lab.classify.config import ClassifyConfig, ClassifyError
from enn_core.lessons import journal_file, lesson_file

posix = pytest.mark.skipif(os.name == "nt", reason="kills and limits the POSIX way")


def test_the_example_runs():
    assert doctest.testmod(migrations).failed == 0


def test_steps_are_taken_in_order_from_the_format_found():
    kind = Content(lambda c: {"v": [*c["v"], 2]}, lambda c: {"v": [*c["v"], 3]})
    assert kind.number == 3
    assert [upgraded({"v": []}, found, kind)["v"] for found in (1, 2, 3)] == [[2, 3], [3], []]
    for found in (0, 4, -1, "1", None, 1.0, True):
        with pytest.raises(FormatError, match=r"^has format .*, this version reads 1 to 3; update"):
            upgraded({}, found, kind)


# --- journals: a search profile and a taught site ------------------------------------------------


@pytest.fixture(params=["me/search-6c86fa51eed6cbf7.sqlite", "site/brain-a4f336caa5e27a10.sqlite"])
def file(request, v0_1) -> Path:
    return v0_1 / "profiles" / "local" / request.param


@pytest.fixture
def next_version(monkeypatch) -> None:
    monkeypatch.setattr(journal_file, "FORMAT", next_format("events", journal_file.FORMAT))


def identity(file: Path) -> dict:
    from contextlib import closing
    from sqlite3 import connect

    with closing(connect(file)) as db:
        text = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0]
    return json.loads(text)


def names(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if path.suffix != ".reserve")


def test_a_journal_is_changed_once_with_a_copy_beside_it(file, next_version):
    owner, before = identity(file), rows(file, "events")
    for _ in range(2):
        with Journal.open(file, identity=owner, create=False) as opened:
            assert [event.seq for event in opened.events(active=None)] == [r[0] for r in before]
            with opened.writing() as writing:
                writing.deactivate([1])
                writing.activate([1])
        assert notes(file, "events") == [("noted0000000",)] * 3
        assert rows(file, "events") == before
        assert names(file) == [file.name, copy_of(file).name]
    assert rows(copy_of(file), "events") == before
    assert notes(copy_of(file), "events") == []
    assert stat.S_IMODE(copy_of(file).stat().st_mode) == stat.S_IMODE(file.stat().st_mode)


def test_the_record_says_when_and_by_what(file, next_version):
    with Journal.open(file, identity=identity(file)) as opened, opened._reading() as db:
        record = journal_file.meta(db, "format 3")
    assert record[:2] == "20"
    assert " by eigen-suite " in record


def test_new_journals_are_of_the_newest_format(tmp_path, next_version):
    for _ in range(2):
        Journal.open(tmp_path / "j", identity={}).close()
        assert names(tmp_path / "j") == ["j"]


def test_what_is_forgotten_is_in_no_copy(file, next_version):
    with Journal.open(file, identity=identity(file)) as opened:
        assert copy_of(file).exists()
        copy_of(file).with_name(f"{copy_of(file).name}.tmp").write_bytes(b"of a killed process")
        assert opened.forget([1]) == 1
    assert names(file) == [file.name]


@posix
def test_what_is_forgotten_is_in_no_copy_of_a_linked_journal(file, tmp_path, next_version):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(file)
    with Journal.open(link, identity=identity(file)):
        assert names(link) == ["link"]
    assert copy_of(file).exists()
    with Journal.open(file, identity=identity(file)) as opened:
        opened.forget()
    assert names(file) == [file.name]


@posix
def test_a_name_that_begins_with_two_slashes(file):
    with Journal.open(f"/{file}", identity=identity(file)) as opened:
        assert len(opened.events(active=None)) == 3


def test_a_newer_version_was_faster(file, next_version, monkeypatch):
    def older(*_: object) -> bool:
        """It is, and is no more once others are waited for."""
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute("PRAGMA user_version = 4")
        return False

    monkeypatch.setattr(migrations, "check_format", older)
    line = r"^'.*sqlite' has format 4, this version reads 1 to 3; update the software$"
    with pytest.raises(JournalError, match=line):
        Journal.open(file, identity=identity(file))


def test_a_newer_journal_is_refused_in_one_line(file, monkeypatch):
    owner = identity(file)
    opened = Journal.open(file, identity=owner)
    with monkeypatch.context() as later:
        later.setattr(journal_file, "FORMAT", next_format("events", journal_file.FORMAT))
        Journal.open(file, identity=owner).close()
    line = r"^'.*sqlite' has format 3, this version reads 1 to 2; update the software$"
    with pytest.raises(JournalError, match=line):
        Journal.open(file, identity=owner)
    # Also one that was open when it was changed.
    for use in (lambda: opened.version, opened.events, lambda: opened.forget([1])):
        with pytest.raises(JournalError, match=line):
            use()
    opened.close()


@posix
def test_killed_at_any_instant(file):
    cases.kill_at_any_instant(cases.open_journal, file, "events", identity(file))


@posix
def test_two_processes_at_once(file):
    owner = identity(file)
    both = [cases.start(cases.slowly, cases.open_journal, file, owner) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert notes(file, "events") == [("noted0000000",)] * 3
    assert notes(copy_of(file), "events") == []


@posix
@pytest.mark.parametrize("limit", [1_000, 20_000, 33_000, 50_000])
def test_a_full_disk(file, limit):
    """It is read as it is, and nothing is written."""
    owner, before = identity(file), rows(file, "events")
    line = "free some space|can be written"
    assert run(cases.within, limit, line, cases.teach_journal, file, owner) == 0
    assert notes(file, "events") == []
    assert rows(file, "events") == before
    assert copy_of(file).exists() == (limit > 30_000)
    assert not list(file.parent.glob("*.tmp"))
    assert run(cases.open_journal, file, owner) == 0
    assert len(notes(file, "events")) == 3


@posix
def test_a_read_only_folder(file):
    owner = identity(file)
    original = file.read_bytes()
    with cases.shown_to_all(file.parent) as folder:
        shown = folder / file.name
        line = "give the right to write it"
        assert run(cases.as_nobody, line, cases.teach_journal, shown, owner) == 0
        assert names(shown) == [file.name]
        assert shown.read_bytes() == original


# --- files that are read whole -------------------------------------------------------------------


def test_an_exported_lesson_file(v0_1, tmp_path, monkeypatch):
    def shout(content: dict) -> dict:
        events = [{**event, "subject": event["subject"].upper()} for event in content["events"]]
        return {**content, "events": events}

    export = v0_1 / "lessons.json"
    before = export.read_bytes()
    owner = json.loads(before)["identity"]
    with Journal.open(tmp_path / "j", identity=owner) as opened:
        with monkeypatch.context() as later:
            later.setattr(lesson_file, "FORMAT", Content(shout))
            assert opened.import_(export) == 3
            assert opened.events()[0].subject == "A RED THING"
            opened.export(tmp_path / "new.json")
        assert json.loads((tmp_path / "new.json").read_text())["version"] == 2
        with pytest.raises(JournalCorrupt, match=r"it has format 2, this version reads 1; update"):
            opened.import_(tmp_path / "new.json")
    assert export.read_bytes() == before


def test_a_state_of_a_local_trainer(v0_1, monkeypatch):
    def rename(state: dict) -> dict:
        return {**state, "seed": state["seed"] + 1}

    file = v0_1 / "checkpoints" / "trainer.pt"
    trainer = local_toys.make(2, seed=5)
    monkeypatch.setattr(local, "FORMAT", Content(rename))
    trainer.load(file)
    assert (trainer.steps, trainer.seed) == (3, 6)
    state = trainer.state_dict()
    assert state["format"] == 2
    monkeypatch.setattr(local, "FORMAT", Content())
    with pytest.raises(ValueError, match=r"^the state .* has format 2, this version reads 1; upd"):
        trainer.load_state_dict(state)


def test_a_checkpoint_of_a_classifier(v0_1, tmp_path, monkeypatch):
    config = ClassifyConfig.load("small", {**CLASSIFIER, "stop_after": 1})
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((v0_1 / "checkpoints" / "classifier.pt").read_bytes())
    found = []
    monkeypatch.setattr(classifier, "FORMAT", Content(lambda s: found.append(s["step"]) or s))
    assert classifier.train(config, output=tmp_path)["steps"] == 2
    assert found == [2]
    stored = torch.load(checkpoint, weights_only=True)
    torch.save({**stored, "format": 2}, checkpoint)
    monkeypatch.setattr(classifier, "FORMAT", Content())
    with pytest.raises(ClassifyError, match=r"^'.*' has format 2, this version reads 1; update"):
        classifier.train(config, output=tmp_path)


# As `fixtures/write_v0_1.py` has it.
CLASSIFIER = {
    "arch": "mlp-relu:3x8",
    "train": 64,
    "batch_size": 32,
    "epochs": 2,
    "rule": "local",
    "layers": "enn",
    "blocks": 2,
}
