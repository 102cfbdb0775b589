"""The orthogonality penalty in local training: error and drift of the bases against lambda.

The method's Figure 5 on brains: ENN-l with the soft penalty alone, lambda from 0 to 0.01, and with
retraction instead. A narrow `bins4` on the training part of outer fold 0 of seed 0, scored on
a fifth of these people that it has not seen: an inner fold, so no test scan chooses.

    python benchmarks/lambda_sweep.py                       # 27 short runs
    python benchmarks/lambda_sweep.py --lambdas 0 2e-4 --seeds 0

Writes results/lambda_sweep.csv and lambda_sweep.png.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from ixi import find_ixi, inner_folds, outer_splits
from record import RESULTS, write_rows

from enn_core.local import LocalTrainer
from enn_core.orthogonality import orthogonality_error, param_groups
from neuro.age.model import by_head
from neuro.age.networks import build
from neuro.age.targets import AgeValue
from neuro.dataset import BrainDataset
from neuro.train import TrainConfig, make_inputs

LAMBDAS = (0.0, 1e-6, 1e-5, 1e-4, 2e-4, 1e-3, 4e-3, 1e-2)
OPTIONS = {"widths": [16, 32, 32, 48]}
BATCH, LR = 8, 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lambdas", type=float, nargs="*", default=list(LAMBDAS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = BrainDataset.read(find_ixi() / "brains_mni_2mm")
    split = next(outer_splits(data, [0]))
    test = inner_folds(data, split)[0]
    data = data.take(np.concatenate([test, np.setdiff1d(split.train, test)]))
    inputs = make_inputs(data, TrainConfig(options=OPTIONS, views=1))[:, 0]
    rows: list[dict[str, Any]] = []
    for penalty in [*args.lambdas, None]:
        for seed in args.seeds:
            row = one(inputs, data.ages, len(test), penalty, seed, args.epochs)
            rows.append(row)
            print(
                f"{row['rule']}, seed {seed}: MAE {row['mae']:.2f}, drift {row['drift']:.3f}",
                flush=True,
            )
    write_rows("lambda_sweep", rows)
    plot(rows)


def one(
    inputs: torch.Tensor,
    ages: np.ndarray,
    held_out: int,
    penalty: float | None,
    seed: int,
    epochs: int,
) -> dict[str, Any]:
    """Train with a penalty, or with retraction if it is None; the first scans are not learnt."""
    known = ages[held_out:]
    target = AgeValue(float(known.mean()), float(known.std()))
    torch.manual_seed(seed)
    net = build("bins4", **OPTIONS)
    learnt, wanted = inputs[held_out:], torch.as_tensor(known, dtype=torch.float32)
    net.standardise_heads_(part.float() for part in learnt.split(BATCH))
    steps = epochs * (len(known) // BATCH)
    trainer = LocalTrainer(
        net.units("local"),
        target.loss,
        optimizer=lambda unit: torch.optim.AdamW(
            param_groups(unit, weight_decay=1e-3), lr=LR, betas=(0.9, 0.99)
        ),
        schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LR, total_steps=steps, cycle_momentum=False
        ),
        retract_every=1 if penalty is None else 0,
        penalty=penalty or 0.0,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    net.train()
    while trainer.steps < steps:
        order = rng.permutation(len(known))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = torch.from_numpy(order[start : start + BATCH])
            x = learnt[chosen].float()
            mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)
            x[mirrored] = x[mirrored].flip(2)
            trainer.step(x, wanted[chosen])
    net.eval()
    said = by_head(net, target, inputs[:held_out]).mean(1)
    drift = orthogonality_error(net)
    return {
        "rule": "retraction" if penalty is None else f"lambda {penalty:g}",
        "lambda": "" if penalty is None else penalty,
        "seed": seed,
        "mae": round(float(np.abs(said - ages[:held_out]).mean()), 3),
        "drift": round(max(drift.values()), 4),
        "loss": round(float(trainer.losses[-20:].mean()), 4),
        "epochs": epochs,
        "n_train": len(known),
        "n_test": held_out,
    }


def plot(rows: list[dict[str, Any]]) -> None:
    """Error and drift against lambda; retraction as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("mae", "drift"), ("MAE (years)", "largest ||QᵀQ - I|| / √r"),
        strict=True,
    ):  # fmt: skip
        soft = [row for row in rows if row["lambda"] != ""]
        lambdas = sorted({row["lambda"] for row in soft})
        means = [np.mean([row[name] for row in soft if row["lambda"] == v]) for v in lambdas]
        axes.plot(lambdas, means, marker="o", label="penalty")
        for row in soft:
            axes.plot(row["lambda"], row[name], ".", color="0.7", zorder=0)
        hard = [row[name] for row in rows if row["lambda"] == ""]
        if hard:
            axes.axhline(float(np.mean(hard)), linestyle="--", color="0.4", label="retraction")
        axes.set_xscale("symlog", linthresh=1e-6)
        axes.set(xlabel="λ", ylabel=label, xlim=(-4e-7, 1.6 * max(lambdas)))
        axes.legend()
    figure.savefig(RESULTS / "lambda_sweep.png", dpi=120)


if __name__ == "__main__":
    main()
