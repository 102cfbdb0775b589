"""Exact conversion of real networks and back."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from enn_core import (
    ConversionError,
    ENNConv2d,
    ENNLinear,
    conversion_report,
    fuse,
    orthogonality_error,
    to_enn,
)
from enn_core.layers import EigenLayer, Factored

TOLERANCE = 1e-5  # largest output difference relative to the largest output, float32


def _output(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out


def _settle(model, inputs) -> None:
    """Give batch norms the statistics of their input, so that activations keep their scale."""
    model.train()
    for _ in range(3):
        _output(model, inputs)
    model.eval()


def round_trip(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Check `model`, its eigen twin and the fused twin against each other; the eigen twin."""
    _settle(model, inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _output(model, inputs)
    scale = expected.abs().max()
    assert scale > 0

    eigen = to_enn(model)
    assert (_output(eigen, inputs) - expected).abs().max() <= TOLERANCE * scale
    fused = fuse(eigen)
    assert (_output(fused, inputs) - expected).abs().max() <= TOLERANCE * scale

    # The original is untouched; the fused state dict has its keys in its order and loads into it.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(fused.state_dict()) == list(before)
    assert not any(isinstance(m, Factored) for m in fused.modules())
    for (name, module), other in zip(model.named_modules(), fused.modules(), strict=True):
        assert type(module) is type(other), name
    model.load_state_dict(fused.state_dict(), strict=True)
    assert (_output(model, inputs) - expected).abs().max() <= TOLERANCE * scale

    # A plain checkpoint loads into the converted model, an eigen one into its like.
    other = _scrambled(eigen)
    other.load_state_dict(before, strict=True)
    assert (_output(other, inputs) - expected).abs().max() <= TOLERANCE * scale
    other = _scrambled(eigen)
    other.load_state_dict(eigen.state_dict(), strict=True)
    assert torch.equal(_output(other, inputs), _output(eigen, inputs))

    report = conversion_report(eigen)
    assert report.parameters_stored == sum(p.numel() for p in eigen.parameters())
    assert report.parameters_fused == sum(p.numel() for p in model.parameters())
    assert max(orthogonality_error(eigen).values()) < 1e-5
    return eigen


def _scrambled(model: nn.Module) -> nn.Module:
    """A copy whose parameters are noise, so that whatever is not loaded shows."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_(std=0.02)
    return other


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _vit(width: int, layers: int, heads: int, image: int, patch: int, out: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image, patch, width, layers, heads, 4.0, output_dim=out)


def test_open_clip_image_tower() -> None:
    eigen = round_trip(_vit(64, 2, 4, 64, 16, 32), _images(2, 3, 64, 64))
    report = conversion_report(eigen)
    assert {row.name for row in report.plain} == {"positional_embedding"}
    names = {row.name: row for row in report.converted}
    assert names["proj"].shape == (64, 32)
    assert names["transformer.resblocks.0.attn.in_proj_weight"].shape == (192, 64)
    keys = eigen.state_dict()
    assert keys["proj_eigen.Q"].shape == (32, 32)
    assert keys["proj_eigen.P"].shape == (64, 32)
    assert keys["transformer.resblocks.0.attn.in_proj_weight_eigen.Q"].shape == (3, 64, 64)


@pytest.mark.parametrize("train", [True, False])
def test_converted_models_compile_to_one_graph(train) -> None:
    eigen = to_enn(_vit(32, 1, 2, 32, 16, 8)).train(train)
    x = _images(2, 3, 32, 32)
    compiled = torch.compile(eigen, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eigen(x))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_open_clip_vit_b_16() -> None:
    import open_clip

    model = open_clip.create_model("ViT-B-16", pretrained=None)
    eigen = to_enn(model, include="visual")
    names = [row.name for row in conversion_report(eigen).converted]
    assert len(names) == 12 * 4 + 2
    assert all(name.startswith("visual.") for name in names)
    del eigen
    round_trip(model.visual, _images(2, 3, 224, 224))


def test_open_clip_model_with_a_plain_text_tower() -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=64, head_width=16, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    eigen = to_enn(model, exclude=["transformer", "text_projection"])
    images, tokens = _images(2, 3, 32, 32), torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(
            eigen.encode_image(images), model.encode_image(images), rtol=0, atol=1e-5
        )
        assert torch.equal(eigen.encode_text(tokens), model.encode_text(tokens))
        everything = to_enn(model)
        torch.testing.assert_close(
            everything.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=1e-5
        )
    assert list(fuse(everything).state_dict()) == list(model.state_dict())


def test_small_residual_network() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16)
    eigen = round_trip(model, _images(2, 3, 64, 64))
    assert not conversion_report(eigen).plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet_50(library) -> None:
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model("resnet50")
    else:
        import torchvision

        model = torchvision.models.resnet50()
    eigen = round_trip(model, _images(4, 3, 128, 128))
    assert not conversion_report(eigen).plain


def test_resnext_groups() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8)
    assert not conversion_report(round_trip(model, _images(2, 3, 64, 64))).plain


@pytest.mark.parametrize("size", [64, 75])
def test_efficientnet_lite0_keeps_its_padding(size) -> None:
    """TensorFlow-style 'same' padding depends on the input size and lives in a subclass."""
    import timm
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    eigen = round_trip(model, _images(2, 3, size, size))
    stem = eigen.conv_stem
    assert isinstance(stem, Conv2dSame)
    assert isinstance(stem, ENNConv2d)
    assert type(stem).__name__ == "ENNConv2dSame"
    assert {row.reason for row in conversion_report(eigen).plain} == {"depthwise"}


def test_the_packaged_efficientnet_lite0() -> None:
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the train extra")
    torch.manual_seed(0)
    model = lite.EfficientNet.from_name("efficientnet-lite0")
    eigen = round_trip(model, _images(1, 3, 64, 64))
    assert {row.reason for row in conversion_report(eigen).plain} == {"depthwise"}


def test_monai_unet_3d() -> None:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    model = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2)
    eigen = round_trip(model, _images(1, 1, 16, 16, 16))
    kinds = {row.kind for row in conversion_report(eigen).plain}
    assert kinds == {"ConvTranspose3d"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["DenseNet121", "SegResNet"])
def test_monai_3d_networks(name) -> None:
    from monai.networks import nets

    torch.manual_seed(0)
    if name == "DenseNet121":
        model = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
    else:
        model = nets.SegResNet(spatial_dims=3, in_channels=1, out_channels=2)
    round_trip(model, _images(2, 1, 32, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "converted"),
    [
        ({}, {"in_proj_weight", "out_proj"}),
        ({"bias": False, "add_bias_kv": True}, {"in_proj_weight", "out_proj"}),
        (
            {"kdim": 12, "vdim": 20},
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"},
        ),
    ],
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(kwargs, converted, need_weights) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True, **kwargs)
    q = torch.randn(2, 5, 16)
    k = torch.randn(2, 7, kwargs.get("kdim", 16))
    v = torch.randn(2, 7, kwargs.get("vdim", 16))
    eigen = round_trip(model, q, k, v)
    assert {row.name for row in conversion_report(eigen).converted} == converted
    eigen.train()
    eigen(q, k, v, need_weights=need_weights)[0].square().sum().backward()
    assert all(p.grad is not None for p in eigen.parameters())


def test_attention_rebuilds_its_weight_once_a_call(monkeypatch) -> None:
    from enn_core import layers

    eigen = to_enn(nn.MultiheadAttention(16, 4))
    calls = []
    original = layers.rebuild
    monkeypatch.setattr(layers, "rebuild", lambda *f: calls.append(0) or original(*f))
    x = torch.randn(5, 2, 16)
    eigen(x, x, x)
    assert len(calls) == 2  # q, k, v at once, and the output
    assert eigen._bound is None


def test_transformer_encoder_fast_path() -> None:
    """torch's fused inference path reads the weights of its layers directly."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    eigen = round_trip(model, torch.randn(2, 5, 16))
    x = torch.randn(2, 5, 16)
    for other in (model, eigen):
        other.train()
        for module in other.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    torch.testing.assert_close(eigen(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_linear_layer_alone() -> None:
    eigen = to_enn(nn.Linear(5, 3))
    assert type(eigen) is ENNLinear
    assert type(fuse(eigen)) is nn.Linear
    assert conversion_report(eigen).converted[0].name == "Linear"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)
    eigen = to_enn(model)
    assert {p.dtype for p in eigen.parameters()} == {dtype}
    x = torch.randn(4, 32, dtype=dtype)
    expected = model(x)
    # Three rounded factors instead of one rounded weight.
    tolerance = (64 if dtype is torch.float64 else 8) * torch.finfo(dtype).eps
    for other in (eigen, fuse(eigen)):
        assert (other(x) - expected).abs().max() <= tolerance * expected.abs().max()


def test_modules_used_twice_stay_shared() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    eigen = to_enn(model)
    assert eigen[0] is eigen[2]
    fused = fuse(eigen)
    assert fused[0] is fused[2]
    assert list(fused.state_dict()) == list(model.state_dict())


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    eigen = round_trip(model, torch.randn(3, 4))
    assert all(getattr(eigen[0], n) is getattr(eigen[2], n) for n in ("Q", "Lambda", "P"))
    fused = fuse(eigen)
    assert fused[0].weight is fused[2].weight
    assert len(conversion_report(eigen).converted) == 2


def test_a_weight_tied_to_a_plain_module_stays_plain() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10), nn.Linear(10, 3))
    model[1].weight = model[0].weight
    eigen = to_enn(model)
    assert type(eigen[1]) is nn.Linear
    assert eigen[1].weight is eigen[0].weight
    reasons = {row.name: row.reason for row in conversion_report(eigen).plain}
    assert reasons == {"0": "no eigen twin", "1": "shared with 0"}


