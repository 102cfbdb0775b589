"""svd_factors, the rebuild function and the factored application."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from enn_core import FactorError, svd_factors
from enn_core.factors import apply_factors, rebuild, rebuild_is_cheaper

MODULES = ["factors", "layers", "bare_parameters", "convert", "orthogonality"]
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (2, 3, 5), (3, 5, 2)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"enn_core.{name}"))
    assert result.failed == 0


def test_importing_enn_core_needs_nothing_but_torch() -> None:
    code = """
import sys, torch
before = {name.partition(".")[0] for name in sys.modules}
import enn_core
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - {"enn_core"} - set(sys.stdlib_module_names)))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"


@settings(max_examples=40)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    blocks=st.sampled_from([(), (3,)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_factors_are_exact_and_orthonormal(m, n, blocks, dtype, seed) -> None:
    W = torch.randn(*blocks, m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    Q, Lambda, P = svd_factors(W)
    r = min(m, n)
    assert (Q.shape, Lambda.shape, P.shape) == ((*blocks, m, r), (*blocks, r), (*blocks, n, r))
    assert {Q.dtype, Lambda.dtype, P.dtype} == {torch.float64}
    eye = torch.eye(r, dtype=torch.float64).expand(*blocks, r, r)
    torch.testing.assert_close(Q.mT @ Q, eye)
    torch.testing.assert_close(P.mT @ P, eye)
    torch.testing.assert_close((Q * Lambda.unsqueeze(-2)) @ P.mT, W.double())
    assert bool((Lambda[..., :-1] >= Lambda[..., 1:]).all())


def test_signs_do_not_depend_on_the_algorithm() -> None:
    W = torch.randn(6, 4, dtype=torch.float64)
    Q, Lambda, P = svd_factors(W)
    again, _, _ = svd_factors((Q * Lambda) @ P.mT)
    torch.testing.assert_close(Q, again)


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(3, 3, dtype=torch.int64), "int64"),
        (torch.zeros(3, 3, dtype=torch.complex64), "complex64"),
        (torch.full((3, 3), float("nan")), "NaN"),
        (torch.full((3, 3), float("inf")), "infinity"),
    ],
)
def test_bad_weights_are_refused(weight: torch.Tensor, word: str) -> None:
    with pytest.raises(FactorError, match=word):
        svd_factors(weight)


def _factors(shape: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    *blocks, m, n = shape
    r = min(m, n)
    sizes = [(*blocks, m, r), (*blocks, r), (*blocks, n, r)]
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.fixture(params=[0, 2**17], ids=["function", "autograd"])
def either_way(request, monkeypatch) -> None:
    """Both ways of rebuilding, whatever the size."""
    monkeypatch.setattr("enn_core.factors._SMALL", request.param)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", SHAPES)
def test_rebuild_has_the_right_first_and_second_derivatives(shape) -> None:
    factors = _factors(shape)
    assert gradcheck(rebuild, factors)
    assert gradgradcheck(rebuild, factors)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_rebuild_gives_gradients_to_the_factors_that_want_them(needed) -> None:
    factors = _factors((4, 3))
    for i, factor in enumerate(factors):
        factor.requires_grad_(i in needed)
    rebuild(*factors).square().sum().backward()
    assert [factor.grad is not None for factor in factors] == [i in needed for i in range(3)]


def _saved_bytes(function) -> int:
    """Bytes that autograd keeps for backward, each storage once."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(seen.values())


def test_rebuild_saves_half_of_what_autograd_saves() -> None:
    n = 512
    factors = _factors((n, n), torch.float32)
    Q, Lambda, P = factors
    x = torch.randn(8, n)
    own = sum(f.untyped_storage().nbytes() for f in factors) + x.untyped_storage().nbytes()
    plain = _saved_bytes(lambda: F.linear(x.requires_grad_(), (Q * Lambda) @ P.mT)) - own
    ours = _saved_bytes(lambda: F.linear(x.requires_grad_(), rebuild(Q, Lambda, P))) - own
    assert ours == n * n * 4  # the weight, which the product needs
    assert plain == 2 * ours


@pytest.mark.usefixtures("either_way")
def test_rebuild_works_under_vmap_and_grad() -> None:
    Q, Lambda, P = (f.detach() for f in _factors((4, 3)))
    spectra = torch.randn(5, 3, dtype=torch.float64)
    many = torch.func.vmap(rebuild, in_dims=(None, 0, None))(Q, spectra, P)
    torch.testing.assert_close(many[2], (Q * spectra[2]) @ P.mT)
    gradient = torch.func.grad(lambda s: rebuild(Q, s, P).square().sum())(Lambda)
    expected = torch.func.grad(lambda s: ((Q * s) @ P.mT).square().sum())(Lambda)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("either_way")
def test_rebuild_under_autocast_keeps_gradients_in_the_factors_dtype() -> None:
    Q, Lambda, P = _factors((6, 4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        W = rebuild(Q, Lambda, P)
    assert W.dtype == torch.bfloat16
    W.float().square().sum().backward()
    exact = torch.autograd.grad(rebuild(Q, Lambda, P).square().sum(), [Q, Lambda, P])
    for factor, expected in zip((Q, Lambda, P), exact, strict=True):
        assert factor.grad.dtype == torch.float32
        assert (factor.grad - expected).norm() <= 0.02 * expected.norm()


@settings(max_examples=40)
@given(m=st.integers(1, 9), n=st.integers(1, 9), rows=st.integers(1, 20), bias=st.booleans())
def test_applying_the_factors_equals_the_dense_product(m, n, rows, bias) -> None:
    Q, Lambda, P = _factors((m, n))
    x = torch.randn(2, rows, n, dtype=torch.float64)
    b = torch.randn(m, dtype=torch.float64) if bias else None
    torch.testing.assert_close(
        apply_factors(x, Q, Lambda, P, b), F.linear(x, rebuild(Q, Lambda, P), b)
    )


def test_the_cheaper_way_follows_the_flops() -> None:
    for m, n in [(768, 768), (3072, 768), (768, 3072), (64, 576)]:
        r = min(m, n)
        for rows in (1, 63, 65, 575, 577, 767, 769, 3071, 3073, 12608):
            rebuilt, applied = m * n * r + rows * m * n, rows * r * (m + n)
            assert rebuild_is_cheaper(rows, m, n) == (rebuilt < applied)
