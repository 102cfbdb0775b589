"""kill -9 at random instants: what was acknowledged is there, and nothing else happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from enn_core.lessons.journal import Journal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills the POSIX way")

IDENTITY = {"dim": 4}
ROUNDS = 60

State = dict[str, bool]  # uid -> active


def _processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["enn_core.feedback", "pytest"])
    return context


def _work(folder: Path, diary: Path, seed: int) -> None:
    """Change the journal until killed; every change is noted before it starts and when it is done.

    Notes go to the kernel at once, so that they survive the process.
    """
    rng = random.Random(seed)
    notes = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, **values) -> None:
        os.write(notes, json.dumps({"what": what, **values}).encode() + b"\n")

    note("open")
    journal = Journal.open(folder / "j", identity=IDENTITY, header=lambda: ({"rule": 1}, {}))
    while True:
        uids = {event.seq: event.uid for event in journal.events(active=None)}
        some = rng.sample(sorted(uids), min(len(uids), rng.randint(1, 3)))
        action = rng.choice(["append"] * 4 + ["deactivate", "activate", "export", "forget"])
        values = {"uids": [uids[seq] for seq in some]}
        if action == "append":
            values = {"uids": [uuid.UUID(int=rng.getrandbits(128)).hex for _ in some or [1]]}
        note(action, **values)
        if action == "export":
            journal.export(folder / "export.json")
        elif action == "forget":
            journal.forget(some)
        else:
            with journal.writing() as writing:
                if action == "append":
                    for uid in values["uids"]:
                        rows = np.full((rng.randint(1, 900), 4), seed, np.float32)
                        writing.append("teach", f"subject-{uid}", {}, {"rows": rows}, uid=uid)
                else:
                    getattr(writing, action)(some)
        note("done")


def _after(state: State, entry: dict) -> State:
    uids = entry.get("uids", [])
    if entry["what"] == "append":
        return state | dict.fromkeys(uids, True)
    if entry["what"] in ("activate", "deactivate"):
        return state | dict.fromkeys(uids, entry["what"] == "activate")
    if entry["what"] == "forget":
        return {uid: active for uid, active in state.items() if uid not in uids}
    return state


def _states(state: State, exported: State | None, diary: Path) -> tuple[list, list]:
    """What the journal and the export may hold: after every note, with the last one or without."""
    unfinished = None
    for line in diary.read_text().splitlines() if diary.exists() else []:
        entry = json.loads(line)
        if entry["what"] == "done":
            state = _after(state, unfinished)
            if unfinished["what"] == "export":
                exported = state
            unfinished = None
        else:
            unfinished = entry
    if unfinished is None:
        return [state], [exported]
    return (
        [state, _after(state, unfinished)],
        [exported, state] if unfinished["what"] == "export" else [exported],
    )


def _held(journal: Journal) -> State:
    return {event.uid: event.active for event in journal.events(active=None)}


def _bytes(folder: Path) -> bytes:
    """What is in the files, read by another process: see `Journal` on this one's locks."""
    return subprocess.run(["cat", *folder.glob("j*")], check=True, capture_output=True).stdout


def test_killed_at_random_instants(tmp_path) -> None:
    context, rng = _processes(), random.Random(0)
    forgotten_once = unfinished_once = 0
    for epoch in range(3):  # each starts without a file
        folder = tmp_path / f"epoch{epoch}"
        state: State = {}
        exported: State | None = None
        seen: set[str] = set()
        watcher: Journal | None = None  # another process that has the file open, but not always
        for i in range(ROUNDS // 3):
            diary = tmp_path / f"diary-{epoch}-{i}"
            process = context.Process(target=_work, args=(folder, diary, 1000 * epoch + i))
            process.start()
            while not diary.exists():
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.015 if i < 5 else 0.09))
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL

            states, exports = _states(state, exported, diary)
            unfinished_once += len(states) == 2 and states[0] != states[1]
            with Journal.open(folder / "j", identity=IDENTITY, header=lambda: ({}, {})) as journal:
                held = _held(journal)
                assert held in states
                assert journal.header[0] in ({"rule": 1}, {})
                if watcher is not None:
                    assert _held(watcher) == held
                seen |= held.keys() | states[0].keys()
                content = _bytes(folder)
                gone = [uid for uid in seen if uid not in held]
                assert not any(f"subject-{uid}".encode() in content for uid in gone)
                forgotten_once += len(gone)
            if i % 8 == 4 and watcher is None:
                watcher = Journal.open(folder / "j", identity=IDENTITY)
            elif i % 8 == 0 and watcher is not None:
                watcher.close()
                watcher = None
            state = held
            export = folder / "export.json"
            if not export.exists():
                assert None in exports
            else:
                with Journal.open(tmp_path / f"copy-{epoch}-{i}", identity=IDENTITY) as copy:
                    copy.import_(export)
                    exported = _held(copy)
                assert exported in exports
        if watcher is not None:
            watcher.close()
    assert unfinished_once > 0, "no kill hit a change: the test has lost its teeth"
    assert forgotten_once > 0
