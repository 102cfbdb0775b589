"""What writes files, as commands that can be disturbed, and what must be true afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_server import Done
from index_cases import age, photo
from stored_files import QUERY, Stored

__all__ = ["WRITERS", "Writer", "names"]


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        run: the command.
        state: what other commands make of its files; None if there are none yet.
        prepare: makes what it starts from.
        partial: whether a state between before and after is a good one.
        once: whether it is not given again where it has done its work without saying so.
    """

    run: Callable[..., Done]
    state: Callable[[Stored], Any]
    prepare: Callable[[Stored], None] = lambda stored: None
    partial: Callable[[Any, Any, Any], bool] = lambda before, after, found: False
    once: bool = False


def names(stored: Stored) -> set[str]:
    """Files, without numbers that count publications.

    A journal's log comes and goes with its readers, its spare room with its writers.
    """
    return {
        "".join("N" if letter.isdigit() else letter for letter in name)
        if ".enn-index" in name or "imported" in name
        else name
        for name in stored.files()
        if not name.endswith(("-wal", "-shm", ".reserve"))
    }


# --- search --------------------------------------------------------------------------------------


def _scores(stored: Stored, index: Path | None = None) -> dict[str, float] | None:
    """Score of every picture by its path; None if there is no index."""
    done = stored.search("query", QUERY, "--json", "-k", "999", index=index)
    if done.code == 2 and ("no index in" in done.err or "no directory" in done.err):
        assert done.err.count("\n") == 1
        return None
    assert (done.code, done.err.count("Traceback")) == (0, 0), done
    return {hit["path"]: hit["score"] for hit in done.document["results"]}


def _imported(stored: Stored) -> dict[str, float] | None:
    return _scores(stored, stored.here / "imported")


def _some_of_both(before: Any, after: Any, found: Any) -> bool:
    """Every score is one of before or after, and what stays is there.

    What is not yet in a snapshot is summed in another order.
    """
    before, after, found = before or {}, after or {}, found or {}
    stays = {path for path in before if before[path] == after.get(path)}

    def known(path: str) -> bool:
        return any(abs(found[path] - all_.get(path, 9)) < 1e-6 for all_ in (before, after))

    return all(map(known, found)) and stays <= set(found)


def _none_or_all(before: Any, after: Any, found: Any) -> bool:
    return not found or (set(found) == set(after) and _some_of_both(before, after, found))


def _without_index(stored: Stored) -> None:
    shutil.rmtree(stored.index)


def _changed_pictures(stored: Stored) -> None:
    """One of everything: new, changed, deleted, moved, copied."""
    for number in (101, 102):
        photo(stored.photos / f"{number}.png", number)
    photo(stored.photos / "1.png", 103)
    (stored.photos / "2.png").unlink()
    (stored.photos / "3.png").rename(stored.photos / "moved.png")
    shutil.copy(stored.photos / "5.png", stored.photos / "copy.png")
    age(stored.photos)


def _with_deleted(stored: Stored) -> None:
    _changed_pictures(stored)
    assert stored.update().code == 0


def _lessons(stored: Stored) -> Any:
    """The lessons as history tells them, the rows that are stored, and scores under them."""
    told = stored.search("history", "--json").document
    for lesson in told:
        del lesson["at"]
    scores = stored.search("query", "one", "--json", "-k", "999").document["results"]
    return told, stored.call("lessons_stored", str(stored.profiles)).document, scores


def _new_profile(stored: Stored) -> Any:
    found = stored.search("history", "--profile", "new", "--json")
    if found.code == 2 and "there is no profile" in found.err:
        return None
    rows = stored.call("lessons_stored", str(stored.profiles / "local" / "new")).document
    return rows if any(rows.values()) else None


def _content(*parts: str) -> Callable[[Stored], Any]:
    """Digests of files; None for those that are not there."""

    def content(stored: Stored) -> Any:
        files = stored.files()
        return [files.get(part) for part in parts]

    return content


def _search(*words: str | Path) -> Callable[..., Done]:
    return lambda stored, **ask: stored.search(*words, **ask)


def _export(name: str) -> Callable[..., Done]:
    return lambda stored, **ask: stored.search("export", stored.here / name, "--force", **ask)


def _old_exports(stored: Stored) -> None:
    for name in ("lessons.json", "vectors.parquet"):
        (stored.here / name).write_bytes(b"an older one")


