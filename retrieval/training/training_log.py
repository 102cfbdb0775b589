"""The log of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enn_core.files.atomic import replacing

__all__ = ["plot"]


def plot(log: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Loss of every block, and held-out recall (or the factors' error), over epochs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    blocks = [key for key in log[-1] if key.startswith("loss_")] or ["loss"]
    for key in blocks:
        label = f"block {key.removeprefix('loss_')}" if key != "loss" else None
        left.plot(epochs, [row[key] for row in log], label=label)
    left.set(xlabel="epoch", ylabel="training loss")
    if len(blocks) > 1:
        left.legend(frameon=False)
    if "t2i_R@1" in log[-1]:
        for key in ("t2i_R@1", "t2i_R@10", "i2t_R@1", "i2t_R@10"):
            right.plot(epochs, [row[key] for row in log], label=key)
        right.legend(frameon=False)
        right.set(xlabel="epoch", ylabel="held-out recall, %")
    else:
        right.plot(epochs, [row["orthogonality"] for row in log])
        right.set(xlabel="epoch", ylabel="largest ‖QᵀQ − I‖ / √r")
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
