"""Loading models: vectors equal open_clip's own, and every mistake has a one-line answer."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from enn_core import conversion_report
from retrieval.eigen_coordinates import scores
from retrieval.model import checkpoints
from retrieval.model.checkpoints import ModelError, read_tensors, weights_hash
from retrieval.model.clip_towers import OneToken, split_final_map
from retrieval.model.loading import MINI, list_models, load

TEXTS = ["a dog in the snow", "two red cars", "a", "eine Straße bei Nacht"]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {
    "enn-vit": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "enn-vit-quickgelu": {
        "image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8,
    },
    "enn-rn": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "enn-timm-linear": {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 64},
    "enn-timm-mlp": {"timm_model_name": "resnet10t", "timm_proj": "mlp", "image_size": 64},
    # SigLIP's shape: attention pooling inside the trunk, nothing linear behind it.
    "enn-timm-map": {
        "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none",
        "image_size": 224,
    },
}  # fmt: skip
EMBED = {"enn-timm-map": 192}
SPLIT = ("enn-vit", "enn-rn", "enn-timm-linear", "enn-timm-mlp")


@pytest.fixture(scope="module", autouse=True)
def _configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in VISION.items():
        config = {"embed_dim": EMBED.get(name, 24), "vision_cfg": vision, "text_cfg": TEXT}
        config["quick_gelu"] = name.endswith("quickgelu")
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.model.runtime.cache_dir", lambda: tmp_path / "cache")


def reference(name: str) -> nn.Module:
    """A random model, with batch norms that are not trivial."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def save(model: nn.Module, path) -> str:
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def photos(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(300, 200), (200, 301), (77, 64)][:n]
    return [
        Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)).resize((w, h))
        for w, h in sizes
    ]


def cosines_of_open_clip(model: nn.Module, name: str) -> np.ndarray:
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    with torch.no_grad():
        z = model.encode_image(torch.stack([transform(p) for p in photos()]), normalize=True)
        t = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    return (t @ z.T).numpy()


def check_against_open_clip(model, own: nn.Module, name: str) -> None:
    v0 = model.image_vectors(np.stack([model.preprocess(p) for p in photos()]))
    c = model.text_vectors(TEXTS)
    assert v0.dtype == c.dtype == np.float32
    assert v0.shape == (3, model.dim)
    np.testing.assert_allclose(np.linalg.norm(v0, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(scores(c, v0), cosines_of_open_clip(own, name), atol=1e-5)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("name", sorted(VISION))
@pytest.mark.filterwarnings("ignore:.*activation it was trained with")
def test_cosines_equal_open_clip(name, runtime, tmp_path):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    own = reference(name)
    model = load(name, checkpoint=save(own, tmp_path / "w.safetensors"), runtime=runtime)
    check_against_open_clip(model, own, name)
    assert model.runtime == runtime
    assert model.dim == (192 if name == "enn-timm-map" else 24)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("name", sorted(VISION))
@pytest.mark.filterwarnings("ignore:.*activation it was trained with")
def test_every_tower_runs_in_bf16(name, runtime, tmp_path):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    own = reference(name)
    file = save(own, tmp_path / "w.safetensors")
    exact, rounded = (
        load(name, checkpoint=file, runtime=runtime, precision=p) for p in ("f32", "bf16")
    )
    pixels = np.stack([exact.preprocess(p) for p in photos()])
    v, w = exact.image_vectors(pixels), rounded.image_vectors(pixels)
    assert rounded.runtime == runtime
    assert (v * w).sum(1).min() > 0.995
    np.testing.assert_array_equal(exact.image_vectors(pixels), v)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "EVA02-B-16"])
@pytest.mark.filterwarnings("ignore:.*activation it was trained with")
def test_cosines_equal_open_clip_at_full_size(name, tmp_path):
    own = reference(name)
    model = load(name, checkpoint=save(own, tmp_path / "w.pt"))
    check_against_open_clip(model, own, name)


