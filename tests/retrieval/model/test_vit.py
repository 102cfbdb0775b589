"""ViT towers beside MiniLM: stages, directories, and everything a loaded model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import retrieval
from enn_core import conversion_report, orthogonality_error, to_enn
from enn_core.files.digests import SEAL
from retrieval.eigen_coordinates import scores
from retrieval.model.checkpoints import ModelError
from retrieval.model.preprocess import Preprocess
from retrieval.model.text_towers import MiniLM
from retrieval.model.tower_folder import load_tower, save_vit
from retrieval.model.vit import VitTower, check_vision, cut_vision

TINY = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
PREPROCESS = {"size": [32, 32], "mode": "shortest", "interpolation": "bicubic"}
CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
TEXTS = ["a dog in the snow", "two red cars", "a"]


def make_tower(dim: int = 384, **vision) -> VitTower:
    torch.manual_seed(0)
    tower = VitTower({**TINY, **vision}, dim)
    tower.text_mean.uniform_(-0.02, 0.02)
    return tower.eval()


def pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, side, side)).astype(np.float32))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.model.runtime.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def directory(tmp_path) -> Path:
    folder = tmp_path / "my vit"
    save_vit(make_tower(), folder, {"preprocess": PREPROCESS, "training": {"epochs": 1}})
    return folder


# --- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stages_together_are_the_features(count, pool, eigen):
    tower = make_tower(pool_type=pool)
    if eigen:
        tower = to_enn(tower)
    x = pixels()
    with torch.no_grad():
        expected = tower.features(x)
        for stage in tower.stages(count):
            x = stage(x)
    assert torch.equal(x, expected)
    assert expected.shape == (2, 32)


@pytest.mark.parametrize("eigen", [False, True])
def test_stages_share_the_parameters_and_each_belongs_to_one(eigen):
    tower = to_enn(make_tower()) if eigen else make_tower()
    stages = tower.stages(2)
    owned = [id(p) for stage in stages for p in stage.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in tower.visual.parameters()}
    with torch.no_grad():
        for stage in stages:
            for parameter in stage.parameters():
                parameter.mul_(0.5)
        x = pixels()
        expected = tower.features(x)
        for stage in stages:
            x = stage(x)
    assert torch.equal(x, expected)


def test_no_gradient_crosses_a_detached_stage():
    first, last = make_tower().stages(2)
    last(first(pixels()).detach()).sum().backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in last.parameters())


@pytest.mark.parametrize("eigen", [False, True])
def test_a_clip_tower_is_cut_before_its_projection(eigen):
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=24, vision_cfg=TINY, quick_gelu=True,
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    ).eval()  # fmt: skip
    visual = to_enn(clip.visual) if eigen else clip.visual
    preprocess = Preprocess(size=(32, 32), **CLIP)
    x = pixels()
    mean, std = (torch.tensor(CLIP[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = clip.visual((x / 255 - mean) / std)
        stages = cut_vision(visual, 3, preprocess)
        for stage in stages:
            x = stage(x)
        torch.testing.assert_close(x @ visual.proj, expected, rtol=1e-4, atol=1e-5)
    own = {id(p) for stage in stages for p in stage.parameters()}
    left = {name for name, p in visual.named_parameters() if id(p) not in own}
    assert left == ({f"proj_eigen.{n}" for n in ("Q", "Lambda", "P")} if eigen else {"proj"})


def test_other_towers_and_counts_are_refused():
    tower = make_tower()
    for count in (0, 4):
        with pytest.raises(ValueError, match=r"1 to 3.*got " + str(count)):
            tower.stages(count)
    with pytest.raises(ValueError, match="got Linear"):
        cut_vision(torch.nn.Linear(2, 2), 1, Preprocess())


# --- the tower ---------------------------------------------------------------------------------


def test_the_text_map_starts_as_the_text_towers_own_geometry():
    tower = VitTower(TINY)
    text = torch.nn.functional.normalize(torch.randn(2, 384), dim=-1)
    torch.testing.assert_close(tower.adapt_text(text), text)
    assert not tower.text_proj.weight.requires_grad
    small = VitTower(TINY, dim=20)
    assert small(pixels()).shape == (2, 20)
    torch.testing.assert_close(small(pixels()).norm(dim=-1), torch.ones(2))


def test_the_size_of_a_vit_b16_is_the_default():
    assert check_vision({})["width"] == 768
    with torch.device("meta"):
        tower = VitTower({}, dim=512)
    count = sum(p.numel() for p in tower.visual.parameters())
    assert count == 85_799_424  # ViT-B/16 of CLIP without its projection


@pytest.mark.parametrize(
    ("vision", "says"),
    [
        ({"widht": 3}, "unknown vision widht; valid: image_size"),
        ({"width": 0}, r"width must be a whole number in 1..8192, got 0"),
        ({"layers": 10**9}, r"layers must be .*1..200"),
        ({"layers": True}, "layers must be"),
        ({"patch_size": 7}, "image_size 32 must be a multiple of patch_size 7"),
        ({"head_width": 24}, "width 32 must be a multiple of head_width 24"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be in"),
        ({"pool_type": "max"}, "'tok' or 'avg'"),
    ],
)
def test_bad_visions_are_explained(vision, says):
    with pytest.raises(ValueError, match=says):
        VitTower({**TINY, **vision})


# --- directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("dim", [384, 20])
def test_a_directory_is_a_model(tmp_path, runtime, dim):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    tower = make_tower(dim)
    save_vit(to_enn(tower), tmp_path / "m", {"preprocess": PREPROCESS})
    model = retrieval.load(tmp_path / "m", runtime=runtime)
    x = pixels(3)
    with torch.no_grad():
        z = tower(x)
        t = tower.adapt_text(torch.from_numpy(MiniLM().embed(TEXTS)))
    v0 = model.image_vectors(x.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    np.testing.assert_allclose(scores(model.text_vectors(TEXTS), v0), (t @ z.T).numpy(), atol=1e-5)
    assert model.runtime == runtime
    assert model.name == f"local-dir:{tmp_path / 'm'}"
    assert retrieval.load(model.name).fingerprint() == model.fingerprint()
    assert model.context_length == 248
    assert model.dim == min(dim, 32)
    eigen = model.image_tower
    assert conversion_report(eigen).converted
    assert max(orthogonality_error(eigen).values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(eigen(x), z, rtol=1e-4, atol=1e-5)


def test_what_is_saved_says_what_it_is(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["architecture"] == "vit-minilm"
    assert config["vision"] == check_vision(TINY)
    assert (config["dim"], config["text"], config["context_length"]) == (
        384, "all-MiniLM-L6-v2", 248,
    )  # fmt: skip
    assert config["training"] == {"epochs": 1}
    files = [directory / name for name in ("config.json", "model.safetensors")]
    assert len({file.stat().st_mode for file in files}) == 1  # others may read it too
    again = load_tower(directory)
    for name, value in make_tower().state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_heads_that_the_tensors_do_not_show_make_another_compiled_tower(directory):
    pytest.importorskip("openvino")
    x = pixels().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    first = retrieval.load(directory, runtime="openvino").image_vectors(x)
    config = json.loads((directory / "config.json").read_text())
    change(directory, vision={**config["vision"], "head_width": 32})
    changed = retrieval.load(directory, runtime="openvino").image_vectors(x)
    expected = retrieval.load(directory, runtime="torch").image_vectors(x)
    assert np.abs(first - expected).max() > 1e-4
    np.testing.assert_allclose(changed, expected, atol=1e-4)


def change(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[SEAL]
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"architecture": "vit-bert"}, "architecture 'vit-bert'; valid: long-eclip-mini, vit-mini"),
        ({"architecture": ["x"]}, "architecture"),
        ({"architecture": None}, "architecture None"),
        ({"vision": {**TINY, "width": 10**12}}, "width must be"),
        ({"vision": [3]}, "vision must be an object"),
        ({"dim": "x"}, "dim must be a whole number"),
        ({"text": "another"}, "text must be 'all-MiniLM-L6-v2', got 'another'"),
        ({"preprocess": {"size": 64}}, r"\(64, 64\), vision wants \(32, 32\)"),
        ({"preprocess": {"size": 32, "mean": [0.4, 0.4, 0.4]}}, "another mean or std"),
        ({"preprocess": 7}, "preprocess must be an object"),
        ({"preprocess": {"sise": 32}}, "unknown preprocessing sise"),
        ({"preprocess": {"size": "big"}}, "size must be"),
    ],
)
def test_bad_configurations_are_answered_in_one_line(directory, entries, says):
    change(directory, **entries)
    with pytest.raises(ModelError, match=says) as caught:
        retrieval.load(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_directory_of_another_network_is_not_taken_for_one(directory):
    (directory / "config.json").write_text('{"model_type": "bert", "hidden_size": 384}')
    with pytest.raises(ModelError, match=r"cannot read a model from .*valid: long-eclip-mini"):
        retrieval.load(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "{}", "\x00", "[" * 100_000])
def test_configurations_that_are_none(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        retrieval.load(directory)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:1000])
        return
    if kind == "less":
        del state["visual.ln_post.weight"]
    elif kind == "layers":
        state = {k: v for k, v in state.items() if "resblocks.2" not in k}
    elif kind == "no text":
        del state["text_mean"]
    elif kind == "text shape":
        state["text_mean"] = torch.zeros(3)
    elif kind == "nan":
        state["text_proj.weight"][0, 0] = float("nan")
    elif kind == "nan map":
        state["proj.weight"][0, 0] = float("nan")
    elif kind == "wide":
        state["proj.weight"] = torch.ones(384, 33)
    save_file(state, file)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut", "cannot read weights"),
        ("less", "does not fit config.json beside it.*ln_post.weight"),
        ("layers", "does not fit config.json"),
        ("no text", "lacks text_mean"),
        ("text shape", r"text_mean is \(3,\), expected \(384,\)"),
        ("nan", "text_proj.weight holds NaN"),
        ("nan map", "NaN or infinity"),
        ("wide", "does not fit config.json"),
    ],
)
def test_damaged_weights_are_answered_in_one_line(directory, kind, says):
    damaged(directory, kind)

    def use() -> None:
        model = retrieval.load(directory, runtime="torch")
        model.image_vectors(np.zeros((1, 32, 32, 3), np.uint8))

    with pytest.raises(ModelError, match=says) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_a_giant_configuration_takes_no_memory(directory):
    giant = {**TINY, "width": 8192, "head_width": 64, "layers": 200}
    change(directory, vision=giant)
    model = retrieval.load(directory, runtime="torch")
    with pytest.raises(ModelError, match="does not fit"):
        model.image_vectors(np.zeros((1, 32, 32, 3), np.uint8))


def test_missing_files_are_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no open_clip_config|config\.json"):
        retrieval.load(directory)
    shutil.rmtree(directory)
    with pytest.raises(ModelError, match=r"unknown model|not found"):
        retrieval.load(directory)


def test_photos_are_found_by_words_and_survive_a_save_of_the_model(directory, tmp_path):
    """Index and search with a trained directory, as `enn search index --model DIR` does."""
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{i}.png")
    model = retrieval.load(directory, runtime="torch")
    index = retrieval.EigenIndex.create(photos / ".enn-index", model)
    index.update(photos, model)
    index.close()
    with retrieval.open_index(photos / ".enn-index") as searcher:
        assert searcher.model.name == model.name
        assert len(searcher.search("a dog", k=4)) == 4


def test_a_changed_configuration_is_refused(directory):
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"epochs": 1', '"epochs": 3'))
    with pytest.raises(ValueError, match=r"config\.json is damaged.*if it was edited, delete its"):
        load_tower(directory)
