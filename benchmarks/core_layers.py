"""Cost of the eigen layers and of keeping them orthonormal, and how far factors drift without it.

    python benchmarks/core_layers.py            # everything, about 4 minutes on 2 quiet cores
    python benchmarks/core_layers.py --quick    # a smoke run, under a minute

Writes three tables under `benchmarks/results`:

* `core_layers.csv`: each layer against its torch twin (fused inference, cached eval,
  forward + backward) at the shapes of ViT-B/16 and ResNet-50.
* `core_orthogonality.csv`: retraction against `torch.nn.utils.parametrizations.orthogonal`.
* `core_drift.csv`: ||Q^T Q - I||_F / sqrt(r), the largest of all factors, after 200 steps.

Every ratio is taken inside one process from alternating runs (A B, B A, A B, ...) and is the median
of the ratios of neighbours, on CPU time; wall time stands beside it.
"""

from __future__ import annotations

import argparse
import csv
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from enn_core import (
    Retraction,
    fuse,
    orthogonality_error,
    orthogonality_penalty,
    param_groups,
    retract_,
    to_enn,
)

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

LINEAR = [  # (in, out, tokens); 197 tokens an image, 64 images are 12,608
    (768, 768, (16, 197, 1576, 8192, 12608)),
    (768, 2304, (197, 1576)),
    (768, 3072, (16, 197, 1576)),
    (3072, 768, (16, 197, 1576)),
]
CONV = [  # (in, out, kernel, stride, image side, batch)
    (3, 64, 7, 2, 224, 8),
    (64, 64, 3, 1, 56, 8),
    (64, 256, 1, 1, 56, 8),
    (128, 128, 3, 1, 28, 8),
    (1024, 256, 1, 1, 14, 32),
    (512, 512, 3, 1, 7, 1),
    (512, 512, 3, 1, 7, 32),
]
RETRACTIONS = [  # (method, learning rate whose drift is retracted)
    ("newton-schulz", 1e-4),
    ("newton-schulz", 1e-3),
    ("quintic", 1e-3),
    ("qr", 1e-3),
]
QUICK_LINEAR = [(256, 256, (16, 512))]
QUICK_CONV = [(16, 32, 3, 1, 14, 4)]


def machine() -> str:
    """Processor name and core count."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the code that ran, with `+` if `enn_core` has uncommitted changes."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "-s", "enn_core"))


def compare(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> Row:
    """CPU and wall milliseconds of two functions, and the median ratio second/first."""

    def once(function: Callable[[], Any], calls: int) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            function()
        return time.process_time() - cpu, time.perf_counter() - wall

    for function in (first, second):  # warm up: caches, allocator, primitive selection
        once(function, 2)
    probe = min(once(first, 1)[1], once(second, 1)[1])
    calls = max(1, math.ceil(0.004 / max(probe, 1e-6)))
    samples: list[tuple[tuple[float, float], tuple[float, float]]] = []
    start = time.perf_counter()
    while len(samples) < 4 or time.perf_counter() - start < seconds:
        if len(samples) % 2:
            b = once(second, calls)
            a = once(first, calls)
        else:
            a = once(first, calls)
            b = once(second, calls)
        samples.append((a, b))
    scale = 1e3 / calls
    return {
        "base_ms": round(statistics.median(a[0] for a, _ in samples) * scale, 4),
        "ours_ms": round(statistics.median(b[0] for _, b in samples) * scale, 4),
        "ratio": round(statistics.median(b[0] / a[0] for a, b in samples), 4),
        "base_wall_ms": round(statistics.median(a[1] for a, _ in samples) * scale, 4),
        "ours_wall_ms": round(statistics.median(b[1] for _, b in samples) * scale, 4),
        "wall_ratio": round(statistics.median(b[1] / a[1] for a, b in samples), 4),
        "pairs": len(samples),
        "calls_per_sample": calls,
    }


def layer_cases(quick: bool) -> Iterator[tuple[str, nn.Module, torch.Tensor, int, int, int]]:
    """(name, plain layer, input, out, n, tokens or output positions)."""
    for n, m, tokens in QUICK_LINEAR if quick else LINEAR:
        for t in tokens:
            yield f"Linear {n}->{m}", nn.Linear(n, m), torch.randn(t, n), m, n, t
    for cin, cout, k, stride, side, batch in QUICK_CONV if quick else CONV:
        conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
        name = f"Conv2d {cin}->{cout} {k}x{k}/{stride} @{side}"
        positions = batch * math.ceil(side / stride) ** 2
        yield name, conv, torch.randn(batch, cin, side, side), cout, cin * k * k, positions


def train_step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, with the gradient of the input, as inside a network."""
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]

    def run() -> None:
        torch.autograd.grad(layer(x), wanted, grad)

    return run


