"""The recursive projector and the ridge adapter against their closed forms."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enn_core.lessons.adapter import RidgeAdapter
from enn_core.lessons.recursive_projector import RecursiveProjector


def products(left: np.ndarray, right: np.ndarray, power: int) -> np.ndarray:
    """(n, m) products of rows: a.c, or |a| |c| cos^2."""
    sizes = np.outer(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    plain = left @ right.T
    return plain if power == 1 else plain**2 / np.where(sizes > 0, sizes, 1)


def closed_form(
    rows: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float, power: int
) -> np.ndarray:
    """M c = c + (B - A)(K + alpha I)^-1 k(c) of rows; K = A^T A and k = A^T c with power 1."""
    gram = products(a, a, power) + alpha * np.eye(len(a))
    return rows + products(rows, a, power) @ np.linalg.solve(gram, b - a)


@st.composite
def lessons(draw) -> dict:
    """Arguments of `RidgeAdapter.of_pairs`: correlated rows of about unit length."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dim, pairs = draw(st.integers(1, 24)), draw(st.integers(0, 12))
    common = draw(st.floats(0, 3)) * rng.standard_normal(dim)

    def rows(count: int) -> np.ndarray:
        values = rng.standard_normal((count, dim)) + common
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    a, b = rows(pairs), rows(pairs)
    if pairs > 1 and draw(st.booleans()):
        a[-1] = a[0]  # the same query taught twice
    return {
        "dim": dim,
        "a": a,
        "b": b,
        "alpha": draw(st.sampled_from([1e-3, 0.01, 0.1, 0.5, 3.0])),
        "power": draw(st.sampled_from([1, 2])),
    }


def _empty(lesson: dict) -> RidgeAdapter:
    return RidgeAdapter(lesson["dim"], alpha=lesson["alpha"], power=lesson["power"])


def _bits(adapter: RidgeAdapter) -> bytes:
    eye = np.eye(adapter.dim)
    return b"".join(adapter.apply(row).tobytes() for row in eye)


@settings(max_examples=150)
@given(lesson=lessons(), data=st.data())
def test_any_order_gives_the_closed_form(lesson, data) -> None:
    order = data.draw(st.permutations(range(len(lesson["a"]))))
    shuffled = lesson | {"a": lesson["a"][order], "b": lesson["b"][order]}
    rows = np.random.default_rng(0).standard_normal((5, lesson["dim"]))
    rows = np.concatenate([rows, np.zeros((1, lesson["dim"])), lesson["a"]])
    expected = closed_form(rows, **{name: lesson[name] for name in ("a", "b", "alpha", "power")})
    for each in (lesson, shuffled):
        adapter = RidgeAdapter.of_pairs(**each)
        assert len(adapter) == len(each["a"])
        np.testing.assert_allclose(adapter.apply(rows), expected, rtol=0, atol=1e-9)


@given(lesson=lessons())
def test_replay_and_undo_give_the_same_bits(lesson) -> None:
    adapter, history = _empty(lesson), []
    for a, b in zip(lesson["a"], lesson["b"], strict=True):
        history.append(_bits(adapter))
        adapter = adapter.with_pair(a, b)
    assert _bits(RidgeAdapter.of_pairs(**lesson)) == _bits(adapter)
    for count, bits in enumerate(history):
        # An undo replays what is left; the prefix is the same without computing it again.
        fewer = lesson | {"a": lesson["a"][:count], "b": lesson["b"][:count]}
        assert _bits(RidgeAdapter.of_pairs(**fewer)) == bits
        assert _bits(adapter.first(count)) == bits
        assert len(adapter.first(count)) == count
        again = adapter.first(count).with_pairs(lesson["a"][count:], lesson["b"][count:])
        assert _bits(again) == _bits(adapter)


