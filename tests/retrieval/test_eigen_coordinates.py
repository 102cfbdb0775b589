"""Eigen-coordinates give the score that re-embedding would give (design, invariant 2)."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import eigen_coordinates as eigen
from retrieval.eigen_coordinates import SPECTRUM_FLOOR, EigenBasis, scores


def cosine(t: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Score by re-embedding: (M, d) unit texts against (N, d) image outputs."""
    return t @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@st.composite
def maps(draw):
    """(weight, bias or None, rng): wide, tall, square and rank-deficient maps."""
    d, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, min(d, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.normal(size=(d, rank)) @ rng.normal(size=(rank, n))
    weight *= draw(st.sampled_from([1e-4, 1.0, 1e4]))
    bias = rng.normal(size=d) * np.abs(weight).max() if draw(st.booleans()) else None
    return weight, bias, rng


def apply(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    return x @ weight.T + (0 if bias is None else bias)


@settings(max_examples=150)
@given(maps())
def test_score_equals_cosine_of_the_map_itself(case):
    weight, bias, rng = case
    basis = EigenBasis.from_weight(weight, bias)
    x, t = rng.normal(size=(7, weight.shape[1])), unit(rng.normal(size=(3, weight.shape[0])))
    expected = cosine(t, apply(weight, bias, x))
    np.testing.assert_allclose(scores(basis.query(t), basis.vectors(x)), expected, atol=2e-6)


@settings(max_examples=200)
@given(maps(), st.sampled_from(["gentle", "signed", "tiny", "one", "negated"]))
def test_score_after_any_change_of_spectrum_equals_re_embedding(case, kind):
    weight, bias, rng = case
    basis = EigenBasis.from_weight(weight, bias)
    r = basis.dim
    delta = {
        "gentle": np.exp(0.3 * rng.normal(size=r)),
        "signed": rng.normal(size=r),
        "tiny": rng.normal(size=r) * 10.0 ** rng.uniform(-12, 0, size=r),
        "one": np.eye(r)[rng.integers(r)],
        "negated": -np.ones(r),
    }[kind]
    x, t = rng.normal(size=(7, weight.shape[1])), unit(rng.normal(size=(3, weight.shape[0])))
    inputs = x if bias is None else np.concatenate([x, np.ones((7, 1))], axis=1)
    changed = (basis.Q * (delta * basis.Lambda)) @ basis.P.T
    z = inputs @ changed.T
    # float32 storage keeps each component's own precision, so even a spectrum that brings tiny
    # components forward loses nothing.
    got = scores(basis.query(t), basis.vectors(x), delta)
    np.testing.assert_allclose(got, cosine(t, z), atol=5e-6)


@settings(max_examples=100)
@given(maps(), st.floats(-1, 1))
def test_query_adapter_equals_moving_the_text(case, strength):
    """An adapter M on eigen-coordinates scores like the text Q M Q^T t in the shared space."""
    weight, bias, rng = case
    basis = EigenBasis.from_weight(weight, bias)
    adapter = np.eye(basis.dim) + strength * rng.normal(size=(basis.dim, basis.dim))
    x, t = rng.normal(size=(7, weight.shape[1])), unit(rng.normal(size=(3, weight.shape[0])))
    moved = t @ basis.Q @ adapter.T @ basis.Q.T
    got = scores(basis.query(t).astype(np.float64) @ adapter.T, basis.vectors(x))
    expected = cosine(moved, apply(weight, bias, x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("d", "n"), [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_are_orthonormal_and_rebuild_the_map(d, n, bias):
    rng = np.random.default_rng(3)
    weight, b = rng.normal(size=(d, n)), rng.normal(size=d) if bias else None
    basis = EigenBasis.from_weight(weight, b)
    eye = np.eye(basis.dim)
    np.testing.assert_allclose(basis.Q.T @ basis.Q, eye, atol=1e-13)
    np.testing.assert_allclose(basis.P.T @ basis.P, eye, atol=1e-13)
    folded = weight if b is None else np.concatenate([weight, b[:, None]], axis=1)
    np.testing.assert_allclose((basis.Q * basis.Lambda) @ basis.P.T, folded, atol=1e-12)
    assert basis.dim == min(folded.shape)
    assert basis.has_bias is bias


def test_small_components_are_dropped():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    p, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    spectrum = np.array([3.0, 1.0, 1e-3, 3.1 * SPECTRUM_FLOOR, 2.9 * SPECTRUM_FLOOR, 0.0])
    assert EigenBasis.from_weight((q * spectrum) @ p.T).dim == 4


def test_vectors_are_unit_or_zero_and_take_the_constant_input_either_way():
    basis = EigenBasis.from_weight(np.eye(3), np.array([0.0, 0.0, 1.0]))
    x = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]])
    v0 = basis.vectors(x)
    assert v0.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(v0, axis=1), [1.0, 0.0], atol=1e-6)
    with_one = np.concatenate([x, np.ones((2, 1))], axis=1)
    np.testing.assert_array_equal(basis.vectors(with_one), v0)
    assert scores(basis.query(np.eye(3)), v0)[:, 1].tolist() == [0.0, 0.0, 0.0]


def test_tensors_are_accepted_and_identity_keeps_the_output():
    weight = torch.randn(4, 6, requires_grad=True)
    basis = EigenBasis.from_weight(weight, torch.zeros(4))
    assert basis.dim == 4
    plain = EigenBasis.identity(4)
    z = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(plain.vectors(z), unit(z), atol=1e-7)
    np.testing.assert_allclose(plain.query(z), z, atol=1e-6)


def test_scores_shapes_and_silenced_images():
    v0 = np.eye(3, dtype=np.float32)
    assert scores(np.ones(3), v0).shape == (3,)
    assert scores(np.ones((2, 3)), v0).shape == (2, 3)
    delta = np.array([2.0, 0.0, -1.0])
    np.testing.assert_allclose(scores(np.ones(3), v0, delta), [1.0, 0.0, -1.0])
    assert scores(np.ones(3), v0, np.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EigenBasis.from_weight(np.zeros((2, 2))), "no direction"),
        (lambda: EigenBasis.from_weight(np.zeros(3)), r"must be \(d, n\)"),
        (lambda: EigenBasis.from_weight(np.eye(2), np.zeros(3)), "to fit weight"),
        (lambda: EigenBasis.from_weight(np.full((2, 2), np.nan)), "NaN"),
        (lambda: EigenBasis.identity(0), "at least 1"),
        (lambda: EigenBasis.identity(2).vectors(np.ones((1, 3))), r"\(N, 2\)"),
        (lambda: EigenBasis.identity(2).query(np.ones((1, 3))), r"\(N, 2\)"),
        (lambda: scores(np.ones(2), np.ones((1, 3))), "same r"),
        (lambda: scores(np.ones(2), np.ones((1, 2)), np.ones(3)), "delta"),
    ],
)
def test_errors_say_what_fits(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(eigen).failed == 0
