"""Projectors of LOCO: what every projector is, and what it does to the variance of updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from enn_core.lessons.recursive_projector import RecursiveProjector
from enn_core.loco import PROJECTIONS, InputProjection, Perturbation, perturb, to_stages
from enn_core.loco.input_projection import k_means, orthonormal, principal
from enn_core.loco.protected_inputs import HardProjector, SoftProjector


def observed(kind: str, columns: int = 12, batches: int = 30, seed: int = 0) -> InputProjection:
    generator = torch.Generator().manual_seed(seed)
    projection = InputProjection(columns, kind, rank=5, clusters=3, buffer=20, every=4)
    for _ in range(batches):
        projection.observe(torch.rand(16, columns, generator=generator) + 0.3)
    return projection


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projectors_are_symmetric_and_idempotent(kind: str) -> None:
    P = observed(kind).matrix()
    torch.testing.assert_close(P, P.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(P @ P, P, atol=1e-5, rtol=0)
    rank = {"loco": (3, 6), "cluster": (10, 11), "low-rank": (6, 6), "mean": (11, 11)}
    least, most = rank.get(kind, (12, 12))
    assert least <= round(float(P.trace())) <= most


def test_mean_is_projected_out() -> None:
    projection = InputProjection(4, "mean")
    rows = torch.tensor([[1.0, 2.0, 0.0, 1.0], [3.0, 0.0, 2.0, 1.0]])
    projection.observe(rows)
    torch.testing.assert_close(projection.matrix() @ rows.mean(0), torch.zeros(4))


def test_cluster_keeps_the_nearest_centre() -> None:
    """Two groups of batches: the other group's direction is removed, one's own is not."""
    projection = InputProjection(3, "cluster", clusters=2, buffer=50, every=1)
    one, other = torch.tensor([[1.0, 0.0, 0.1]]), torch.tensor([[0.0, 1.0, 0.1]])
    for step in range(21):
        projection.observe(other if step % 2 else one)
    P = projection.matrix()
    assert float((P @ other[0]).norm()) < 1e-6
    assert float((P @ one[0]).norm()) > 0.9


def test_k_means_against_a_slow_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=generator).numpy()
    centres = np.concatenate([rows[:4], np.full((1, 5), 99.0)])  # nobody is nearest to the last
    got = k_means(torch.tensor(rows), torch.tensor(centres).float(), rounds=7)
    for _ in range(7):
        nearest = np.array([np.argmin([np.sum((r - c) ** 2) for c in centres]) for r in rows])
        centres = np.stack(
            [
                rows[nearest == k].mean(0) if (nearest == k).any() else c
                for k, c in enumerate(centres)
            ]
        )
    np.testing.assert_allclose(got.numpy(), centres, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (20, 5)])
def test_principal_directions_are_the_singular_vectors(shape: tuple[int, int]) -> None:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = rows[:, 0]  # one dimension less
    wanted = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:3].T
    got = principal(rows, 3).double()
    torch.testing.assert_close(got @ got.T, wanted @ wanted.T, atol=1e-5, rtol=0)
    assert principal(rows, 99).shape[1] == int(torch.linalg.matrix_rank(rows.double()))
    assert principal(torch.zeros(4, 3), 2).shape == (3, 0)


def test_orthonormal_spans_what_is_new() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(8, 3, generator=generator)
    columns = torch.cat([columns, columns @ torch.ones(3, 2), 1e-3 * torch.eye(8)[:, :1]], 1)
    basis = orthonormal(columns, 0.1).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double(), atol=1e-5, rtol=0)
    span = torch.linalg.qr(columns[:, :3].double())[0]
    torch.testing.assert_close(basis @ basis.T, span @ span.T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_variance_falls_as_the_trace_says(kind: str) -> None:
    """Linear loss, so that errors do not depend on inputs: `E|GP|^2 / E|G|^2 = tr(PC) / tr(C)`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 2)).double()
    projection = observed(kind)
    x = (torch.rand(16, 11) + 0.3).double()
    rows = torch.cat([x, torch.ones(16, 1)], 1).double()
    C, P = rows.T @ rows, projection.matrix().double()

    def linear(scores: Tensor, y: Tensor) -> Tensor:
        return scores[:, 0]

    whole = kept = 0.0
    for _ in range(300):
        estimates, _ = perturb(*to_stages(model), x, torch.zeros(16), linear, Perturbation())
        G = estimates[0].gradient().detach()
        centre = torch.outer(model[1].weight[0].detach(), rows.mean(0))
        whole += float((G - centre).square().sum())
        kept += float(projection.project((G - centre).float()).square().sum())
    assert kept / whole == pytest.approx(float((P @ C).trace() / C.trace()), rel=0.1)


@settings(max_examples=30, deadline=None)
@given(
    columns=st.integers(1, 8),
    blocks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    alpha=st.floats(1e-3, 1e2),
    seed=st.integers(0, 99),
)
def test_recursive_is_the_closed_form(
    columns: int, blocks: list[int], alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(blocks), columns, generator=generator, dtype=torch.float64)
    soft = SoftProjector(columns, alpha)
    for block in rows.split(blocks):
        soft.add(block)
    one_by_one = RecursiveProjector(columns, alpha)
    for row in rows:
        one_by_one.add(row.numpy())
    closed = torch.linalg.inv(torch.eye(columns).double() + rows.T @ rows / alpha)
    torch.testing.assert_close(soft.P, closed, atol=1e-9, rtol=1e-6)
    np.testing.assert_allclose(soft.P.numpy(), one_by_one.P, atol=1e-9)
    torch.testing.assert_close(soft.P, soft.P.T, atol=1e-14, rtol=0)
    assert 0 <= soft.used() < 1


def test_weight_counts_rows() -> None:
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    once, thrice = SoftProjector(4, 0.5), SoftProjector(4, 0.5)
    once.add(rows, weight=3.0)
    for _ in range(3):
        thrice.add(rows)
    torch.testing.assert_close(once.P, thrice.P)


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(2, 10), share=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_hard_projector_holds_the_share(columns: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hard = HardProjector(columns, share)
    tasks = [torch.randn(7, columns, generator=generator) + 1 for _ in range(2)]
    for rows in tasks:
        hard.add(rows)
        x = rows.double()
        P = hard.P
        torch.testing.assert_close(P @ P, P)
        torch.testing.assert_close(P, P.T)
        assert float((x @ P).square().sum()) <= (1 - share + 1e-9) * float(x.square().sum())
    assert hard.used() == pytest.approx(1 - float(hard.P.trace()) / columns, abs=1e-9)


def test_hard_projector_takes_no_more_than_it_must() -> None:
    rows = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    for share, wanted in ((0.6, 1), (0.9, 2), (1.0, 3)):
        hard = HardProjector(4, share)
        hard.add(rows)
        assert hard.B.shape[1] == wanted
    low = HardProjector(4, 1.0, rank=2)
    low.add(rows)
    assert low.B.shape[1] == 2


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: InputProjection(3, "median"), "projection must be one of"),
        (lambda: InputProjection(3, rank=0), "rank must be at least 1"),
        (lambda: InputProjection(3, clusters=1), "clusters must be at least 2"),
        (lambda: InputProjection(3, buffer=3), "buffer must be at least 10"),
        (lambda: SoftProjector(3, 0.0), "alpha must be above 0"),
        (lambda: HardProjector(3, 1.5), "share must be"),
        (lambda: HardProjector(3, 0.5, rank=4), "from 1 to 3"),
    ],
)
def test_bad_settings(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()  # type: ignore[operator]
