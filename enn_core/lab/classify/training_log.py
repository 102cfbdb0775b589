"""The log of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enn_core.files.atomic import replacing

__all__ = ["plot", "write_tensorboard"]


def plot(log: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Training loss (of every block) and validation accuracy over epochs, as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in log]
    mark = "o" if len(log) == 1 else ""
    blocks = [key for key in log[-1] if key.startswith("loss_")] or ["loss"]
    for key in blocks:
        left.plot(
            epochs, [row[key] for row in log], marker=mark, label=key.replace("loss_", "block ")
        )
    left.set(xlabel="epoch", ylabel="training loss")
    if len(blocks) > 1:
        left.legend(frameon=False)
    if "valid_accuracy" in log[-1]:
        right.plot(epochs, [100 * row["valid_accuracy"] for row in log], marker=mark)
        right.set(xlabel="epoch", ylabel="validation accuracy, %")
    else:
        right.plot(epochs, [row["lr"] for row in log], marker=mark)
        right.set(xlabel="epoch", ylabel="learning rate")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def write_tensorboard(log: Sequence[Mapping[str, Any]], folder: Path) -> bool:
    """The last row as TensorBoard scalars, if that is installed; whether it is."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    with SummaryWriter(str(folder)) as writer:
        for key, value in log[-1].items():
            if key not in ("epoch", "step"):
                writer.add_scalar(key, value, log[-1]["step"])
    return True
