"""Recall@K equals a brute-force oracle, whatever the ties, chunks and batches."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_cases import TinyTestModel, photo

from retrieval.datasets import CaptionDataset, load_karpathy
from retrieval.evaluate import (
    bootstrap_interval,
    embed_images,
    evaluate,
    retrieval_ranks,
    write_result,
)
from retrieval.images import ImageError


class Model(TinyTestModel):
    truncated_texts = 0


def oracle(scores: np.ndarray, owners: np.ndarray, k: int) -> tuple[float, float]:
    """Recall@K of (M captions x N images) scores by sorting everything: stable, so that of equal
    scores the earlier item comes first."""
    by_text = [owners[m] in np.argsort(-row, kind="stable")[:k] for m, row in enumerate(scores)]
    by_image = [
        any(owners[m] == n for m in np.argsort(-column, kind="stable")[:k])
        for n, column in enumerate(scores.T)
    ]
    return float(np.mean(by_text)), float(np.mean(by_image))


@st.composite
def cases(draw):
    """Captions, images, owners; few distinct values, so that many scores tie."""
    images = draw(st.integers(1, 9))
    extra = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, extra)]))
    if draw(st.booleans()):
        texts, stored = (rng.integers(-1, 2, (n, 3)) for n in (len(owners), images))
    else:
        texts, stored = (rng.normal(size=(n, 4)) for n in (len(owners), images))
    return texts.astype(np.float32), stored.astype(np.float32), owners


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 12), st.sampled_from([None, 1, 3]))
def test_recall_equals_the_oracle_under_ties(case, k, chunk):
    texts, images, owners = case
    to_image, to_text = retrieval_ranks(texts, images, owners, chunk=chunk)
    scores = texts.astype(np.float64) @ images.astype(np.float64).T
    expected = oracle(np.round(scores, 9), owners, k)
    assert (float(np.mean(to_image <= k)), float(np.mean(to_text <= k))) == expected


def test_a_collapsed_model_gets_no_credit():
    owners = np.repeat(np.arange(10), 5)
    same = np.ones((50, 4), np.float32)
    to_image, to_text = retrieval_ranks(same, same[:10], owners)
    assert np.mean(to_image <= 1) == 0.1
    assert np.mean(to_text <= 1) == 0.1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CaptionDataset:
    folder = tmp_path_factory.mktemp("photos ü")
    paths = tuple(photo(folder / f"{i}.png", i) for i in range(23))
    captions = tuple(f"caption {i % 40}" for i in range(46))  # some occur twice
    return CaptionDataset("tiny", "val", "test", paths, captions, np.repeat(np.arange(23), 2))


def test_the_result_depends_on_neither_batches_nor_threads(dataset):
    first = evaluate(Model(), dataset, bootstrap=20)
    for batch_size, workers in ((1, 1), (7, 3), (64, 2)):
        other = evaluate(Model(), dataset, batch_size=batch_size, workers=workers, bootstrap=20)
        assert other["metrics"] == first["metrics"]


def test_the_result_equals_the_oracle_and_says_how_it_came_about(dataset):
    model = Model()
    stages = []
    result = evaluate(
        model, dataset, (10, 1), bootstrap=50, progress=lambda *step: stages.append(step)
    )
    images = embed_images(model, dataset.images)
    scores = model.text_vectors(dataset.captions).astype(np.float64) @ images.T.astype(np.float64)
    for k in (1, 10):
        to_image, to_text = oracle(np.round(scores, 9), dataset.image_of_caption, k)
        assert result["metrics"][f"image_retrieval_recall@{k}"] == to_image
        assert result["metrics"][f"text_retrieval_recall@{k}"] == to_text
        low, high = (result["metrics"][f"text_retrieval_recall@{k}_{b}"] for b in ("low", "high"))
        assert 0 <= low <= to_text <= high <= 1
    assert result["weights_hash"] == model.weights_hash
    assert result["preprocess_hash"] == model.preprocess.hash
    assert (result["n_images"], result["n_captions"]) == (23, 46)
    assert "earlier item" in result["tie_rule"]
    assert {stage for stage, _, _ in stages} == {"images", "texts", "ranks"}
    assert all(done <= total for _, done, total in stages)
    assert stages[-1] == ("ranks", 69, 69)


def clip_benchmark_build(results: list[dict]) -> str:
    """What CLIP_benchmark's `build` makes of result files: one CSV row each."""
    rows = []
    for data in results:
        row = {**data["metrics"], **{k: v for k, v in data.items() if k != "metrics"}}
        row["model_fullname"] = f"{row['model']} {row['pretrained']}"
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_clip_benchmark_can_read_the_file(dataset, tmp_path):
    result = evaluate(Model(), dataset, bootstrap=5)
    write_result(result, tmp_path / "r.json")
    read = json.loads((tmp_path / "r.json").read_text())
    assert read == result
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]
    for key in ("dataset", "model", "pretrained", "task", "language"):
        assert isinstance(read[key], str)
    assert read["task"] == "zeroshot_retrieval"
    assert all(isinstance(value, float) for value in read["metrics"].values())
    assert not any(isinstance(v, dict | list) for k, v in read.items() if k != "metrics")
    table = list(csv.DictReader(io.StringIO(clip_benchmark_build([read]))))
    assert (
        float(table[0]["image_retrieval_recall@5"]) == read["metrics"]["image_retrieval_recall@5"]
    )


def test_an_unreadable_image_stops_the_evaluation_by_name(dataset, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        embed_images(Model(), (*dataset.images, bad), batch_size=4)


def test_wrong_arguments_are_refused(dataset):
    with pytest.raises(ValueError, match="recall_k"):
        evaluate(Model(), dataset, (0, 1))
    with pytest.raises(ValueError, match="batch_size"):
        embed_images(Model(), dataset.images, batch_size=0)


def test_intervals_draw_whole_images():
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(200), 5)
    independent = rng.random(1000) < 0.3
    repeated = np.repeat(rng.random(200) < 0.3, 5)
    narrow, wide = (np.diff(bootstrap_interval(h, owners))[0] for h in (independent, repeated))
    assert wide > 1.7 * narrow  # five equal answers are one observation
    assert bootstrap_interval(independent, owners) == bootstrap_interval(independent, owners)
    assert bootstrap_interval(independent, owners, samples=0) == (independent.mean(),) * 2


@pytest.mark.slow
def test_the_shipped_model_beats_the_probe_on_flickr8k():
    from retrieval.models import load

    data = Path(os.environ.get("ENN_DATA", "../shared/data")) / "flickr8k"
    if not data.is_dir():
        pytest.skip(f"Flickr8k is not in ENN_DATA ({data})")
    val = load_karpathy(data / "dataset_flickr8k.json", data / "images", "val")
    metrics = evaluate(load(), val)["metrics"]
    assert metrics["image_retrieval_recall@10_low"] > 0.56
    assert metrics["text_retrieval_recall@10_low"] > 0.60
