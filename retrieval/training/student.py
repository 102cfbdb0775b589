"""What a contrastive run trains: an image tower cut into local blocks, beside its text tower."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enn_core import fuse, to_enn
from enn_core.bare_parameters import EigenOwner
from enn_core.local import LocalBlock
from retrieval.model.preprocess import Preprocess
from retrieval.training.config import TrainConfig
from retrieval.training.settings import TrainError

if TYPE_CHECKING:
    from retrieval.model.checkpoints import OpenClip
    from retrieval.model.vit import VitTower

__all__ = ["Student", "TextEncoder", "make_student"]


@dataclass(frozen=True)
class TextEncoder:
    """The frozen text tower.

    Attributes:
        encode: N texts -> (N, width) float32, before `Student.adapt_text`.
        key: identifies what `encode` does, for caches.
    """

    encode: Callable[[Sequence[str]], np.ndarray]
    key: str


class Student(nn.Module):
    """An image tower in local blocks; with one block, ordinary end-to-end training.

    Attributes:
        tower: what is saved in the end.
        blocks: `MicroBatched` local blocks; the last head is the tower's own last map.
        preprocess: how photos become pixels.
    """

    tower: nn.Module
    blocks: nn.ModuleList
    preprocess: Preprocess

    def adapt_text(self, encoded: Tensor) -> Tensor:
        """What `encode` gives -> unit vectors (N, d)."""
        return encoded

    def centre_text(self, mean: Tensor) -> None:
        """Take note of the mean training caption (width,), once, before `adapt_text`."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in 0..255 -> unit vectors (N, d) of the last head."""
        x, z = pixels, pixels
        for block in self.blocks:
            x, (z, _) = block(x)
        return z

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        """Write the plain network as a directory that `retrieval.load` takes."""
        raise NotImplementedError

    def cut(
        self, stages: Sequence[nn.Module], last: Head, widths: tuple[int, int], micro_batch: int
    ) -> None:
        """Make the local blocks: (width, d) are the sizes of the new heads."""
        heads = [LocalHead(*widths, last.log_scale) for _ in stages[1:]]
        self.blocks = nn.ModuleList(
            MicroBatched(LocalBlock(stage, head), micro_batch)
            for stage, head in zip(stages, [*heads, last], strict=True)
        )


class Head(nn.Module):
    """Features -> unit vectors, with the temperature that their scores are learnt at."""

    log_scale: nn.Parameter


class LocalHead(Head):
    """Contrastive head of an inner block: tokens (N, L, width), averaged -> (N, d)."""

    def __init__(self, width: int, dim: int, log_scale: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(log_scale.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.proj(self.norm(tokens.mean(1))).float(), dim=-1)


class LastHead(Head):
    """The tower's own last map: features (N, width) -> (N, d)."""

    def __init__(self, proj: nn.Module, log_scale: nn.Parameter) -> None:
        super().__init__()
        self.proj = proj
        self.log_scale = log_scale

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.proj(features).float(), dim=-1)


class MicroBatched(nn.Module):
    """A local block that learns a few rows at a time, keeping only what comes out of them.

    Activations of the rest are computed again when the gradient needs them (with the same random
    numbers), so a loss over the whole batch costs one micro-batch of memory, and is exact.

    `forward(x)` returns the next block's input, and the prediction: unit vectors (N, d) with the
    logarithm of the scale that the head has learnt for their products.
    """

    def __init__(self, block: LocalBlock, rows: int) -> None:
        super().__init__()
        self.local = block
        self.rows = rows

    @property
    def head(self) -> Head:
        """The block's head."""
        head: Any = self.local.head
        return head

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not self.rows or len(x) <= self.rows or not torch.is_grad_enabled():
            h, z = self.local(x)
        else:
            parts = [checkpoint(self.local, p, use_reentrant=False) for p in x.split(self.rows)]
            h, z = torch.cat([h for h, _ in parts]), torch.cat([z for _, z in parts])
        return h, (z, self.head.log_scale)


def make_student(
    config: TrainConfig, data: Path | None, device: str
) -> tuple[Student, TextEncoder]:
    """Build what a configuration names.

    Raises:
        TrainError: missing weights, or an architecture that cannot be trained.
    """
    make = _beside_minilm if config.text == "minilm" else _clip
    try:
        student, encoder = make(config, data, device)
        return student.to(device), encoder
    except TrainError:
        raise
    except ValueError as error:
        raise TrainError(str(error)) from error


class _BesideMiniLM(Student):
    """A ViT of any size beside the shipped text tower."""

    def __init__(self, tower: VitTower, preprocess: Preprocess) -> None:
        super().__init__()
        self.tower: Any = tower
        self.preprocess = preprocess

    def adapt_text(self, encoded: Tensor) -> Tensor:
        return self.tower.adapt_text(encoded)

    def centre_text(self, mean: Tensor) -> None:
        self.tower.text_mean.copy_(mean)

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        from retrieval.model.tower_folder import save_vit

        preprocess = asdict(self.preprocess)
        for fixed in ("mean", "std"):
            del preprocess[fixed]
        save_vit(self.tower, folder, {"preprocess": preprocess, "training": dict(training)})