class _TwoMaps(nn.Module):
    """Bare projections beside other parameters, to watch their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4))
        self.proj = nn.Parameter(torch.randn(4, 6))
        self.middle = nn.Parameter(torch.randn(6))
        self.text_projection = nn.Parameter(torch.randn(6, 3))
        self.last = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + self.first) @ self.proj + self.middle) @ self.text_projection + self.last


def test_bare_projections_keep_their_place_and_can_be_picked() -> None:
    torch.manual_seed(0)
    model = _TwoMaps()
    eigen = round_trip(model, torch.randn(5, 4))
    assert eigen.proj.shape == (4, 6)
    assert isinstance(eigen, _TwoMaps)
    one = to_enn(model, include="proj")
    two = to_enn(one)  # a second conversion adds the other
    assert isinstance(one.text_projection, nn.Parameter)
    assert {row.name for row in conversion_report(two).converted} == {"proj", "text_projection"}
    assert list(fuse(two).state_dict()) == list(model.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(two(x), model(x))


def test_copies_and_pickles_of_converted_models() -> None:
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    for model, x in (
        (small, torch.randn(2, 3, 4, 4)),
        (_vit(32, 1, 2, 32, 16, 8), torch.randn(1, 3, 32, 32)),
    ):
        eigen = to_enn(model.eval())
        buffer = io.BytesIO()
        torch.save(eigen, buffer)
        buffer.seek(0)
        expected = _output(eigen, (x,))
        for other in (copy.deepcopy(eigen), torch.load(buffer, weights_only=False)):
            assert torch.equal(_output(other, (x,)), expected)
            assert list(fuse(other).state_dict()) == list(model.state_dict())


def test_hooks_flags_and_modes_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    calls = []
    model[1].register_forward_hook(lambda *a: calls.append(a))
    eigen = to_enn(model)
    assert not eigen[0].Q.requires_grad
    assert eigen[0].bias.requires_grad
    assert eigen[1].Q.requires_grad
    assert not eigen[1].training
    eigen(torch.randn(1, 4))
    assert len(calls) == 1
    fused = fuse(eigen)
    assert not fused[0].weight.requires_grad
    assert fused[1].weight.requires_grad


def test_in_place_conversion_keeps_the_objects() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    layer = model[0]
    assert to_enn(model, inplace=True) is model
    assert model[0] is layer
    assert isinstance(layer, ENNLinear)
    assert fuse(model, inplace=True) is model
    assert type(layer) is nn.Linear
    assert to_enn(to_enn(model))[0].Q.shape == (3, 3)  # converting twice changes nothing


def test_training_a_fused_model_equals_nothing_lost() -> None:
    torch.manual_seed(0)
    eigen = to_enn(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    optimizer = torch.optim.SGD(eigen.parameters(), lr=0.1)
    x, y = torch.randn(32, 6), torch.randn(32, 2)
    for _ in range(20):
        optimizer.zero_grad()
        (eigen(x) - y).square().mean().backward()
        optimizer.step()
    # The factors have drifted; fusing multiplies out what is there.
    torch.testing.assert_close(fuse(eigen)(x), eigen(x))


def test_include_and_exclude() -> None:
    model = nn.ModuleDict(
        {"image": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "text": nn.Linear(4, 4)}
    )

    def converted(**kwargs) -> list[str]:
        return [row.name for row in conversion_report(to_enn(model, **kwargs)).converted]

    assert converted(include="image") == ["image.0", "image.1"]
    assert converted(include=["*.1", "text"]) == ["image.1", "text"]
    assert converted(exclude="image.0") == ["image.1", "text"]
    assert converted(include="image", exclude="*.0") == ["image.1"]
    with pytest.raises(ConversionError, match=r"'visual' matches no weight.*image, text"):
        to_enn(model, include="visual")


def test_what_stays_plain_says_why() -> None:
    model = nn.ModuleDict(
        {
            "dw": nn.Conv2d(4, 8, 3, groups=4),
            "head": nn.Linear(4, 1),
            "up": nn.ConvTranspose2d(4, 4, 2),
            "lstm": nn.LSTM(4, 4),
            "embed": nn.Embedding(5, 4),
            "lazy": nn.LazyLinear(4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "norm": nn.LayerNorm(4),
            "skipped": nn.Linear(4, 4),
        }
    )
    eigen = to_enn(model, exclude="skipped")
    report = conversion_report(eigen)
    assert not report.converted
    reasons = {row.name: row.reason for row in report.plain}
    assert reasons["dw"] == "depthwise"
    assert reasons["head"] == "rank 1"
    assert reasons["up"] == "no eigen twin"
    assert reasons["embed"] == "no eigen twin"
    assert reasons["lazy"] == "not initialised yet"
    assert reasons["skipped"] == "not selected"
    assert reasons["lstm.weight_ih_l0"] == "not known to be a linear map"
    assert "norm" not in reasons
    table = str(report)
    assert "depthwise" in table
    assert table.endswith("fused")


def test_a_layer_whose_weight_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ConversionError, match=r"^1: the weight holds NaN"):
        to_enn(model)


def test_a_subclass_with_its_own_arithmetic_keeps_it() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
            return super()._conv_forward(input, weight, bias)

    class Doubled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Standardised(2, 4, 3), nn.Flatten(), Doubled(4 * 4, 3))
    eigen = to_enn(model)
    x = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(eigen(x), model(x))
    assert all(isinstance(eigen[i], EigenLayer) for i in (0, 2))
    torch.testing.assert_close(fuse(eigen)(x), model(x))


def test_converting_nothing_warns_and_what_was_is_logged(caplog) -> None:
    class Conv1D(nn.Module):  # as in transformers' GPT-2
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

    model = nn.Sequential(nn.Embedding(5, 4), Conv1D())
    with pytest.warns(UserWarning, match=r"none of the model's 2 weights \(in Conv1D, Embedding\)"):
        to_enn(model)
    with warnings.catch_warnings(), caplog.at_level("INFO", "enn_core.convert"):
        warnings.simplefilter("error")
        to_enn(nn.Sequential(model, nn.Linear(4, 4)))
        to_enn(nn.ReLU())
        to_enn(nn.Sequential(nn.Linear(4, 4)), exclude="0")
        to_enn(to_enn(nn.Linear(4, 4)))
    assert caplog.messages[0] == "to_enn converted 1 of 3 weights"
