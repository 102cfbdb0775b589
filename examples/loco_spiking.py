"""A spiking network of 11 weight layers learns to read digits, without backpropagation.

    python examples/loco_spiking.py                 # about a minute of one core
    python examples/loco_spiking.py --steps 1500 --projection none

Forward passes through the spikes are all there is: every layer's current gets noise at once, and
each sample broadcasts one number, by how much its loss changed. There is no surrogate gradient, and
no network of rates that is converted afterwards. Needs scikit-learn for the digits.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from enn_core.loco import LOCO, PROJECTIONS, calibrate_
from enn_core.spiking import IF, Decode, Encode


def main(arguments: list[str] | None = None) -> float:
    """Train, print, and return the accuracy on images that were not learnt from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=600, help="batches to learn from")
    parser.add_argument("--time", type=int, default=8, help="time steps of the network")
    parser.add_argument("--width", type=int, default=64, help="neurons of each layer")
    parser.add_argument("--projection", choices=PROJECTIONS, default="mean")
    args = parser.parse_args(arguments)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)

    torch.manual_seed(0)
    layers: list[nn.Module] = [Encode(args.time)]
    for before in [64, *[args.width] * 9]:
        layers += [nn.Linear(before, args.width), IF(args.time)]
    model = nn.Sequential(*layers, nn.Linear(args.width, 10), Decode(args.time))
    calibrate_(model, x[:300])  # without it, ten layers of spikes say the same of every image

    rule = LOCO(model, lr=3e-3, steps=args.steps, sigma=0.05, projection=args.projection, loss="ce")
    with torch.inference_mode():  # no graph is built anywhere
        for step in range(args.steps):
            chosen = torch.randint(1400, (128,))
            loss = rule.step(x[chosen], y[chosen])
            if (step + 1) % 100 == 0:
                print(f"step {step + 1}: loss {loss:.3f}")
    accuracy = float((rule.scores(x[1400:]).argmax(1) == y[1400:]).float().mean())
    print(f"{accuracy:.1%} of {len(x) - 1400} new digits are read correctly")
    return accuracy


if __name__ == "__main__":
    main()
