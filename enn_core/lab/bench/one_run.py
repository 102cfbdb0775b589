"""One run of the bench: a rule trains a network on data, and is judged.

Runs of one seed share images, order, augmentation and initial weights, whatever the rule.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from enn_core.lab.bench.measures import SavedMemory, about_weights, trained_modules
from enn_core.lab.bench.origin import provenance
from enn_core.lab.classify.batches import Augment, Batches, feed
from enn_core.lab.classify.dataset_files import Images
from enn_core.lab.classify.datasets import ImageData, in_unit_range, load_data
from enn_core.lab.classify.networks import build_network
from enn_core.rules import Rule, make_rule

__all__ = ["Cell", "Method", "Run", "execute", "prepare"]

_JUDGED = 500  # images at once


@dataclass(frozen=True)
class Cell:
    """Data, network and budget that methods are compared on.

    Attributes:
        data: as `load_data` takes it.
        train: images to learn from.
        valid: images to choose the rate by.
        arch: as `build_network` takes it.
        steps, batch: the budget.
        pad, flip: of the augmentation: margin of a random crop, mirroring.
        refit: the chosen rate is run anew on training and validation images together.
        device: "cpu" (one thread) or "cuda".
        choosing: seeds whose validation errors choose the rate; more where these are few images.
        heads: whether local rules are tried with other heads than their own.
        side: of the images, which are averaged down to it; 0: as they are.
    """

    data: str
    train: int
    valid: int
    arch: str
    steps: int
    batch: int = 64
    pad: int = 0
    flip: bool = False
    refit: bool = False
    device: str = "cpu"
    choosing: tuple[int, ...] = (0,)
    heads: bool = False
    side: int = 0

    @property
    def name(self) -> str:
        pixels = f"-{self.side}px" if self.side else ""
        return f"{self.data}-{self.train + self.valid * self.refit}{pixels}/{self.arch}"


@dataclass(frozen=True)
class Method:
    """A rule with its options, and the rates it is tried at.

    Attributes:
        label: in tables.
        rule: its name in `RULES`.
        grid: learning rates, ascending, of the series 1, 2, 5, 10, ...
        options: of the rule.
    """

    label: str
    rule: str
    grid: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Run:
    """A method on a cell with one rate and one seed; `refit`: on the validation images too."""

    cell: Cell
    method: Method
    lr: float
    seed: int
    refit: bool = False

    @property
    def key(self) -> str:
        """What decides the result; results of equal keys are interchangeable."""
        cell = self.cell
        parts = [
            *(cell.data, cell.train, cell.valid, cell.arch, cell.steps, cell.batch),
            *(cell.pad, cell.flip, self.refit and cell.refit),
            *(self.method.rule, dict(self.method.options), self.lr, self.seed),
            *([cell.device] if cell.device != "cpu" else []),
            *([cell.side] if cell.side else []),
        ]
        return json.dumps(parts)


def prepare(run: Run, root: Path | None) -> tuple[Rule, ImageData]:
    """The rule with its fresh network, and the data.

    Raises:
        RuleError: the rule cannot train this network.
        ValueError: the cell needs a CUDA device and there is none.
    """
    cell = run.cell
    if cell.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"cell {cell.name} needs a CUDA device and there is none; choose other cells, or "
            "install a torch with CUDA"
        )
    joined = run.refit and cell.refit
    data = _load(cell.data, root, cell.train, cell.valid, run.seed, joined, cell.side)
    model = build_network(cell.arch, data.shape, len(data.classes), seed=run.seed)
    rule = make_rule(
        run.method.rule,
        model.to(cell.device),
        data.normalized(data.train_x[torch.arange(8)].to(cell.device)),
        len(data.classes),
        lr=run.lr,
        steps=cell.steps,
        seed=run.seed,
        **dict(run.method.options),
    )
    return rule, data


@lru_cache(maxsize=8)
def _load(
    name: str, root: Path | None, train: int, valid: int, seed: int, joined: bool, side: int
) -> ImageData:
    if joined:
        train, valid = train + valid, 0
    data = load_data(name, root=root, train=train, valid=valid, seed=seed)
    if not side:
        return data
    train_x, valid_x, test_x = (
        _averaged(images, side) for images in (data.train_x, data.valid_x, data.test_x)
    )
    return replace(data, train_x=train_x, valid_x=valid_x, test_x=test_x)


def _averaged(images: Images, side: int) -> Tensor:
    if not isinstance(images, Tensor):
        raise ValueError("sets that stay on disk cannot be averaged down; give a cell without side")
    if not len(images):  # interpolate takes none
        return images.new_empty(0, images.shape[1], side, side, dtype=torch.float32)
    return F.interpolate(in_unit_range(images), (side, side), mode="area")


def execute(run: Run, root: Path | None = None) -> dict[str, Any]:
    """Train and judge; on the CPU in one thread.

    Args:
        run: what.
        root: directory of the data sets.

    Returns:
        A row: what was run, errors in percent ("valid_error" None if nothing was set apart),
        "loss" (mean of the last tenth of the steps), "diverged" (the loss was not finite: chance
        is its error), "cpu_s" and "wall_s" of the training steps, "saved_mb" (peak that autograd
        kept in the first step, in 10^6 bytes, without weights and the batch), `about_weights`,
        `provenance`.
    """
    cell = run.cell
    if cell.device == "cpu":
        torch.set_num_threads(1)
    rule, data = prepare(run, root)
    per_epoch = len(data.train_y) // cell.batch
    batches = Batches(
        len(data.train_y), cell.batch, epochs=math.ceil(cell.steps / per_epoch), seed=run.seed
    )
    memory = SavedMemory()
    losses: list[float] = []
    diverged = False
    start = _clocks(cell)
    for x, y in feed(data.train_x, data.train_y, batches, Augment(cell.pad, flip=cell.flip), 0):
        if len(losses) == cell.steps:
            break
        x, y = data.normalized(x.to(cell.device)), y.to(cell.device)
        try:
            if losses:
                losses.append(rule.step(x, y))
            else:  # the first step is watched, and not timed
                fixed = [t for m in trained_modules(rule) for t in m.state_dict().values()]
                with memory.watch([x, *fixed]):
                    losses.append(rule.step(x, y))
                start = _clocks(cell)
        except FloatingPointError:
            diverged = True
            break
    whole = cell.steps / max(1, cell.steps - 1)  # the first step was not timed
    cpu, wall = (whole * (b - a) for a, b in zip(start, _clocks(cell), strict=True))
    chance = 100 * (1 - 1 / len(data.classes))
    row: dict[str, Any] = {
        "cell": cell.name,
        "method": run.method.label,
        "lr": run.lr,
        "seed": run.seed,
        "test_error": chance if diverged else _error(rule, data, data.test_x, data.test_y),
        "valid_error": None,
        "loss": round(sum(losses[-max(1, cell.steps // 10) :]) / max(1, cell.steps // 10), 5),
        "diverged": diverged,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "saved_mb": round(memory.peak / 1e6, 3),
        **_rounded(about_weights(rule) if not diverged else {}),
        "train": len(data.train_y),
        "steps": cell.steps,
        "batch": cell.batch,
        "refit": run.refit and cell.refit,
        "key": run.key,
        **provenance(),
    }
    if len(data.valid_y):
        row["valid_error"] = chance if diverged else _error(rule, data, data.valid_x, data.valid_y)
    return row


def _clocks(cell: Cell) -> tuple[float, float]:
    """Processor time of this process and wall time, in seconds, when all work is done."""
    if cell.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


@torch.no_grad()
def _error(rule: Rule, data: ImageData, images: Any, labels: Tensor) -> float:
    """Percent of wrong answers; scores that are not finite are wrong."""
    right = 0
    device = next(rule.network().parameters()).device
    for rows in torch.arange(len(labels)).split(_JUDGED):
        scores = rule.scores(data.normalized(images[rows].to(device))).cpu()
        finite = scores.isfinite().all(1)
        right += int(((scores.argmax(1) == labels[rows]) & finite).sum())
    return round(100 * (1 - right / len(labels)), 4)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
