"""The networks: shapes, rules, heads, exact layers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from enn_core import conversion_report, fuse
from neuro.age.networks import ARCHITECTURES, BrainNet, GridHead, IntensityBins, build

TINY = {"widths": (4, 6, 6, 8), "grid": (2, 2, 2)}


def tiny(layers: str = "plain", **options) -> BrainNet:
    torch.manual_seed(0)
    return build("bins4", layers=layers, **{**TINY, **options})


@settings(max_examples=8)
@given(size=st.tuples(*[st.integers(16, 40)] * 3), count=st.integers(1, 3))
def test_any_size_of_volume(size, count):
    said = tiny()(torch.rand(count, 1, *size))
    assert [tuple(p.shape) for p in said] == [(count, 1)] * 4


def test_blocks_are_eigen_layers_and_fuse_exactly():
    net = tiny("enn")
    assert len(conversion_report(net).converted) == 4
    nn.init.normal_(net.blocks[3].head.out.weight)
    x = torch.rand(2, 1, 16, 16, 16)
    net.eval()
    plain = fuse(net)
    assert torch.allclose(plain(x)[-1], net(x)[-1], atol=1e-4)
    again = tiny("enn")
    again.load_state_dict(plain.state_dict())
    assert torch.allclose(again.eval()(x)[-1], net(x)[-1], atol=1e-4)


def test_the_local_rule_cuts_gradients_and_backprop_does_not():
    net = tiny()
    for unit in net.blocks:
        nn.init.normal_(unit.head.out.weight)
    h = net.stem(torch.rand(2, 1, 16, 16, 16))
    for unit in net.units("local"):
        h, prediction = unit(h)
    prediction.sum().backward()
    assert [u.block.conv.weight.grad is not None for u in net.blocks] == [False] * 3 + [True]
    net.zero_grad()
    (whole,) = net.units("backprop")
    _, prediction = whole(net.stem(torch.rand(2, 1, 16, 16, 16)))
    prediction.sum().backward()
    assert all(u.block.conv.weight.grad is not None for u in net.blocks)
    assert [u.head.out.weight.grad is not None for u in net.blocks] == [False] * 3 + [True]


def test_gradients_reach_the_voxels():
    net = tiny()
    nn.init.normal_(net.blocks[3].head.out.weight)
    x = torch.rand(1, 1, 16, 16, 16, requires_grad=True)
    net(x)[-1].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_the_last_block_reads_its_cached_input():
    net = tiny().eval()
    nn.init.normal_(net.blocks[3].head.out.weight)
    x = torch.rand(2, 1, 16, 20, 16)
    cached = net.block_input(x, -1)
    last = net.blocks[-1]
    assert torch.equal(last.head(last.block(cached)), net(x)[-1])
    assert torch.equal(net.block_input(x, 0), net.stem(x))


def test_bins_are_soft_and_leave_the_outside_out():
    bins = IntensityBins(7)
    x = torch.zeros(1, 1, 4, 4, 4)
    assert bins(x).abs().sum() == 0
    x[..., :2] = 0.45
    said = bins(x)
    assert said.shape == (1, 7, 2, 2, 2)
    assert said[0, :, 0, 0, 0].tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0], abs=1e-5)
    assert bins(torch.full((1, 1, 2, 2, 2), 0.525)).flatten().tolist()[2:4] == pytest.approx(
        [0.5, 0.5], abs=1e-5
    )
    with pytest.raises(ValueError, match="expected"):
        bins(torch.zeros(4, 4, 4))


def test_heads_start_from_standardised_features():
    net = tiny()
    h = net.stem(torch.rand(6, 1, 16, 16, 16))
    net.standardise_heads_([h[:4], h[4:]])
    for head, pooled in zip(net.grid_heads(), net.pooled([h]), strict=True):
        features = (pooled - head.mean) / head.scale
        assert features.mean(0).abs().max() < 1e-3
        assert features.square().sum(1).mean() == pytest.approx(100, rel=1e-3)
    assert all(p.abs().max() == 0 for p in net(torch.rand(2, 1, 16, 16, 16)))


def test_a_refit_is_the_ridge_regression_of_the_smallest_left_out_error():
    torch.manual_seed(1)
    head = GridHead(3, 1, (2, 2, 2))
    x = torch.randn(30, 24)
    y = x @ torch.randn(24) + 3 + 0.3 * torch.randn(30)
    penalty = head.refit_(x, y)
    said = head.out(head.features(x.view(30, 3, 2, 2, 2)))[:, 0]
    assert (said - y).square().mean() < 0.2
    # The same, written with the covariance and one scan left out at a time.
    unit = (x - x.mean(0)).double().square().sum(1).mean()

    def weights(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, t = x[rows].double(), y[rows].double()
        m, level = z.mean(0), t.mean()
        gram = (z - m).T @ (z - m) + penalty * unit * torch.eye(24).double()
        w = torch.linalg.solve(gram, (z - m).T @ (t - level))
        return w, level - m @ w

    w, b = weights(torch.arange(30))
    assert torch.allclose(head.out.weight[0].double(), w, atol=1e-4)
    assert head.out.bias.item() == pytest.approx(float(b), abs=1e-4)
    with pytest.raises(ValueError, match="1 output"):
        GridHead(3, 2, (2, 2, 2)).refit_(x, y)


def test_yin_s_layers():
    net = build("yin2023", layers="plain").eval()
    count = sum(p.numel() for u in net.blocks for p in u.block.parameters())
    count += sum(p.numel() for p in net.blocks[-1].head.parameters())
    assert round(count / 1e6, 2) == 2.34  # published
    sides = []
    with torch.no_grad():
        h = net.stem(torch.rand(1, 1, 80, 96, 80))
        for unit in net.blocks:
            h = unit.block(h)
            sides.append(h.shape[-1])
            assert unit.head(h).shape == (1, 1)
    assert sides == [45, 20, 7, 1]  # of 96; published: 61, 28, 11, 3 of 128


def test_sfcn_s_layers():
    net = build("sfcn", outputs=40, layers="plain")
    count = sum(p.numel() for u in net.blocks for p in u.block.parameters())
    count += sum(p.numel() for p in net.blocks[-1].head.parameters())
    assert round(count / 1e6, 2) == 2.95  # published
    with torch.no_grad():
        said = net.eval()(torch.rand(1, 1, 32, 32, 32))
    assert [tuple(p.shape) for p in said] == [(1, 40)] * 6


def test_settings_make_the_network_again():
    net = tiny(norm="group")
    again = build(**net.settings)
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]
    assert copy.deepcopy(net).settings == net.settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet"}, f"valid are {', '.join(ARCHITECTURES)}"),
        ({"name": "bins4", "layers": "soft"}, "valid are 'enn' and 'plain'"),
        ({"name": "sfcn", "widths": (1, 2)}, "no option widths; valid are norm, eps, dropout"),
        ({"name": "bins4", "norm": "layer"}, "valid are 'instance', 'group' and 'batch'"),
        ({"name": "bins4", "bins": 1}, "2 or more"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"layers": "plain", **arguments})
