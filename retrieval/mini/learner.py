"""The trained half of `long-eclip-mini`: block inputs to unit image vectors, fast on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrieval.model.mini_tower import MiniTower

__all__ = ["Learner", "average_"]


class _Depthwise(torch.autograd.Function):
    """A frozen depthwise convolution whose input gradient is a convolution as well.

    torch's CPU backward of a strided depthwise convolution is 60 times slower than its forward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride, ctx.size = stride, x.shape[2:]
        return F.conv2d(x, weight, bias, stride=stride, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        stride, k = ctx.stride, weight.shape[2]
        height, width = ctx.size
        if stride > 1:  # put zeros between the rows and columns that the stride skipped
            n, c, h, w = grad.shape
            spread = grad.new_zeros(n, c, (h - 1) * stride + 1, (w - 1) * stride + 1)
            spread = spread.contiguous(memory_format=torch.channels_last)
            spread[:, :, ::stride, ::stride] = grad
            grad = spread
        grad = F.pad(grad, (k - 1, width - grad.shape[3], k - 1, height - grad.shape[2]))
        return F.conv2d(grad, weight.flip(2, 3), groups=grad.shape[1]), None, None, None


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    from timm.layers import Conv2dSame, pad_same

    if isinstance(conv, Conv2dSame):
        x = pad_same(x, list(conv.kernel_size), list(conv.stride))
    else:
        rows, columns = int(conv.padding[0]), int(conv.padding[1])
        x = F.pad(x, (columns, columns, rows, rows))
    weight, bias = conv.weight, conv.bias
    if bias is None:
        raise ValueError("depthwise convolutions need their folded bias")
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    return _Depthwise.apply(x, weight, bias, conv.stride[0])


class Learner(nn.Module):
    """The tower from its first trained block on, with the temperature."""

    def __init__(self, tower: MiniTower, first_block: int) -> None:
        super().__init__()
        self.tower = tower
        self.first_block = first_block
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    @property
    def blocks(self) -> list[nn.Module]:
        backbone: Any = self.tower.backbone
        return [*backbone.blocks[self.first_block :], backbone.conv_head]

    def pooled(self, inputs: Tensor) -> Tensor:
        """Block inputs -> pooled features of the backbone (N, n) float32."""
        backbone: Any = self.tower.backbone
        with torch.autocast("cpu", torch.bfloat16):
            x = inputs
            for block in backbone.blocks[self.first_block :]:
                x = _run_block(block, x)
            return backbone.bn2(backbone.conv_head(x)).float().mean((2, 3))

    def images(self, inputs: Tensor) -> Tensor:
        """Block inputs -> unit image vectors (N, d)."""
        x = self.pooled(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            z = self.tower.proj(self.tower.head(x))
        return F.normalize(z.float(), dim=-1)


def _run_block(block: nn.Module, x: Tensor) -> Tensor:
    """timm's InvertedResidual blocks, with the fast depthwise convolution."""
    for layer in block.children():
        kept = x
        for name, child in layer.named_children():
            x = depthwise(child, x) if name == "conv_dw" else child(x)  # type: ignore[arg-type]
        if getattr(layer, "has_skip", False):
            x = x + kept
    return x


@torch.no_grad()
def average_(mean: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move a running mean of weights towards a model's trained ones, in place.

    Args:
        mean: copy of `model` that holds the mean.
        model: after its optimizer's step number `step` (from 1).
        step: early steps weigh more, so that the start is forgotten.
        decay: of the mean, in the long run.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for average, value in zip(mean.parameters(), model.parameters(), strict=True):
        if value.requires_grad:
            average.lerp_(value, 1 - decay)
