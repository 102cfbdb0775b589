"""Networks of the classifiers: shapes, seeds, cuts, eigen twins, plain checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import models

from enn_core import conversion_report, fuse, local_blocks, to_enn
from enn_core.lab.classify.config import ClassifyError
from enn_core.lab.classify.networks import NetworkError, build_network
from enn_core.lab.classify.weights import load_plain, own_names

SMALL = [
    ("mlp", (1, 8, 8)),
    ("mlp:5x32", (3, 32, 32)),
    ("mlp-relu", (1, 28, 28)),
    ("conv-small", (1, 8, 8)),
    ("conv-small", (1, 28, 28)),
    ("vit-tiny", (1, 8, 8)),
    ("vit-tiny", (3, 64, 64)),
    ("resnet-small", (1, 8, 8)),
    ("resnet-small", (3, 32, 32)),
]


@pytest.mark.parametrize(
    ("arch", "shape"),
    [*SMALL, pytest.param("resnet18", (1, 28, 28), marks=pytest.mark.slow)],
)
def test_a_network_takes_its_images_and_is_cut_into_four(arch, shape):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = build_network(arch, shape, 7, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = (build_network(arch, shape, 7, seed=seed) for seed in (1, 2))
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(same)
    changed = zip(model.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in changed)
    x = torch.rand(4, *shape)
    scores = model(x)
    assert tuple(scores.shape) == (4, 7)
    blocks = local_blocks(model, x, 4, outputs=7)
    assert len(blocks) == 4
    assert {id(p) for block in blocks for p in block.parameters()} >= set(
        map(id, model.parameters())
    )


def test_signals_keep_their_size_through_deep_nets():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    model = build_network("mlp:15", (1, 8, 8), 10, seed=0)
    weights = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert len(weights) == 15
    h = x
    for layer in model:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            assert 0.05 < float(h.detach().square().mean().sqrt()) < 3


def test_patches_of_the_tiny_vit():
    tokens = {
        side: build_network("vit-tiny", (1, side, side), 10)[0](torch.zeros(1, 1, side, side))
        for side in (8, 28, 32, 64)
    }
    assert {side: t.shape[1] for side, t in tokens.items()} == {8: 16, 28: 49, 32: 64, 64: 64}
    larger = build_network("vit-tiny:7", (1, 28, 28), 10)
    assert larger[0](torch.zeros(1, 1, 28, 28)).shape[1] == 16


@pytest.mark.parametrize(
    ("arch", "shape", "message"),
    [
        ("resnet51", (3, 32, 32), "give one of mlp"),
        ("mlp:one", (1, 8, 8), "mlp:DEPTHxWIDTH"),
        ("mlp:1", (1, 8, 8), "at least 2 weight layers"),
        ("vit-tiny", (1, 31, 31), "vit-tiny cannot cut images of 31 x 31 into"),
        (
            "vit-tiny:5",
            (1, 28, 28),
            "vit-tiny:PATCH with a patch of 2 or 4 or 7 or 14, or images of",
        ),
        ("vit-tiny:5", (1, 31, 31), "patches; give images of another size"),
        ("vit-tiny:wide", (1, 28, 28), "vit-tiny:wide cannot cut"),
        ("resnet-small", (1, 4, 4), "from 8 x 8 on"),
        ("timm:no_such_model", (3, 32, 32), "timm cannot build 'no_such_model'"),
        ("torchvision:no_such", (3, 32, 32), "torchvision cannot build 'no_such'"),
        ("torchvision:resnet18", (1, 28, 28), "images of 3 channels, these have 1"),
    ],
)
def test_networks_that_cannot_be(arch, shape, message):
    with pytest.raises(NetworkError, match=message) as caught:
        build_network(arch, shape, 10)
    assert "\n" not in str(caught.value)


def test_other_libraries_networks():
    x = torch.rand(2, 1, 32, 32)
    assert tuple(build_network("timm:resnet10t", (1, 32, 32), 5)(x).shape) == (2, 5)
    vit = build_network("timm:vit_tiny_patch16_224", (1, 32, 32), 5)
    assert tuple(vit(x).shape) == (2, 5)
    mobile = build_network("torchvision:mobilenet_v3_small", (3, 32, 32), 5).eval()
    assert tuple(mobile(x.expand(-1, 3, -1, -1)).shape) == (2, 5)


def test_resnets_have_torchvisions_names_and_a_stem_for_small_images():
    small, large = (build_network("resnet18", (3, side, side), 10) for side in (64, 65))
    theirs = models.resnet18(num_classes=10)
    assert list(large.state_dict()) == list(small.state_dict()) == list(theirs.state_dict())
    assert small.conv1.stride == (1, 1)
    large.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 65, 65)
    torch.testing.assert_close(large.eval()(x), theirs.eval()(x))
    assert build_network("resnet18", (1, 80, 80), 10).conv1.in_channels == 1


def check_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters of the eigen network, as stored and after fusing."""
    eigen = to_enn(model)
    report = conversion_report(eigen)
    assert report.parameters_stored == sum(p.numel() for p in eigen.parameters())
    fused = fuse(eigen)
    assert report.parameters_fused == sum(p.numel() for p in fused.parameters())
    assert report.parameters_fused == sum(p.numel() for p in model.parameters())
    assert {k: v.shape for k, v in fused.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    return report.parameters_stored, report.parameters_fused


@pytest.mark.parametrize("arch", ["mlp", "conv-small", "vit-tiny", "resnet-small"])
def test_fused_networks_have_the_plain_ones_parameters(arch):
    stored, fused = check_counts(build_network(arch, (1, 8, 8), 10))
    assert stored > fused


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("arch", "plain", "stored"),
    [  # plain: torchvision's own numbers
        ("resnet50", 25_557_032, 31_720_000),
        ("vit-b16", 86_567_656, 116_097_256),  # q, k and v packed: 130.27 M if apart
        ("resnet101", 44_549_160, 54_060_000),
        ("resnet152", 60_192_808, 72_470_000),
    ],
)
def test_parameters_of_the_published_networks(arch, plain, stored):
    found, fused = check_counts(build_network(arch, (3, 224, 224), 1000))
    assert fused == plain
    assert found == pytest.approx(stored, rel=2e-3)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped"])
