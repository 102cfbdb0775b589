"""Checkpoints of every published layout give the features of open_clip and of transformers."""

from __future__ import annotations

import json
import shutil
import warnings

import clip_cases as cases
import numpy as np
import open_clip
import pytest
import torch

from enn_core import ENNLinear, conversion_report
from retrieval.eigen_coordinates import scores
from retrieval.model.architecture import find_architecture, list_architectures
from retrieval.model.checkpoints import ModelError, load_open_clip, read_clip
from retrieval.model.clip_layouts import read_layout, stretch_positions
from retrieval.model.loading import list_models, load

TEXTS = ["a dog", "two red cars at night", "word " * 60, "many more words " * 60, "dog " * 400]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.model.runtime.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("ENN_ARCHITECTURES", str(tmp_path / "architectures"))
    cases.write_architecture(tmp_path / "architectures" / "tiny-248.json", cases.tiny())
    cases.write_architecture(tmp_path / "architectures" / "tiny-77.json", cases.tiny(77))
    gelu = cases.tiny(quick_gelu=False)
    cases.write_architecture(tmp_path / "architectures" / "tiny-gelu.json", gelu)


def pixels(size: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(cases.MEAN_STD[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def features_of_open_clip(network, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = open_clip.SimpleTokenizer(context_length=network.context_length)(TEXTS)
    with torch.no_grad():
        z = network.encode_image(normalised(images), normalize=True)
        return z.numpy(), network.encode_text(tokens, normalize=True).numpy()


def features_of_transformers(config: dict, state, images) -> tuple[np.ndarray, np.ndarray]:
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(**cases.transformers_config(config))).eval()
    model.load_state_dict(cases.transformers(state))
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    with torch.no_grad():
        z = model.get_image_features(normalised(images)).pooler_output
        t = model.get_text_features(tokenizer(TEXTS)).pooler_output
    unit = torch.nn.functional.normalize
    return unit(z, dim=-1).numpy(), unit(t, dim=-1).numpy()


@pytest.fixture(scope="module")
def tiny():
    """The network that most checkpoints here are of: its tensors, and its features elsewhere."""
    network = cases.network(cases.tiny())
    state = cases.plain_state(network)
    images = pixels(32)
    theirs = features_of_transformers(cases.tiny(), state, images)
    return state, features_of_open_clip(network, images), theirs


def check_features(model, images: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    z, t = expected
    np.testing.assert_allclose(model._text.encode(TEXTS), t, atol=1e-4)
    with torch.no_grad():
        own = torch.nn.functional.normalize(model.image_tower(normalised(images)), dim=-1)
    np.testing.assert_allclose(own.numpy(), z, atol=1e-4)
    got = scores(model.text_vectors(TEXTS), model.image_vectors(images))
    np.testing.assert_allclose(got, t @ z.T, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
def test_features_equal_open_clip_and_transformers(layout, suffix, tiny, tmp_path):
    state, of_open_clip, of_transformers = tiny
    file = cases.save(cases.LAYOUTS[layout](state), tmp_path / f"weights{suffix}")
    model = load("tiny-248", checkpoint=file, runtime="torch")
    check_features(model, pixels(32), of_open_clip)
    check_features(model, pixels(32), of_transformers)
    assert model.context_length == 248
    assert model.name == f"tiny-248:{file}"
    assert load(model.name, runtime="torch").fingerprint() == model.fingerprint()


def test_one_network_has_one_hash_whatever_the_layout(tiny, tmp_path):
    state = tiny[0]
    hashes = {
        load("tiny-248", checkpoint=cases.save(make(state), tmp_path / f"{name}.pt")).weights_hash
        for name, make in cases.LAYOUTS.items()
        if not name.startswith("enn")
    }
    assert len(hashes) == 1


def test_the_image_tower_is_eigen_and_the_text_tower_is_not(tiny, tmp_path):
    state = tiny[0]
    model = load("tiny-248", checkpoint=cases.save(cases.long_clip(state), tmp_path / "w.pt"))
    report = conversion_report(model.image_tower)
    names = {row.name for row in report.converted}
    assert {"conv1", "proj", "transformer.resblocks.1.attn.in_proj_weight"} <= names
    assert len(names) == 2 + 4 * 2  # patches, projection; packed q/k/v, output and MLP per layer
    assert not any(isinstance(module, ENNLinear) for module in model.clip.model.modules())
    assert not any(value.requires_grad for value in model.clip.model.parameters())


def test_half_precision_files_are_read_in_float32(tmp_path):
    state = cases.plain_state(cases.network(cases.tiny()))
    half = {k: v.half() if v.ndim else v for k, v in cases.long_clip(state).items()}
    model = load("tiny-248", checkpoint=cases.save(half, tmp_path / "half.pt"), runtime="torch")
    assert {value.dtype for value in model.clip.model.parameters()} == {torch.float32}
    network = cases.network(cases.tiny())
    network.load_state_dict({k: v.half().float() if v.ndim else v for k, v in state.items()})
    check_features(model, pixels(32), features_of_open_clip(network, pixels(32)))


def test_wrappers_of_training_are_taken_off(tiny, tmp_path):
    state = tiny[0]
    wrapped = {f"module.{key}": value for key, value in cases.long_clip(state).items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "train.pt")
    plain = cases.save(state, tmp_path / "plain.safetensors")
    hashes = [
        load("tiny-248", checkpoint=file).weights_hash for file in (tmp_path / "train.pt", plain)
    ]
    assert hashes[0] == hashes[1]


def test_the_stretch_is_long_clips():
    table = torch.randn(77, 8)
    torch.testing.assert_close(stretch_positions(table), cases.start_of_long_clip(table))
    assert stretch_positions(table).shape == (248, 8)


def test_rows_come_from_the_table_that_long_clip_reads_them_from():
    state = cases.plain_state(cases.network(cases.tiny()))
    given = cases.long_clip(state)
    read = read_layout(given)
    assert read.layout == "long-clip"
    assert read.context_length == 248
    torch.testing.assert_close(read.tensors["positional_embedding"], state["positional_embedding"])
    assert "positional_embedding_res" in given  # what was passed in stays as it was


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


def broken(kind: str, state: dict) -> dict:
    """Checkpoints of tiny-248 with one thing wrong."""
    long = cases.long_clip(state)
    hugging = cases.transformers(state)
    eigen = cases.enn(state)
    short = {**state, "positional_embedding": torch.randn(77, 32)}
    half = long["positional_embedding"].half()
    block, image = "visual.transformer.resblocks.0.", "vision_model.encoder."
    factors = ("Q", "Lambda", "P")
    return {
        "res dropped": lambda: without(long, "positional_embedding_res"),
        "res dropped, half": lambda: {**state, "positional_embedding": half},
        "only res": lambda: without(long, "positional_embedding"),
        "short res": lambda: {**long, "positional_embedding_res": torch.ones(77, 32)},
        "77 tokens": lambda: short,
        "77 tokens, openai": lambda: cases.openai(short),
        "77 tokens, transformers": lambda: cases.transformers(short),
        "no projection": lambda: without(long, "visual.proj"),
        "image only": lambda: {k: v for k, v in hugging.items() if not k.startswith("text_model")},
        "a layer less": lambda: without(hugging, *(k for k in hugging if f"{image}layers.1" in k)),
        "no k": lambda: without(hugging, "vision_model.encoder.layers.1.self_attn.k_proj.weight"),
        "no P": lambda: without(eigen, f"{block}mlp.c_fc.P"),
        "no v factors": lambda: without(eigen, *(f"{block}attn.v_proj.{n}" for n in factors)),
        "other rank": lambda: {**eigen, f"{block}mlp.c_fc.Lambda": torch.ones(3)},
        "nan": lambda: {**state, "ln_final.bias": torch.full((32,), torch.nan)},
        "larger image": lambda: {**state, "visual.positional_embedding": torch.ones(26, 128)},
    }[kind]()  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("res dropped", "positional_embedding_res is missing.*starts from"),
        ("res dropped, half", "positional_embedding_res is missing"),
        ("only res", "positional_embedding with its first 20 rows is missing"),
        ("short res", r"\(248, 32\) and positional_embedding_res \(77, 32\)"),
        ("77 tokens", "reads 77 tokens of text, 248 were asked for: name an architecture of 77"),
        ("77 tokens, openai", "reads 77 tokens of text, 248 were asked for"),
        ("77 tokens, transformers", "reads 77 tokens of text, 248 were asked for"),
        ("no projection", "does not fit tiny-248: missing visual.proj"),
        ("image only", r"no text tower \(text_model"),
        ("a layer less", "missing visual.transformer.resblocks.1.* and 9 more"),
        ("no k", "no whole CLIPModel: missing .*layers.1.self_attn.k_proj.weight"),
        ("no P", "c_fc has Lambda, but P is missing"),
        ("no v factors", "v_proj.weight is missing"),
        ("other rank", r"c_fc do not fit each other.*Lambda \(3,\)"),
        ("nan", "ln_final.bias holds NaN or infinity"),
        ("larger image", r"visual.positional_embedding is \(26, 128\).*image size"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(kind, message, tiny, tmp_path):
    file = cases.save(broken(kind, tiny[0]), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load("tiny-248", checkpoint=file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("w.safetensors")


def test_a_long_file_is_refused_where_77_tokens_are_asked_for(tiny, tmp_path):
    state = tiny[0]
    for name, make in cases.LAYOUTS.items():
        file = cases.save(make(state), tmp_path / f"{name}.pt")
        with pytest.raises(ModelError, match="reads 248 tokens of text, 77 were asked for"):
            load("tiny-77", checkpoint=file)


def test_quick_gelu_is_read_from_the_layout(tmp_path):
    state = cases.plain_state(cases.network(cases.tiny()))
    for make, origin in ((cases.openai, "OpenAI's"), (cases.long_clip, "Long-CLIP")):
        file = cases.save(make(state), tmp_path / "w.pt")
        with pytest.raises(ModelError, match=rf"trained with QuickGELU.*{origin}.*uses GELU"):
            load("tiny-gelu", checkpoint=file)
    file = cases.save(state, tmp_path / "plain.pt")  # does not say: the architecture does
    network = cases.network(cases.tiny(quick_gelu=False))
    model = load("tiny-gelu", checkpoint=file, runtime="torch")
    check_features(model, pixels(32), features_of_open_clip(network, pixels(32)))


def write_transformers(folder, config: dict, state, preprocessor: dict | None = None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cases.transformers_config(config)))
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    cases.save(cases.transformers(state), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_directory_of_transformers_is_a_model(quick_gelu, tmp_path):
    config = cases.tiny(quick_gelu=quick_gelu)
    network = cases.network(config)
    state = cases.plain_state(network)
    pre = {
        "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}, "resample": 3,
        "image_mean": cases.MEAN_STD["mean"], "image_std": cases.MEAN_STD["std"],
    }  # fmt: skip
    folder = write_transformers(tmp_path / "hugging", config, state, pre)
    model = load(folder, runtime="torch")
    check_features(model, pixels(32), features_of_open_clip(network, pixels(32)))
    check_features(model, pixels(32), features_of_transformers(config, state, pixels(32)))
    assert model.name == f"local-dir:{folder}"
    assert load(model.name).fingerprint() == model.fingerprint()
    # The config beside the file decides here too.
    fitting, other = ("tiny-248", "tiny-gelu") if quick_gelu else ("tiny-gelu", "tiny-248")
    assert load(fitting, checkpoint=folder).weights_hash == model.weights_hash
    with pytest.raises(ModelError, match=r"config\.json beside it"):
        load(other, checkpoint=folder / "model.safetensors")


def test_what_transformers_saves_is_read(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(**cases.transformers_config(cases.tiny()))).eval()
    theirs.save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", runtime="torch")
    with torch.no_grad():
        tokens = open_clip.SimpleTokenizer(context_length=248)(TEXTS)
        t = torch.nn.functional.normalize(theirs.get_text_features(tokens).pooler_output, dim=-1)
    np.testing.assert_allclose(model._text.encode(TEXTS), t.numpy(), atol=1e-4)


def test_a_directory_of_open_clip_is_not_stretched(tmp_path):
    folder = tmp_path / "model"
    cases.write_architecture(folder / "open_clip_config.json", cases.tiny())
    short = cases.plain_state(cases.network(cases.tiny(77)))
    cases.save(short, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match="reads 77 tokens of text, 248 were asked for"):
        load(folder)
    state = cases.plain_state(cases.network(cases.tiny()))
    cases.save(cases.long_clip(state), folder / "open_clip_model.safetensors")
    network = cases.network(cases.tiny())
    expected = features_of_open_clip(network, pixels(32))
    check_features(load(folder, runtime="torch"), pixels(32), expected)


@pytest.fixture
def tagged(tmp_path):
    """open_clip's registries with an architecture of GELU and a tag of QuickGELU."""
    file = cases.save(
        cases.plain_state(cases.network(cases.tiny(77))), tmp_path / "open_clip_tag.safetensors"
    )
    config = tmp_path / "enn-tagged.json"
    config.write_text(json.dumps(cases.tiny(77, quick_gelu=False)))
    open_clip.add_model_config(config)
    registry = open_clip.pretrained._PRETRAINED
    registry["enn-tagged"] = {"quick": {"file": str(file), "quick_gelu": True}}
    yield "enn-tagged:quick"
    del registry["enn-tagged"]
    open_clip.factory._MODEL_CONFIGS.pop("enn-tagged")


def test_a_tag_says_itself_whether_it_wants_quick_gelu(tagged, recwarn):
    network = cases.network(cases.tiny(77))
    model = load(tagged, runtime="torch")
    check_features(model, pixels(32), features_of_open_clip(network, pixels(32)))
    assert not [w for w in recwarn if "QuickGELU" in str(w.message)]
    assert load_open_clip(tagged, None, "cpu").config["quick_gelu"] is True


def test_open_clip_names_take_every_layout(tagged, tmp_path):
    network = cases.network(cases.tiny(77, quick_gelu=False))
    state = cases.plain_state(network)
    expected = features_of_open_clip(network, pixels(32))
    for make in (dict, cases.transformers, cases.enn, cases.enn_transformers):
        file = cases.save(make(state), tmp_path / "w.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_features(
                load("enn-tagged", checkpoint=file, runtime="torch"), pixels(32), expected
            )
    with pytest.raises(ModelError, match="trained with QuickGELU"):
        load("enn-tagged", checkpoint=cases.save(cases.openai(state), tmp_path / "o.pt"))


def test_architectures_are_data(tmp_path):
    assert list_architectures()[:2] == ["long-eclip-b16", "long-eclip-l14"]
    assert list_models()[:3] == ["long-eclip-mini", "long-eclip-b16", "long-eclip-l14"]
    assert "tiny-248" in list_models()
    for name, width, embed in (("long-eclip-b16", 768, 512), ("long-eclip-l14", 1024, 768)):
        found = find_architecture(name)
        assert found.quick_gelu
        assert found.context_length == 248
        assert found.model["embed_dim"] == embed
        assert found.model["vision_cfg"]["width"] == width
        # The same network as open_clip's, but for the length of texts.
        theirs = open_clip.get_model_config(
            {"b16": "ViT-B-16-quickgelu", "l14": "ViT-L-14-quickgelu"}[name[-3:]]
        )
        theirs["text_cfg"]["context_length"] = 248
        assert found.model == theirs
    elsewhere = tmp_path / "else where" / "mine.json"
    cases.write_architecture(elsewhere, cases.tiny())
    state = cases.plain_state(cases.network(cases.tiny()))
    file = cases.save(state, tmp_path / "w.pt")
    model = load(str(elsewhere), checkpoint=file)
    assert model.name == f"{elsewhere}:{file}"
    assert load(model.name).fingerprint() == model.fingerprint()
    # open_clip's bare model files are architectures too.
    bare = tmp_path / "architectures" / "bare.json"
    bare.write_text(json.dumps(cases.tiny()))
    assert load("bare", checkpoint=file).weights_hash == model.weights_hash


@pytest.mark.parametrize(
    "vision", [None, {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}]
)
def test_a_network_that_was_not_initialised_equals_one_that_was(vision, tmp_path):
    """Every tensor that the network reads is in its state dict, but for the mask."""
    config = cases.tiny() if vision is None else {**cases.tiny(77), "vision_cfg": vision}
    cases.write_architecture(tmp_path / "architectures" / "some.json", config)
    found = find_architecture("some")
    plain, empty = cases.network(config), found.build(initialise=False)
    outside = {name for name, _ in plain.named_buffers()} - plain.state_dict().keys()
    assert outside == {"attn_mask"}
    assert torch.equal(plain.attn_mask, empty.attn_mask)
    empty.load_state_dict(plain.state_dict())
    images = pixels(config["vision_cfg"]["image_size"])
    expected, got = features_of_open_clip(plain, images), features_of_open_clip(empty, images)
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "JSON object"),
        ("{}", "lacks embed_dim, vision_cfg, text_cfg"),
        ({"vision_cfg": 3}, "must be objects"),
        ({"text_cfg": {"hf_model_name": "bert"}}, "another text tower"),
        ({"text_cfg": {"vocab_size": 32000}}, "vocab_size 32000"),
        ({"colour": 1}, "cannot be built.*colour"),
        ({"vision_cfg": {"wide": 1}}, "cannot be built.*wide"),
    ],
)
def test_bad_architectures_are_named(content, message, tmp_path):
    file = tmp_path / "architectures" / "bad.json"
    text = content if isinstance(content, str) else json.dumps({**cases.tiny(), **content})
    file.write_text(text)
    weights = cases.save({"a": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=message) as caught:
        load("bad", checkpoint=weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "long-eclip-b16"}, "needs weights.*248 tokens.*long-eclip-b16:FILE"),
        ({"name": "long-eclip-b61"}, "did you mean long-eclip-b16"),
        ({"name": "long-eclip-b16:no.pt"}, "weights file not found"),
        ({"name": "long-eclip-b16:a.pt", "checkpoint": "b.pt"}, "already names its weights"),
        ({"name": "no/such.json", "checkpoint": "b.pt"}, "architecture file not found"),
    ],
)
def test_wrong_names_are_answered_in_one_line(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        load(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["long-clip", "enn-long-clip", "transformers"])
def test_a_full_size_checkpoint(layout, tmp_path):
    """Long-CLIP's ViT-B/16: 303 keys with the published shapes."""
    config = dict(find_architecture("long-eclip-b16").model)
    network = cases.network(config)
    state = cases.plain_state(network)
    given = cases.LAYOUTS[layout](state)
    if layout == "long-clip":
        assert len(given) == 303
        assert given["positional_embedding_res"].shape == (248, 512)
        assert given["visual.proj"].shape == (768, 512)
    file = cases.save(given, tmp_path / "longclip-B.pt")
    assert read_clip(file).layout == layout.removeprefix("enn-")
    model = load("long-eclip-b16", checkpoint=file, runtime="torch")
    images = pixels(224, 2)
    z, t = features_of_open_clip(network, images)
    np.testing.assert_allclose(model._text.encode(TEXTS), t, atol=1e-4)
    got = scores(model.text_vectors(TEXTS), model.image_vectors(images))
    np.testing.assert_allclose(got, t @ z.T, atol=1e-4)
    if layout == "long-clip":
        hugging = features_of_transformers(config, state, images)
        np.testing.assert_allclose(got, hugging[1] @ hugging[0].T, atol=1e-4)
        assert model.dim == 512


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into the hub's local cache; the hub itself is unreachable."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # real retries take half a minute

    def publish(folder, repository: str) -> str:
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))
        return f"hf-hub:{repository}"

    return publish


def test_hub_ids_of_both_kinds_are_models(hub, tmp_path):
    network = cases.network(cases.tiny())
    state = cases.plain_state(network)
    pre = {"crop_size": 32, "image_mean": [0.5, 0.5, 0.5]}
    hugging = hub(write_transformers(tmp_path / "h", cases.tiny(), state, pre), "org/hugging")
    folder = tmp_path / "model"
    cases.write_architecture(folder / "open_clip_config.json", cases.tiny())
    cases.save(state, folder / "open_clip_model.safetensors")
    theirs = hub(folder, "org/open-clip")
    for name in (hugging, theirs):
        model = load(name, runtime="torch")
        assert model.name == name
        assert load(model.name).fingerprint() == model.fingerprint()
        np.testing.assert_allclose(
            model._text.encode(TEXTS), features_of_open_clip(network, pixels(32))[1], atol=1e-4
        )
    assert load(hugging).weights_hash == load(theirs).weights_hash
    assert load(hugging).preprocess.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load("hf-hub:org/other")
    with pytest.raises(ModelError, match="brings its own weights"):
        load(hugging, checkpoint="w.pt")
