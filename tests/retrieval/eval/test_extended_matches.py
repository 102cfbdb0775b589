"""ECCV Caption and CxC: their package gets the right lists under the right numbers."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieval.datasets.captioned import CaptionDataset
from retrieval.eval.extended_matches import extended_matches
from retrieval.eval.ranks import retrieval_ranks

eccv_caption = pytest.importorskip(
    "eccv_caption", reason="pip install eccv_caption (the extra [dev] has it)"
)


@pytest.fixture(scope="module")
def coco() -> tuple[CaptionDataset, np.ndarray, np.ndarray]:
    """COCO's test by the package's own numbers, with vectors that are right now and then."""
    pairs = sorted(eccv_caption.Metrics().coco_gts["i2t"].items())
    owners = np.repeat(np.arange(len(pairs)), [len(own) for _, own in pairs])
    dataset = CaptionDataset(
        "mscoco_captions", "test", "karpathy",
        images=tuple(Path(str(number)) for number, _ in pairs),
        captions=tuple(str(number) for _, own in pairs for number in own),
        image_of_caption=owners,
        image_ids=tuple(number for number, _ in pairs),
        caption_ids=tuple(number for _, own in pairs for number in own),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(pairs), 8)).astype(np.float32)
    texts = images[owners] + 0.3 * rng.normal(size=(len(owners), 8)).astype(np.float32)
    return dataset, texts, images


@pytest.mark.slow
def test_against_the_whole_lists(coco, monkeypatch):
    """Its own metrics on complete sorted lists of every query, computed the plain way."""
    dataset, texts, images = coco
    found, told = extended_matches(dataset, texts, images, (1, 5))
    assert "eccv_caption" in told
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    ids = np.array(dataset.image_ids), np.array(dataset.caption_ids)
    to_image = ids[0][np.argsort(-scores, axis=1)[:, :60]].tolist()
    to_text = ids[1][np.argsort(-scores.T, axis=1)[:, :60]].tolist()
    lists = {
        "t2i": dict(zip(dataset.caption_ids, to_image, strict=True)),
        "i2t": dict(zip(dataset.image_ids, to_text, strict=True)),
    }
    theirs = eccv_caption.Metrics()
    eccv = theirs.eccv_metrics(lists, "all")
    for way, name in (("t2i", "image_retrieval"), ("i2t", "text_retrieval")):
        for k in (1, 5):
            expected = theirs.cxc_recalls(lists, "all", K=k)[way]
            assert found[f"{name}_cxc_recall@{k}"] == pytest.approx(expected)
        for key, ours in (("map_at_r", "map@r"), ("rprecision", "rprecision"), ("r1", "recall@1")):
            assert found[f"{name}_eccv_{ours}"] == pytest.approx(eccv[f"eccv_{key}"][way])
    assert len(found) == 10
    # The plain recalls agree with the package's, which knows the same pairs.
    ranks = retrieval_ranks(texts, images, dataset.image_of_caption)
    plain = theirs.coco_5k_recalls(lists, "all", K=5)
    assert np.mean(ranks[0] <= 5) == pytest.approx(plain["t2i"])
    assert np.mean(ranks[1] <= 5) == pytest.approx(plain["i2t"])


def test_where_it_does_not_apply(coco, monkeypatch):
    dataset, texts, images = coco
    part = dataset.limited(100)
    found, told = extended_matches(part, texts[:500], images[:100], (1,))
    assert found == {}
    assert "not the whole" in told
    assert extended_matches(replace(part, image_ids=()), texts[:500], images[:100], (1,))[1] == ""
    real = builtins.__import__

    def without(name: str, *args: object, **options: object):
        if name == "eccv_caption":
            raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install eccv_caption" in extended_matches(dataset, texts, images, (1,))[1]
