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
import sys
import time
from collections.abc import Callable

import numpy as np
from index_cases import TinyTestModel, queries, ranking

from retrieval import transfer, update  # noqa: F401  (imported before the fork, not in each child)
from retrieval.catalog import Catalog
from retrieval.index import EigenIndex


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
    for name in ("put", "put_vector", "mark_deleted", "commit_snapshot", "checkpoint"):
        setattr(Catalog, name, around(getattr(Catalog, name)))


def update_until(step: int, root: str, folder: str) -> None:
    die_at(step)
    EigenIndex.open(folder).update(root, TinyTestModel(), batch_size=2, workers=2)


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
        if [list(item) for item in ranking(reader, queries(1)[0])] != expected:
            os._exit(5)


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
