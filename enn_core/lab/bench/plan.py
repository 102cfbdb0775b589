"""Which runs are missing: the grid at first, wider where its best rate is at an edge, then seeds.

Everything follows from the rows that are there, so a bench that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from enn_core.lab.bench.one_run import Cell, Method, Run

__all__ = ["Choice", "Row", "missing", "neighbour"]

Row = Mapping[str, Any]

_WIDER = 3  # rates that a grid may grow by, on each side


@dataclass(frozen=True)
class Choice:
    """The best rate of a method on a cell.

    Attributes:
        lr: with the smallest mean error on the validation images (the smaller of equal ones).
        tried: all rates that were run, ascending.
        at_edge: whether it is the smallest or the largest of these: a better one may be beyond.
    """

    lr: float
    tried: tuple[float, ...]
    at_edge: bool


def missing(
    cell: Cell, method: Method, seeds: Sequence[int], rows: Mapping[str, Row]
) -> tuple[list[Run], Choice | None]:
    """Runs that can be started now, and the choice of the rate if all of its runs are there.

    Args:
        cell, method: what is compared on what.
        seeds: that are reported.
        rows: finished runs by their key.
    """
    tried = sorted(method.grid)
    smallest, largest = tried[0], tried[-1]
    while True:
        runs = [Run(cell, method, lr, seed) for lr in tried for seed in cell.choosing]
        todo = [run for run in runs if run.key not in rows]
        if todo:
            return todo, None
        errors = [
            fmean(rows[Run(cell, method, lr, s).key]["valid_error"] for s in cell.choosing)
            for lr in tried
        ]
        best = tried[errors.index(min(errors))]
        if best == tried[0] and best > neighbour(smallest, -_WIDER):
            tried.insert(0, neighbour(best, -1))
        elif best == tried[-1] and best < neighbour(largest, _WIDER):
            tried.append(neighbour(best, 1))
        else:
            break
    choice = Choice(best, tuple(tried), best in (tried[0], tried[-1]))
    final = [Run(cell, method, best, seed, refit=cell.refit) for seed in seeds]
    return [run for run in final if run.key not in rows], choice


def neighbour(lr: float, steps: int) -> float:
    """The rate so many places further in the series ..., 0.1, 0.2, 0.5, 1, 2, 5, ...

    >>> neighbour(5e-3, 1), neighbour(1e-3, -1), neighbour(0.2, 3)
    (0.01, 0.0005, 2.0)

    Raises:
        ValueError: the rate is not of the series.
    """
    text = f"{lr:.0e}"
    digit, exponent = int(text[0]), int(text[2:])
    if digit not in (1, 2, 5) or float(text) != lr:
        raise ValueError(f"rate {lr} is not of the series 1, 2, 5, 10, ...; give one that is")
    place = 3 * exponent + (1, 2, 5).index(digit) + steps
    return float(f"{(1, 2, 5)[place % 3]}e{place // 3}")
