"""LOCO, its parts and its controls: deep nets, spiking nets, continual learning, parallel time.

    python benchmarks/loco.py deep --data digits --depth 11        # about 15 CPU minutes
    python benchmarks/loco.py deep --data fashion-mnist --depth 11 --methods none mean loco
    python benchmarks/loco.py deep --data digits --depth 15
    python benchmarks/loco.py choices                              # what mattered, on digits
    python benchmarks/loco.py spiking                              # trained through the spikes
    python benchmarks/loco.py continual
    python benchmarks/loco.py sequential                           # dependent steps against depth

Runs that a CSV already holds are not run again, so a command can be stopped, and given more
`--seeds` later. Every method gets the same data, batches, initial weights (`calibrate_`), loss and
number of steps, and its own best learning rate: seed 0 goes up and down a grid of half decades
until the best rate on the validation part has a worse neighbour on both sides (`edge` says where
the grid ended first); the other seeds run at that rate. The test part is only reported.

Writes results/core/loco_SUBCOMMAND.csv, one line per run with where it came from, and for `deep`
and `spiking` loco_SUBCOMMAND_summary.csv, the means that a table needs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from record import RESULTS, provenance, write_rows
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.classify.data import ImageData, load_data
from enn_core.loco import LOCO, PROJECTIONS, calibrate_
from enn_core.spiking import ClampedReLU

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
START = {"backprop": 1e-3, "none": 3e-4, "low-rank": 3e-4}  # others: 3e-3
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
    """`depth` weight layers: 3 x 3 convolutions, pooled twice on the way, and a linear map."""
    side, before = data.train_x.shape[-1], data.train_x.shape[1]
    layers: list[nn.Module] = []
    for index in range(depth - 1):
        layers += [nn.Conv2d(before, channels, 3, padding=1), ClampedReLU()]
        if index in (1, 4):
            layers.append(nn.AvgPool2d(2))
            side //= 2
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 10))


def network(data: ImageData, kind: str, depth: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return (mlp if kind == "mlp" else conv)(data, depth, width)


def images(x: Any) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def percent(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        answers = torch.cat([model(images(part)).argmax(1) for part in x.split(500)])
    return round(100 * float((answers == y).float().mean()), 2)


def train(
    data: ImageData, model: nn.Sequential, method: str, lr: float, seed: int, steps: int, **o: Any
) -> dict[str, Any]:
    """Train a calibrated network on random batches; accuracy in percent."""
    generator = torch.Generator().manual_seed(seed)
    step = backprop(model, lr, steps) if method == "backprop" else None
    if step is None:
        options = {"loss": "ce", "projection": method, **o}
        step = LOCO(model, lr=lr, steps=steps, seed=seed, **options).step
    try:
        for _ in range(steps):
            chosen = torch.randint(len(data.train_y), (BATCH,), generator=generator)
            step(images(data.train_x[chosen]), data.train_y[chosen])
    except FloatingPointError:
        pass  # its accuracy is that of spoilt weights
    return {
        "valid": percent(model, data.valid_x, data.valid_y),
        "test": percent(model, data.test_x, data.test_y),
    }


def backprop(model: nn.Module, lr: float, steps: int) -> Callable[[Tensor, Tensor], float]:
    """Adam through the same layers, loss and schedule: what the estimates estimate."""
    from enn_core.rules.base import warm_up_cosine

    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = warm_up_cosine(optimizer, steps)

    def step(x: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return float(loss)

    return step


def best_rate(valid_at: Callable[[float], float], start: float) -> float:
    """Climb the grid from `start` until the best rate has worse ones, or the end, on both sides."""
    seen = {GRID.index(start): valid_at(start)}
    while True:
        best = max(seen, key=lambda index: seen[index])
        beside = [i for i in (best - 1, best + 1) if 0 <= i < len(GRID) and i not in seen]
        if not beside:
            return GRID[best]
        for index in beside:
            seen[index] = valid_at(GRID[index])


def compare(
    table: Table,
    make: Callable[[str, float, int], dict[str, Any]],
    key: dict[str, Any],
    methods: Iterable[str],
    seeds: Sequence[int],
) -> None:
    """Every method at its own best rate: one line per run, then the summary of the whole table."""
    for method in methods:

        def one(lr: float, seed: int, method: str = method) -> dict[str, str]:
            return table.run(lambda: make(method, lr, seed), **key, method=method, lr=lr, seed=seed)

        lr = best_rate(lambda lr: float(one(lr, 0)["valid"]), START.get(method, 3e-3))
        for seed in seeds:
            one(lr, seed)
    summarise(table, (*key, "method"))


def summarise(table: Table, key: Sequence[str]) -> None:
    """Per method the rate that seed 0 chose on validation, and the mean over seeds at that rate."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table.rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    summary = []
    for values, rows in groups.items():
        valid = {float(row["lr"]): float(row["valid"]) for row in rows if row["seed"] == "0"}
        best = max(valid, key=lambda lr: valid[lr])
        chosen = [row for row in rows if float(row["lr"]) == best]
        tests = [float(row["test"]) for row in chosen]
        summary.append(
            {
                **dict(zip(key, values, strict=True)),
                "lr": best,
                "edge": best in (min(valid), max(valid)),
                "seeds": len(tests),
                "test": round(statistics.mean(tests), 2),
                "sd": round(statistics.stdev(tests), 2) if len(tests) > 1 else "",
                "run_cpu_s": round(statistics.mean(float(row["cpu_s"]) for row in chosen), 1),
            }
        )
    write_rows(f"core/{table.path.stem}_summary", summary)


# --- sub-commands --------------------------------------------------------------------------------


def deep(args: argparse.Namespace) -> None:
    data = load(args.data)
    key = {
        "data": args.data,
        "net": "mlp",
        "depth": args.depth,
        "width": args.width,
        "steps": args.steps,
    }

    def make(method: str, lr: float, seed: int) -> dict[str, Any]:
        model = network(data, "mlp", args.depth, args.width, seed)
        calibrate_(model, images(data.train_x[:500]))
        return train(data, model, method, lr, seed, args.steps)

    table = Table("loco_deep", (*key, "method", "lr", "seed"))
    compare(table, make, key, args.methods, args.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("deep")
    command.set_defaults(function=deep)
    command.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    command.add_argument("--depth", type=int, default=11)
    command.add_argument("--width", type=int, default=128)
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--methods", nargs="+", default=["backprop", *PROJECTIONS])
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.function(args)


if __name__ == "__main__":
    main()
