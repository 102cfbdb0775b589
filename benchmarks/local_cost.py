"""Memory and processor time of local training against backpropagation and checkpointing.

    python benchmarks/local_cost.py            # about 5 minutes on 2 quiet cores
    python benchmarks/local_cost.py --quick    # small batches, under a minute

One step on the same network and batch, one thread. `backprop` is the network as one block;
`local` is Algorithm 1 with `conv` heads on the blocks that `enn_core.cut` finds by memory;
`checkpoint` is backprop that recomputes each of the same blocks. Writes `results/local_cost.csv`:

* saved_mb: peak of the tensors that autograd keeps, without parameters (saved_tensors_hooks).
* allocated_mb: peak of what a step allocates, gradients included (torch.profiler).
* rss_mb: peak of the process over its size before the step, in a process of its own (Linux).
* cpu_s: median processor time of a step; cpu_ratio: median of neighbouring runs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from local_networks import CASES, QUICK, Case
from record import write_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from enn_core import LocalBlock, LocalTrainer, cut, local_blocks

METHODS = ("backprop", "local", "checkpoint")
MB = 1e6


class Checkpointed(nn.Module):
    """Parts one after the other, each recomputed in the backward but the last."""

    def __init__(self, parts: list[nn.Module], reentrant: bool) -> None:
        super().__init__()
        self.parts, self.reentrant = nn.ModuleList(parts), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:  # recomputes only if its input has a gradient
            x = x.detach().requires_grad_()
        *before, last = self.parts
        for part in before:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return last(x)


def trainer_of(case: Case, method: str, reentrant: bool = False) -> LocalTrainer:
    """The same network, trained by one of the methods."""
    torch.manual_seed(0)
    model = case.make()
    x, _ = case.data()
    example = x[: max(1, len(x) // 8)] if len(x) > 8 else x
    if method == "local":
        blocks = local_blocks(model, example, case.blocks)
    elif method == "checkpoint":
        parts = cut(model, example, case.blocks)
        blocks = [LocalBlock(Checkpointed(parts, reentrant), nn.Identity())]
    else:
        blocks = [LocalBlock(model, nn.Identity())]
    return LocalTrainer(blocks, F.cross_entropy)


def saved_peak(trainer: LocalTrainer, step: Callable[[], object]) -> int:
    """Most bytes that autograd keeps at once."""
    own = {
        t.untyped_storage().data_ptr()
        for block in trainer.blocks
        for t in [*block.parameters(), *block.buffers()]
    }
    users: Counter[int] = Counter()
    now = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            self.size = 0 if self.key in own else tensor.untyped_storage().nbytes()
            if not users[self.key]:
                now += self.size
                peak = max(peak, now)
            users[self.key] += 1

        def __del__(self) -> None:
            nonlocal now
            users[self.key] -= 1
            if not users[self.key]:
                now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step()
    return peak


def peaks(trainer: LocalTrainer, step: Callable[[], object]) -> tuple[int, int]:
    """Of one step: most bytes kept by autograd, and allocated beyond what there was before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        saved = saved_peak(trainer, step)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return saved, peak


def memory(case: Case, method: str) -> dict[str, float]:
    """Memory of one method; states of the optimizer are not there yet, so as not to count."""
    torch.set_num_threads(1)
    x, target = case.data()
    trainer = trainer_of(case, method, reentrant=True)
    for learner in trainer.learners:  # as light as an optimizer can be
        learner.optimizer = torch.optim.SGD(learner.block.parameters(), lr=1e-3)
    saved, allocated = peaks(trainer, lambda: trainer.step(x, target))
    return {
        "saved_mb": round(saved / MB, 1),
        "allocated_mb": round(allocated / MB, 1),
    }


def grown(case: Case, method: str) -> dict[str, float]:
    """Growth of this process by its first full step; to be called in a new process."""
    torch.set_num_threads(1)
    x, target = case.data()
    trainer = trainer_of(case, method)
    trainer.step(x[:2], target[:2])  # states of the optimizer, code that loads late
    before = _status("VmRSS")
    # The peak starts anew; getrusage's would be the parent's, kept through fork and exec.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.step(x, target)
    return {"rss_mb": round((_status("VmHWM") - before) / MB, 1)}


def _status(field: str) -> int:
    """A size of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def seconds(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Processor time of a step of every method, by turns."""
    torch.set_num_threads(1)
    x, target = case.data()
    trainers = {method: trainer_of(case, method) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(-1, repeats):
        order = METHODS if repeat % 2 else METHODS[::-1]
        for method in order:
            start = time.process_time()
            trainers[method].step(x, target)
            if repeat >= 0:
                times[method].append(time.process_time() - start)
    result = {}
    for method, own in times.items():
        ratios = [a / b for a, b in zip(own, times["backprop"], strict=True)]
        result[method] = {
            "cpu_s": round(statistics.median(own), 3),
            "cpu_ratio": round(statistics.median(ratios), 3),
            "cpu_ratio_low": round(min(ratios), 3),
            "cpu_ratio_high": round(max(ratios), 3),
        }
    return result


def in_a_process(*arguments: str) -> dict[str, float]:
    """Run a part of this script alone; large blocks of memory go back when they are freed."""
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches, no file")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--no-rss", action="store_true", help="leave out the processes' growth")
    parser.add_argument("--grown", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = QUICK if options.quick else CASES
    if options.grown:
        name, method = options.grown
        print(json.dumps(grown(cases[name], method)))
        return
    rows: list[dict[str, Any]] = []
    for name, case in cases.items():
        base: dict[str, float] = {}
        for method in METHODS:
            used = memory(case, method)
            if not options.no_rss:
                quick = ["--quick"] if options.quick else []
                used |= in_a_process(*quick, "--grown", name, method)
            base = base or used
            ratios = {
                key.replace("_mb", "_ratio"): round(value / base[key], 3) if base[key] else ""
                for key, value in used.items()
            }
            rows.append({"network": name, "method": method, **used, **ratios})
            print(json.dumps(rows[-1]), flush=True)
        for row, spent in zip(rows[-3:], seconds(case, options.repeats).values(), strict=True):
            row |= spent
            print(json.dumps({"network": name, "method": row["method"], **spent}), flush=True)
        if not options.quick:  # after every network: a run may be cut off
            path = write_rows("local_cost", rows)
    if not options.quick:
        print(path)


if __name__ == "__main__":
    main()
