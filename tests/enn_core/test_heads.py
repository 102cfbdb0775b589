"""Heads: any size of features, any layout, the averages of torch."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from enn_core import heads, make_head
from enn_core.heads import FORMS, ConvHead, LinearHead, _averages, _pool, _spread

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def test_examples():
    assert doctest.testmod(heads).failed == 0


@settings(max_examples=40)
@given(
    form=st.sampled_from(FORMS),
    sides=st.lists(st.integers(1, 12), max_size=3),
    other=st.integers(1, 40),
    channels=st.integers(1, 9),
    last=st.booleans(),
)
def test_one_head_takes_features_of_any_size(form, sides, other, channels, last):
    axis = -1 if last else 1
    shape = [3, *sides, channels] if last else [3, channels, *sides]
    head = make_head(form, shape, 5, channel_axis=axis)
    assert head(torch.randn(shape)).shape == (3, 5)
    if sides:
        shape[1 if last else -1] = other
        assert head(torch.randn(shape)).shape == (3, 5)


@settings(max_examples=40)
@given(data=st.data(), axes=st.integers(1, 3))
def test_averages_are_those_of_torch(data, axes):
    largest = {1: 1500, 2: 40, 3: 14}[axes]  # on both sides of where the product is used
    sides = data.draw(st.lists(st.integers(1, largest), min_size=axes, max_size=axes))
    cells = data.draw(st.lists(st.integers(1, 5), min_size=axes, max_size=axes))
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    ours, theirs = _averages(x, cells), POOLS[axes](x, cells)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_pooling_never_makes_more_cells_but_for_the_last_map():
    assert _pool(torch.zeros(2, 3, 5, 20), 8).shape == (2, 3, 5, 8)
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(_spread(x), x.expand(2, 3, 2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_tokens_equal_channels_first(form):
    torch.manual_seed(0)
    last = make_head(form, torch.randn(2, 50, 16), 4)
    first = make_head(form, torch.randn(2, 16, 50), 4, channel_axis=1)
    first.load_state_dict(last.state_dict())
    h = torch.randn(3, 50, 16)
    torch.testing.assert_close(last(h), first(h.mT))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_autocast(form, dtype):
    h = torch.randn(2, 8, 6, 6)
    head = make_head(form, h, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(h).dtype == torch.bfloat16
    assert head.to(dtype)(h.to(dtype)).dtype == dtype


def test_heads_are_light_on_memory():
    """On small features nothing of their size is kept for the backward."""
    h = torch.randn(4, 64, 32, 32, requires_grad=True)
    for form in FORMS:
        head, kept = make_head(form, h, 10), []

        def pack(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            head(h)
        assert max(kept) < h.numel() / 3


def test_learns_where_something_is():
    """What tells the two spatial heads from the plain average."""
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8, 8)
    x[:32, :, :4] += 1
    x[32:, :, 4:] += 1
    target = torch.arange(64) // 32
    right = {}
    for form in FORMS:
        head = make_head(form, x, 2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(head(x), target).backward()
            optimizer.step()
        right[form] = float((head(x).argmax(1) == target).float().mean())
    assert right["conv"] == right["mlp"] == 1
    assert right["linear"] < 0.9


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="form 'avg' is unknown, valid are linear, conv, mlp"):
        make_head("avg", (2, 3), 1)
    with pytest.raises(ValueError, match=r"features of shape \(7,\) have 1 dimensions"):
        make_head("conv", torch.zeros(7), 1)
    with pytest.raises(ValueError, match=r"got features \(2, 5, 8, 8\) and takes \(N, 4, \*, \*\)"):
        ConvHead(4, 2, axes=2)(torch.zeros(2, 5, 8, 8))
    with pytest.raises(ValueError, match=r"got features \(2, 5\) and takes \(N, \*, 4\)"):
        LinearHead(4, 2, axes=1, channel_axis=-1)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="axes=4"):
        LinearHead(4, 2, axes=4)
    with pytest.raises(ValueError, match="channel_axis=2"):
        LinearHead(4, 2, axes=2, channel_axis=2)
    assert isinstance(make_head("linear", (2, 3), 1), nn.Module)
