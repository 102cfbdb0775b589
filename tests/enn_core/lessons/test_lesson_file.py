"""Export and import: the same events elsewhere, and nothing from a file that is no export."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enn_core.lessons import lesson_file as transfer
from enn_core.lessons.errors import JournalCorrupt, JournalError, JournalMismatch
from enn_core.lessons.events import latest
from enn_core.lessons.journal import Journal

IDENTITY = {"weights": "0123abcd", "dim": 4}


@pytest.fixture
def journal(tmp_path):
    with _filled(tmp_path / "search.sqlite") as opened:
        yield opened


def _filled(path: Path) -> Journal:
    """Two subjects; one taught twice, one undone, one computed anew."""
    rng = np.random.default_rng(0)
    journal = Journal.open(path, identity=IDENTITY, header=lambda: ({"rule": "adapter"}, {}))
    with journal.writing() as writing:
        for subject, kind, covers in (
            ("a \N{DOG}", "teach", []),
            ("b", "teach", []),
            ("a \N{DOG}", "teach", [1]),
            ("a \N{DOG}", "refit", [3]),
        ):
            arrays = {"c": rng.standard_normal((2, 4)).astype(np.float16)}
            writing.append(kind, subject, {"marks": [[7, 1]]}, arrays, covers)
        writing.deactivate([1])
    return journal


def _facts(journal: Journal) -> list[tuple]:
    return [
        (
            event.uid,
            event.at,
            event.kind,
            event.subject,
            event.details,
            {name: (a.dtype, a.shape, a.tobytes()) for name, a in event.arrays.items()},
            event.active,
        )
        for event in journal.events(active=None)
    ]


def test_everything_comes_back(journal, tmp_path) -> None:
    file = tmp_path / "taught.json"
    assert journal.export(file) == 4
    if os.name != "nt":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = json.loads(file.read_text())
    assert (content["format"], content["version"]) == ("enn-feedback", 1)
    assert content["header"] == {"rule": "adapter"}
    with Journal.open(tmp_path / "other", identity=IDENTITY) as other:
        assert other.import_(file) == 4
        assert _facts(other) == _facts(journal)
        covers = [event.covers for event in other.events(active=None)]
        assert covers == [event.covers for event in journal.events(active=None)]
        version = other.version
        assert other.import_(file) == 0  # again
        assert other.version == version
        again = tmp_path / "again.json"
        other.export(again)
        assert json.loads(again.read_text())["events"] == content["events"]
    assert journal.import_(file) == 0
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["again.json", "taught.json"]
    assert not list(tmp_path.glob(".*"))


def test_a_flipped_bit_is_refused(journal, tmp_path) -> None:
    file = tmp_path / "taught.json"
    journal.export(file)
    data = file.read_bytes()
    with Journal.open(tmp_path / "whole", identity=IDENTITY) as other:
        other.import_(file)
        want = _facts(other)
    rng, refused = random.Random(0), 0
    for i in range(60):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with Journal.open(tmp_path / str(i), identity=IDENTITY) as other:
            try:
                other.import_(file)
            except JournalError as error:
                assert str(file) in str(error)  # noqa: PT017
                refused += 1
            else:  # a space, the key of the digest, or how a letter is written
                assert _facts(other) == want
    assert refused > 50


def test_one_without_a_digest_is_read(journal, tmp_path) -> None:
    """As version 0.1 wrote them; that reads those of today, as it passes over keys that it does
    not know."""
    file = tmp_path / "taught.json"
    journal.export(file)
    content = json.loads(file.read_text())
    assert content.pop("sha256")
    assert content["version"] == 1
    file.write_text(json.dumps(content))
    with Journal.open(tmp_path / "other", identity=IDENTITY) as other:
        assert other.import_(file) == 4


def test_numbers_are_translated_among_others(journal, tmp_path) -> None:
    file = tmp_path / "taught.json"
    journal.forget([2])
    journal.export(file)
    with Journal.open(tmp_path / "other", identity=IDENTITY) as other:
        with other.writing() as writing:
            for subject in ("x", "y", "z"):
                writing.append("teach", subject, {})
        assert other.import_(file) == 3
        events = other.events(active=None)
        assert [event.seq for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event.covers for event in events[3:]] == [(4,), (4, 5), (5,)]
        assert latest(events)["a \N{DOG}"].uid == journal.events()[-1].uid


def test_events_computed_from_forgotten_ones_stay_unused(journal, tmp_path) -> None:
    file = tmp_path / "taught.json"
    journal.forget([1])
    journal.export(file)
    with Journal.open(tmp_path / "other", identity=IDENTITY) as other:
        with other.writing() as writing:  # has the number of the forgotten one
            writing.append("teach", "a \N{DOG}", {})
            writing.deactivate([1])
        other.import_(file)
        assert [event.covers for event in other.events()] == [(2,), (0, 3), (3,)]
        assert latest(other.events())["a \N{DOG}"].kind == "refit"


def test_the_caller_may_refuse(journal, tmp_path) -> None:
    file = tmp_path / "taught.json"
    journal.export(file)
    seen = []

    def accept(header, events) -> None:
        seen.append((header, [event.subject for event in events]))
        raise KeyError("another rule")

    with Journal.open(tmp_path / "other", identity=IDENTITY) as other:
        with pytest.raises(KeyError, match="another rule"):
            other.import_(file, accept=accept)
        assert other.events(active=None) == []
    assert seen == [({"rule": "adapter"}, ["a \N{DOG}", "b", "a \N{DOG}", "a \N{DOG}"])]


def test_export_replaces_a_file_or_leaves_it(journal, tmp_path, monkeypatch) -> None:
    file = tmp_path / "taught.json"
    file.write_text("old")
    monkeypatch.setattr(transfer.os, "fsync", _no_space)
    with pytest.raises(JournalError, match="No space left"):
        journal.export(file)
    assert file.read_text() == "old"
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert journal.export(link) == 4
    assert link.is_symlink()
    assert file.read_text().startswith("{")


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["search.sqlite", "search.sqlite-wal", "", "missing/x", "a\0b"])
def test_places_that_cannot_be_exported_to(journal, tmp_path, name) -> None:
    before = _facts(journal)
    with pytest.raises(JournalError) as caught:
        journal.export(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)
    assert _facts(journal) == before


def test_an_export_is_never_larger_than_an_import(journal, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "MAX_BYTES", 500)
    with pytest.raises(JournalError, match="forget something"):
        journal.export(tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(transfer, "MAX_VALUES", 10)
    with pytest.raises(JournalError, match="forget something"):
        journal.export(tmp_path / "x")


# --- hostile files -------------------------------------------------------------------------------


def _content(**changes: Any) -> dict[str, Any]:
    event = {
        "seq": 1,
        "uid": "0" * 32,
        "at": 1.5,
        "kind": "teach",
        "subject": "a",
        "details": {},
        "covers": [1],
        "active": True,
        "arrays": {"c": _array(np.float16([1, 2, 3, 4]))},
    }
    content = {
        "format": "enn-feedback",
        "version": 1,
        "identity": dict(IDENTITY),
        "header": {},
        "events": [event],
    }
    for key, value in changes.items():
        (content if key in content else event)[key] = value
    return content


def _array(values: np.ndarray, **changes: Any) -> dict[str, Any]:
    data = base64.b64encode(values.tobytes()).decode()
    return {"dtype": values.dtype.name, "shape": list(values.shape), "data": data} | changes


_GOOD = np.float16([1, 2, 3, 4])


def test_the_file_that_the_hostile_ones_are_made_of_is_fine(journal, tmp_path) -> None:
    (tmp_path / "x").write_text(json.dumps(_content()))
    assert journal.import_(tmp_path / "x") == 1


def _refuses(journal: Journal, path: Path, kind: type[Exception] = JournalCorrupt) -> str:
    before = _facts(journal), journal.version
    with pytest.raises(kind) as caught:
        journal.import_(path)
    assert (_facts(journal), journal.version) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "text",
        {},
        _content(format="zip"),
        _content(version=2),
        _content(version=[1]),
        _content(header=None),
        _content(header={"a": "x" * 3_000_000}),
        _content(identity="me"),
        _content(events={}),
        _content(events=[None]),
        _content(events=[{"seq": 1}]),
        _content(events=_content()["events"] * 2),
        _content(events=[*_content()["events"], *_content(uid="1" * 32)["events"]]),
        _content(events=[*_content()["events"], *_content(seq=2)["events"]]),
        _content(seq=0),
        _content(seq=2**63),
        _content(seq="1"),
        _content(seq=True),
        _content(seq=1.0),
        _content(uid="G" * 32),
        _content(uid="0" * 32 + "\n"),
        _content(uid=None),
        _content(at="now"),
        _content(at=True),
        _content(at=-1),
        _content(at=10**4000),
        _content(at=float("inf")),
        _content(kind="drop table"),
        _content(kind=["teach"]),
        _content(subject=7),
        _content(subject="x" * 20_001),
        _content(subject="\ud800"),
        _content(details=[]),
        _content(details={"x": "y" * 2_000_000}),
        _content(details={"x": float("nan")}),
        _content(details={"a": {"a": {"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}}}),
        _content(covers=1),
        _content(covers=[-1]),
        _content(covers=[2**70]),
        _content(covers=[0.5]),
        _content(covers=[1] * 100_001),
        _content(active=1),
        _content(active="yes"),
        _content(arrays=[]),
        _content(arrays={"c": None}),
        _content(arrays={"../c": _array(_GOOD)}),
        _content(arrays={f"c{i}": _array(_GOOD) for i in range(9)}),
        _content(arrays={"c": _array(np.ones(4, np.float64))}),
        _content(arrays={"c": _array(np.ones(4, np.complex64))}),
        _content(arrays={"c": _array(_GOOD, dtype="object")}),
        _content(arrays={"c": _array(_GOOD, dtype=["float16"])}),
        _content(arrays={"c": _array(_GOOD, shape=[5])}),
        _content(arrays={"c": _array(_GOOD, shape=[-1, 4])}),
        _content(arrays={"c": _array(_GOOD, shape=[])}),
        _content(arrays={"c": _array(_GOOD, shape=4)}),
        _content(arrays={"c": _array(_GOOD, shape=[True, 4])}),
        _content(arrays={"c": _array(_GOOD, shape=[1, 1, 1, 1, 4])}),
        _content(arrays={"c": _array(_GOOD, shape=[2**40, 2**40])}),
        _content(arrays={"c": _array(_GOOD, shape=[2, 2])}),
        _content(arrays={"c": _array(np.ones(5, np.float32))}),
        _content(arrays={"c": _array(np.float16([1, 2, 3, np.nan]))}),
        _content(arrays={"c": _array(np.float32([1, 2, 3, np.inf]))}),
        _content(arrays={"c": _array(_GOOD, data="AAAA!AAAA===")}),
        _content(arrays={"c": _array(_GOOD, data="é")}),
        _content(arrays={"c": _array(_GOOD, data=7)}),
        _content(arrays={"c": _array(np.zeros((2_200_000, 4), np.float32))}),
    ],
    ids=lambda content: "",
)
def test_hostile_values(journal, tmp_path, content) -> None:
    (tmp_path / "x").write_text(json.dumps(content))
    _refuses(journal, tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"\xff\xfe{",
        b"SQLite format 3\0",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b"[" + b"[]," * 3_000_000 + b"[]]",
        b"9" * 10_000,
        b'{"format": NaN}',
        json.dumps(_content()).encode()[:-40],
        json.dumps(_content()).encode().replace(b"1.5", b"1e999"),
        json.dumps(_content())
        .encode()
        .replace(b'"covers": [1]', b'"covers": [' + b"9" * 5000 + b"]"),
    ],
    ids=lambda data: "",
)
def test_hostile_bytes(journal, tmp_path, data) -> None:
    (tmp_path / "x").write_bytes(data)
    _refuses(journal, tmp_path / "x")


def test_hostile_files(journal, tmp_path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(transfer.MAX_BYTES + 1)
    assert "larger than" in _refuses(journal, big)
    _refuses(journal, tmp_path, JournalError)
    _refuses(journal, tmp_path / "missing", JournalError)
    for name in ("search.sqlite", "search.sqlite-wal", "./search.sqlite-shm"):
        assert "the profile itself" in _refuses(journal, tmp_path / name, JournalError)
    _refuses(journal, Path("a\0b"), JournalError)
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        _refuses(journal, tmp_path / "pipe", JournalError)
        _refuses(journal, Path("/dev/zero"), JournalError)


def test_of_another_model(journal, tmp_path) -> None:
    (tmp_path / "x").write_text(json.dumps(_content(identity=IDENTITY | {"weights": "ffff"})))
    assert "weights" in _refuses(journal, tmp_path / "x", JournalMismatch)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def _spots(value: Any, path: tuple = ()) -> list[tuple]:
    children: Any = ()
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in children:
        found += [(*path, key), *_spots(child, (*path, key))]
    return found


@settings(max_examples=100)
@given(data=st.data())
def test_a_changed_export_is_read_whole_or_not_at_all(data, tmp_path_factory) -> None:
    """Whatever is changed in it: one-line errors, and what was taken can be used and exported."""
    folder = tmp_path_factory.mktemp("fuzz")
    content = _content()
    for _ in range(data.draw(st.integers(1, 3))):
        spot = data.draw(st.sampled_from(_spots(content) or [()]))
        parent: Any = content
        for key in spot[:-1]:
            parent = parent[key]
        if spot:
            parent[spot[-1]] = data.draw(_VALUES)
    file = folder / "x"
    file.write_text(json.dumps(content))
    with Journal.open(folder / "j", identity=IDENTITY) as journal:
        try:
            count = journal.import_(file)
        except JournalError:
            _refuses(journal, file, JournalError)
            count = 0
        events = journal.events(active=None)
        assert len(events) == count
        latest(events)
        assert journal.export(folder / "again") == count
        with Journal.open(folder / "k", identity=IDENTITY) as other:
            assert other.import_(folder / "again") == count


@settings(max_examples=60)
@given(cut=st.integers(0, 2000), change=st.binary(max_size=8))
def test_changed_bytes(cut, change, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    raw = json.dumps(_content()).encode()
    (folder / "x").write_bytes(raw[:cut] + change + raw[cut + len(change) :])
    with Journal.open(folder / "j", identity=IDENTITY) as journal:
        with contextlib.suppress(JournalError):
            journal.import_(folder / "x")
        assert len(journal.events(active=None)) <= 1
