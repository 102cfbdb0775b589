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
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from loco_runs import BATCH, Table, images, load, network, percent
from record import write_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from enn_core.lab.classify.datasets import ImageData
from enn_core.lab.continual import (
    Protection,
    Task,
    accuracy_matrix_summary,
    learn_stream,
    permuted_stream,
    split_stream,
)
from enn_core.local import LocalBlock, LocalTrainer
from enn_core.loco import LOCO, PROJECTIONS, calibrate_
from enn_core.loco.node_perturbation import LOSSES, restricted
from enn_core.loco.protected_inputs import HardProjector, SoftProjector
from enn_core.rules.base import decay
from enn_core.spiking import ClampedReLU, spiking_twin

Projector = HardProjector | SoftProjector

GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
START = {"none": 3e-4, "low-rank": 3e-4}  # others: 1e-3


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
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = decay(optimizer, steps)

    def step(x: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return float(loss.detach())

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

        lr = best_rate(lambda lr: float(one(lr, 0)["valid"]), START.get(method, 1e-3))
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


CHOICES: dict[str, dict[str, Any]] = {
    "as in deep": {},
    "squared error": {"loss": "mse"},
    "errors of clamped units kept": {"gate": False},
    "sigma 0.05": {"sigma": 0.05},
    "antithetic, sigma 0.05": {"antithetic": True, "sigma": 0.05},
    "4 probes": {"probes": 4},
    "SGD, lr 0.03": {"optimizer": "sgd", "lr": 0.03},
    "usual initial weights": {"calibrate": False},
}


def choices(args: argparse.Namespace) -> None:
    """One choice changed at a time, at one learning rate: digits, 11 layers."""
    data = load("digits")
    table = Table("loco_choices", ("choice", "method", "steps", "lr", "seed"))
    for method, lr in (("mean", 3e-3), ("none", 3e-4)):
        for choice, options in CHOICES.items():
            for seed in args.seeds:

                def one(
                    options: dict[str, Any] = options,
                    method: str = method,
                    lr: float = lr,
                    seed: int = seed,
                ) -> dict[str, Any]:
                    options = {"lr": lr, **options}
                    model = network(data, "mlp", 11, 128, seed)
                    if options.pop("calibrate", True):
                        calibrate_(model, data.train_x[:500])
                    else:
                        usual_(model)
                    return train(data, model, method, seed=seed, steps=args.steps, **options)

                table.run(one, choice=choice, method=method, steps=args.steps, lr=lr, seed=seed)


def usual_(model: nn.Sequential) -> None:
    """He's weights, no bias: what deep rectifiers start from."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def spiking(args: argparse.Namespace) -> None:
    """The spiking forward itself is perturbed and trained, 11 weight layers, digits."""
    data = load("digits")
    key = {
        "data": "digits",
        "net": args.net,
        "depth": args.depth,
        "width": args.width,
        "leak": args.leak,
        "time": args.time,
        "coding": args.coding,
        "sigma": args.sigma,
        "steps": args.steps,
    }

    def make(method: str, lr: float, seed: int) -> dict[str, Any]:
        rate = network(data, args.net, args.depth, args.width, seed)
        model = spiking_twin(rate, args.time, leak=args.leak, coding=args.coding)
        torch.manual_seed(seed)
        calibrate_(model, data.train_x[:300])
        result = train(data, model, method, lr, seed, args.steps, sigma=args.sigma)
        return {**result, "rate_test": percent(rate, data.test_x, data.test_y)}

    table = Table("loco_spiking", (*key, "method", "lr", "seed"))
    if args.lr is None:
        compare(table, make, key, args.methods, args.seeds)
        return
    for method in args.methods:
        for seed in args.seeds:
            table.run(
                lambda method=method, seed=seed: make(method, args.lr, seed),  # type: ignore[misc]
                **key,
                method=method,
                lr=args.lr,
                seed=seed,
            )
    summarise(table, (*key, "method"))


HOLD = 1e-7  # alpha that lets nothing of an earlier task's inputs change
SETTINGS: dict[str, Callable[[int, int], Projector] | None] = {
    "no protection": None,
    "soft, all layers 1e-2": lambda columns, place: SoftProjector(columns, 1e-2),
    "hold, last soft 1e-1": lambda columns, place: SoftProjector(columns, HOLD if place else 1e-1),
    "hold, last soft 1e-2": lambda columns, place: SoftProjector(columns, HOLD if place else 1e-2),
    "hold, last soft 1e-3": lambda columns, place: SoftProjector(columns, HOLD if place else 1e-3),
    "hold, last hard 0.9": lambda columns, place: (
        SoftProjector(columns, HOLD) if place else HardProjector(columns, 0.9)
    ),
    "hold, last hard 0.97": lambda columns, place: (
        SoftProjector(columns, HOLD) if place else HardProjector(columns, 0.97)
    ),
    "hold, last rank 20": lambda columns, place: (
        SoftProjector(columns, HOLD) if place else HardProjector(columns, 1.0, rank=20)
    ),
}


def streams(data: ImageData, scenario: str) -> tuple[list[Task], int]:
    """Two tasks (three orders of pixels), and how many outputs the head has."""
    parts = [
        (images(x).flatten(1), y)
        for x, y in (
            (data.train_x, data.train_y),
            (data.valid_x, data.valid_y),
            (data.test_x, data.test_y),
        )
    ]
    if scenario == "permuted":
        return permuted_stream(*parts, tasks=3), 10
    groups = (range(5), range(5, 10))
    return split_stream(*parts, groups, scenario), 5 if scenario == "domain" else 10


def continual(args: argparse.Namespace) -> None:
    """Protection chosen on validation by seed 0, then the width, then the other seeds."""
    key = ("data", "scenario", "rule", "setting", "width", "lr", "steps", "seed")
    table, lr = Table("loco_continual", key), 3e-3
    for name in args.data:
        data = load(name)
        for scenario in args.scenarios:
            if (name, scenario) == ("digits", "permuted"):
                continue
            stream, outputs = streams(data, scenario)
            for rule in args.rules:
                same = {"data": name, "scenario": scenario, "rule": rule}
                same |= {"lr": lr, "steps": args.steps}

                def one(
                    setting: str,
                    width: int,
                    seed: int,
                    stream: list[Task] = stream,
                    outputs: int = outputs,
                    rule: str = rule,
                    same: dict[str, Any] = same,
                ) -> dict[str, str]:
                    make = SETTINGS[setting]
                    return table.run(
                        lambda: learn_tasks(
                            stream, outputs, rule, make, width, lr, args.steps, seed
                        ),
                        **same,
                        setting=setting,
                        width=width,
                        seed=seed,
                    )

                tried = [one(setting, args.widths[0], 0) for setting in args.settings]
                setting = max(tried, key=_valid)["setting"]
                wider = [one(setting, width, 0) for width in args.widths]
                width = int(max(wider, key=_valid)["width"])
                for seed in args.seeds:
                    one("no protection", args.widths[0], seed)
                    one(setting, width, seed)
                _summarise_continual(table)


def _valid(row: dict[str, str]) -> tuple[bool, float]:
    """On validation: first that 95 % of each earlier task is kept, then the mean accuracy."""
    return float(row["valid_kept"]) >= 0.95, float(row["valid_average"])


def _summarise_continual(table: Table) -> None:
    """Without protection, and with what seed 0 chose on validation: means over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table.rows:
        key = tuple(row[name] for name in ("data", "scenario", "rule", "steps"))
        groups.setdefault(key, []).append(row)
    summary = []
    for (data, scenario, rule, steps), rows in groups.items():
        first = [row for row in rows if row["seed"] == "0"]
        bare = [row for row in first if row["setting"] == "no protection"][:1]
        for best in [*bare, max(first, key=_valid)]:
            chosen = [
                row
                for row in rows
                if (row["setting"], row["width"]) == (best["setting"], best["width"])
            ]
            means = {
                column: round(statistics.mean(float(row[column]) for row in chosen), 4)
                for column in ("average", "kept", "learnt", "forgetting")
            }
            summary.append(
                {
                    "data": data,
                    "scenario": scenario,
                    "rule": rule,
                    "steps": steps,
                    "setting": best["setting"],
                    "width": best["width"],
                    "seeds": len(chosen),
                    **means,
                    "used": best["used"],
                }
            )
    write_rows("core/loco_continual_summary", summary)


def learn_tasks(
    stream: list[Task],
    outputs: int,
    rule: str,
    make: Callable[[int, int], Projector] | None,
    width: int,
    lr: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """One wide hidden layer learns the stream; accuracies in shares, of valid and test part."""
    torch.manual_seed(seed)
    pixels = stream[0].train[0].shape[1]
    model = nn.Sequential(nn.Linear(pixels, width), ClampedReLU(), nn.Linear(width, outputs))
    calibrate_(model, stream[0].train[0][:500], spread=0.5)
    protection = Protection(model, make) if make else None

    def learn(index: int, task: Task) -> None:
        x, y = task.train
        loss = restricted(LOSSES["mse"], task.outputs)
        generator = torch.Generator().manual_seed(100 * seed + index)
        end: Callable[[], None] | None = None
        if rule == "backprop":
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            schedule = decay(optimizer, steps)
            end = protection.attach(optimizer) if protection else None
        else:
            learner = LOCO(
                model,
                lr=lr,
                steps=steps,
                loss="mse",
                outputs=task.outputs,
                projection="none",
                protection=protection,
                seed=100 * seed + index,
            )
        for _ in range(steps):
            chosen = torch.randint(len(x), (BATCH,), generator=generator)
            if rule != "backprop":
                learner.step(x[chosen], y[chosen])
                continue
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).mean().backward()
            optimizer.step()
            schedule.step()
        if end:
            end()

    def after(index: int, task: Task) -> None:
        if protection:
            protection.add(task.train[0][:2000])

    matrices = learn_stream(model, stream, learn, after)
    return {
        **{f"valid_{k}": v for k, v in accuracy_matrix_summary(matrices["valid"]).items()},
        **accuracy_matrix_summary(matrices["test"]),
        "matrix": json.dumps([[round(a, 4) for a in row] for row in matrices["test"]]),
        "used": json.dumps([round(u, 3) for u in protection.used()] if protection else []),
    }


class Chain(TorchDispatchMode):
    """Follows how many operations every tensor has behind it, one after the other.

    An operation comes one after the latest of its inputs; views are none. What does not need
    another's result could run at the same time, however the program orders it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.behind: dict[int, int] = {}
        self.alive: list[Tensor] = []  # or a new tensor could get a dead one's address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        level = 1 + max((self.of(t) for t in given), default=0)
        storages = {t.untyped_storage().data_ptr() for t in given}
        for t in made:
            where = t.untyped_storage().data_ptr()
            if where not in storages or func._schema.is_mutable:
                self.behind[where] = max(level, self.behind.get(where, 0))
        self.alive += made
        return result

    def of(self, tensor: Tensor) -> int:
        return self.behind.get(tensor.untyped_storage().data_ptr(), 0)


def sequential(args: argparse.Namespace) -> None:
    """The longest chain of operations of a real update, and how much of it follows the last loss.

    A forward pass is as long as the network is deep for every rule; what follows the loss is what
    a rule adds, and no number of processors can do at the same time.
    """
    x, y = torch.rand(16, 32), torch.arange(16) % 10
    rows = []
    for depth in args.depths:
        for rule in ("backprop", "local, 4 blocks", "local, a block per layer", "loco"):
            torch.manual_seed(0)
            widths = [32] * depth
            layers = [nn.Sequential(nn.Linear(w, 32), ClampedReLU()) for w in widths[:-1]]
            model = nn.Sequential(*layers, nn.Linear(32, 10))
            chain, at_loss = Chain(), [0]
            if rule == "loco":

                def loss(
                    scores: Tensor, y: Tensor, chain: Chain = chain, at_loss: list[int] = at_loss
                ) -> Tensor:
                    result = LOSSES["ce"](scores, y)
                    at_loss[0] = chain.of(result)
                    return result

                step: Callable[[Tensor, Tensor], Any] = LOCO(
                    model, lr=1e-3, steps=10, loss=loss
                ).step
            else:

                def task(
                    scores: Tensor, y: Tensor, chain: Chain = chain, at_loss: list[int] = at_loss
                ) -> Tensor:
                    result = F.cross_entropy(scores, y)
                    at_loss[0] = chain.of(result)
                    return result

                blocks = 1 if rule == "backprop" else 4 if "4" in rule else depth
                step = LocalTrainer(_blocks(list(model), blocks), task).step
            for _ in range(2):  # states of the optimizer
                step(x, y)
            with chain:
                step(x, y)
            whole = max(chain.of(parameter) for parameter in model.parameters())
            rows.append(
                {
                    "rule": rule,
                    "depth": depth,
                    "chain": whole,
                    "to_loss": at_loss[0],
                    "after_loss": whole - at_loss[0],
                }
            )
            print(rows[-1], flush=True)
    write_rows("core/loco_sequential", rows)


def _blocks(layers: list[nn.Module], count: int) -> list[LocalBlock]:
    """Equal shares of the layers, each with a linear head; the last layer is the last head."""
    if count == 1:
        return [LocalBlock(nn.Sequential(*layers[:-1]), layers[-1])]
    count = min(count, len(layers) - 1)
    bounds = [round(i * (len(layers) - 1) / count) for i in range(count + 1)]
    parts = [nn.Sequential(*layers[a:b]) for a, b in pairwise(bounds)]
    heads = [*(nn.Linear(32, 10) for _ in parts[:-1]), layers[-1]]
    return [LocalBlock(part, head) for part, head in zip(parts, heads, strict=True)]


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

    command = commands.add_parser("choices")
    command.set_defaults(function=choices)
    command.add_argument("--steps", type=int, default=1500)
    command.add_argument("--seeds", type=int, nargs="+", default=[0])

    command = commands.add_parser("spiking")
    command.set_defaults(function=spiking)
    command.add_argument("--net", choices=("mlp", "conv"), default="mlp")
    command.add_argument("--depth", type=int, default=11)
    command.add_argument("--width", type=int, default=64)
    command.add_argument("--leak", type=float, default=1.0)
    command.add_argument("--time", type=int, default=8)
    command.add_argument("--coding", choices=("constant", "poisson"), default="constant")
    command.add_argument("--sigma", type=float, default=0.05)
    command.add_argument("--steps", type=int, default=600)
    command.add_argument("--lr", type=float, help="this rate alone, no search")
    command.add_argument("--methods", nargs="+", default=["none", "mean", "loco"])
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1])

    command = commands.add_parser("continual")
    command.set_defaults(function=continual)
    command.add_argument("--data", nargs="+", default=["digits", "fashion-mnist"])
    command.add_argument("--scenarios", nargs="+", default=["class", "task", "domain", "permuted"])
    command.add_argument("--rules", nargs="+", default=["backprop", "loco"])
    command.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    command.add_argument("--widths", type=int, nargs="+", default=[300, 800])
    command.add_argument("--steps", type=int, default=500)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1])

    command = commands.add_parser("sequential")
    command.set_defaults(function=sequential)
    command.add_argument("--depths", type=int, nargs="+", default=[3, 11, 15, 50])

    args = parser.parse_args()
    torch.set_num_threads(1)
    args.function(args)


if __name__ == "__main__":
    main()
