"""What writes to the dense weight of an eigen layer changes the layer, or is refused."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from enn_core import ENNConv2d, ENNLinear, FactorError, fuse, to_enn
from enn_core.dense_weights import DenseWeight

NEW = torch.arange(24.0).reshape(4, 6).cos()


def _data(weight, value):
    weight.data = value


def _item(weight, key, value):
    weight[key] = value


def _add_to_data(weight):
    weight.data += NEW


# Each is done to a plain layer and to an eigen one, and must do the same to both.
WRITES = {
    "data.mul_": lambda w: w.data.mul_(2),
    "data +=": _add_to_data,
    "data =": lambda w: _data(w, NEW.clone()),
    "data = data + x": lambda w: _data(w, w.data + NEW),
    "data = clone, twice": lambda w: (_data(w, NEW.clone()), _data(w, w.data * 2)),
    "data.copy_": lambda w: w.data.copy_(NEW),
    "data.data": lambda w: w.data.data.mul_(3),
    "data[0] =": lambda w: _item(w.data, 0, 1.0),
    "data[0].zero_": lambda w: w.data[0].zero_(),
    "data.view": lambda w: w.data.view(-1)[3:7].fill_(2),
    "data.T": lambda w: w.data.T.copy_(NEW.T),
    "data.unbind": lambda w: w.data.unbind(1)[2].neg_(),
    "detach": lambda w: w.detach().add_(1),
    "mul_": lambda w: w.mul_(2),
    "[mask] =": lambda w: _item(w, w > 0, 0.0),
    "view": lambda w: w.view(-1).mul_(2),
    "relu_": lambda w: torch.relu_(w),
    "out=": lambda w: torch.add(NEW, 1, out=w),
    "out=data": lambda w: torch.mul(NEW, 2, out=w.data),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "twice": lambda w: w.add_(1).mul_(2),
    "uniform_": nn.init.uniform_,
    "normal_": nn.init.normal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "constant_": lambda w: nn.init.constant_(w, 0.5),
    "zeros_": nn.init.zeros_,
    "eye_": nn.init.eye_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "sparse_": lambda w: nn.init.sparse_(w, 0.5),
}


def _same(eigen, plain) -> None:
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    x = torch.randn(3, plain.in_features)
    with torch.no_grad():
        torch.testing.assert_close(fuse(eigen).weight, plain.weight, **tolerance)
        torch.testing.assert_close(eigen(x), plain(x), **tolerance)
        torch.testing.assert_close(eigen.train()(x), plain(x), **tolerance)
        torch.testing.assert_close(eigen.eval()(x), plain(x), **tolerance)
        other = ENNLinear(6, 4)
        other.load_state_dict(eigen.state_dict())
        torch.testing.assert_close(other(x), plain(x), **tolerance)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen", "inference", "cached"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_changes_the_layer(name, mode) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 4).train(mode == "train")
    plain.requires_grad_(mode != "frozen")
    eigen = to_enn(plain)
    guard = torch.inference_mode if mode == "inference" else torch.no_grad
    for layer in (plain, eigen):
        torch.manual_seed(1)
        with guard():
            if mode == "cached":
                layer(torch.randn(2, 6))
            WRITES[name](layer.weight)
    _same(eigen, plain)


@pytest.mark.parametrize("name", [n for n in WRITES if n.startswith("data") or n.endswith("_")])
def test_with_gradients_on(name) -> None:
    if name in ("mul_", "relu_"):
        pytest.skip("torch refuses this for a plain layer too")
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    eigen = to_enn(plain)
    for layer in (plain, eigen):
        torch.manual_seed(1)
        WRITES[name](layer.weight)
    _same(eigen, plain)


def test_in_place_on_a_weight_that_requires_grad_is_refused_as_torch_does() -> None:
    layer = ENNLinear(6, 4)
    before = layer.Lambda.clone()
    with pytest.raises(RuntimeError, match="no_grad"):
        layer.weight.mul_(2)
    assert torch.equal(layer.Lambda, before)


def test_other_memory_is_refused() -> None:
    layer = to_enn(nn.Linear(4, 3))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"assign layer\.weight"):
        layer.weight.set_(torch.ones(3, 4))


def test_an_array_is_read_only() -> None:
    layer = ENNLinear(6, 4).eval()
    with torch.no_grad():
        arrays = [layer.weight.numpy(), layer.weight.detach().numpy(), np.asarray(layer.weight)]
    arrays.append(layer.weight.detach().numpy())
    arrays.append(np.asarray(layer.train().weight.data))
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_held_weight_may_be_written_again() -> None:
    for train in (True, False):
        layer = ENNLinear(6, 4).train(train)
        with torch.no_grad():
            weight = layer.weight
            weight.copy_(NEW)
            layer(torch.randn(2, 6))
            weight.mul_(2)
            torch.testing.assert_close(layer.weight, 2 * NEW)


def test_a_held_weight_of_an_earlier_layer_is_refused() -> None:
    layer = ENNLinear(6, 4)
    weight = layer.weight
    with torch.no_grad():
        layer.Lambda.mul_(2)
    with pytest.raises(RuntimeError, match=r"read layer\.weight again"):
        weight.data.zero_()


def test_assignment_factors() -> None:
    for value in (NEW, nn.Parameter(NEW), ENNLinear(6, 4).weight, NEW.double()):
        layer = ENNLinear(6, 4)
        Q = layer.Q
        layer.weight = value
        torch.testing.assert_close(layer.weight, value.detach().float())
        assert layer.Q is Q
        assert list(layer.state_dict()) == ["Q", "Lambda", "P", "bias"]
    with torch.no_grad():
        layer.weight += 1
    torch.testing.assert_close(layer.weight, value.float() + 1)


@pytest.mark.parametrize("value", [torch.zeros(6, 4), nn.Parameter(torch.zeros(3, 6))])
def test_another_shape_is_refused(value) -> None:
    layer = ENNLinear(6, 4)
    with pytest.raises(FactorError, match="got a weight of shape"):
        layer.weight = value
    with pytest.raises(FactorError, match="got a weight of shape"):
        layer.weight.data = value.detach()


def test_no_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="got NoneType for the weight"):
        ENNLinear(6, 4).weight = None


def test_nan_shows() -> None:
    layer = ENNLinear(6, 4)
    layer.weight.data[0, 0] = torch.nan
    assert layer(torch.ones(1, 6)).isnan().any()
    with pytest.raises(FactorError, match="NaN"):
        layer.weight = NEW / 0


def test_apply_of_an_initialiser() -> None:
    def init(module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Linear(4, 5))
    plain = plain.to(memory_format=torch.channels_last)
    eigen = to_enn(plain)
    for model in (plain, eigen):
        torch.manual_seed(0)
        model.apply(init)
    for one, other in zip(fuse(eigen), plain, strict=True):
        torch.testing.assert_close(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention(mode) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=True).train(mode == "train")
    eigen = to_enn(plain)
    x = torch.randn(2, 3, 8)
    for model in (plain, eigen):
        torch.manual_seed(0)
        with torch.no_grad():
            model(x, x, x)
        model._reset_parameters()
        model.in_proj_weight.data[8:16] *= 3
        model.out_proj.weight.data += 1
    with torch.no_grad():
        torch.testing.assert_close(fuse(eigen)(x, x, x), plain(x, x, x))
        torch.testing.assert_close(eigen(x, x, x), plain(x, x, x))
    new = nn.Parameter(torch.randn(24, 8))
    eigen.in_proj_weight = plain.in_proj_weight = new
    torch.testing.assert_close(fuse(eigen).in_proj_weight, new)
    with pytest.raises(FactorError, match=r"this parameter's is \(24, 8\)"):
        eigen.in_proj_weight = torch.zeros(8, 8)


def test_a_transposed_projection() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(6, 4))

    for train in (True, False):
        eigen = to_enn(Tower()).train(train)
        with torch.no_grad():
            nn.init.normal_(eigen.proj)
            eigen.proj.copy_(NEW.T)
        torch.testing.assert_close(fuse(eigen).proj.detach(), NEW.T)
        eigen.proj = 2 * NEW.T
        torch.testing.assert_close(fuse(eigen).proj.detach(), 2 * NEW.T)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_lora_merges(safe, train) -> None:
    """What peft's LoRA does on merge and unmerge, to the statement."""
    plain = nn.Linear(16, 16).train(train)
    eigen = to_enn(plain)
    delta = torch.randn(16, 4) @ torch.randn(4, 16)
    x = torch.randn(4, 16)
    with torch.no_grad():
        before, want = plain(x), plain(x) + x @ delta.T
        eigen(x)
    if safe:
        orig_weight = eigen.weight.data.clone()
        orig_weight += delta.to(orig_weight.dtype)
        eigen.weight.data = orig_weight
    else:
        eigen.weight.data += delta
    with torch.no_grad():
        for model in (eigen, fuse(eigen), eigen.train(), eigen.eval(), copy.deepcopy(eigen)):
            torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-5)
    eigen.weight.data -= delta
    with torch.no_grad():
        torch.testing.assert_close(fuse(eigen)(x), before, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("assigned", [True, False])
def test_oft_merges(assigned) -> None:
    """OFT multiplies the weight by a trained rotation and puts it back."""
    plain = nn.Linear(16, 8)
    eigen = to_enn(plain)
    rotation = nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0])
    weight = eigen.weight.data
    turned = torch.mm(rotation, weight.t().to(rotation.dtype)).t()
    if assigned:
        eigen.weight.data = turned.contiguous().to(eigen.weight.dtype)
    else:
        weight.copy_(turned)
    want = plain.weight @ rotation.T
    torch.testing.assert_close(fuse(eigen).weight, want.detach(), atol=1e-5, rtol=1e-5)