@given(lesson=lessons(), seed=st.integers(0, 2**32 - 1))
def test_orthogonal_directions_stay_and_scores_move_within_the_bound(lesson, seed) -> None:
    rng = np.random.default_rng(seed)
    adapter = RidgeAdapter.of_pairs(**lesson)
    query, image = rng.standard_normal((2, lesson["dim"]))
    image /= np.linalg.norm(image)
    _, sizes, basis = np.linalg.svd(lesson["a"], full_matrices=False)
    basis = basis[sizes > 1e-9 * max(sizes, default=1)]
    inside = basis.T @ (basis @ query)
    np.testing.assert_allclose(adapter.apply(query - inside), query - inside, rtol=0, atol=1e-7)
    moved = abs(image @ (adapter.apply(query) - query))
    # In the space of the kernel: the map's size times the length that the query has in common
    # with what was taught.
    near = products(query[None], lesson["a"], lesson["power"])[0]
    gram = products(lesson["a"], lesson["a"], lesson["power"])
    gram = gram + lesson["alpha"] * np.eye(len(gram))
    shift = np.linalg.solve(gram, lesson["b"] - lesson["a"])
    assert (
        moved <= np.linalg.norm(shift, 2) * np.linalg.norm(near) + 1e-9 if len(gram) else not moved
    )


@given(lesson=lessons(), seed=st.integers(0, 2**32 - 1))
def test_rows_shapes_and_scale(lesson, seed) -> None:
    dim = lesson["dim"]
    adapter = RidgeAdapter.of_pairs(**lesson)
    rows = np.random.default_rng(seed).standard_normal((2, 3, dim))
    mapped = adapter.apply(rows)
    np.testing.assert_allclose(adapter.apply(3 * rows), 3 * mapped, atol=1e-7)
    np.testing.assert_allclose(adapter.apply(rows[0, 0]), mapped[0, 0], atol=1e-9)
    assert adapter.apply(rows[:0]).shape == (0, 3, dim)
    assert adapter.apply(rows.astype(np.float32)).dtype == np.float64
    if lesson["power"] == 1:
        np.testing.assert_allclose(rows @ adapter.matrix().T, mapped, atol=1e-9)
    else:
        with pytest.raises(ValueError, match="take power 1"):
            adapter.matrix()


@given(lesson=lessons())
def test_the_projector_agrees_with_the_closed_form(lesson) -> None:
    dim, alpha = lesson["dim"], lesson["alpha"]
    projector, matrix = RecursiveProjector(dim, alpha), np.eye(dim)
    for a, b in zip(lesson["a"], lesson["b"], strict=True):
        matrix = matrix + np.outer(b - matrix @ a, projector.add(a))
    a, b = lesson["a"], lesson["b"]
    mapped = closed_form(np.eye(dim), a, b, alpha, power=1)
    np.testing.assert_allclose(matrix.T, mapped, rtol=0, atol=1e-9)
    linear = RidgeAdapter.of_pairs(dim, a, b, alpha=alpha, power=1)
    np.testing.assert_allclose(matrix, linear.matrix(), rtol=0, atol=1e-9)
    expected = np.linalg.inv(np.eye(dim) + a.T @ a / alpha)
    np.testing.assert_allclose(projector.P, expected, rtol=0, atol=1e-9)
    assert np.array_equal(projector.P, projector.P.T)


def test_many_pairs_and_rows_go_through_in_pieces() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 100, 64)) / 8
    adapter = RidgeAdapter.of_pairs(64, a, b, alpha=0.1)
    rows = rng.standard_normal((300, 64))
    one_by_one = np.array([adapter.apply(row) for row in rows])
    np.testing.assert_allclose(adapter.apply(rows), one_by_one, rtol=0, atol=1e-11)
    expected = closed_form(rows, a, b, 0.1, power=2)
    np.testing.assert_allclose(adapter.apply(rows), expected, rtol=0, atol=1e-9)


_DIGEST = """
import hashlib
import numpy as np
from enn_core.feedback import RecursiveProjector, RidgeAdapter
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 40, 384)) / 20
rows = rng.standard_normal((2, 384)) / 20
adapters = [RidgeAdapter.of_pairs(384, a, b, alpha=0.1, power=power) for power in (1, 2)]
projector = RecursiveProjector(384)
gains = [projector.add(row) for row in a]
values = [*(adapter.apply(row) for adapter, row in zip(adapters, rows)), projector.P, *gains]
print(hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest())
"""


