"""What decides a contrastive training run, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enn_core.files.settings import Checks
from retrieval.training.settings import TrainError, make_settings, read_config

__all__ = ["LAYERS", "RULES", "TrainConfig", "TrainError"]

RULES = ("backprop", "local")
LAYERS = ("exact", "penalty", "plain")


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run; the defaults are the published recipe's where it names a value.

    Attributes:
        dataset, images, annotations, split, protocol: as `enn search eval` takes them; `images` and
            `annotations` are looked for in the data directory if empty, `split` may join several
            by "+".
        captions_per_image: use the first so many captions (0: all).
        holdout: training images kept out and reported on after every epoch (0: none).
        text: "clip", the text tower of `weights`, or "minilm", the shipped one.
        architecture: with text "clip", what `retrieval.load` takes: its network is trained.
        weights: with text "clip", a file of that architecture with the frozen text tower.
        vision: with text "minilm", open_clip's `vision_cfg` of the ViT to train.
        preprocess: with text "minilm", fields of `retrieval.model.preprocess.Preprocess`.
        start: "scratch" draws the image tower anew, "weights" begins from the file's.
        rule: "backprop" end to end, or "local": `blocks` blocks with a contrastive head each and
            no gradient between them (ENN-ℓ).
        blocks: of rule "local".
        layers: "exact", eigen layers retracted while they learn; "penalty", eigen layers with the
            paper's penalty; "plain", ordinary layers.
        penalty: the paper's λ, with layers "penalty".
        retract_every: optimizer steps between retractions, with layers "exact".
        epochs, batch_size, seed: as usual; the batch is the whole one, of all processes together.
        micro_batch: images whose activations are held at once (0: all of a process's). The rest
            of a batch is computed twice, so that the loss still sees the whole batch: exact.
        lr, final_lr, warmup: peak and last learning rate (AdamW; linear warm-up, cosine), and
            optimizer steps of warm-up (at most a fifth of the run).
        weight_decay, head_weight_decay: of the tower, and of the last map and the local heads.
        clip_norm: bound of each block's gradient norm (0: none).
        temperature: the first one; learnt.
        label_smoothing, mixup: as usual; mix-up with the next image of the batch, Beta(α, α).
        randaugment: [operations, magnitude 0..30], or [].
        crop: [smallest, largest] share of the image in a random crop, or [].
        flip: whether images are mirrored at random.
        text_bank: compare images with one caption of every training image, not of the batch alone:
            the text tower is frozen, so those are free.
        short_weight: weight of Long-CLIP's short branch: the first sentence against the principal
            components of the batch's image features (0: none).
        short_components: how many components those are.
        amp: bfloat16 autocast.
        ema: decay of the averaged weights, which are the ones saved.
        workers: processes that decode images.
        save_every: optimizer steps between checkpoints; every epoch ends with one besides.
        stop_after: epochs after which to stop, at the schedule of `epochs` (0: run them all).
    """

    dataset: str = "flickr8k"
    images: str = ""
    annotations: str = ""
    split: str = "train"
    protocol: str = ""
    captions_per_image: int = 0
    holdout: int = 0
    text: str = "minilm"
    architecture: str = "long-eclip-b16"
    weights: str = ""
    vision: Mapping[str, Any] = field(
        default_factory=lambda: {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
    )
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    start: str = "scratch"
    rule: str = "backprop"
    blocks: int = 4
    layers: str = "exact"
    penalty: float = 2e-4
    retract_every: int = 1
    epochs: int = 30
    batch_size: int = 512
    micro_batch: int = 0
    lr: float = 3e-4
    final_lr: float = 1e-6
    warmup: int = 2000
    weight_decay: float = 5e-2
    head_weight_decay: float = 1e-4
    clip_norm: float = 1.0
    temperature: float = 0.07
    label_smoothing: float = 0.1
    mixup: float = 0.1
    randaugment: list[int] = field(default_factory=lambda: [2, 9])
    crop: list[float] = field(default_factory=list)
    flip: bool = False
    text_bank: bool = False
    short_weight: float = 0.0
    short_components: int = 32
    amp: bool = True
    ema: float = 0.999
    workers: int = 2
    save_every: int = 1000
    seed: int = 0
    stop_after: int = 0

    def __post_init__(self) -> None:
        check = Checks(self, TrainError)
        check.one_of("rule", RULES)
        check.one_of("layers", LAYERS)
        check.one_of("text", ("clip", "minilm"))
        check.one_of("start", ("scratch", "weights"))
        if self.start == "weights" and self.text == "minilm":
            raise TrainError("start 'weights' needs text 'clip': minilm has no image tower")
        check.at_least_one("epochs", "batch_size", "blocks", "retract_every", "save_every")
        if self.batch_size < 2:
            raise TrainError("batch_size must be at least 2: a contrast needs two images")
        check.not_negative("holdout", "captions_per_image", "micro_batch", "warmup", "workers")
        check.not_negative("stop_after", "weight_decay", "head_weight_decay", "penalty")
        check.not_negative("clip_norm", "mixup", "short_weight", "short_components", "final_lr")
        check.not_negative("seed")
        check.positive("lr", "temperature")
        check.below_one("label_smoothing", "ema")
        check.randaugment()
        check.crop()
        if self.short_weight and self.short_components < 1:
            raise TrainError("short_components must be at least 1 with a short_weight")

    @classmethod
    def load(cls, name: str | Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """A named configuration or a .json file, with some fields changed.

        Raises:
            TrainError: unknown name or fields, ill-typed or invalid values.
        """
        return make_settings(cls, {**read_config(name), **(changes or {})}, str(name))
