"""One network learns the digits 0 to 4, then 5 to 9, and still knows the first ones.

    python examples/continual.py              # a few seconds
    python examples/continual.py --alpha 0    # without protection: it forgets them all

One head of ten classes, nothing of the first task is stored but a projector per layer, and nobody
says at test time which task a digit is from. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from enn_core.lab.continual import (
    Protection,
    Task,
    accuracy_matrix_summary,
    learn_stream,
    split_stream,
)
from enn_core.loco import LOCO, calibrate_
from enn_core.loco.protected_inputs import SoftProjector
from enn_core.spiking import ClampedReLU


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Learn both tasks, print the accuracies, and return their summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--alpha", type=float, default=1e-2, help="small holds tightly, 0: not")
    parser.add_argument("--steps", type=int, default=400, help="batches of each task")
    args = parser.parse_args(arguments)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
    parts = (x[:1200], y[:1200]), (x[1200:1400], y[1200:1400]), (x[1400:], y[1400:])
    stream = split_stream(*parts, [range(5), range(5, 10)], "class")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), ClampedReLU(), nn.Linear(300, 10))
    calibrate_(model, stream[0].train[0], spread=0.5)
    protection = None
    if args.alpha:
        protection = Protection(model, lambda columns, place: SoftProjector(columns, args.alpha))

    def learn(index: int, task: Task) -> None:
        inputs, answers = task.train
        rule = LOCO(
            model, lr=3e-3, steps=args.steps, projection="none", protection=protection, seed=index
        )
        for _ in range(args.steps):
            chosen = torch.randint(len(inputs), (128,))
            rule.step(inputs[chosen], answers[chosen])

    def protect(index: int, task: Task) -> None:
        if protection is not None:
            protection.add(task.train[0])

    matrix = learn_stream(model, stream, learn, protect)["test"]
    for task, row in zip(stream, matrix, strict=True):
        print(f"after {task.name}: " + ", ".join(f"{a:.1%}" for a in row))
    summary = accuracy_matrix_summary(matrix)
    print(f"kept {summary['kept']:.1%} of the first task, learnt {summary['learnt']:.1%}", end="")
    if protection is not None:
        taken = ", ".join(f"{used:.0%}" for used in protection.used())
        print(f"; of the layers' inputs {taken} are taken", end="")
    print()
    return summary


if __name__ == "__main__":
    main()