def test_the_number_of_threads_does_not_change_the_bits() -> None:
    digests = set()
    for threads in ("1", "4"):
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        digests.add(
            subprocess.run(
                [sys.executable, "-c", _DIGEST],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RidgeAdapter(0, alpha=1), "dim must be at least 1"),
        (lambda: RidgeAdapter(2, alpha=0), "alpha must be above 0"),
        (lambda: RidgeAdapter(2, alpha=np.nan), "alpha must be above 0"),
        (lambda: RidgeAdapter(2, alpha=1, power=3), "power must be 1 or 2"),
        (lambda: RidgeAdapter(2, alpha=1).with_pair([1, np.nan], [1, 0]), "a holds NaN"),
        (lambda: RidgeAdapter(2, alpha=1).with_pair([1, 0], [1, np.inf]), "b holds NaN"),
        (lambda: RidgeAdapter(2, alpha=1).with_pair([1, 0, 0], [1, 0]), r"a must have shape \(2,"),
        (lambda: RidgeAdapter(2, alpha=1).with_pair([1e300, 0], [1, 0]), "too large"),
        (lambda: RidgeAdapter(2, alpha=1).with_pairs(np.eye(2), np.eye(2)[:1]), "give pairs"),
        (lambda: RidgeAdapter(2, alpha=1).apply([1, 2, 3]), "rows must have shape"),
        (lambda: RidgeAdapter(2, alpha=1).apply(1.0), "rows must have shape"),
        (lambda: RidgeAdapter(2, alpha=1).first(1), "count must be 0 to 0"),
        (lambda: RecursiveProjector(2, alpha=-1), "alpha must be above 0"),
        (lambda: RecursiveProjector(2).add([1]), "a must have shape"),
        (lambda: RecursiveProjector(2).add([np.nan, 1]), "a holds NaN"),
        (lambda: RecursiveProjector(2).add([1e300, 1]), "too large"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_wrong_values_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter", "journal", "recursive_projector"])
def test_the_examples_run(name) -> None:
    result = doctest.testmod(importlib.import_module(f"enn_core.lessons.{name}"))
    assert result.attempted
    assert not result.failed


def test_a_zero_row_changes_nothing() -> None:
    for power in (1, 2):
        adapter = RidgeAdapter(3, alpha=0.1, power=power).with_pair([0, 0, 0], [1, 0, 0])
        np.testing.assert_array_equal(adapter.apply(np.eye(3)), np.eye(3))


def line_by_line(dim, a, b, alpha, power):
    """T and the moves, one pair after another, every sum as a whole."""
    count = len(a)
    inverse, moves = np.zeros((count, count)), np.empty((count, dim))
    for n, (row, target) in enumerate(zip(a, b, strict=True)):
        products = np.einsum("nd,d->n", a[:n], row)
        own = float(np.einsum("d,d->", row, row))
        if power == 2:
            lengths = np.sqrt(np.einsum("nd,nd->n", a[:n], a[:n]))
            sizes = lengths * np.sqrt(np.einsum("d,d->", row, row))
            products = np.divide(products * products, sizes)
        along = np.einsum("mn,n->m", inverse[:n, :n], products)
        left = max(own - float(np.einsum("n,n->", along, along)), 0.0)
        length = float(np.sqrt(alpha + left))
        moves[n] = (target - row - np.einsum("n,nd->d", along, moves[:n])) / length
        inverse[n, :n] = -np.einsum("m,mn->n", along, inverse[:n, :n]) / length
        inverse[n, n] = 1 / length
    return inverse, moves


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 66, 127, 129, 130, 193, 257, 400])
@pytest.mark.parametrize("dim", [16, 100, 384])
@pytest.mark.parametrize("power", [1, 2])
def test_many_pairs_at_once_give_the_bits_of_one_line_at_a_time(count, dim, power):
    rng = np.random.default_rng(count)
    a, b = (rng.normal(size=(count, dim)) + 1 for _ in range(2))
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    inverse, moves = line_by_line(dim, a, b, 0.01, power)
    for first in {0, count // 3, count // 2, count - 1}:
        adapter = RidgeAdapter.of_pairs(dim, a[:first], b[:first], alpha=0.01, power=power)
        adapter = adapter.with_pairs(a[first:], b[first:])
        np.testing.assert_array_equal(adapter._inverse, inverse)
        np.testing.assert_array_equal(adapter._moves, moves)
