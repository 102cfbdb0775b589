"""ENN-l (Algorithm 1): a network cut into blocks that learn from their own losses.

>>> import torch
>>> from torch import nn
>>> from enn_core.local import LocalBlock
>>> first = LocalBlock(nn.Linear(4, 8), nn.Linear(8, 2))
>>> second = LocalBlock(nn.Linear(8, 8), nn.Linear(8, 2))
>>> h, _ = first(torch.randn(3, 4))
>>> h, answer = second(h)
>>> answer.sum().backward()
>>> first.block.weight.grad is None, second.block.weight.grad is None
(True, False)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def detached(value: Any) -> Any:
    """The same tensor, or tuple, list or dict of tensors, cut off from its graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(detached, value))
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return value


class LocalBlock(nn.Module):
    """A part of a network with its head; no gradient passes its input or its output.

    `forward(x)` returns `(h, prediction)`: `h = block(x)`, the next block's input, detached, and
    `prediction = head(h)`, whose loss trains block and head and nothing else. End-to-end
    backpropagation is the case of one `LocalBlock` that holds the whole network.

    Args:
        block: any module of one argument (a tensor, or a tuple, list or dict of tensors).
        head: any module that maps the block's output to a prediction.
    """

    def __init__(self, block: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.head = head

    def forward(self, x: Any) -> tuple[Any, Any]:
        h = self.block(detached(x))
        return detached(h), self.head(h)
