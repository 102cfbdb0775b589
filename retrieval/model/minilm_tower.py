"""Image towers beside the frozen MiniLM text tower: what all of them are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MINI", "TEXT_DIM", "VIT", "MiniLMTower", "map_text"]

MINI = "long-eclip-mini"
VIT = "vit-minilm"
TEXT_DIM = 384  # of all-MiniLM-L6-v2


class MiniLMTower(nn.Module):
    """An image tower with the text map that makes MiniLM's vectors comparable to its own.

    A subclass makes `proj`, the last, linear map into the joint space, then calls `add_text_map`.

    Shapes:
        `features`: (N, 3, H, W) in 0..255 -> (N, n);
        `proj`: (N, n) -> (N, dim), not normalised;
        `adapt_text`: (N, 384) -> (N, dim), unit norm.
    """

    proj: nn.Linear
    text_proj: nn.Linear
    text_mean: Tensor

    def add_text_map(self, dim: int) -> None:
        """Make `text_mean` (zeros) and `text_proj`, which starts from MiniLM's own geometry."""
        self.text_proj = nn.Linear(TEXT_DIM, dim, bias=False)
        if dim == TEXT_DIM:
            nn.init.eye_(self.text_proj.weight)
        else:
            nn.init.orthogonal_(self.text_proj.weight)
        self.register_buffer("text_mean", torch.zeros(TEXT_DIM))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in 0..255 -> features `x` (N, n)."""
        raise NotImplementedError

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
