"""What decides the training of a classifier, as data: JSON files that come along, or the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enn_core.files import settings
from enn_core.heads import FORMS

__all__ = ["AMP", "LAYERS", "ClassifyConfig", "ClassifyError", "list_configs", "read_config"]

LAYERS = ("plain", "enn", "enn-penalty")
AMP = ("none", "bf16", "fp16")
_CONFIGS = Path(__file__).parent / "configs"


class ClassifyError(ValueError):
    """A run that cannot be started or continued; one line."""


@dataclass(frozen=True)
class ClassifyConfig:
    """What decides a run.

    Attributes:
        data: as `load_data` takes it; a relative DIR of imagefolder:DIR is looked for in the data
            directory, too.
        image_size: side that images are resized to (0: as they are; folders of photos 224).
        valid, train: share of the training images for validation; how many of the others to use
            (0: all).
        arch: as `build_network` takes it.
        weights: a checkpoint of the plain network to begin from, or "".
        rule: "backprop", "local" (blocks with heads of their own), "loco", or a name of
            `enn_core.rules.RULES`.
        layers: "plain"; "enn", eigen layers that are retracted while they learn; "enn-penalty",
            eigen layers with the paper's penalty.
        options: of the rule, e.g. {"probes": 8} for loco.
        blocks, head: of rule "local": how many, and the form of their heads.
        penalty: the paper's λ, with layers "enn-penalty".
        retract_every: optimizer steps between retractions, with layers "enn".
        epochs, batch_size, seed: as usual; the batch is that of all processes together.
        lr, final_lr: highest and last learning rate.
        warmup: share of the steps in which the rate rises.
        drops: shares of the run after which the rate is divided by ten, not below final_lr; []: a
            cosine from lr to final_lr.
        weight_decay: of weights, not of biases, norms and bases.
        clip_norm: bound of each block's gradient norm (0: none).
        label_smoothing: as usual.
        pad: pixels of margin for a random crop (0: none).
        crop: [smallest, largest] share of the image in a random crop, or [].
        flip: whether images are mirrored at random.
        randaugment: [operations, magnitude 0..30], or [].
        amp: "none", "bf16" or, on CUDA, "fp16".
        workers: processes that decode and augment images.
        save_every: steps between checkpoints; every epoch ends with one besides.
        stop_after: epochs after which to stop, at the schedule of `epochs` (0: run them all).
    """

    data: str = "digits"
    image_size: int = 0
    valid: float = 0.1
    train: int = 0
    arch: str = "vit-tiny"
    weights: str = ""
    rule: str = "backprop"
    layers: str = "plain"
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 4
    head: str = "conv"
    penalty: float = 2e-4
    retract_every: int = 1
    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    final_lr: float = 0.0
    warmup: float = 0.05
    drops: list[float] = field(default_factory=list)
    weight_decay: float = 1e-2
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    pad: int = 0
    crop: list[float] = field(default_factory=list)
    flip: bool = False
    randaugment: list[int] = field(default_factory=list)
    amp: str = "none"
    workers: int = 0
    save_every: int = 1000
    seed: int = 0
    stop_after: int = 0

    def __post_init__(self) -> None:
        check = settings.Checks(self, ClassifyError)
        for name, valid in (("layers", LAYERS), ("amp", AMP), ("head", FORMS)):
            check.one_of(name, valid)
        check.at_least_one("epochs", "batch_size", "blocks", "retract_every", "save_every")
        check.not_negative("image_size", "train", "workers", "stop_after", "pad", "seed")
        check.not_negative("final_lr", "weight_decay", "clip_norm", "penalty")
        check.positive("lr")
        check.below_one("valid", "warmup", "label_smoothing")
        if any(not isinstance(at, int | float) or not 0 < at < 1 for at in self.drops):
            raise ClassifyError(
                f"drops must be shares of the run between 0 and 1, got {self.drops}"
            )
        check.crop()
        check.randaugment()

    @classmethod
    def load(cls, name: str | Path, changes: Mapping[str, Any] | None = None) -> ClassifyConfig:
        """A named configuration or a .json file, with some fields changed.

        Raises:
            ClassifyError: unknown name or fields, ill-typed or invalid values.
        """
        values = {**read_config(name), **(changes or {})}
        values.pop("description", None)
        return settings.make_settings(cls, values, str(name), ClassifyError)


def list_configs() -> dict[str, str]:
    """Names of the configurations that come along, and what each is for."""
    return settings.list_configs(_CONFIGS)


def read_config(name: str | Path) -> dict[str, Any]:
    """The JSON object of a named configuration, or of a .json file.

    Raises:
        ClassifyError: there is no such configuration, or its file cannot be read.
    """
    return settings.read_config(name, _CONFIGS, ClassifyError)