def _beside_minilm(
    config: TrainConfig, data: Path | None, device: str
) -> tuple[Student, TextEncoder]:
    from retrieval.model.text_towers import MINILM_SHA256, MiniLM
    from retrieval.model.vit import VitTower

    tower = VitTower(config.vision)
    size = int(tower.vision["image_size"])
    preprocess = Preprocess.from_config({"size": size, **config.preprocess})
    if preprocess.size != (size, size):
        raise TrainError(f"preprocess size {preprocess.size} is not the ViT's {size}")
    if (preprocess.mean, preprocess.std) != (Preprocess.mean, Preprocess.std):
        raise TrainError("preprocess mean and std are fixed beside minilm; leave them out")
    if config.layers != "plain":
        to_enn(tower, exclude=["text_proj"], inplace=True)
    student = _BesideMiniLM(tower, preprocess)
    last = LastHead(tower.proj, nn.Parameter(torch.tensor(-math.log(config.temperature))))
    stages = tower.stages(config.blocks if config.rule == "local" else 1)
    widths = int(tower.vision["width"]), tower.text_proj.out_features
    student.cut(stages, last, widths, config.micro_batch)
    return student, TextEncoder(MiniLM(device=device).embed, f"minilm|{MINILM_SHA256}")


class _Clip(Student):
    """A CLIP network, whose text tower stays as the file has it."""

    def __init__(self, loaded: OpenClip) -> None:
        super().__init__()
        self.tower: Any = loaded.model
        self.preprocess = loaded.preprocess
        self._loaded = loaded

    def save(self, folder: Path, training: Mapping[str, Any]) -> None:
        from retrieval.model.export import FORMS

        plain: Any = fuse(self.tower)
        FORMS["open_clip"](replace(self._loaded, model=plain.cpu()), folder)
        text = json.dumps(dict(training), indent=2)
        (folder / "training.json").write_text(text + "\n", encoding="utf-8")


def _clip(config: TrainConfig, data: Path | None, device: str) -> tuple[Student, TextEncoder]:
    from retrieval.model.architecture import find_architecture
    from retrieval.model.checkpoints import load_architecture, weights_hash
    from retrieval.model.text_towers import OpenClipText
    from retrieval.model.vit import cut_vision

    architecture = find_architecture(config.architecture)
    if architecture is None:
        raise TrainError(
            f"no architecture {config.architecture!r}; give a name of `enn search models` "
            "or the path of a .json file"
        )
    loaded = load_architecture(architecture, _weights(config, data), "cpu")
    model: Any = loaded.model
    visual = model.visual
    frozen = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    encoder = TextEncoder(
        OpenClipText(model.to(device), loaded.tokenizer, device).encode,
        f"clip|{weights_hash(frozen)}",
    )
    if visual.proj is None:
        raise TrainError(f"{config.architecture} has no last linear map to train")
    width, dim = visual.proj.shape
    if config.start == "scratch":
        fresh: Any = architecture.build()
        visual.load_state_dict(fresh.visual.state_dict())
        model.logit_scale.data.fill_(-math.log(config.temperature))
    if config.layers != "plain":
        to_enn(visual, inplace=True)
    visual.requires_grad_(True)
    model.logit_scale.requires_grad_(True)
    student = _Clip(loaded)
    last = LastHead(_Projection(model.visual), model.logit_scale)
    count = config.blocks if config.rule == "local" else 1
    student.cut(
        cut_vision(model.visual, count, loaded.preprocess), last, (width, dim), config.micro_batch
    )
    return student, encoder


class _Projection(nn.Module):
    """open_clip's `visual.proj`, a bare (width, d) parameter, as a module of its own."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        eigen = isinstance(visual, EigenOwner) and "proj" in visual.eigen_names
        self.eigen: Any = visual.eigen_weight("proj") if eigen else None  # type: ignore[operator]
        self.plain: Any = None if eigen else visual.proj

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.plain if self.eigen is None else self.eigen())


def _weights(config: TrainConfig, data: Path | None) -> Path:
    if not config.weights:
        raise TrainError(
            f"{config.architecture} needs --weights FILE: a checkpoint of it, whose text tower is "
            "kept as it is (Long-CLIP's longclip-B.pt for long-eclip-b16)"
        )
    given = Path(config.weights).expanduser()
    for path in (given, *([data / given] if data is not None else [])):
        if os.path.exists(path):
            return path
    raise TrainError(f"there is no weights file '{given}'; give the path of a checkpoint")
