"""Contrastive losses between images that learn and texts that do not.

With several processes every one holds its own rows of the batch; the other side's rows are
gathered, images with their gradients. Each returns the mean over its own rows: the mean of those,
which is what data-parallel training takes, is the loss of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

__all__ = ["contrastive_loss", "gather_rows", "principal_components"]


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    targets: Tensor,
    *,
    bank: Tensor | None = None,
    own: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy over scaled products (CLIP's loss, arXiv 2103.00020, figure 3).

    Args:
        images: (n, d) of this process, of unit norm (Long-CLIP's short branch: not quite).
        texts: (n, d) unit vectors, row i belongs to image i.
        log_scale: logarithm of 1 / temperature; the scale is bounded by 100.
        targets: (n, n) float, how much of image i is of text j; rows sum to 1. The identity
            without mix-up.
        bank: (m, d) texts to compare images with instead of the batch's; texts must be among them.
        own: (n,) int64, row of each text in the bank.
        label_smoothing: of both directions.

    Returns:
        Scalar.
    """
    rank, world = _rank_and_world()
    first, n = rank * len(images), len(images)
    scale = log_scale.exp().clamp(max=100.0)
    everything = gather_rows(images)
    if bank is None or own is None:
        candidates = torch.cat(_gather_constant(texts)) if world > 1 else texts
        columns = torch.arange(n, device=images.device) + first
    else:
        candidates, columns = bank, own
    to_text = F.cross_entropy(
        scale * images @ candidates.mT,
        _spread(targets, columns, len(candidates)),
        label_smoothing=label_smoothing,
    )
    places = torch.arange(n, device=images.device) + first
    to_image = F.cross_entropy(
        scale * texts @ everything.mT,
        _spread(targets.mT, places, n * world),
        label_smoothing=label_smoothing,
    )
    return (to_text + to_image) / 2


def principal_components(vectors: Tensor, count: int) -> Tensor:
    """Rows rebuilt from their mean and their batch's leading principal components.

    Long-CLIP's primary component extraction (arXiv 2403.15378, section 3.2): what of an image's
    features a short caption should have to match. Not normalised again, as there. The components
    are constants to the gradient: that of a decomposition is not finite where two of its values
    meet.

    Args:
        vectors: (N, d), the whole batch.
        count: components to keep; at least N - 1 of them return the rows unchanged.
    """
    mean = vectors.mean(0)
    centred = vectors - mean
    with torch.no_grad():
        # N centred rows span N - 1 directions; the next one would be noise with a gradient.
        count = min(count, len(vectors) - 1)
        basis = torch.linalg.svd(centred.float(), full_matrices=False).Vh[:count].to(vectors.dtype)
    return centred @ basis.mT @ basis + mean


def gather_rows(rows: Tensor) -> Tensor:
    """(n, d) of every process, in their order: (world n, d); gradients flow back to each."""
    if _rank_and_world()[1] == 1:
        return rows
    import torch.distributed.nn.functional as differentiable

    return torch.cat(differentiable.all_gather(rows.contiguous()))


def _gather_constant(rows: Tensor) -> list[Tensor]:
    out = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(out, rows.contiguous())
    return out


def _spread(targets: Tensor, columns: Tensor, width: int) -> Tensor:
    """(n, n) targets laid into n of `width` columns; equal columns add up."""
    out = targets.new_zeros(len(targets), width)
    return out.index_add_(1, columns, targets)


def _rank_and_world() -> tuple[int, int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
