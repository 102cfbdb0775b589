"""A process killed at any instant of teaching, undoing or exporting loses nothing acknowledged."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from teaching_cases import PICTURES, bits, open_profile

from retrieval.teach import fitting

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no kill -9 there")


def work(gallery: str, folder: str, seed: int, acknowledge: Connection) -> None:
    """Teach, undo and export until killed; says what is done once it is done."""
    fitting._MARGIN = -2.0
    rng = random.Random(seed)
    with open_profile(Path(gallery), path=Path(folder) / "me.sqlite") as searcher:
        acknowledge.send(("ready", 0))
        while True:
            active = [entry.entry for entry in searcher.history() if entry.active]
            kind = rng.choice(["teach", "teach", "teach", "undo", "export"])
            if kind == "teach":
                good, bad = rng.sample(range(1, PICTURES + 1), 2)
                lesson = searcher.teach(f"query {rng.randrange(4)}", [good], [bad], force=True)
                acknowledge.send(("taught", lesson.entry))
            elif kind == "undo" and active:
                acknowledge.send(("undone", searcher.undo(rng.choice(active)).entry))
            elif kind == "export" and active:
                searcher.teacher.export(Path(folder) / "taught.json")
                acknowledge.send(("exported", len(active)))


def killed_run(gallery: Path, folder: Path, seed: int) -> list[tuple[str, int]]:
    """What one process acknowledged before it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retrieval.teach.teacher", "retrieval.index.update"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(str(gallery), str(folder), seed, there))
    process.start()
    there.close()
    assert here.poll(60)
    assert here.recv() == ("ready", 0)
    time.sleep(random.Random(seed).uniform(0, 0.12))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    heard = []
    while here.poll():
        try:
            heard.append(here.recv())
        except EOFError:
            break
    return heard


def check_kills(gallery: Path, folder: Path, count: int) -> None:
    told: dict[int, bool] = {}
    for seed in range(count):
        heard = killed_run(gallery, folder, seed)
        for kind, entry in heard:
            if kind in ("taught", "undone"):
                told[entry] = kind == "taught"
        with open_profile(gallery, path=folder / "me.sqlite") as searcher:
            found = {entry.entry: entry.active for entry in searcher.history()}
            # At most the one act that was under way when the process died is new.
            unexpected = [e for e in found if e not in told or (told[e] and not found[e])]
            assert len(unexpected) <= 1
            assert all(
                found[entry] == active or entry in unexpected for entry, active in told.items()
            )
            told = dict(found)
            for query in (f"query {number}" for number in range(4)):
                searcher.teacher.marks(query)
            with open_profile(gallery, path=folder / "me.sqlite") as again:
                assert bits(again.teacher) == bits(searcher.teacher)
        if (folder / "taught.json").exists():
            json.loads((folder / "taught.json").read_text())
    assert told


def test_a_few_kills(gallery, profiles, tmp_path):
    check_kills(gallery, tmp_path, 4)


@pytest.mark.slow
def test_sixty_kills(gallery, profiles, tmp_path):
    check_kills(gallery, tmp_path, 60)
