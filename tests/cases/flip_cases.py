"""Damage to every kind of file that is stored, and what its reader says of it."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from command_server import Done
from index_cases import age, photo
from stored_files import QUERY, Stored

__all__ = ["KINDS", "VERDICTS", "Kind", "Verdict", "judge_kind", "verdicts"]

Verdict = Literal["silently wrong", "blocked", "named", "harmless"]
"""Of a damaged file, worst first: another result without a word; work that stops although the file
could be made anew, or by an error that does not name it; a word that names it; the same result."""

VERDICTS: tuple[Verdict, ...] = ("silently wrong", "blocked", "named", "harmless")

Step = Callable[[Stored], tuple[Done, Any]]
"""A command, and its result as far as it must not change."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: where it is.
        steps: what is done with it.
        tries: how often it is damaged for the benchmark.
        named: words one of which names it in a message, besides its own name.
        prepare: makes it, if it is not there.
        damage: what is done to it; one to three bytes are flipped by default.
        derived: whether it can be made anew from what else is there.
    """

    file: Callable[[Stored], Path]
    steps: Sequence[Step]
    tries: int
    named: tuple[str, ...] = ()
    prepare: Callable[[Stored], None] = lambda stored: None
    damage: Callable[[Path, random.Random], None] | None = None
    derived: bool = False


def judge_kind(stored: Stored, name: str, tries: int) -> Counter[Verdict]:
    """Damage a file so many times, differently each time but alike in every run."""
    return Counter(verdict for verdict, _ in verdicts(stored, name, tries))


def verdicts(stored: Stored, name: str, tries: int) -> Iterator[tuple[Verdict, list[Done]]]:
    """The verdict on every try, and what was said."""
    kind = KINDS[name]
    stored.reset()
    kind.prepare(stored)
    stored.keep("damaged")
    good = [step(stored) for step in kind.steps]
    stored.restore()
    again = [result for _, result in (step(stored) for step in kind.steps)]
    if again != [result for _, result in good]:
        raise RuntimeError(f"{name}: undamaged files give two results: {good} {again}")
    for seed in range(tries):
        stored.restore()
        file = kind.file(stored)
        (kind.damage or flip)(file, random.Random(f"{name} {seed}"))
        found = [step(stored) for step in kind.steps]
        yield _verdict(kind, (file.name, *kind.named), found, good), [done for done, _ in found]
    stored.reset()


def _verdict(
    kind: Kind,
    names: Sequence[str],
    found: Sequence[tuple[Done, Any]],
    good: Sequence[tuple[Done, Any]],
) -> Verdict:
    """The worst of all steps.

    Once the file was named, later refusals need not name it again; and once a change was refused,
    a result of before it is right.
    """
    rights = [result for _, result in good]
    refused = False
    known, worst = False, len(VERDICTS) - 1
    for (done, result), (was, expected) in zip(found, good, strict=True):
        said = "\n".join(set(done.err.splitlines()) - set(was.err.splitlines()))
        named = any(name in said for name in names)
        verdict: Verdict
        if done.code < 0 or done.code == 70 or "Traceback" in said:
            verdict = "blocked"
        elif done.code == was.code:
            right = result == expected or (refused and result in rights)
            verdict = "named" if named else "harmless" if right else "silently wrong"
        else:
            verdict = "named" if (named or known) and not kind.derived else "blocked"
        known |= named
        refused |= done.code != was.code
        worst = min(worst, VERDICTS.index(verdict))
    return VERDICTS[worst]


# --- damage --------------------------------------------------------------------------------------


def flip(file: Path, rng: random.Random) -> None:
    """Change one to three bytes, by one bit or by several."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 3) if content else 0):
        change = rng.choice((1 << rng.randrange(8), rng.randint(1, 255)))
        content[rng.randrange(len(content))] ^= change
    file.write_bytes(content)


def zeros(file: Path, rng: random.Random) -> None:
    """Lose 8 kB, as a disk does that loses blocks."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) - 8192)
    content[start : start + 8192] = bytes(8192)
    file.write_bytes(content)


def halve(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def foreign(file: Path, rng: random.Random) -> None:
    """Put another index's file in its place."""
    shutil.copy(file.parents[2] / "others" / ".enn-index" / file.name, file)


# --- steps ---------------------------------------------------------------------------------------