def _import_lessons(stored: Stored, **ask: Any) -> Done:
    return stored.search("import", stored.here / "lessons.json", "--profile", "new", **ask)


def _import_vectors(stored: Stored, **ask: Any) -> Done:
    words = ("search", "import", stored.here / "vectors.parquet", "--index")
    return stored.run(*words, stored.here / "imported", **ask)


# --- brain ---------------------------------------------------------------------------------------


def _no_cache(stored: Stored) -> None:
    shutil.rmtree(stored.brains / "cache")


def _predict(stored: Stored, **ask: Any) -> Done:
    table = stored.here / "new.csv"
    return stored.brain("predict", stored.brains, "--out", table, "--force", **ask)


def _teach_brain(stored: Stored, **ask: Any) -> Done:
    return stored.brain("teach", stored.scan(1), "--age", "50", "--force", **ask)


def _brain_lessons(stored: Stored) -> Any:
    told = stored.brain("history", "--json").document
    for lesson in told:
        del lesson["at"]
    return told, stored.call("lessons_stored", str(stored.profiles)).document


def _calibrate(stored: Stored, **ask: Any) -> Done:
    words = (stored.here / "labelled.csv", "--out", stored.here / "new.json", "--force")
    return stored.brain("calibrate", *words, "--write-model", stored.here / "new.model", **ask)


def _train_brain(stored: Stored, **ask: Any) -> Done:
    """As a user does who is told that there is a model already."""
    again = ("--force",) if (stored.here / "run" / "model.safetensors").exists() else ()
    return stored.train_brain(*again, **ask)


# --- classifiers ---------------------------------------------------------------------------------


def _train(stored: Stored, **ask: Any) -> Done:
    """As a user does who is told that there is a run already."""
    again = ("--resume",) if (stored.here / "new" / "checkpoint.pt").exists() else ()
    return stored.train("new", *again, **ask)


def _trained(stored: Stored) -> Any:
    """Digest of the model, what it reached, and the log without how fast it was."""
    folder = stored.here / "new"
    if not (folder / "result.json").exists():
        return None
    log = [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]
    return _content("new/model.safetensors")(stored), (folder / "result.json").read_text(), log


def _captioned(stored: Stored) -> None:
    assert stored.call("write_captioned", str(stored.here)).code == 0


def _train_tower(stored: Stored, **ask: Any) -> Done:
    """As a user does who is told that there is a run already."""
    if (stored.here / "tower" / "checkpoint.pt").exists():
        return stored.train_tower("--resume", **ask)
    return stored.train_tower("--config", str(stored.here / "tower.json"), **ask)


def _tower(stored: Stored) -> Any:
    return {name: hash_ for name, hash_ in stored.files().items() if "tower/model/" in name}


WRITERS = {
    "a first index": Writer(Stored.update, _scores, _without_index, partial=_some_of_both),
    "an update": Writer(Stored.update, _scores, _changed_pictures, partial=_some_of_both),
    "compaction": Writer(_search("compact"), _scores, _with_deleted),
    "vectors exported": Writer(
        _export("vectors.parquet"), _content("vectors.parquet"), _old_exports
    ),
    "vectors imported": Writer(_import_vectors, _imported, partial=_none_or_all),
    "a lesson": Writer(
        _search("teach", "three", "--good", "5", "--bad", "6", "--force"), _lessons, once=True
    ),
    "undo": Writer(_search("undo", "1"), _lessons, once=True),
    "forget": Writer(_search("forget", "one", "--yes"), _lessons, once=True),
    "lessons exported": Writer(_export("lessons.json"), _content("lessons.json"), _old_exports),
    "lessons imported": Writer(_import_lessons, _new_profile),
    "ages": Writer(_predict, _content("new.csv"), _no_cache),
    "a brain's lesson": Writer(_teach_brain, _brain_lessons, once=True),
    "a calibration": Writer(
        _calibrate, _content("new.json", "new.model"), partial=lambda before, after, found: True
    ),
    "a brain model": Writer(
        _train_brain, _content("run/model.safetensors"), partial=lambda *_: True
    ),
    "a classifier": Writer(_train, _trained, partial=lambda *_: True),
    "a search model": Writer(_train_tower, _tower, _captioned, partial=lambda *_: True),
}