@pytest.mark.parametrize("name", SPLIT)
def test_the_image_tower_is_eigen_and_has_the_same_outputs(name, tmp_path):
    own = reference(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(name, checkpoint=save(own, tmp_path / "w.safetensors"), runtime="torch")
    report = conversion_report(model.image_tower)
    assert report.converted
    pixels = torch.randn(2, 3, *model.preprocess.size)
    with torch.no_grad():
        expected, got = own.visual(pixels), model.image_tower(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert model.image_tower is model.image_tower


@pytest.mark.parametrize("name", sorted(VISION))
def test_splitting_leaves_the_tower_as_it_was(name):
    visual = reference(name).visual
    pixels = torch.randn(2, 3, *visual.image_size) if isinstance(
        visual.image_size, tuple
    ) else torch.randn(2, 3, visual.image_size, visual.image_size)  # fmt: skip
    before = list(visual.state_dict())
    with torch.no_grad():
        expected = visual(pixels)
        headless, basis = split_final_map(visual)
        x = headless(pixels).double().numpy()
        assert torch.equal(visual(pixels), expected)
    assert list(visual.state_dict()) == before
    if basis is None:
        assert name == "enn-timm-map"
        return
    if basis.has_bias:
        x = np.concatenate([x, np.ones((2, 1))], axis=1)
    rebuilt = x @ basis.P @ np.diag(basis.Lambda) @ basis.Q.T
    np.testing.assert_allclose(rebuilt, expected.numpy(), atol=1e-5)


def test_the_last_block_is_computed_for_the_token_that_is_read():
    visual = reference("enn-vit").visual
    headless, _ = split_final_map(visual)
    widths = []
    block = headless.transformer.resblocks[-1]
    hook = block.mlp.register_forward_hook(lambda _m, _i, out: widths.append(tuple(out.shape[:2])))
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    with torch.no_grad():
        headless(torch.randn(2, 3, size, size))
    hook.remove()
    assert widths == [(2, 1)]
    assert not isinstance(visual.transformer, OneToken)  # what is exported or trained is whole


def test_one_file_many_formats_one_hash(tmp_path):
    own = reference("enn-rn")
    tensors = {k: v.contiguous() for k, v in own.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "b.pt")
    hashes = {load(f"enn-rn:{tmp_path / f}").weights_hash for f in ("a.safetensors", "b.pt")}
    assert len(hashes) == 1
    changed = {**tensors, "logit_scale": tensors["logit_scale"] + 1}
    assert weights_hash(changed) not in hashes
    assert weights_hash(dict(reversed(tensors.items()))) == weights_hash(tensors)


def test_the_name_loads_the_same_model_again(tmp_path):
    file = save(reference("enn-rn"), tmp_path / "weights with spaces é.safetensors")
    first = load("enn-rn", checkpoint=file)
    again = load(first.name)
    assert again.fingerprint() == first.fingerprint()
    assert set(first.fingerprint()) == {"model", "weights", "preprocess", "dim", "precision"}
    json.dumps(first.fingerprint())


def local_directory(folder, weights: bool = True) -> str:
    config = {"embed_dim": 24, "vision_cfg": VISION["enn-vit"], "text_cfg": TEXT}
    pre = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "resize_mode": "squash"}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": pre})
    )
    if weights:
        save(reference("enn-vit"), folder / "open_clip_model.safetensors")
    return str(folder)


def test_a_local_directory_is_a_model(tmp_path):
    path = local_directory(tmp_path / "my model")
    model = load(path)
    assert model.preprocess.mode == "squash"
    assert model.preprocess.mean == (0.1, 0.2, 0.3)
    own = reference("enn-vit")
    own.visual.preprocess_cfg = open_clip.create_model(f"local-dir:{path}").visual.preprocess_cfg
    check_against_open_clip(model, own, "enn-vit")
    assert load(f"local-dir:{path}").name == model.name == f"local-dir:{path}"


def test_texts_are_remembered_counted_and_may_be_none(tmp_path, caplog):
    model = load("enn-rn", checkpoint=save(reference("enn-rn"), tmp_path / "w.pt"))
    assert model.text_vectors([]).shape == (0, 24)
    first = model.text_vectors(["a dog", "a cat", "a dog"])
    np.testing.assert_array_equal(first[0], first[2])
    model._text.encode = None  # any further call would fail
    np.testing.assert_array_equal(model.text_vectors(["a cat"])[0], first[1])
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        model.text_vectors("a dog")


def test_long_texts_are_cut_and_said_so(tmp_path, caplog):
    model = load("enn-rn", checkpoint=save(reference("enn-rn"), tmp_path / "w.pt"))
    long = "dog " * 100
    got = model.text_vectors([long, "cat"])
    assert model.truncated_texts == 1
    assert "1 of 2 texts longer than 77 tokens" in caplog.text
    np.testing.assert_allclose(got[0], model.text_vectors(["dog " * 200])[0], atol=1e-6)


