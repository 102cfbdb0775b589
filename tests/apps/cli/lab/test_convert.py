"""`enn convert` and `enn fuse` on real networks, small ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from apps.cli.lab.architectures import build
from apps.cli.main import app
from enn_core import to_enn

ARCH = "timm:test_vit"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine cost more than these small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*args: str | Path) -> SimpleNamespace:
    result = CliRunner().invoke(app, [os.fspath(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def document(*args: str | Path) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def refused(*args: str | Path) -> str:
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.count("\n") == 1, done.err
    return done.err


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """plain.safetensors and its eigen form, of a small ViT."""
    folder = tmp_path_factory.mktemp("netze – ü")
    torch.manual_seed(0)
    save_file(build(ARCH).state_dict(), folder / "plain.safetensors")
    done = run("convert", folder / "plain.safetensors", folder / "enn.safetensors", "--arch", ARCH)
    assert done.code == 0, done.err
    assert "converted" in done.out
    return folder


def test_by_architecture_the_file_loads_into_the_converted_network(files):
    state = load_file(files / "enn.safetensors")
    model = to_enn(build(ARCH))
    model.load_state_dict(state, strict=True)
    plain = build(ARCH)
    plain.load_state_dict(load_file(files / "plain.safetensors"))
    image = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), plain(image), rtol=1e-5, atol=1e-5)


def test_what_is_written_may_be_read_by_others(files, tmp_path):
    fused = tmp_path / "p.safetensors"
    assert run("fuse", files / "enn.safetensors", fused).code == 0
    for file in (files / "enn.safetensors", fused):
        assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("how", ["nothing", "arch", "like"])
def test_fuse_goes_back(files, tmp_path, how):
    extra = {
        "nothing": [],
        "arch": ["--arch", ARCH],
        "like": ["--like", files / "plain.safetensors"],
    }
    done = document("fuse", files / "enn.safetensors", tmp_path / "p.safetensors", *extra[how])
    assert done["fused"] > 5
    plain = load_file(files / "plain.safetensors")
    same(load_file(tmp_path / "p.safetensors"), plain, 1e-6)
    assert sorted(os.listdir(tmp_path)) == ["p.safetensors"]


def test_like_an_eigen_file_gives_the_same_names(files, tmp_path):
    out = tmp_path / "again.safetensors"
    done = document(
        "convert", files / "plain.safetensors", out, "--like", files / "enn.safetensors"
    )
    assert done["largest_relative_difference"] < 1e-6
    one, other = load_file(out), load_file(files / "enn.safetensors")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    run("fuse", out, tmp_path / "plain.safetensors")
    same(load_file(tmp_path / "plain.safetensors"), load_file(files / "plain.safetensors"), 1e-6)


def _net() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Embedding(9, 8)
            self.conv = nn.Conv2d(3, 6, 3)
            self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
            self.volume = nn.Conv3d(2, 4, 3)
            self.attention = nn.MultiheadAttention(8, 2)
            self.proj = nn.Parameter(torch.randn(8, 5))
            self.table = nn.Parameter(torch.randn(7, 8))
            self.head = nn.Linear(8, 5)
            self.norm = nn.BatchNorm2d(6)

    torch.manual_seed(1)
    return Net()


def test_an_unknown_network_by_names_alone(tmp_path):
    state = _net().state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "n.pt")
    done = document("convert", tmp_path / "n.pt", tmp_path / "e.safetensors")
    rank = {row["name"]: row["rank"] for row in done["weights"]}
    assert {name: r for name, r in rank.items() if r} == {
        "conv": 6,
        "volume": 4,
        "attention.in_proj_weight": 8,
        "attention.out_proj": 8,
        "proj": 5,
        "head": 5,
    }
    eigen = load_file(tmp_path / "e.safetensors")
    assert eigen["attention.in_proj_weight_eigen.Q"].shape == (3, 8, 8)
    assert eigen["proj_eigen.Q"].shape == (5, 5)
    assert eigen["volume.P"].shape == (54, 4)
    # The names are those of enn_core, except for what a file cannot tell.
    assert set(eigen) == set(to_enn(_net()).state_dict())
    assert run("fuse", tmp_path / "e.safetensors", tmp_path / "p.safetensors").code == 0
    same(load_file(tmp_path / "p.safetensors"), state, 1e-6)


def test_patterns_select(tmp_path):
    save_file(_net().state_dict(), tmp_path / "n.safetensors")
    args = ["--include", "attention", "--include", "*ea*", "--exclude", "attention.out_proj"]
    done = document("convert", tmp_path / "n.safetensors", tmp_path / "e.safetensors", *args)
    found = {row["name"] for row in done["weights"] if row["rank"]}
    assert found == {"attention.in_proj_weight", "head"}
    wrong = ["--exclude", "haed", "--force"]
    assert "pattern 'haed' matches no tensor" in refused(
        "convert", tmp_path / "n.safetensors", tmp_path / "e.safetensors", *wrong
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_bit_for_bit(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _net().state_dict().items()}
    save_file(state, tmp_path / "n.safetensors")
    assert run("convert", tmp_path / "n.safetensors", tmp_path / "e.safetensors").code == 0
    assert run("fuse", tmp_path / "e.safetensors", tmp_path / "p.safetensors").code == 0
    same(load_file(tmp_path / "p.safetensors"), state, 1e-14 if dtype is torch.float64 else 0.0)


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"dir \xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    (folder / "n").mkdir()
    source = folder / os.fsdecode(b"n\xef.safetensors")
    save_file(_net().state_dict(), tmp_path / "n.safetensors")
    (tmp_path / "n.safetensors").rename(source)
    out = folder / "n" / os.fsdecode(b"e\xef.safetensors")
    done = run("convert", source, out)
    assert done.code == 0, done.err
    assert "e\\xef.safetensors" in done.out
    assert run("fuse", out, tmp_path / "p.safetensors").code == 0
    same(load_file(tmp_path / "p.safetensors"), _net().state_dict(), 1e-6)


def test_mistakes_are_told_in_one_line_and_write_nothing(files, tmp_path):
    plain, eigen = files / "plain.safetensors", files / "enn.safetensors"
    out, taken, bad = tmp_path / "o.safetensors", tmp_path / "t.safetensors", tmp_path / "bad.pt"
    taken.write_bytes(b"precious")
    bad.write_bytes(b"not a checkpoint")
    nan, short = tmp_path / "nan.safetensors", tmp_path / "short.safetensors"
    save_file({"a.weight": torch.full((3, 4), torch.nan)}, nan)
    save_file({"a.weight": torch.ones(3, 4)}, short)
    bare, half = tmp_path / "bare.safetensors", tmp_path / "half.safetensors"
    save_file(load_file(eigen), bare)
    save_file({"a.Q": torch.ones(3, 2), "a.Lambda": torch.ones(2)}, half)
    cases: list[tuple[list[str | Path], str]] = [
        (["convert", "no.pt", out], "there is no file 'no.pt'"),
        (["convert", plain, tmp_path / "o.pt"], "must end in .safetensors"),
        (["convert", plain, plain, "--force"], "is the input"),
        (["convert", plain, taken], "--force to overwrite"),
        (["convert", plain, tmp_path / "no" / "o.safetensors"], "there is no directory"),
        (["convert", bad, out], "bad.pt"),
        (["convert", eigen, out], "in eigen form already"),
        (["convert", nan, out], "a.weight: the weight holds NaN"),
        (["convert", plain, out, "--arch", "timm:test_vitt"], "did you mean test_vit"),
        (["convert", plain, out, "--arch", "vit"], "open_clip has no architecture 'vit'"),
        (["convert", plain, out, "--arch", "hub:x"], "unknown source 'hub'"),
        (["convert", plain, out, "--arch", "timm:test_resnet"], "missing: "),
        (["convert", plain, out, "--arch", ARCH, "--exclude", "x"], "matches no weight"),
        (["convert", plain, out, "--arch", ARCH, "--like", eigen], "exclude each other"),
        (["convert", plain, out, "--like", eigen, "--include", "x"], "leave --include"),
        (["convert", plain, out, "--like", short], "has no factored weights"),
        (["convert", short, out, "--like", eigen], "does not fit the file after --like"),
        (["fuse", plain, out], "has no factored weights"),
        (["fuse", bare, out], "give --arch NAME, or --like"),
        (["fuse", bare, out, "--like", short], "not in it: "),
        (["fuse", bare, out, "--arch", "timm:test_vit2"], "does not fit timm:test_vit2"),
        (["fuse", half, out], "not both Q and P"),
        (["fuse", eigen, taken], "--force to overwrite"),
    ]
    for args, expected in cases:
        assert expected in refused(*args)
    assert not out.exists()
    assert taken.read_bytes() == b"precious"
    assert run("fuse", eigen, taken, "--force").code == 0
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_torchvision_and_grouped_convolutions(tmp_path):
    model = build("torchvision:shufflenet_v2_x0_5")
    torch.save(model.state_dict(), tmp_path / "n.pth")
    args = ["--arch", "torchvision:shufflenet_v2_x0_5"]
    done = document("convert", tmp_path / "n.pth", tmp_path / "e.safetensors", *args)
    assert done["largest_relative_difference"] < 1e-5
    assert any(row["reason"] == "depthwise" for row in done["weights"])
    assert run("fuse", tmp_path / "e.safetensors", tmp_path / "p.safetensors", *args).code == 0
    same(load_file(tmp_path / "p.safetensors"), dict(model.state_dict()), 1e-5)


@pytest.mark.slow
def test_open_clip_with_both_towers(tmp_path):
    pytest.importorskip("open_clip")
    arch = "ViT-S-32-alt"
    torch.manual_seed(0)
    state = build(arch).half().state_dict()
    torch.save(state, tmp_path / "n.pt")
    done = document("convert", tmp_path / "n.pt", tmp_path / "e.safetensors", "--arch", arch)
    kinds = {row["name"] for row in done["weights"] if row["rank"]}
    assert {"visual.proj", "text_projection"} <= kinds
    assert run("fuse", tmp_path / "e.safetensors", tmp_path / "p.safetensors").code == 0
    same(load_file(tmp_path / "p.safetensors"), dict(state))
