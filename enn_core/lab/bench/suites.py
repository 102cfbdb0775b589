"""What the bench compares: methods with their rates, and cells of data, network and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from enn_core.lab.bench.one_run import Cell, Method
from enn_core.rules import RULES

__all__ = ["FULL", "LARGE", "QUICK", "Suite"]

BASELINE = "backprop-adamw"

_ADAM = (2e-3, 5e-3, 1e-2, 2e-2)
_SGD = (2e-2, 5e-2, 0.1, 0.2)
_SLOW = (5e-4, 1e-3, 2e-3, 5e-3)
_GRIDS = {"backprop-sgd": _SGD, "node-perturbation": _SLOW, "loco": _SLOW, "loco-mean": _SLOW}

METHODS = tuple(Method(rule, rule, _GRIDS.get(rule, _ADAM)) for rule in RULES)
# ENN-l and DGL with other heads than their own (conv).
HEADS = tuple(
    Method(f"{rule}, {head} heads", rule, _ADAM, (("head", head),))
    for rule in ("local-enn", "dgl")
    for head in ("mlp", "linear")
)

# What is asked beyond the difference of each method to the baseline.
CONTRASTS = (
    ("enn", "muon"),
    ("enn", "enn-penalty"),
    ("local-enn", "enn"),
    *((f"local-enn{head}", f"dgl{head}") for head in ("", ", mlp heads", ", linear heads")),
    ("loco", "loco-mean"),
    ("loco", "node-perturbation"),
)

_FEW = {"steps": 500, "batch": 32, "choosing": (0, 1), "heads": True}  # 200 images choose
_DIGITS = {"steps": 300, "batch": 32, "refit": True}
_FASHION = {"steps": 200}  # in batches of 64
_FASHION_SMALL = {"steps": 120, "side": 14}
_CIFAR = {"steps": 300, "side": 16}


def _cells(data: str, train: int, valid: int, archs: tuple[str, ...], **budget: Any) -> list[Cell]:
    return [Cell(data, train, valid, arch, **budget) for arch in archs]


@dataclass(frozen=True)
class Suite:
    """Cells, methods and the seeds that are reported."""

    cells: tuple[Cell, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[Cell, Method]]:
        """All that is compared, in the order it is run."""
        return self.pairs_of(self.cells, self.methods)

    @staticmethod
    def pairs_of(cells: Sequence[Cell], methods: Sequence[Method]) -> list[tuple[Cell, Method]]:
        """Each of the cells with each of the methods; other heads only where a cell asks for it."""
        return [(c, m) for c in cells for m in methods if c.heads or m not in HEADS]


_NETWORKS = ("vit-tiny", "mlp", "resnet-small")
# What two processor cores can pay: CIFAR-10 at half its resolution, transformers of 16 tokens.
FULL = Suite(
    cells=(
        *_cells("digits", 400, 200, _NETWORKS, **_FEW),
        *_cells("digits", 1200, 200, _NETWORKS, **_DIGITS),
        *_cells("fashion-mnist", 10000, 2000, ("vit-tiny:7", "mlp"), **_FASHION),
        *_cells("fashion-mnist", 10000, 2000, ("resnet-small",), **_FASHION_SMALL),
        *_cells("cifar10", 8000, 2000, ("resnet-small",), heads=True, **_CIFAR),
        *_cells("cifar10", 8000, 2000, ("vit-tiny:4",), **_CIFAR),
    ),
    methods=(*METHODS, *HEADS),
    seeds=(0, 1, 2, 3, 4),
)

# A few minutes: three rates, three seeds, fewer steps; it shows the direction, not the numbers.
QUICK = Suite(
    cells=tuple(_cells("digits", 400, 200, ("vit-tiny", "mlp"), steps=200, batch=32)),
    methods=tuple(Method(method.label, method.rule, method.grid[1:]) for method in METHODS),
    seeds=(0, 1, 2),
)

# All of CIFAR-10, 20 epochs; needs a CUDA device.
LARGE = Suite(
    cells=(
        Cell(
            "cifar10", 45000, 5000, "resnet18",
            steps=7020, batch=128, pad=4, flip=True, refit=True, device="cuda",
        ),
    ),
    methods=METHODS,
    seeds=FULL.seeds,
)  # fmt: skip
