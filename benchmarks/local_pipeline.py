"""Wall time of ENN-l on two processes against one process, one thread each.

    python benchmarks/local_pipeline.py            # about 3 minutes on 2 quiet cores
    python benchmarks/local_pipeline.py --quick    # small batches; a smoke run

Needs two idle cores. The same blocks, batch and optimizer: `sequential` is `LocalTrainer.step` on
one thread, `pipeline` is `Pipeline` on two processes of one thread, `backprop` is the network as
one block on one thread and on two. Blocks are cut by time and spread over the processes by
`cuts.balance`. Rounds alternate; a round is `--steps` steps, the pipeline's ends when it has run
empty. Losses of pipeline and sequential run are compared bit for bit. Writes
`results/local_pipeline.csv`: median seconds a step, and ratio to `sequential` (median of rounds).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from local_networks import CASES, QUICK, Case
from record import write_rows
from torch import nn
from torch.nn import functional as F

from enn_core import LocalBlock, LocalTrainer, Pipeline, local_blocks
from enn_core.cuts import balance, measure

PARTS = 8  # finer than the two processes, so that they can be evenly loaded


def local_trainer(case: Case, parts: int) -> LocalTrainer:
    torch.manual_seed(0)
    x, _ = case.data()
    return LocalTrainer(local_blocks(case.make(), x, parts, by="time"), F.cross_entropy)


def bench(case: Case, steps: int, rounds: int) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one network, and whether both schedules gave the same losses to the bit."""
    torch.set_num_threads(1)
    x, target = case.data()
    sequential = local_trainer(case, PARTS)
    piped = LocalTrainer(copy.deepcopy(sequential.blocks), F.cross_entropy)
    torch.manual_seed(0)
    whole = LocalTrainer([LocalBlock(case.make(), nn.Identity())], F.cross_entropy)
    costs = [cost.seconds for cost in measure(sequential.blocks, x, repeats=2)]
    groups = balance(costs, 2)
    times: dict[str, list[float]] = {}

    def clocked(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        times.setdefault(name, []).append((time.perf_counter() - start) / steps)

    def repeat(trainer: LocalTrainer) -> None:
        for _ in range(steps):
            trainer.step(x, target)

    def backprop_on_two() -> None:
        torch.set_num_threads(2)
        try:
            repeat(whole)
        finally:
            torch.set_num_threads(1)

    halves = [sum(costs[: groups[0]]), sum(costs[groups[0] :])]
    with Pipeline(piped, groups=groups) as pipeline:

        def through() -> None:
            for _ in range(steps):
                pipeline.step(x, target)
            pipeline.drain()

        for run in (lambda: repeat(sequential), through, lambda: repeat(whole)):
            run()  # warm up
        for _ in range(rounds):
            clocked("sequential", lambda: repeat(sequential))
            clocked("pipeline", through)
            clocked("backprop, 1 thread", lambda: repeat(whole))
            clocked("backprop, 2 threads", backprop_on_two)
    same = torch.equal(sequential.losses, piped.losses)
    rows = []
    for name, own_times in times.items():
        ratios = [a / b for a, b in zip(times["sequential"], own_times, strict=True)]
        rows.append(
            {
                "schedule": name,
                "seconds_per_step": round(statistics.median(own_times), 4),
                "speedup": round(statistics.median(ratios), 3),
                "speedup_low": round(min(ratios), 3),
                "speedup_high": round(max(ratios), 3),
                "bound": round(sum(halves) / max(halves), 3) if name == "pipeline" else "",
                "blocks": "+".join(map(str, groups)) if name == "pipeline" else "",
            }
        )
    return rows, same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches, no file")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name, case in (QUICK if options.quick else CASES).items():
        if name.endswith("17 blocks"):  # cut for memory; the network is there already
            continue
        own, same = bench(case, options.steps, options.rounds)
        network = name.partition(",")[0]
        for row in own:
            rows.append({"network": network, **row, "same_bits": same})
            print(json.dumps(rows[-1]), flush=True)
        if not options.quick:  # after every network: a run may be cut off
            path = write_rows("local_pipeline", rows)
    if not options.quick:
        print(path)


if __name__ == "__main__":
    main()
