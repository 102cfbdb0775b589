"""A timm model in eigen form: train it locally on two processes, fuse it, save it.

    python examples/convert_timm.py
    python examples/convert_timm.py --model resnet10t --epochs 4 --output resnet.safetensors

The model learns scikit-learn's digits. Its blocks learn from losses of their own, so no gradient
passes between the two processes. What is saved is timm's plain model again, under its own names.
Needs timm, scikit-learn and safetensors.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core import LocalTrainer, Pipeline, conversion_report, fuse, local_blocks, to_enn
from enn_core.lab.classify.datasets import load_data
from enn_core.local import adamw

SIDE = 32  # pixels; digits have 8


def build(name: str) -> nn.Module:
    """An untrained model of timm for grey images of ten classes."""
    options = {"num_classes": 10, "in_chans": 1}
    if "vit" in name:
        options |= {"img_size": SIDE, "patch_size": 8, "dynamic_img_size": False}
    return timm.create_model(name, **options)


def main(name: str, epochs: int, batch: int, output: Path) -> None:
    data = load_data("digits")

    def images(x: Tensor) -> Tensor:
        return F.interpolate(data.normalized(x), (SIDE, SIDE), mode="bilinear")

    torch.manual_seed(0)
    x = images(data.train_x[:8])
    plain = build(name).eval()
    eigen = to_enn(plain)
    with torch.no_grad():
        off = (eigen(x) - plain(x)).abs().max()
    report = conversion_report(eigen)
    print(
        f"{name}: {len(report.converted)} weights in eigen form, scores change by {off:.1e}; "
        f"{report.parameters_stored:,} parameters stored, {report.parameters_fused:,} fused"
    )

    eigen.train()
    blocks = local_blocks(eigen, x, 4, by="time")
    trainer = LocalTrainer(
        blocks, F.cross_entropy, optimizer=partial(adamw, lr=5e-3), retract_every=1
    )
    with Pipeline(trainer, processes=2) as pipeline:
        for epoch in range(epochs):
            for rows in torch.randperm(len(data.train_y)).split(batch):
                pipeline.step(images(data.train_x[rows]), data.train_y[rows])
            pipeline.sync()
            right = trainer.answer(images(data.valid_x)).argmax(1) == data.valid_y
            print(f"epoch {epoch + 1}: {100 * right.double().mean():.1f} % of validation right")

    # The blocks hold the modules of `eigen`, so that is what has been trained.
    trained = fuse(eigen)
    save_file(trained.state_dict(), output)
    again = build(name).eval()
    again.load_state_dict(load_file(output))
    with torch.no_grad():
        right = again(images(data.test_x)).argmax(1) == data.test_y
    print(f"{output}: {100 * right.double().mean():.1f} % of test right, by timm's own model")


if __name__ == "__main__":  # the second process imports this file
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="test_vit", help="a model of timm (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("model.safetensors"))
    given = parser.parse_args()
    main(given.model, given.epochs, given.batch, given.output)