def test_a_mask_in_a_layers_own_forward() -> None:
    class Masked(nn.Conv2d):
        def forward(self, input):
            self.weight.data[:, :, 1:] = 0
            return super().forward(input)

    plain = Masked(3, 4, 3)
    eigen = to_enn(plain)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(eigen(x), plain(x))
    eigen(x).sum().backward()
    assert eigen.Q.grad is not None


def test_the_fused_inference_path_is_still_taken() -> None:
    layer = to_enn(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval()
    with torch.no_grad():
        weights = (layer.linear1.weight, layer.self_attn.in_proj_weight)
        assert not torch.overrides.has_torch_function(weights)
    assert all(type(weight) is DenseWeight for weight in weights)


def test_gradients_go_through() -> None:
    layer = ENNLinear(6, 4)
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.Lambda.grad, 2 * layer.Lambda.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.weight[1:].T.sum(), layer.weight[1:].sum())


@pytest.mark.parametrize("train", [True, False])
def test_a_read_weight_is_a_tensor_of_its_own_elsewhere(train) -> None:
    layer = ENNConv2d(2, 4, 3).train(train)
    with torch.no_grad():
        weight = layer.weight
    assert type(copy.deepcopy(weight)) is torch.Tensor
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, weight)
    assert repr(weight).startswith("tensor(")
    assert type(weight + 1) is torch.Tensor
    parameter = nn.Parameter(weight)
    before = layer.Lambda.detach().clone()
    other = nn.Conv2d(2, 4, 3)
    other.weight = parameter
    torch.optim.SGD(other.parameters(), 0.1).zero_grad()
    other(torch.randn(1, 2, 4, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert torch.equal(layer.Lambda, before)
    assert isinstance(copy.deepcopy(other).weight, nn.Parameter)


def test_a_compiled_layer_sees_a_write() -> None:
    for train in (True, False):
        layer = ENNLinear(6, 4).train(train)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(3, 6)
        with torch.no_grad():
            compiled(x)
            layer.weight.copy_(NEW)
            torch.testing.assert_close(compiled(x), x @ NEW.T + layer.bias)