def bench_layers(quick: bool, seconds: float) -> Iterator[Row]:
    for name, plain, x, m, n, tokens in layer_cases(quick):
        eigen = to_enn(plain)
        fused, r = fuse(eigen).eval(), min(m, n)
        facts = {"layer": name, "out": m, "n": n, "r": r, "tokens": tokens}
        law = min(1 + r / tokens, r * (m + n) / (m * n))
        plain.eval()
        eigen.eval()
        with torch.no_grad():
            for mode, other in (("fused inference", fused), ("cached eval", eigen)):
                timing = compare(partial(plain, x), partial(other, x), seconds)
                yield facts | {"mode": mode} | timing | {"target": 1.02}
            grad = torch.randn_like(plain(x))
        plain.train()
        eigen.train()
        timing = compare(train_step(plain, x, grad), train_step(eigen, x, grad), seconds)
        yield facts | {"mode": "forward+backward"} | timing | {"target": round(1.1 * law, 4)}


def drift(layer: nn.Module, lr: float, steps: int = 10) -> None:
    """Move the factors as far as ten Adam steps do, so that a retraction has real work."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("Q", "P"):
                parameter.add_(torch.randn_like(parameter), alpha=lr * steps**0.5)


def bench_orthogonality(quick: bool, seconds: float) -> Iterator[Row]:
    """Per training step of one layer: what each way of staying orthonormal adds.

    Ours keeps two factors (Q and P) orthonormal, torch's map one matrix of the layer's shape: the
    columns `torch_*_over_ours` compare what one matrix costs at every step, `every_10th_over_layer`
    what both factors add to a plain layer's forward and backward when retracted every tenth step.
    """
    for m, n, tokens in [(128, 128, 256)] if quick else [(768, 768, 1576), (256, 256, 1576)]:
        x = torch.randn(tokens, n)
        plain = nn.Linear(n, m)
        base = train_step(plain, x, torch.randn(tokens, m))
        facts = {"layer": f"Linear {n}->{m}", "tokens": tokens}
        maps: dict[str, float] = {}
        for name in ("matrix_exp", "cayley"):
            mapped = orthogonal(nn.Linear(n, m), orthogonal_map=name)
            timing = compare(base, train_step(mapped, x, torch.randn(tokens, m)), seconds)
            maps[name] = (timing["ratio"] - 1) * timing["base_ms"]
            yield facts | {"method": f"torch {name}", "added_ms": round(maps[name], 3)} | timing
        for method, lr in RETRACTIONS:
            eigen = to_enn(plain)
            drift(eigen, lr)
            start = {key: value.clone() for key, value in eigen.state_dict().items()}

            def restore(eigen=eigen, start=start) -> None:
                eigen.load_state_dict(start)

            def retract(eigen=eigen, restore=restore, method=method) -> None:
                restore()
                retract_(eigen, method)

            added = compare(restore, retract, seconds)
            cost = added["ours_ms"] - added["base_ms"]
            restore()
            before = max(orthogonality_error(eigen).values())
            retract()
            after = max(orthogonality_error(eigen).values())
            timing = compare(base, retract, seconds)
            share = cost / 10 / timing["base_ms"]
            # One matrix against one matrix: ours retracted two, Q and P, of this square layer.
            over_default = maps["matrix_exp"] / (cost / 2)
            over_cayley = maps["cayley"] / (cost / 2)
            yield (
                facts
                | {
                    "method": f"retraction {method}, Q and P",
                    "drift": f"10 steps of lr {lr:g}",
                    "added_ms": round(cost, 3),
                    "every_10th_over_layer": round(share, 4),
                    "torch_default_over_ours": round(over_default, 1),
                    "torch_cayley_over_ours": round(over_cayley, 1),
                    "error_before": f"{before:.2e}",
                    "error_after": f"{after:.2e}",
                    "met": share <= 0.1 and over_default >= 20 and over_cayley >= 3,
                }
                | timing
            )
        eigen = to_enn(plain)
        wanted = [eigen.Q, eigen.P]

        def penalty(eigen=eigen, wanted=wanted) -> None:
            torch.autograd.grad(orthogonality_penalty(eigen), wanted)

        timing = compare(base, penalty, seconds)
        yield facts | {"method": "penalty, Q and P", "added_ms": timing["ours_ms"]} | timing


def small_vit(width: int, depth: int) -> nn.Module:
    """Patches of 16 numbers, `depth` encoder blocks, ten classes."""
    block = nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(16, width), encoder, nn.Linear(width, 10))


def bench_drift(quick: bool) -> Iterator[Row]:
    """200 AdamW steps towards a random teacher; what holds Q and P, and what does not."""
    width, depth, steps = (32, 1, 20) if quick else (128, 2, 200)
    variants: list[tuple[str, float, str | None, int]] = [
        ("nothing", 0.0, None, 0),
        ("penalty, lambda 2e-4 (paper)", 2e-4, None, 0),
        ("penalty, lambda 1e-2", 1e-2, None, 0),
        ("penalty, lambda 1", 1.0, None, 0),
        ("newton-schulz every step", 0.0, "newton-schulz", 1),
        ("newton-schulz every 10th", 0.0, "newton-schulz", 10),
        ("quintic every 10th", 0.0, "quintic", 10),
        ("qr every 10th", 0.0, "qr", 10),
    ]
    for name, coefficient, method, every in variants:
        torch.manual_seed(0)
        plain, teacher = small_vit(width, depth), nn.Linear(16, 10)
        model = to_enn(plain)
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
        if method:
            Retraction(optimizer, model, every=every, method=method)
        worst = 0.0
        start = time.process_time()
        for step in range(steps):
            x = torch.randn(16, 16, 16)
            target = teacher(x).square()
            loss = (model(x) - target).square().mean()
            total = loss + orthogonality_penalty(model, coefficient) if coefficient else loss
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if step >= steps - 10:  # one whole cycle
                worst = max(worst, *orthogonality_error(model).values())
        errors = orthogonality_error(model).values()
        yield {
            "held_by": name,
            "steps": steps,
            "optimizer": "AdamW lr 1e-3",
            "largest_error": f"{max(errors):.2e}",
            "mean_error": f"{statistics.mean(errors):.2e}",
            "largest_error_last_10_steps": f"{worst:.2e}",
            "factors": len(errors),
            "last_loss": round(loss.item(), 4),
            "cpu_seconds": round(time.process_time() - start, 2),
            "target": 5e-3 if method else "",
            "met": max(errors) <= 5e-3,
        }


def write(path: Path, rows: list[Row], about: Row) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *about], restval="")
        writer.writeheader()
        writer.writerows(row | about for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--seconds", type=float, help="at least this long per comparison")
    parser.add_argument("--only", choices=["layers", "orthogonality", "drift"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    args = parser.parse_args()
    seconds = args.seconds or (0.1 if args.quick else 1.0)
    torch.manual_seed(0)
    about = {
        "command": shlex.join(["python", "benchmarks/core_layers.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "layers": lambda: bench_layers(args.quick, seconds),
        "orthogonality": lambda: bench_orthogonality(args.quick, seconds),
        "drift": lambda: bench_drift(args.quick),
    }
    for name, part in parts.items():
        if args.only not in (None, name):
            continue
        rows: list[Row] = []
        for row in part():
            if name == "layers":
                row["met"] = row["ratio"] <= row["target"]
            rows.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        write(args.out / f"core_{name}.csv", rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