def test_pixels_of_another_size_are_refused(tmp_path):
    model = load("enn-rn", checkpoint=save(reference("enn-rn"), tmp_path / "w.pt"))
    assert model.image_vectors(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, 24)
    for wrong in (np.zeros((1, 32, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)):
        with pytest.raises(ValueError, match=r"uint8 \(N, 64, 64, 3\)"):
            model.image_vectors(wrong)


class Payload:
    def __reduce__(self):
        return (print, ("code in weights was run",))


@pytest.fixture
def broken(tmp_path):
    """Files that are not weights of enn-rn, by name."""
    own = reference("enn-rn")
    state = {k: v.contiguous() for k, v in own.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "logit_scale"}, tmp_path / "less.safetensors")
    save_file({**state, "extra": torch.ones(1)}, tmp_path / "more.safetensors")
    save_file({**state, "ln_final.bias": torch.ones(3)}, tmp_path / "shape.safetensors")
    stretched = torch.ones(248, 32)
    save_file({**state, "positional_embedding": stretched}, tmp_path / "long.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"w": Payload()}))
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "w.onnx").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("less.safetensors", "does not fit enn-rn: missing logit_scale"),
        ("more.safetensors", "unexpected extra"),
        ("shape.safetensors", "other shape ln_final.bias"),
        ("long.safetensors", r"positional_embedding is \(248, 32\), the architecture has \(77, 32"),
        ("text.safetensors", "cannot read weights"),
        ("cut.pt", "cannot read weights|damaged"),
        ("code.pt", "pickled code"),
        ("list.pt", "expected a state_dict"),
        ("w.onnx", "valid: .safetensors"),
        ("missing.pt", "not found"),
    ],
)
def test_bad_files_are_named_with_the_reason(broken, file, message, capfd):
    with pytest.raises(ModelError, match=message) as caught:
        load("enn-rn", checkpoint=str(broken / file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "code in weights was run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B32"}, "did you mean.*ViT-B-32"),
        ({"name": "long-eclip-mni"}, "did you mean.*long-eclip-mini"),
        ({"name": "qqqqqqqqqqqq"}, "list_models"),
        ({"name": "ViT-B-32"}, "needs weights.*openai"),
        ({"name": "ViT-B-32:opneai"}, "did you mean.*openai"),
        ({"name": "ViT-B-32:no/such/file.pt"}, "not found"),
        ({"name": "ViT-B-32:openai", "checkpoint": "x.pt"}, "already names its weights"),
        ({"name": "hf-hub:a/b", "checkpoint": "x.pt"}, "brings its own weights"),
        ({"name": "local-dir:/no/such/dir"}, "directory not found"),
        ({"name": "long-eclip-mini", "checkpoint": "/no/such/dir"}, "config.json"),
        ({"name": "long-eclip-mini", "runtime": "tpu"}, "auto, openvino, torch"),
        ({"name": "long-eclip-mini", "precision": "int8"}, "f32, bf16"),
        ({"name": "long-eclip-mini", "runtime": "openvino", "device": "cuda"}, "NVIDIA|CUDA|CPU"),
    ],
)
def test_wrong_names_are_answered_in_one_line(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        load(**arguments)
    assert "\n" not in str(caught.value)


def test_directories_without_config_or_weights_are_refused(tmp_path):
    # open_clip itself would go on with random weights.
    with pytest.raises(ModelError, match="has no weights"):
        load(local_directory(tmp_path / "bare", weights=False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no open_clip_config"):
        load(str(tmp_path / "empty"))


def test_a_folder_called_like_an_architecture_is_not_taken_for_a_model(tmp_path, monkeypatch):
    (tmp_path / "RN50").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="RN50 needs weights"):
        load("RN50")
    with pytest.raises(ModelError, match="unknown model ''"):
        load("")
    local_directory(tmp_path / "mine")
    assert load("mine").name == f"local-dir:{tmp_path / 'mine'}"


@pytest.mark.parametrize("name", ["ViT-B-32:openai", "hf-hub:no-such-org/no-such-model"])
def test_an_unreachable_hub_is_named(name, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # real retries take half a minute
    with pytest.raises(ModelError, match=r"hub cannot be reached.*local weights"):
        load(name)


def test_a_local_file_for_a_name_with_a_quickgelu_twin_is_remarked_on(tmp_path):
    file = save(reference("enn-vit"), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="load them as enn-vit-quickgelu"):
        load("enn-vit", checkpoint=file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("enn-vit-quickgelu", checkpoint=file)


MINI_WEIGHTS = Path(__file__).parents[3] / "retrieval" / "weights" / MINI


@pytest.fixture(scope="module")
def mini_photos() -> np.ndarray:
    rng = np.random.default_rng(2)
    small = rng.integers(0, 256, (5, 7, 7, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(s).resize((224, 224))) for s in small])


def test_the_shipped_model_equals_its_network(mini_photos):
    """Vectors and coordinates give the cosines of the plain network, by either runtime."""
    from retrieval.model.text_towers import MiniLM
    from retrieval.model.tower_folder import load_mini

    model = load()
    tower = load_mini(MINI_WEIGHTS)
    with torch.no_grad():
        z = tower(torch.from_numpy(mini_photos).permute(0, 3, 1, 2).float())
        t = tower.adapt_text(torch.from_numpy(MiniLM().embed(TEXTS)))
    got = scores(model.text_vectors(TEXTS), model.image_vectors(mini_photos))
    np.testing.assert_allclose(got, (t @ z.T).numpy(), atol=1e-5)
    plain = load(runtime="torch").image_vectors(mini_photos)
    np.testing.assert_allclose(model.image_vectors(mini_photos), plain, atol=1e-4)
    assert model.name == "long-eclip-mini"
    assert model.context_length == 248
    assert model.dim == model.basis.dim <= tower.proj.out_features


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_bf16_turns_vectors_little_and_texts_not_at_all(runtime, mini_photos):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    exact, rounded = (load(runtime=runtime, precision=p) for p in ("f32", "bf16"))
    v, w = (model.image_vectors(mini_photos) for model in (exact, rounded))
    assert (v * w).sum(1).min() > 0.99
    np.testing.assert_array_equal(exact.text_vectors(TEXTS), rounded.text_vectors(TEXTS))
    assert rounded.fingerprint() == {**exact.fingerprint(), "precision": "bf16"}


def test_the_shipped_image_tower_is_eigen(mini_photos):
    model = load(runtime="torch")
    assert conversion_report(model.image_tower).converted
    with torch.no_grad():
        z = model.image_tower(torch.from_numpy(mini_photos).permute(0, 3, 1, 2).float()).numpy()
    v0 = model.image_vectors(mini_photos)
    np.testing.assert_allclose(v0 @ v0.T, z @ z.T, atol=1e-4)


def test_a_directory_of_the_mini_is_a_model(tmp_path, mini_photos):

    own = tmp_path / "my mini"
    shutil.copytree(MINI_WEIGHTS, own)
    model, shipped = load(own), load()
    assert model.weights_hash == shipped.weights_hash
    assert model.name == f"local-dir:{own}"
    assert load(model.name).fingerprint() == model.fingerprint()
    assert load(checkpoint=own).weights_hash == shipped.weights_hash
    state = read_tensors(own / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "text_mean"}, own / "model.safetensors")
    with pytest.raises(ModelError, match=r"cannot read long-eclip-mini .*text_mean"):
        load(own)
    save_file({k: v for k, v in state.items() if "conv_stem" not in k}, own / "model.safetensors")
    with pytest.raises(ModelError, match=r"cannot read long-eclip-mini .*does not fit"):
        load(own).image_vectors(mini_photos)


def test_models_are_listed_as_they_are_loaded():
    names = list_models()
    assert names[0] == "long-eclip-mini"
    assert "ViT-B-32:openai" in names


def test_weights_of_any_type_and_shape_have_a_hash(tmp_path):
    odd = {
        "a": torch.tensor(1),
        "b": torch.ones(2, 3).T,
        "c": torch.ones(0),
        "d": torch.ones(2).half(),
    }
    assert len(weights_hash(odd)) == 64
    save_file({k: v.contiguous() for k, v in odd.items()}, tmp_path / "a.safetensors")
    assert weights_hash(read_tensors(tmp_path / "a.safetensors")) == weights_hash(odd)


def test_near_matches_are_offered():
    assert checkpoints.suggest("vit-b-16", ["ViT-B-16", "RN50"]) == "; did you mean ViT-B-16?"
    assert checkpoints.suggest("zzz", ["ViT-B-16"]) == ""
