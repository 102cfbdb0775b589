"""Backpropagation with a term that pulls plain weights towards orthogonal ones: SRIP and OCNN."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from enn_core.local import adamw
from enn_core.rules.backprop import one_block
from enn_core.rules.base import TrainerRule


def srip(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    coefficient: float = 1e-2,
    **training: Any,
) -> TrainerRule:
    """AdamW with the spectral restricted isometry term of all weights."""
    return one_block(
        model,
        partial(adamw, lr=lr, weight_decay=weight_decay),
        steps=steps,
        seed=seed,
        penalty=partial(srip_penalty, coefficient=coefficient),
        **training,
    )


def ocnn(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    coefficient: float = 1e-1,
    **training: Any,
) -> TrainerRule:
    """AdamW with the orthogonality of convolutions as maps of images."""
    return one_block(
        model,
        partial(adamw, lr=lr, weight_decay=weight_decay),
        steps=steps,
        seed=seed,
        penalty=partial(ocnn_penalty, coefficient=coefficient),
        **training,
    )


def srip_penalty(model: nn.Module, coefficient: float, iterations: int = 2) -> Tensor:
    """`coefficient * sum over weights of sigma(W^T W - I)`, sigma the spectral norm.

    The smaller of the two Gram matrices counts (the other one's norm is at least 1). sigma is
    estimated by power iteration from a random vector (SRIP of Bansal et al. 2018, arXiv
    1810.09102), and differentiated with its vector held fixed.

    Args:
        model: module with plain weights.
        coefficient: lambda.
        iterations: of the power method.
    """
    terms = [isometry(matrix, iterations) for _, matrix in matrices(model)]
    return coefficient * torch.stack(terms).sum() if terms else torch.zeros(())


def isometry(matrix: Tensor, iterations: int) -> Tensor:
    """Spectral norm of `W^T W - I`, from below, for W (m, n) or its transpose, the narrower."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mT
    with torch.no_grad():
        vector = torch.randn(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        for _ in range(iterations):
            vector = F.normalize(matrix.mT @ (matrix @ vector) - vector, dim=0)
    return ((matrix @ vector).square().sum() - vector.square().sum()).abs()


def ocnn_penalty(model: nn.Module, coefficient: float) -> Tensor:
    """`coefficient * sum over weights`, for a 2-d convolution of its self-convolution's distance
    to the identity (L_ocnn of Wang et al. 2020, arXiv 1911.12207), else of `||W W^T - I||_F^2`.

    Args:
        model: module with plain weights.
        coefficient: lambda.
    """
    terms = []
    for module, matrix in matrices(model):
        conv = isinstance(module, nn.Conv2d) and module.groups == 1
        terms.append(self_convolution(module) if conv else gram_error(matrix))  # type: ignore[arg-type]
    return coefficient * torch.stack(terms).sum() if terms else torch.zeros(())


def self_convolution(layer: nn.Conv2d) -> Tensor:
    """`||Conv(K, K, padding P, stride S) - I||_F^2` with `P = floor((k - 1) / S) S`.

    Zero where the layer's map of images has orthonormal rows.
    """
    kernel = layer.weight
    padding = [(k - 1) // s * s for k, s in zip(layer.kernel_size, layer.stride, strict=True)]
    overlap = F.conv2d(kernel, kernel, stride=layer.stride, padding=padding)
    centre = [side // 2 for side in overlap.shape[2:]]
    ones = overlap[:, :, centre[0], centre[1]].diagonal()
    # ||Z - I||^2 = ||Z||^2 - 2 tr(Z_centre) + out
    return overlap.square().sum() - 2 * ones.sum() + len(kernel)


def gram_error(matrix: Tensor) -> Tensor:
    """`||W W^T - I||_F^2` of W (m, n), or of its transpose if that is wider."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    gram = matrix @ matrix.mT
    return gram.square().sum() - 2 * gram.trace() + len(gram)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Trainable weights of linear maps as matrices (out, inputs), each once, with their module."""
    seen: set[int] = set()
    for module in model.modules():
        name = "weight" if isinstance(module, nn.Linear | _ConvNd) else "in_proj_weight"
        weight = getattr(module, name, None)
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or weight.ndim < 2:
            continue
        if id(weight) not in seen:
            seen.add(id(weight))
            yield module, weight.flatten(1)
