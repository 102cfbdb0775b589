"""Exported files give the same vectors in open_clip, transformers and onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import os

import clip_cases as cases
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from retrieval.model.checkpoints import ModelError
from retrieval.model.export import FORMS, export
from retrieval.model.loading import load
from retrieval.model.retrieval_model import RetrievalModel

TEXTS = ["a dog", "Zwei rote Autos, naïve café!", "word " * 100, "dog " * 400]
MISSING = [
    name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.model.runtime.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("ENN_ARCHITECTURES", str(tmp_path / "architectures"))


def load_tiny(folder, make=cases.long_clip, **options) -> RetrievalModel:
    """A model from a generated checkpoint, by default of Long-CLIP's layout."""
    config = cases.tiny(**options)
    cases.write_architecture(folder / "architectures" / "tiny.json", config)
    state = cases.plain_state(cases.network(config))
    return load("tiny", checkpoint=cases.save(make(state), folder / "w.pt"), runtime="torch")


def photo(seed: int = 0) -> Image.Image:
    # An even excess: transformers and torchvision round half a pixel of crop differently.
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)).resize((80, 48))


def own_features(model: RetrievalModel) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in the shared space, of one photo and of TEXTS."""
    v0 = model.image_vectors(np.array(model.preprocess(photo()))[None])
    return (v0 @ model.basis.Q.T).astype(np.float32), model._text.encode(TEXTS)


def test_open_clip_reads_its_form(tmp_path):
    model = load_tiny(tmp_path, make=lambda state: cases.enn(cases.long_clip(state)))
    folder = export(model, tmp_path / "out" / "open clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        z = theirs.eval().encode_image(transform(photo())[None], normalize=True).numpy()
        t = theirs.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    own = own_features(model)
    np.testing.assert_allclose(own[0], z, atol=1e-4)
    np.testing.assert_allclose(own[1], t, atol=1e-4)
    assert load(folder).weights_hash == model.weights_hash
    assert load(folder).preprocess == model.preprocess
    assert load(folder).context_length == 248


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_transformers_reads_its_form(quick_gelu, tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = load_tiny(tmp_path, make=dict, quick_gelu=quick_gelu)
    folder = export(model, tmp_path / "hugging", "transformers")
    theirs, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = open_clip.SimpleTokenizer(context_length=248)(TEXTS)
    for row, wanted in zip(tokens["input_ids"], expected, strict=True):
        length = int(wanted.argmax()) + 1
        assert row[:length].tolist() == wanted[:length].tolist()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = processor(photo(), return_tensors="pt")
    with torch.no_grad():
        z = theirs.eval().get_image_features(**images).pooler_output
        t = theirs.get_text_features(**tokens).pooler_output
    own = own_features(model)
    unit = torch.nn.functional.normalize
    np.testing.assert_allclose(own[0], unit(z, dim=-1).numpy(), atol=1e-4)
    np.testing.assert_allclose(own[1], unit(t, dim=-1).numpy(), atol=1e-4)
    assert load(folder).weights_hash == model.weights_hash
    assert load(folder).preprocess == model.preprocess


@needs_onnx
def test_onnxruntime_runs_its_form(tmp_path):
    import onnxruntime

    model = load_tiny(tmp_path)
    folder = export(model, tmp_path / "onnx", "onnx")
    own = own_features(model)
    image = onnxruntime.InferenceSession(folder / "image.onnx")
    (z,) = image.run(["image_embeds"], {"pixels": model.preprocess(photo())[None]})
    np.testing.assert_allclose(own[0], z, atol=1e-4)
    text = onnxruntime.InferenceSession(folder / "text.onnx")
    tokens = open_clip.SimpleTokenizer(context_length=248)(TEXTS).numpy()
    (t,) = text.run(["text_embeds"], {"tokens": tokens})
    np.testing.assert_allclose(own[1], t, atol=1e-4)
    (first,) = text.run(["text_embeds"], {"tokens": tokens[:1, :4]})
    np.testing.assert_allclose(own[1][:1], first, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert config["context_length"] == 248
    assert config["preprocess"]["size"] == [32, 32]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ModelError, match=r"needs onnx: pip install 'eigen-suite\[onnx\]'"):
        export(load_tiny(tmp_path), tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = load_tiny(tmp_path)
    with pytest.raises(ModelError, match="unknown form 'tf'; valid: open_clip, transformers, onnx"):
        export(model, tmp_path / "out", "tf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    with pytest.raises(ModelError, match="holds files already"):
        export(model, tmp_path / "full")
    with pytest.raises(ModelError, match="is a file"):
        export(model, tmp_path / "full" / "photo.jpg")
    assert os.listdir(tmp_path / "full") == ["photo.jpg"]
    model.clip = None
    with pytest.raises(ModelError, match="no CLIP network"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "vision",
    [
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 64},
    ],
)
def test_other_image_towers_have_no_transformers_form(vision, tmp_path):
    config = {**cases.tiny(77), "vision_cfg": vision}
    cases.write_architecture(tmp_path / "architectures" / "other.json", config)
    state = cases.plain_state(open_clip.CLIP(**config))
    model = load("other", checkpoint=cases.save(state, tmp_path / "w.pt"), runtime="torch")
    with pytest.raises(ModelError, match="no CLIPModel"):
        export(model, tmp_path / "out", "transformers")
    assert [path.name for path in tmp_path.iterdir() if "export" in path.name] == []
    assert load(export(model, tmp_path / "out")).weights_hash == model.weights_hash


def test_forms_are_listed():
    assert list(FORMS) == ["open_clip", "transformers", "onnx"]


@needs_onnx
@pytest.mark.slow
def test_the_full_size_towers_run_in_onnxruntime(tmp_path):
    """ViT-B/16 with 248 tokens; `export` itself compares both towers with torch."""
    from retrieval.model.architecture import find_architecture

    state = cases.plain_state(cases.network(dict(find_architecture("long-eclip-b16").model)))
    file = cases.save(cases.long_clip(state), tmp_path / "w.safetensors")
    folder = export(load("long-eclip-b16", checkpoint=file), tmp_path / "onnx", "onnx")
    assert (folder / "image.onnx").is_file()
