"""Published SFCN files, made here with their key names."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from neuro.age.networks import BrainNet, build
from neuro.age.published_weights import (
    CheckpointError,
    load_sfcn,
    map_sfcn,
    published_names,
    read_tensors,
    start_from_,
)


@pytest.fixture(scope="module")
def trained() -> BrainNet:
    """An SFCN with weights and statistics of its own."""
    torch.manual_seed(3)
    net = build("sfcn", outputs=40, layers="plain")
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) / 9
            )
    return net.eval()


def keras_names(net: BrainNet, prefix: str = "sfcn-reg") -> dict[str, torch.Tensor]:
    """The same tensors as pyment's h5 files hold them."""
    words = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    tensors = {}
    for name, value in published_names(net).items():
        if name.endswith("num_batches_tracked"):
            continue
        _, part, block, *rest = name.split(".")
        if part == "classifier" or block == "conv_6":
            key = "kernel" if rest[-1] == "weight" else "bias"
            name = f"{prefix}_predictions/{prefix}_predictions/{key}:0"
            value = value.flatten(1).T if key == "kernel" else value
        else:
            index, layer = int(block.removeprefix("conv_")), rest[0]
            place = "top" if index == 5 else f"block-{index}"
            if layer == "0":
                owner, key = f"{prefix}_{place}_conv", "kernel" if rest[1] == "weight" else "bias"
                value = value.permute(2, 3, 4, 1, 0) if key == "kernel" else value
            else:
                owner = f"{prefix}_{place}_norm"
                key = words.get(rest[1], {"weight": "gamma", "bias": "beta"}.get(rest[1], ""))
            name = f"{owner}/{owner}/{key}:0"
        tensors[name] = value.contiguous()
    return tensors


def same_answers(net: BrainNet, other: BrainNet) -> bool:
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        return torch.allclose(net(x)[-1], other(x)[-1], atol=1e-5)


@pytest.mark.parametrize("module", [True, False])
def test_peng_s_files_load(trained, tmp_path, module):
    tensors = published_names(trained)
    assert "module.feature_extractor.conv_0.0.weight" in tensors
    assert tensors["module.classifier.conv_6.weight"].shape == (40, 64, 1, 1, 1)
    if not module:
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    # The published files are of 2019, before torch wrote zip files.
    torch.save(tensors, tmp_path / "run_20190719.p", _use_new_zipfile_serialization=False)
    assert same_answers(load_sfcn(tmp_path / "run_20190719.p"), trained)


def test_nested_state_dicts_load(trained, tmp_path):
    torch.save({"epoch": 3, "state_dict": published_names(trained)}, tmp_path / "a.pt")
    assert same_answers(load_sfcn(tmp_path / "a.pt"), trained)


@pytest.mark.parametrize("repeated", [True, False])
def test_pyment_s_names_load(trained, tmp_path, repeated):
    tensors = keras_names(trained)
    if not repeated:
        tensors = {name.split("/", 1)[1]: value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "pyment.safetensors")
    net = load_sfcn(tmp_path / "pyment.safetensors")
    assert net.blocks[0].block.norm.eps == 1e-3
    ours = trained.state_dict()
    for name, value in map_sfcn(tensors).items():
        assert torch.equal(value, ours[name]), name


def test_published_weights_become_eigen_layers(trained, tmp_path):
    torch.save(published_names(trained), tmp_path / "a.p")
    net = load_sfcn(tmp_path / "a.p", layers="enn")
    assert "blocks.0.block.conv.Lambda" in net.state_dict()
    assert same_answers(net, trained)


@pytest.mark.parametrize("layers", ["plain", "enn"])
def test_a_network_starts_from_published_blocks(trained, tmp_path, layers):
    save_file(keras_names(trained), tmp_path / "pyment.safetensors")
    net = build("sfcn", outputs=1, layers=layers)
    heads = [unit.head for unit in net.blocks]
    start_from_(net, tmp_path / "pyment.safetensors")
    assert [unit.head for unit in net.blocks] == heads
    again = build(**net.settings)
    again.load_state_dict(net.state_dict())
    assert same_answers(again.eval(), net.eval())
    x = torch.rand(1, 1, 32, 32, 32)
    known = load_sfcn(tmp_path / "pyment.safetensors")
    with torch.no_grad():
        for unit, one in zip(again.blocks, known.blocks, strict=True):
            expected = one.block(x)
            torch.testing.assert_close(unit.block(x), expected, atol=1e-4, rtol=1e-4)
            x = expected
    with pytest.raises(CheckpointError, match="choose the architecture sfcn"):
        start_from_(build("yin2023"), tmp_path / "pyment.safetensors")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    (tmp_path / "a.p").write_bytes(pickle.dumps({"module.x": Evil()}))
    torch.save({"module.x": Evil()}, tmp_path / "b.p")
    for name in ("a.p", "b.p"):
        with pytest.raises(CheckpointError, match="tensors alone") as caught:
            load_sfcn(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_mismatches_are_named(trained, tmp_path):
    whole = published_names(trained)
    path = tmp_path / "a.p"

    def refused(tensors, message: str) -> None:
        torch.save(tensors, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_sfcn(path)
        assert "\n" not in str(caught.value)

    missing = {k: v for k, v in whole.items() if "conv_2.0.weight" not in k}
    refused(missing, r"lacks blocks\.2\.block\.conv\.weight")
    wrong = {**whole, "module.feature_extractor.conv_1.0.weight": torch.zeros(64, 1, 3, 3, 3)}
    refused(wrong, r"blocks\.1\.block\.conv\.weight has shape \(64, 1, 3, 3, 3\)")
    refused({**whole, "module.layer4.weight": torch.zeros(1)}, "of another network")
    refused({"module.feature_extractor.conv_0.0.bias": torch.zeros(32)}, "has no last layer")
    refused({}, "holds no state dict")
    refused({"a": 3}, "other things than tensors")
    twice = {**whole, "feature_extractor.conv_0.0.bias": torch.zeros(32)}
    refused(twice, "there twice")


def test_damaged_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match="no intact safetensors"):
        read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_tensors(tmp_path / "b.p")
