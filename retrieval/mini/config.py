"""What decides a training run, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from enn_core.files.settings import Checks
from retrieval.training.settings import TrainError, make_settings, read_config

__all__ = ["TrainConfig", "TrainError"]


@dataclass(frozen=True)
class TrainConfig:
    """What decides a training run.

    Attributes:
        dataset: Karpathy JSON, relative to the data directory.
        images: folder of its images, likewise.
        splits: splits to train on, joined by "+".
        holdout: images kept out and reported on (0 trains on everything).
        hidden, dim, dropout: of `MiniTower`.
        first_block: backbone blocks from this one on are trained.
        views: cached views of each image; 0 is the image, 1 its mirror image, others are random
            crops, stretched to the input size and jittered in brightness, contrast and colour.
        rule: "enn" (eigen layers, retracted) or "plain" (ordinary layers, for comparison).
        epochs, batch_size, seed: as usual.
        backbone_lr, head_lr: peak learning rates (AdamW; 10 % linear warm-up, then cosine).
        weight_decay: of Lambda and of plain weights, never of Q and P.
        label_smoothing: of both cross-entropies.
        distill: weight of the ImageNet classifier's opinion of each view over the 1,000 class
            names, which keeps words that the captions lack in the space.
        refine_epochs, refine_lr: of the second stage, which trains the head alone (0 epochs: none).
        refine_views: views of each image that the second stage uses.
        imagined: weight, in the second stage, of classes imagined into photos (`refine`).
        retract_every: optimizer steps between retractions.
        ema: decay of the averaged weights, which are the ones saved.
        stop_after: epochs after which to stop, at the schedule of `epochs` (0: run them all).
    """

    dataset: str = "flickr8k/dataset_flickr8k.json"
    images: str = "flickr8k/images"
    splits: str = "train+restval"
    holdout: int = 0
    hidden: int = 1024
    dim: int = 384
    dropout: float = 0.2
    first_block: int = 4
    views: int = 10
    rule: str = "enn"
    epochs: int = 12
    batch_size: int = 256
    backbone_lr: float = 4e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    distill: float = 0.0
    refine_epochs: int = 0
    refine_lr: float = 6e-4
    refine_views: int = 4
    imagined: float = 0.5
    retract_every: int = 5
    ema: float = 0.998
    seed: int = 0
    stop_after: int = 0

    def __post_init__(self) -> None:
        check = Checks(self, TrainError)
        check.one_of("rule", ("enn", "plain"))
        if not 0 <= self.first_block <= 6:
            raise TrainError(f"first_block must be in 0..6, got {self.first_block}")
        check.at_least_one("views", "epochs", "batch_size", "hidden", "dim", "retract_every")
        if self.refine_epochs and not 1 <= self.refine_views <= self.views:
            raise TrainError(f"refine_views must be in 1..{self.views}, got {self.refine_views}")
        check.below_one("dropout", "label_smoothing", "ema")

    @classmethod
    def load(cls, name: str | Path) -> TrainConfig:
        """A named configuration, or a JSON file of this class's fields.

        Raises:
            TrainError: unknown name, or a file with unknown or ill-typed fields.
        """
        return make_settings(cls, read_config(name), str(name))
