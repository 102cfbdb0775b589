"""Losses against loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from retrieval.training.loss import contrastive_loss, principal_components


def unit(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def softmax_loss(scores: list[float], wanted: dict[int, float], smoothing: float) -> float:
    """Cross-entropy of one row, number by number."""
    norm = math.log(sum(math.exp(s) for s in scores))
    target = [
        (1 - smoothing) * wanted.get(j, 0.0) + smoothing / len(scores) for j in range(len(scores))
    ]
    return -sum(t * (s - norm) for t, s in zip(target, scores, strict=True))


@given(
    n=st.integers(2, 6),
    dim=st.integers(1, 5),
    smoothing=st.sampled_from([0.0, 0.1]),
    mixed=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_a_loop_over_pairs(
    n: int, dim: int, smoothing: float, mixed: float, seed: int
) -> None:
    images, texts = unit(n, dim, seed), unit(n, dim, seed + 1000)
    scale = 3.0
    targets = mixed * torch.eye(n) + (1 - mixed) * torch.eye(n).roll(1, 1)
    got = contrastive_loss(
        images, texts, torch.tensor(math.log(scale)), targets.double(), label_smoothing=smoothing
    )
    loss = 0.0
    for i in range(n):
        scores = [scale * float(images[i] @ texts[j]) for j in range(n)]
        loss += softmax_loss(scores, {j: float(targets[i, j]) for j in range(n)}, smoothing) / n
        scores = [scale * float(images[j] @ texts[i]) for j in range(n)]
        loss += softmax_loss(scores, {j: float(targets[j, i]) for j in range(n)}, smoothing) / n
    assert got.item() == pytest.approx(loss / 2, abs=1e-6)


def test_a_bank_replaces_the_batch_for_images_alone() -> None:
    bank = unit(9, 4, 0)
    own = torch.tensor([7, 2, 4])
    images, texts = unit(3, 4, 1), bank[own]
    scale = torch.tensor(1.5)
    got = contrastive_loss(images, texts, scale, torch.eye(3).double(), bank=bank, own=own)
    to_text = F.cross_entropy(scale.exp() * images @ bank.T, own)
    to_image = F.cross_entropy(scale.exp() * texts @ images.T, torch.arange(3))
    assert got.item() == pytest.approx((to_text + to_image).item() / 2, abs=1e-9)


def test_agrees_with_open_clips_loss() -> None:
    from open_clip.loss import ClipLoss

    images, texts = unit(8, 16, 0).float(), unit(8, 16, 1).float()
    scale = torch.tensor(2.0)
    ours = contrastive_loss(images, texts, scale, torch.eye(8))
    torch.testing.assert_close(ours, ClipLoss()(images, texts, scale.exp()))


def test_the_scale_is_bounded() -> None:
    images, texts = unit(4, 8, 0), unit(4, 8, 1)
    eye = torch.eye(4).double()
    at_bound = contrastive_loss(images, texts, torch.tensor(math.log(100.0)), eye)
    beyond = contrastive_loss(images, texts, torch.tensor(9.0), eye)
    torch.testing.assert_close(at_bound, beyond)


@given(rows=st.integers(2, 7), dim=st.integers(1, 6), count=st.integers(1, 8))
def test_principal_components_are_the_best_of_their_rank(rows: int, dim: int, count: int) -> None:
    vectors = unit(rows, dim, rows * 10 + dim)
    got = principal_components(vectors, count)
    assert got.shape == vectors.shape
    count = min(count, rows - 1, dim)
    pca = PCA(count).fit(vectors.numpy())
    expected = pca.inverse_transform(pca.transform(vectors.numpy()))
    # The components are found in float32.
    torch.testing.assert_close(got, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_gradient_of_principal_components_is_finite_where_values_meet() -> None:
    vectors = torch.eye(6, requires_grad=True)  # all singular values equal
    principal_components(vectors, 2).square().sum().backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


def test_gradient_of_the_loss() -> None:
    images = unit(3, 4, 0).requires_grad_()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(3).double()
    assert torch.autograd.gradcheck(
        lambda z, s: contrastive_loss(z, unit(3, 4, 1), s, eye, label_smoothing=0.1),
        (images, scale),
    )