def _json(done: Done) -> Any:
    return json.loads(done.out) if done.code in (0, 1) and done.out else None


def _query(query: str = QUERY, *options: str, place: str = "photos", **ask: Any) -> Step:
    def step(stored: Stored) -> tuple[Done, Any]:
        words = ("query", query, "--json", *(options or ("-k", "999")))
        done = stored.search(*words, index=stored.here / place, **ask)
        told = _json(done) or {}
        return done, (told.get("results"), told.get("changed"), told.get("images"))

    return step


def _told(*args: str) -> Step:
    """A command of search that changes lessons; its document without when and how long."""

    def step(stored: Stored) -> tuple[Done, Any]:
        done = stored.search(*args, "--json")
        told = _json(done)
        if isinstance(told, dict):
            told = {key: value for key, value in told.items() if key not in ("at", "seconds")}
        return done, told

    return step


def _history(*options: str) -> Step:
    def step(stored: Stored) -> tuple[Done, Any]:
        done = stored.search("history", "--json", *options)
        told = _json(done) or []
        # Those that were taught just now have another time in every try.
        return done, [each if each["lesson"] < 3 else {**each, "at": 0} for each in told]

    return step


def _update(stored: Stored) -> tuple[Done, Any]:
    photo(stored.photos / "200.png", 200)
    age(stored.photos)
    done = stored.update()
    return done, [line for line in done.out.splitlines() if "took" not in line]


def _imported(name: str, where: Sequence[str], then: Sequence[Step]) -> Step:
    """What an import brings, if it is not refused."""

    def step(stored: Stored) -> tuple[Done, Any]:
        places = [
            str(stored.here / each) if each in ("imported", "photos") else each for each in where
        ]
        done = stored.run("search", "import", stored.here / name, *places)
        if done.code:
            return done, None
        found = [each(stored) for each in then]
        errors = "".join(each.err for each in (done, *(said for said, _ in found)))
        return Done(max(each.code for each, _ in found), done.out, errors), [r for _, r in found]

    return step


def _age(*options: str) -> Step:
    def step(stored: Stored) -> tuple[Done, Any]:
        files = [stored.here / option if "." in option else option for option in options]
        done = stored.brain("predict", stored.scan(), "--json", *files)
        return done, (_json(done) or {}).get("scans")

    return step


def _brain_history(stored: Stored) -> tuple[Done, Any]:
    done = stored.brain("history", "--json")
    return done, _json(done)


def _content(stored: Stored, done: Done, *parts: str) -> tuple[Done, Any]:
    files = stored.files()
    return done, [files.get(part) for part in parts]


def _fine_tune(stored: Stored) -> tuple[Done, Any]:
    weights = ("--set", f"weights={stored.here / 'whole' / 'model.safetensors'}")
    done = stored.train("tuned", *weights)
    return _content(stored, done, "tuned/model.safetensors", "tuned/result.json")


def _go_on(stored: Stored) -> tuple[Done, Any]:
    done = stored.train("half", "--resume", "--set", "stop_after=0")
    return _content(stored, done, "half/model.safetensors", "half/result.json")


def _go_on_brain(stored: Stored) -> tuple[Done, Any]:
    return _content(stored, stored.train_brain(), "run/model.safetensors")


def _go_on_tower(stored: Stored) -> tuple[Done, Any]:
    done = stored.train_tower("--resume", "--set", "stop_after=0")
    files = (stored.here / "tower" / "model").glob("*.safetensors")
    return _content(stored, done, *(f"tower/model/{file.name}" for file in sorted(files)))


# --- kinds ---------------------------------------------------------------------------------------

_ANN = {"ann_from": 20, "ann_candidates": 10}


def _with_ann(stored: Stored) -> None:
    assert stored.update(ann_from=20).code == 0
    assert stored.search("compact", ann_from=20).code == 0


def _with_other(stored: Stored) -> None:
    for number in range(60):
        photo(stored.here / "others" / f"{number}.png", 1000 + number)
    age(stored.here / "others")
    assert stored.run("search", "index", stored.here / "others").code == 0


def _killed_teacher(stored: Stored) -> None:
    taught = [("x", 1, 2), ("y", 3, 4), ("z", 5, 6)]
    journal = str(_journal("search-*.sqlite")(stored))
    done = stored.call("teach_and_die", str(stored.index), taught, journal)
    assert done.out.split() == ["x", "y", "z"]