def test_plain_checkpoints_load(tmp_path, kind):
    theirs = models.resnet18(num_classes=10)
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    state = theirs.state_dict()
    if kind == "safetensors":
        save_file(state, file)
    else:
        wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
        torch.save(wrapped if kind == "wrapped" else state, file)
    model = build_network("resnet18", (3, 80, 80), 10, seed=4)
    assert load_plain(model, file) == []
    x = torch.rand(2, 3, 80, 80)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x))


def test_a_head_of_other_classes_is_left_out(tmp_path):
    source, model = (build_network("resnet18", (3, 80, 80), n, seed=n) for n in (12, 5))
    before = model.fc.weight.detach().clone()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert load_plain(model, tmp_path / "w.pt") == ["fc.weight", "fc.bias"]
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = build_network("vit-tiny", (1, 8, 8), 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(state: object) -> str:
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(ClassifyError) as caught:
            load_plain(model, tmp_path / "w.pt")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    state = model.state_dict()
    assert "it lacks 0.patches.bias" in refused(
        {k: v for k, v in state.items() if k != "0.patches.bias"}
    )
    assert "it also has extra" in refused({**state, "extra": torch.zeros(1)})
    wider = build_network("vit-tiny", (3, 8, 8), 10).state_dict()
    assert "it differs in 0.patches.weight" in refused(wider)
    assert "`enn fuse`" in refused(to_enn(model).state_dict())
    assert "holds no state dict" in refused([1, 2])
    assert "cannot read the weights file" in refused({"w": F.relu})
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(ClassifyError, match="cannot read"):
        load_plain(model, tmp_path / "w.safetensors")
    with pytest.raises(ClassifyError, match="there is no weights file"):
        load_plain(model, tmp_path / "none.pt")


def test_names_of_parts_are_those_of_the_model():
    model = build_network("resnet-small", (1, 8, 8), 10)
    names = set(model.state_dict())
    blocks = local_blocks(model, torch.rand(2, 1, 8, 8), 4, outputs=10)
    parts = nn.Sequential(*(block.block for block in blocks), blocks[-1].head)
    own = own_names(parts.state_dict(), names)
    assert set(own) == names
    build_network("resnet-small", (1, 8, 8), 10, seed=9).load_state_dict(own)
    assert list(own_names({"a": torch.zeros(1)}, names)) == ["a"]
