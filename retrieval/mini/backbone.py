"""The network of `long-eclip-mini`: an EfficientNet-Lite0 image tower beside a MiniLM text tower.

Image: pixels -> EfficientNet-Lite0 (timm) -> LayerNorm -> Linear -> GELU = features `x`, then the
last, linear map `z = W x + b` into the joint space. Text: the frozen MiniLM embedding, centred on
the mean training caption, through one linear map into the joint space. Every linear map and
pointwise convolution of the image tower is an eigen layer while it trains; the shipped file holds
the fused (plain) weights, which `enn_core.to_enn` factors again, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retrieval.atomic import replacing

__all__ = ["TEXT_DIM", "MiniTower", "load_mini", "map_text", "save_mini"]

TEXT_DIM = 384  # of all-MiniLM-L6-v2
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class MiniTower(nn.Module):
    """Image tower and text map of `long-eclip-mini`.

    Args:
        hidden: width of the features `x` that the last map reads.
        dim: size of the joint space.
        dropout: on the features, while training.

    Shapes:
        `features`: (N, 3, 224, 224) in 0..255 -> (N, hidden);
        `proj`: (N, hidden) -> (N, dim), not normalised;
        `adapt_text`: (N, 384) -> (N, dim), unit norm.
    """

    def __init__(self, hidden: int = 1024, dim: int = 384, dropout: float = 0.0) -> None:
        super().__init__()
        import timm  # seconds to import, and needed by this model alone

        backbone: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        fold_batchnorm(backbone)
        width: int = backbone.num_features
        self.backbone = backbone
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(hidden, dim)
        self.text_proj = nn.Linear(TEXT_DIM, dim, bias=False)
        if dim == TEXT_DIM:
            nn.init.eye_(self.text_proj.weight)  # start from the text tower's own geometry
        else:
            nn.init.orthogonal_(self.text_proj.weight)
        self.text_mean: Tensor
        self.register_buffer("text_mean", torch.zeros(TEXT_DIM))

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled backbone features (N, 1280) -> features `x` (N, hidden)."""
        return self.dropout(F.gelu(self.hidden(self.norm(pooled))))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in 0..255 -> features `x` (N, hidden)."""
        return self.head(self.backbone(pixels / 127.5 - 1.0))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in 0..255 -> unit image vectors (N, dim)."""
        return F.normalize(self.proj(self.features(pixels)), dim=-1)

    def adapt_text(self, embedding: Tensor) -> Tensor:
        """MiniLM embeddings (N, 384) -> unit text vectors (N, dim)."""
        return map_text(embedding, self.text_mean, self.text_proj.weight)


def map_text(embedding: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """MiniLM embeddings (N, 384) -> unit text vectors (N, dim); needs no image tower.

    Args:
        embedding: unit vectors.
        mean: (384,) mean training caption, `text_mean` of the weights file.
        weight: (dim, 384), `text_proj.weight` of the weights file.
    """
    centred = F.normalize(embedding - mean, dim=-1)
    return F.normalize(F.linear(centred, weight), dim=-1)


def fold_batchnorm(backbone: nn.Module) -> None:
    """Fold each BatchNorm of a timm EfficientNet into the convolution before it, in place.

    The eigen factors are then those of the map that the network really applies, and training and
    inference both skip the normalisation. Uses the running statistics, as `eval()` would.
    """
    for owner in [backbone, *backbone.modules()]:
        children = dict(owner.named_children())
        # timm names them in the order in which they run: conv_stem, bn1; conv_pw, bn1, conv_dw, ...
        previous: str | None = None
        for name, child in children.items():
            if isinstance(child, nn.Conv2d):
                previous = name
            elif isinstance(child, nn.BatchNorm2d) and previous is not None:
                conv: Any = children[previous]
                setattr(owner, previous, fuse_conv_bn_eval(conv.eval(), child.eval()))
                setattr(owner, name, getattr(child, "act", nn.Identity()))
                previous = None


def save_mini(tower: MiniTower, directory: Path | str, config: Mapping[str, Any]) -> None:
    """Write a tower's plain weights and its configuration, each file in one atomic step.

    Args:
        tower: with or without eigen layers; written fused, in float32.
        directory: made if missing.
        config: at least "hidden" and "dim" of the tower, and its "preprocess".
    """
    from safetensors.torch import save_file

    from enn_core import fuse

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().float().contiguous() for k, v in fuse(tower).state_dict().items()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    with replacing(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def load_mini(directory: Path | str, device: str | torch.device = "cpu") -> MiniTower:
    """Read a tower written by `save_mini`, in evaluation mode, with plain layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the configuration.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    tower = MiniTower(hidden=config["hidden"], dim=config["dim"])
    state = load_file(directory / WEIGHTS, device="cpu")
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{directory / WEIGHTS} does not fit {CONFIG} beside it: {str(error).splitlines()[0]}"
        ) from error
    return tower.eval().to(device)