def _stopped_training(stored: Stored) -> None:
    assert stored.call("stop_training", str(stored.here)).code == 0


def _stopped_tower(stored: Stored) -> None:
    assert stored.call("write_captioned", str(stored.here)).code == 0
    config = str(stored.here / "tower.json")
    assert stored.train_tower("--config", config, "--set", "stop_after=1").code == 0


def _index_file(pattern: str) -> Callable[[Stored], Path]:
    return lambda stored: next(stored.index.glob(pattern))


def _journal(pattern: str) -> Callable[[Stored], Path]:
    return lambda stored: next((stored.profiles / "local" / "default").glob(pattern))


def _at(*parts: str) -> Callable[[Stored], Path]:
    return lambda stored: stored.here.joinpath(*parts)


def _cached(stored: Stored) -> Path:
    """The brain of the first scan."""
    import hashlib

    from neuro.scans.prep_cache import PrepCache

    digest = hashlib.sha256(stored.scan().read_bytes()).hexdigest()
    return PrepCache(stored.brains / "cache")._path(digest, "mni")


_TAUGHT = (
    _query("one"),
    _told("teach", "three", "--good", "5", "--bad", "6", "--force"),
    _query("three"),
    _told("undo"),
    _query("one"),
    _history(),
)
_NEW = ("--profile", "new", "--index", "photos")
_IN_NEW = (_query("one", "--profile", "new", "-k", "999"), _history("--profile", "new"))
_SNAPSHOT = (_query(), _update, _query())
_LOG = {"prepare": _killed_teacher, "steps": (_query("x"), _history())}
_LOST = ("search-",)

KINDS = {
    "vectors-N.faiss": Kind(_index_file("vectors-*"), _SNAPSHOT, 40),
    "ann-N.faiss": Kind(
        _index_file("ann-*"),
        [_query(query, "-k", "1", **_ANN) for query in (QUERY, "one", "two", "three")],
        20,
        prepare=_with_ann,
        derived=True,
    ),
    "catalog.sqlite": Kind(
        _index_file("catalog.sqlite"), _SNAPSHOT, 40, named=("the catalog", "its catalog")
    ),
    "manifest.json": Kind(_index_file("manifest.json"), (_query(),), 20, named=("manifest",)),
    "journal, then teach and undo": Kind(_journal("search-*.sqlite"), _TAUGHT, 40),
    "journal of brains": Kind(_journal("brain-*.sqlite"), (_age(), _brain_history), 20),
    "Parquet export": Kind(
        _at("vectors.parquet"),
        (_imported("vectors.parquet", ("--index", "imported"), [_query(place="imported")]),),
        30,
    ),
    "exported lessons": Kind(_at("lessons.json"), (_imported("lessons.json", _NEW, _IN_NEW),), 30),
    "brain model": Kind(_at("brains", "model.safetensors"), (_age(),), 12),
    "classifier model": Kind(_at("whole", "model.safetensors"), (_fine_tune,), 30),
    "checkpoint.pt of a classifier": Kind(_at("half", "checkpoint.pt"), (_go_on,), 30),
    "checkpoint.pt of a search model": Kind(
        _at("tower", "checkpoint.pt"), (_go_on_tower,), 12, prepare=_stopped_tower
    ),
    "network-N.pt of a brain model": Kind(
        _at("run", "network-1.pt"), (_go_on_brain,), 12, prepare=_stopped_training
    ),
    "brain cache": Kind(_cached, (_age(),), 60, derived=True),
    "calibration": Kind(_at("calibration.json"), (_age("--calibration", "calibration.json"),), 20),
    "8 kB of zeros in vectors-N.faiss": Kind(_index_file("vectors-*"), _SNAPSHOT, 5, damage=zeros),
    "another index's vectors-N.faiss": Kind(
        _index_file("vectors-*"), _SNAPSHOT, 1, damage=foreign, prepare=_with_other
    ),
    "log of the journal after kill -9, flipped": Kind(
        _journal("search-*-wal"), tries=10, named=_LOST, **_LOG
    ),
    "log of the journal after kill -9, halved": Kind(
        _journal("search-*-wal"), tries=1, named=_LOST, damage=halve, **_LOG
    ),
    "log of the journal after kill -9, removed": Kind(
        _journal("search-*-wal"), tries=1, named=_LOST, damage=remove, **_LOG
    ),
}
