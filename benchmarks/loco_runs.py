"""Data and networks of `loco.py`, and the table of its runs."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from record import RESULTS, provenance
from torch import Tensor, nn

from enn_core.lab.classify.datasets import ImageData, load_data
from enn_core.spiking import ClampedReLU

ORIGIN = ("command", "commit", "machine", "load", "torch", "date")
BATCH = 128


class Table:
    """A CSV of runs, written after each of them; `key` columns say which run a line is."""

    def __init__(self, name: str, key: Sequence[str]) -> None:
        self.path = RESULTS / "core" / f"{name}.csv"
        self.key = tuple(key)
        self.rows = self.read()

    def read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def run(self, function: Callable[[], dict[str, Any]], **key: Any) -> dict[str, str]:
        """The line of a run, which is made if it is not there yet."""
        wanted = {name: str(key[name]) for name in self.key}
        for row in self.rows:
            if all(row.get(name) == value for name, value in wanted.items()):
                return row
        started = time.process_time()
        result = function()
        result["cpu_s"] = round(time.process_time() - started, 1)
        row = {name: str(value) for name, value in {**key, **result, **provenance()}.items()}
        self.rows = [*self.read(), row]  # another command may have written meanwhile
        self.write()
        print({k: v for k, v in row.items() if k not in ORIGIN}, flush=True)
        return row

    def write(self) -> None:
        columns = list(dict.fromkeys(k for row in self.rows for k in row if k not in ORIGIN))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns, *ORIGIN], restval="")
            writer.writeheader()
            writer.writerows(self.rows)


# --- data and networks ---------------------------------------------------------------------------


def load(name: str) -> ImageData:
    """Digits whole; of Fashion-MNIST 12,000 to learn from, 2,000 to choose by, the whole test."""
    if name == "digits":
        return load_data("digits", valid=200)
    return load_data("fashion-mnist", valid=2000, train=12000)


def mlp(data: ImageData, depth: int, width: int) -> nn.Sequential:
    """`depth` weight layers of clamped rate neurons."""
    pixels = data.train_x[0].numel()
    widths = [pixels, *[width] * (depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), ClampedReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def conv(data: ImageData, depth: int, channels: int) -> nn.Sequential:
    """`depth` weight layers: 2 x 2 convolutions until one pixel is left, then linear maps.

    Without padding: zeros at the border are no mean rate, and each layer would add to the error.
    """
    before, side = data.train_x.shape[1], data.train_x.shape[-1]
    layers: list[nn.Module] = []
    for _ in range(side - 1):
        layers += [nn.Conv2d(before, channels, 2), ClampedReLU()]
        before = channels
    layers.append(nn.Flatten())
    for _ in range(depth - side):
        layers += [nn.Linear(before, 8 * channels), ClampedReLU()]
        before = 8 * channels
    return nn.Sequential(*layers, nn.Linear(before, 10))


def network(data: ImageData, kind: str, depth: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return (mlp if kind == "mlp" else conv)(data, depth, width)


def images(x: Any) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def percent(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        answers = torch.cat([model(images(part)).argmax(1) for part in x.split(500)])
    return round(100 * float((answers == y).float().mean()), 2)
