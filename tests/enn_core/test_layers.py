"""The eigen layers against their torch twins."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from enn_core import ENNConv1d, ENNConv2d, ENNConv3d, ENNLinear, FactorError, fuse, to_enn

TWINS = {nn.Linear: ENNLinear, nn.Conv1d: ENNConv1d, nn.Conv2d: ENNConv2d, nn.Conv3d: ENNConv3d}

# (plain class, arguments, keyword arguments, input shape)
CASES = [
    (nn.Linear, (6, 4), {}, (5, 6)),
    (nn.Linear, (4, 6), {"bias": False}, (2, 3, 4)),
    (nn.Linear, (4, 6), {}, (4,)),
    (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 11)),
    (nn.Conv1d, (4, 6, 3), {"padding": "same", "padding_mode": "circular"}, (2, 4, 7)),
    (nn.Conv2d, (3, 8, 3), {}, (2, 3, 9, 9)),
    (nn.Conv2d, (3, 8, (3, 5)), {"padding": "same", "dilation": 2}, (2, 3, 9, 9)),
    (nn.Conv2d, (3, 8, 3), {"padding": "valid", "bias": False}, (3, 9, 9)),
    (nn.Conv2d, (3, 8, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (1, 3, 6, 6)),
    (nn.Conv2d, (3, 8, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}, (1, 3, 6, 6)),
    (nn.Conv2d, (4, 6, 3), {"groups": 2, "stride": (2, 1), "padding": 1}, (2, 4, 6, 7)),
    (nn.Conv2d, (8, 4, 1), {}, (1, 8, 20, 20)),
    (nn.Conv3d, (2, 5, 3), {"padding": 1, "dilation": (1, 2, 1)}, (1, 2, 5, 6, 5)),
    (nn.Conv3d, (4, 4, 2), {"groups": 4, "stride": 2}, (2, 4, 4, 4, 4)),
]
ids = [f"{c.__name__}{i}" for i, (c, *_) in enumerate(CASES)]


def _pair(cls, args, kwargs, **factory):
    torch.manual_seed(0)
    plain = cls(*args, **kwargs, **factory)
    torch.manual_seed(0)
    return plain, TWINS[cls](*args, **kwargs, **factory)


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), CASES, ids=ids)
@pytest.mark.parametrize("batch", [1, 40], ids=["few", "many"])
def test_same_seed_same_function_and_gradients(cls, args, kwargs, shape, batch) -> None:
    """One seed gives twins the same weights; outputs and gradients agree for any input size."""
    plain, eigen = _pair(cls, args, kwargs, dtype=torch.float64)
    dims = {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}[cls]
    if len(shape) > dims:
        shape = (shape[0] * batch, *shape[1:])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(eigen.weight, plain.weight)
    expected, got = plain(x), eigen(y)
    torch.testing.assert_close(got, expected)
    seed = torch.randn_like(expected)
    expected.backward(seed)
    got.backward(seed)
    torch.testing.assert_close(y.grad, x.grad)
    # By the chain rule through W = Q Lambda P^T, from the plain layer's own gradient.
    grad = eigen._as_matrix(plain.weight.grad)
    scale = eigen.Lambda.unsqueeze(-2)
    torch.testing.assert_close(eigen.Q.grad, (grad @ eigen.P) * scale)
    torch.testing.assert_close(eigen.P.grad, (grad.mT @ eigen.Q) * scale)
    torch.testing.assert_close(eigen.Lambda.grad, (eigen.Q * (grad @ eigen.P)).sum(-2))
    eigen.eval()
    with torch.no_grad():
        torch.testing.assert_close(eigen(y), expected.detach())


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), CASES, ids=ids)
def test_shapes_names_and_repr(cls, args, kwargs, shape) -> None:
    plain, eigen = _pair(cls, args, kwargs)
    names = ["Q", "Lambda", "P"] + ["bias"] * (plain.bias is not None)
    assert list(eigen.state_dict()) == names
    groups = getattr(plain, "groups", 1)
    m, n = plain.weight.shape[0] // groups, plain.weight[0].numel()
    lead = (groups,) if groups > 1 else ()
    assert eigen.Q.shape == (*lead, m, min(m, n))
    assert eigen.Lambda.shape == (*lead, min(m, n))
    assert eigen.P.shape == (*lead, n, min(m, n))
    assert repr(eigen) == f"ENN{repr(plain)[:-1]}, rank={min(m, n)})"
    assert isinstance(eigen, cls)


@settings(max_examples=60)
@given(
    channels=st.integers(1, 5),
    out=st.integers(1, 7),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    size=st.integers(5, 9),
    batch=st.integers(1, 4),
)
def test_any_convolution(channels, out, kernel, stride, dilation, padding, size, batch) -> None:
    kwargs = {"stride": stride, "dilation": dilation, "padding": padding}
    plain, eigen = _pair(nn.Conv2d, (channels, out, kernel), kwargs, dtype=torch.float64)
    x = torch.randn(batch, channels, size, size + 1, dtype=torch.float64)
    expected = plain(x)
    torch.testing.assert_close(eigen(x), expected)
    assert eigen._output_sizes(x) == expected.shape[2:]


WAYS = [
    (nn.Conv1d, (4, 6, 3), {"padding": 1}, (1, 4, 9), "unfold"),
    (nn.Conv1d, (4, 6, 3), {"padding": "same"}, (4, 9), "unfold"),
    (nn.Conv2d, (3, 8, 3), {"padding": 1, "stride": 2}, (2, 3, 6, 6), "unfold"),
    (nn.Conv2d, (3, 8, (2, 3)), {"padding": "same", "dilation": (1, 2)}, (3, 4, 4), "unfold"),
    (nn.Conv2d, (3, 8, 3), {"padding": (2, 1), "padding_mode": "reflect"}, (1, 3, 4, 4), "unfold"),
    (nn.Conv2d, (64, 4, 1), {}, (1, 64, 6, 6), "kernels"),
    (nn.Conv2d, (16, 2, 3), {}, (1, 16, 12, 12), "rebuild"),
    (nn.Conv3d, (4, 8, 3), {"padding": 1}, (1, 4, 2, 3, 3), "kernels"),
    (nn.Conv2d, (4, 8, 3), {"groups": 2}, (1, 4, 3, 3), "rebuild"),
    (nn.Conv2d, (3, 8, 3), {}, (4, 3, 12, 12), "rebuild"),
]


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize(("cls", "args", "kwargs", "shape", "way"), WAYS)
def test_every_way_to_convolve_agrees(cls, args, kwargs, shape, way) -> None:
    plain, eigen = _pair(cls, args, kwargs, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, got = plain(x), eigen(x)
    assert eigen._way(x, eigen._output_sizes(x)) == way
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    grads = [torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)
    twice = [torch.autograd.grad(g.pow(2).sum(), x)[0] for g in grads]
    torch.testing.assert_close(*twice)


@pytest.mark.parametrize("side", [3, 12], ids=["few", "many"])
def test_per_sample_gradients_of_convolutions(side) -> None:
    layer = ENNConv2d(2, 4, 3, padding=1, dtype=torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 2, side, side, dtype=torch.float64)

    def loss(p, image):
        return functional_call(layer, p, (image.unsqueeze(0),)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    expected = torch.func.grad(loss)(params, x[2])
    for name in params:
        torch.testing.assert_close(grads[name][2], expected[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_convolutions(dtype) -> None:
    layer = ENNConv2d(4, 8, 3, dtype=dtype)
    for side in (4, 20):
        x = torch.randn(1, 4, side, side, dtype=dtype)
        expected = nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers(dtype) -> None:
    layer = ENNLinear(16, 8, dtype=dtype)
    for rows in (2, 64):
        x = torch.randn(rows, 16, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        expected = x.double() @ layer.weight.double().T + layer.bias.double()
        torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rows", [2, 64], ids=["factored", "rebuilt"])
def test_autocast(rows) -> None:
    layer = ENNLinear(16, 8)
    x = torch.randn(rows, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.weight.dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), layer.Q)[0]
    assert (layer.Q.grad - expected).norm() < 0.05 * expected.norm()
    layer.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32  # nothing of the autocast region was kept


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.Conv3d])
def test_channels_last_follows_the_model(cls) -> None:
    """`model.to(memory_format=...)` cannot see a kernel in Q and P; the layer follows anyway."""
    last = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}[cls]

    def is_last(layer) -> bool:
        return layer.weight.is_contiguous(memory_format=last)

    plain, eigen = _pair(cls, (4, 6, 3), {})
    assert not is_last(eigen)
    eigen.to(memory_format=last)
    assert is_last(eigen)
    assert is_last(eigen.double().float())
    assert is_last(copy.deepcopy(eigen))
    for train in (True, False):
        eigen.train(train)
        for side in (3, 12):
            x = torch.randn(2, 4, *[side] * (plain.weight.ndim - 2)).contiguous(memory_format=last)
            with torch.no_grad():
                torch.testing.assert_close(eigen(x), plain(x))
                assert is_last(eigen)
    assert is_last(fuse(eigen))
    assert is_last(to_enn(plain.to(memory_format=last)))
    assert not is_last(eigen.to(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_compile_is_one_graph_and_agrees(mode) -> None:
    model = nn.Sequential(
        ENNConv2d(3, 8, 3),
        to_enn(nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)),
        nn.ReLU(),
        nn.Flatten(),
        ENNLinear(8 * 16, 600),
        ENNLinear(600, 5),
    )
    model.train(mode == "train")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 200):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(compiled(x), model(x))
    grads = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected)


def test_compiled_eval_sees_changed_parameters() -> None:
    layer = ENNLinear(6, 4).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6)
    with torch.no_grad():
        compiled(x)
        layer.Lambda.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))


def test_deepcopy_and_pickle_are_independent() -> None:
    layer = ENNConv2d(3, 4, 3).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x)  # fills the cache
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), expected)
            other.Lambda.zero_()
            assert not torch.equal(other(x), expected)
            assert torch.equal(layer(x), expected)
    assert all(not name.startswith("_cache") for name in layer.__getstate__())


def test_functional_call_and_per_sample_gradients() -> None:
    layer = ENNLinear(6, 4).eval()
    x = torch.randn(3, 6)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    other = {**params, "Lambda": params["Lambda"] * 2}
    with torch.no_grad():
        first = layer(x)
        doubled = functional_call(layer, other, (x,))
        torch.testing.assert_close(doubled - layer.bias, 2 * (first - layer.bias))
        assert torch.equal(layer(x), first)

    def loss(p, row):
        return functional_call(layer, p, (row.unsqueeze(0),)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    expected = torch.func.grad(loss)(params, x[1])
    torch.testing.assert_close(grads["Q"][1], expected["Q"])


class TestCache:
    """In eval, the dense weight is kept exactly as long as it is right."""

    @pytest.fixture
    def layer(self) -> ENNLinear:
        layer = ENNLinear(6, 4).eval()
        with torch.no_grad():
            layer.weight  # noqa: B018  fills the cache
        return layer

    @staticmethod
    def _right(layer) -> bool:
        with torch.no_grad():
            return torch.equal(layer.weight, (layer.Q * layer.Lambda) @ layer.P.mT)

    @torch.no_grad()
    def test_is_used(self, layer) -> None:
        assert layer.dense() is layer.dense()

    def test_is_not_used_where_gradients_are_wanted(self, layer) -> None:
        assert layer.weight.requires_grad
        layer(torch.randn(2, 6)).sum().backward()
        assert layer.Q.grad is not None

    def test_is_used_for_frozen_factors(self, layer) -> None:
        for p in layer.parameters():
            p.requires_grad_(False)
        assert layer.dense() is layer.dense()
        x = torch.randn(2, 6, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 6))

    @pytest.mark.parametrize("name", ["Q", "Lambda", "P"])
    def test_in_place_change(self, layer, name) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(1.5)
        assert self._right(layer)

    def test_optimizer_step_in_eval(self, layer) -> None:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        assert self._right(layer)

    def test_load_state_dict(self, layer) -> None:
        layer.load_state_dict(ENNLinear(6, 4).state_dict())
        assert self._right(layer)
        layer.load_state_dict(nn.Linear(6, 4).state_dict())
        assert self._right(layer)
        layer.load_state_dict(nn.Linear(6, 4).state_dict(), assign=True)
        assert self._right(layer)

    def test_new_parameter(self, layer) -> None:
        layer.Q = nn.Parameter(torch.randn(4, 4))
        assert self._right(layer)

    def test_data_assignment(self, layer) -> None:
        layer.Q.data = torch.randn(4, 4)
        assert self._right(layer)

    def test_dtype_round_trip(self, layer) -> None:
        assert self._right(layer.to(torch.bfloat16).float())
        assert self._right(layer.double())

    def test_data_write_is_seen_after_train_and_eval(self, layer) -> None:
        layer.Lambda.data.mul_(2)
        assert self._right(layer.train().eval())

    def test_parent_train(self, layer) -> None:
        nn.Sequential(layer).train()
        assert layer._cache is None

    def test_a_written_weight(self, layer) -> None:
        with torch.no_grad():
            layer.weight.zero_()
        assert self._right(layer)

    def test_inference_mode_does_not_taint_it(self) -> None:
        layer = ENNLinear(6, 4).eval()
        with torch.inference_mode():
            layer(torch.randn(2, 6))
        for p in layer.parameters():
            p.requires_grad_(False)
        x = torch.randn(2, 6, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None

    def test_a_layer_born_in_inference_mode(self) -> None:
        with torch.inference_mode():
            layer = ENNLinear(6, 4).eval()
            first = layer(torch.ones(1, 6))
            layer.Lambda.mul_(2)
            assert not torch.equal(layer(torch.ones(1, 6)), first)

    def test_factor(self, layer) -> None:
        W = torch.randn(4, 6)
        layer.factor_(W)
        assert self._right(layer)
        torch.testing.assert_close(layer.weight, W)
        with pytest.raises(FactorError, match=r"\(6, 4\).*\(4, 6\)"):
            layer.factor_(W.T)


@pytest.mark.parametrize(("cls", "args", "kwargs", "shape"), CASES, ids=ids)
def test_plain_checkpoints_load_strictly(cls, args, kwargs, shape) -> None:
    plain = cls(*args, **kwargs)
    eigen = TWINS[cls](*args, **kwargs)
    for assign in (False, True):
        given = plain.state_dict()
        result = eigen.load_state_dict(given, strict=True, assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert list(given) == list(plain.state_dict())  # the caller's dict is untouched
        torch.testing.assert_close(eigen.weight, plain.weight)


def test_own_checkpoints_load_bit_for_bit() -> None:
    first, second = ENNConv1d(4, 6, 3), ENNConv1d(4, 6, 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_shape_is_refused_as_torch_does(strict) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\(3, 3\).*\(4, 6\)"):
        ENNLinear(6, 4).load_state_dict(nn.Linear(3, 3, bias=False).state_dict(), strict=strict)


def test_a_half_precision_checkpoint_is_factored_before_it_is_rounded() -> None:
    plain = nn.Linear(64, 32).half()
    eigen = ENNLinear(64, 32)
    eigen.load_state_dict(plain.state_dict())
    torch.testing.assert_close(eigen.weight, plain.weight.float(), atol=1e-6, rtol=0)
    eigen.load_state_dict(plain.state_dict(), assign=True)
    assert eigen.Q.dtype == torch.float16


def test_a_checkpoint_with_nan_is_refused_by_name() -> None:
    state = nn.Linear(6, 4).state_dict()
    state["weight"][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"0.weight: the weight holds NaN"):
        nn.Sequential(ENNLinear(6, 4)).load_state_dict({f"0.{k}": v for k, v in state.items()})


def test_missing_and_unexpected_keys_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*Lambda"):
        ENNLinear(6, 4).load_state_dict({"bias": torch.zeros(4)})
    state = {**ENNLinear(6, 4).state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        ENNLinear(6, 4).load_state_dict(state)


def test_meta_device_and_materialisation() -> None:
    layer = ENNLinear(6, 4, device="meta")
    assert layer(torch.zeros(2, 6, device="meta")).shape == (2, 4)
    plain = nn.Linear(6, 4)
    layer.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(layer.weight, plain.weight)
    empty = ENNLinear(6, 4, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    eye = torch.eye(4)
    torch.testing.assert_close(empty.Q.mT @ empty.Q, eye)


def test_reset_parameters_draws_as_the_twin_does() -> None:
    plain, eigen = nn.Conv2d(3, 5, 3), ENNConv2d(3, 5, 3)
    torch.manual_seed(3)
    plain.reset_parameters()
    torch.manual_seed(3)
    eigen.reset_parameters()
    torch.testing.assert_close(eigen.weight, plain.weight)
    assert torch.equal(eigen.bias, plain.bias)
    assert list(eigen.state_dict()) == ["Q", "Lambda", "P", "bias"]


def test_double_backward_through_a_layer() -> None:
    layer = ENNLinear(3, 2, dtype=torch.float64)
    for rows in (1, 8):
        x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda x, *p: functional_call(
                layer, dict(zip(["Q", "Lambda", "P", "bias"], p, strict=True)), (x,)
            ),
            (x, *layer.parameters()),
        )


def test_weight_errors_name_the_attribute() -> None:
    with pytest.raises(FactorError, match=r"weight of shape \(3, 2\), this layer's is \(2, 3\)"):
        ENNLinear(3, 2).weight = nn.Parameter(torch.zeros(3, 2))


def test_empty_batches() -> None:
    for train in (True, False):
        layer = ENNLinear(3, 2).train(train)
        assert layer(torch.zeros(0, 3)).shape == (0, 2)
        conv = ENNConv2d(3, 2, 3).train(train)
        assert conv(torch.zeros(0, 3, 8, 8)).shape == (0, 2, 6, 6)
