"""A ViT image tower to train from scratch, and vision transformers cut into stages.

The network is open_clip's VisionTransformer. Cutting is what local learning (ENN-l) needs: each
stage is trained with a head of its own, and no gradient crosses from one to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from retrieval.model.minilm_tower import MiniLMTower
from retrieval.model.preprocess import Preprocess

__all__ = ["VISION", "VitTower", "check_vision", "cut_vision"]

VISION: dict[str, int | float | str] = {
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "layers": 12,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_dropout": 0.0,
    "pool_type": "tok",
}
"""What a `vision` may say, as open_clip's `vision_cfg` calls it, with the values of a ViT-B/16."""

# Far above any published tower; a damaged file must not ask for the machine's whole memory.
_LIMITS = {"image_size": 4096, "patch_size": 512, "width": 8192, "layers": 200, "head_width": 8192}


class VitTower(MiniLMTower):
    """A vision transformer beside the frozen MiniLM text tower; see `MiniLMTower`.

    Pixels are scaled to -1..1, `Preprocess`'s default mean and std.

    Args:
        vision: keys of `VISION`; what is missing is taken from there.
        dim: size of the joint space.

    Attributes:
        visual: open_clip's VisionTransformer without its output projection.
        proj: (width -> dim), no bias.
        text_proj: frozen; the identity when dim is 384.

    Raises:
        ValueError: for unknown keys or values out of range.
    """

    def __init__(self, vision: Mapping[str, Any], dim: int = 384) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer  # seconds to import

        self.vision = check_vision(vision)
        size, patch, width, layers, head_width, mlp_ratio, dropout, pool = self.vision.values()
        self.visual: Any = VisionTransformer(
            image_size=size,
            patch_size=patch,
            width=width,
            layers=layers,
            heads=width // head_width,
            mlp_ratio=mlp_ratio,
            patch_dropout=dropout,
            pool_type=pool,
            output_dim=1,
        )
        self.visual.proj = None
        self.pixels = _Pixels(Preprocess())
        self.proj = nn.Linear(width, dim, bias=False)
        self.add_text_map(dim)
        self.text_proj.requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in 0..255 -> pooled, normalised features `x` (N, width)."""
        return self.visual(self.pixels(pixels))

    def stages(self, count: int) -> list[nn.Module]:
        """`cut_vision` of this tower: together the stages are `features`."""
        return cut_vision(self.visual, count, Preprocess())


def check_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of `VISION`, in its order.

    Raises:
        ValueError: unknown keys, values out of range, or sizes that do not divide.
    """
    if not isinstance(vision, Mapping):
        raise ValueError(f"vision must be an object of open_clip's vision_cfg, got {vision!r}")
    unknown = [str(key) for key in vision if key not in VISION]
    if unknown:
        raise ValueError(f"unknown vision {', '.join(unknown)}; valid: {', '.join(VISION)}")
    full = {**VISION, **vision}
    for key, limit in _LIMITS.items():
        value = full[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ValueError(f"vision {key} must be a whole number in 1..{limit}, got {value!r}")
    for key, low, high in (("mlp_ratio", 0.01, 64.0), ("patch_dropout", 0.0, 0.99)):
        value = full[key]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"vision {key} must be in {low}..{high}, got {value!r}")
    if full["pool_type"] not in ("tok", "avg"):
        raise ValueError(f"vision pool_type must be 'tok' or 'avg', got {full['pool_type']!r}")
    for whole, part in (("image_size", "patch_size"), ("width", "head_width")):
        if full[whole] % full[part]:
            raise ValueError(
                f"vision {whole} {full[whole]} must be a multiple of {part} {full[part]}"
            )
    return full


def cut_vision(visual: nn.Module, count: int, preprocess: Preprocess) -> list[nn.Module]:
    """Cut an open_clip VisionTransformer into stages that run one after the other.

    The stages share the tower's modules and parameters, so training one trains the tower. Cut
    after the weights are loaded and the tower is where it belongs: what is replaced in the tower
    later is not replaced in the stages. `visual.proj` is part of no stage.

    Args:
        visual: plain or with eigen layers.
        count: 1 to the number of its layers; these are shared out evenly, later stages getting
            what is over, as the first has the patches to embed.
        preprocess: its mean and std are applied by the first stage.

    Returns:
        Stages: pixels (N, 3, H, W) in 0..255 -> tokens (N, L, width) -> ... -> pooled and
        normalised features (N, width), the inputs of `visual.proj`.

    Raises:
        ValueError: another kind of tower, or a count out of range.
    """
    from open_clip.transformer import VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise ValueError(
            f"only vision transformers without attention pooling can be cut into stages, got "
            f"{type(visual).__name__}"
        )
    blocks = list(visual.transformer.resblocks)
    if not 1 <= count <= len(blocks):
        raise ValueError(f"stages must be 1 to {len(blocks)}, the tower's layers; got {count}")
    ends = [i * len(blocks) // count for i in range(count + 1)]
    stages: list[nn.Module] = []
    for number, (start, end) in enumerate(pairwise(ends)):
        parts: list[nn.Module] = []
        if number == 0:
            parts += [_Pixels(preprocess), _Embed(visual)]
        parts.append(_some_blocks(visual.transformer, blocks[start:end]))
        if number == count - 1:
            parts.append(_Pool(visual))
        stages.append(nn.Sequential(*parts))
    return stages


class _Pixels(nn.Module):
    """(N, 3, H, W) in 0..255 -> the same, normalised."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        # On the CPU even where the tower is built without memory for its weights.
        mean, std = (torch.tensor(x, device="cpu") for x in (preprocess.mean, preprocess.std))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", 255 * mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 255 * std.view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.scale


class _Embed(nn.Module):
    """The tower's beginning: pixels -> tokens (N, L, width)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.tower = _only(visual, "conv1", "patch_dropout", "ln_pre", *_EMBEDDINGS)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower._embeds(x)


_EMBEDDINGS = ("class_embedding", "positional_embedding")


class _Pool(nn.Module):
    """The tower's end: tokens (N, L, width) -> pooled and normalised (N, width)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.tower = _only(visual, "ln_post")

    def forward(self, x: Tensor) -> Tensor:
        pooled, _ = self.tower._pool(x)
        return pooled


def _only(module: Any, *names: str) -> Any:
    """A module of the same class that has (and shares) only these children and parameters."""
    part = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        own = getattr(module, table)
        part.__dict__[table] = {name: own[name] for name in own if name in names}
    return part


def _some_blocks(transformer: Any, blocks: list[nn.Module]) -> nn.Module:
    """Some blocks of an open_clip Transformer, run as it runs them."""
    part = _only(transformer)
    part.resblocks = nn.ModuleList(blocks)
    return part
