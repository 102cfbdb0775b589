"""Scenarios that end a process in the middle of its work, run by forks of this script.

`python index_crash_cases.py` imports everything once, then forks for every line "NAME [ARGS]" on
its standard input and answers with two lines: the child's pid, and its exit code when it has ended
(negative for a signal).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from index_cases import TinyTestModel, assert_same_ranking, queries, ranking

from retrieval.index import writer
from retrieval.index.catalog import Catalog
from retrieval.index.eigen_index import EigenIndex

if "SMALL_SNAPSHOT" in os.environ:
    writer.SMALL_SNAPSHOT = int(os.environ["SMALL_SNAPSHOT"])
    writer.PENDING_SHARE = 0.3


def die_at(step: int) -> None:
    """Kill this process before or after its nth rename, sync, deletion or row written."""
    count = [0]

    def tick() -> None:
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable) -> Callable:
        def wrapped(*args, **options):
            tick()
            result = function(*args, **options)
            tick()
            return result

        return wrapped

    for name in ("replace", "fsync", "unlink", "mkdir"):
        setattr(os, name, around(getattr(os, name)))
    for name in ("put", "put_vector", "mark_deleted", "commit_snapshot", "checkpoint", "keep"):
        setattr(Catalog, name, around(getattr(Catalog, name)))


def update_until(step: int, root: str, folder: str) -> None:
    die_at(step)
    EigenIndex.open(folder).update(root, TinyTestModel(), batch_size=2, workers=2, prune=True)


def create_until(step: int, root: str, folder: str) -> None:
    die_at(step)
    EigenIndex.create(folder, TinyTestModel(), root=root)


def compact_until(step: int, folder: str) -> None:
    die_at(step)
    EigenIndex.open(folder).compact()


def update_slowly(root: str, folder: str) -> None:
    class Slow(TinyTestModel):
        def image_vectors(self, pixels: np.ndarray) -> np.ndarray:
            time.sleep(0.002)
            return super().image_vectors(pixels)

    EigenIndex.open(folder).update(root, Slow(), batch_size=3)


def update_within(limit: int, root: str, folder: str) -> None:
    """No file may grow beyond the limit; exit code 3 for the error that this must give."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        EigenIndex.open(folder).update(root, TinyTestModel(dim=150), batch_size=4)
    except OSError as error:
        line = error.strerror or ""
        fine = "cannot be written" in line and "safe" in line and "\n" not in line
        os._exit(3 if fine else 4)


def read_as_nobody(folder: str, expected: list) -> None:
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    with EigenIndex.open(folder) as reader:
        assert_same_ranking(ranking(reader, queries(1)[0]), expected)


class Server:
    """Runs scenarios of this module, each in a process of its own."""

    def __init__(self, **environment: str) -> None:
        here = Path(__file__).parent
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # none before a fork
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The packages of this checkout, whichever are installed.
            env={**os.environ, **threads, **environment, "PYTHONPATH": f"{here}:{here.parents[1]}"},
        )
        assert self._line().endswith("ready")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, name: str, *args: object) -> int:
        """Start a scenario; returns its pid."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, args], default=os.fspath) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def ended(self) -> int:
        """Wait for the scenario; returns its exit code, negative for a signal."""
        return int(self._line())

    def run(self, name: str, *args: object) -> int:
        self.start(name, *args)
        return self.ended()

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    TinyTestModel()  # imports what it needs here, not in every child
    print("ready", flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                globals()[name](*arguments)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
