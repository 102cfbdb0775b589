"""The bench itself: finds what is missing, runs it in processes, keeps every finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from enn_core.child_process import follow_parent
from enn_core.lab.bench.one_run import Cell, Method, Run, execute, prepare
from enn_core.lab.bench.plan import missing
from enn_core.lab.bench.report import table, write
from enn_core.lab.bench.store import Store
from enn_core.lab.bench.suites import Suite
from enn_core.rules import RuleError

__all__ = ["Result", "bench", "trainable"]

Progress = Callable[[str, int, int, str], None]
Pair = tuple[Cell, Method]


class Result(NamedTuple):
    """What a bench tells.

    Attributes:
        table: see `report.table`.
        left_out: why a method cannot train a network, by cell and method.
    """

    table: list[dict[str, Any]]
    left_out: dict[tuple[str, str], str]


def bench(
    suite: Suite,
    folder: Path,
    *,
    pairs: Iterable[Pair] | None = None,
    root: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Result:
    """Run what of a suite is missing in a folder, and write its tables.

    Args:
        suite: what is compared.
        folder: of `runs.jsonl` (one line per finished run, which a later call does not repeat),
            the tables and pictures of `report.write`.
        pairs: run only these, in this order; the tables tell of all that is there.
        root: directory of the data sets; the environment variable ENN_DATA if None.
        workers: processes that run at once.
        progress: called with (stage, done, total, note); the total grows with the grids.

    Raises:
        ValueError: another bench writes to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _bench(
            suite, folder, suite.pairs if pairs is None else pairs, root, workers, progress
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two benches would overwrite each other's runs."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another bench writes to '{folder}'; wait for it, or give another folder"
        ) from None


def _bench(
    suite: Suite,
    folder: Path,
    pairs: Iterable[Pair],
    root: Path | None,
    workers: int,
    progress: Progress | None,
) -> Result:
    store = Store(folder / "runs.jsonl")
    say = progress or (lambda *_: None)
    say("looking what each rule can train", 0, 1, "")
    able, left_out = trainable(
        pairs,
        root,
        {(row["cell"], row["method"]) for row in store.rows.values()},
    )

    def todo() -> list[Run]:
        """What can be started, once each: methods may share runs."""
        runs = [r for pair in able for r in missing(*pair, suite.seeds, store.rows)[0]]
        return list({run.key: run for run in runs}.values())

    def keep(row: dict[str, Any]) -> None:
        store.add(row)
        left = len(todo())
        done = len(store.rows)
        say("runs", done, done + left, f"{row['cell']} {row['method']}")

    try:
        if workers == 1:
            _run_here(todo, partial(execute, root=root), keep)
        else:
            _run_in_processes(todo, partial(execute, root=root), keep, workers)
    finally:
        if store.rows:
            write(suite, store.rows, folder)
    return Result(table(suite, store.rows), left_out)


def trainable(
    pairs: Iterable[Pair],
    root: Path | None,
    tried: Collection[tuple[str, str]] = (),
) -> tuple[list[Pair], dict[tuple[str, str], str]]:
    """Pairs whose rule can train the network, and why not, by cell and method, for the others.

    Args:
        pairs, root: as in `bench`; a network is built for each.
        tried: cells and methods that are known to work.
    """
    able: list[Pair] = []
    reasons: dict[tuple[str, str], str] = {}
    known: dict[tuple[str, str, str], str] = {}
    for cell, method in pairs:
        if (cell.name, method.label) in tried:
            able.append((cell, method))
            continue
        key = (cell.data, cell.arch, method.rule + json.dumps(method.options))
        if key not in known:
            try:
                prepare(Run(cell, method, method.grid[0], cell.choosing[0]), root)
                known[key] = ""
            except RuleError as error:
                known[key] = str(error)
        if known[key]:
            reasons[cell.name, method.label] = known[key]
        else:
            able.append((cell, method))
    return able, reasons


def _run_here(
    todo: Callable[[], Sequence[Run]],
    do: Callable[[Run], dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    while runs := todo():
        keep(do(runs[0]))


def _run_in_processes(
    todo: Callable[[], Sequence[Run]],
    do: Callable[[Run], dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
    workers: int,
) -> None:
    others = set(active_children())
    flying: dict[Future[dict[str, Any]], str] = {}
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=follow_parent,
    )
    try:
        while True:
            started = set(flying.values())
            for run in todo():
                if len(flying) == workers:
                    break
                if run.key not in started:
                    flying[pool.submit(do, run)] = run.key
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                del flying[future]
                keep(future.result())
    finally:
        if flying:  # stopped: nobody waits for these
            for child in set(active_children()) - others:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
