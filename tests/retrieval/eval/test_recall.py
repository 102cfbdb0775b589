"""An evaluation: its numbers, its JSON, and that it can be stopped."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel, photo
from ranking_cases import brute_recall, exact_scores

from retrieval.datasets.captioned import CaptionDataset, DatasetError, load_karpathy
from retrieval.eval import recall as evaluation
from retrieval.eval.feature_cache import FeatureCache
from retrieval.eval.recall import embed_images, evaluate, measure, write_result
from retrieval.images import ImageError


class Model(TinyTestModel):
    truncated_texts = 0


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
    scores = exact_scores(model.text_vectors(dataset.captions), images)
    for k in (1, 10):
        to_image, to_text = brute_recall(scores, dataset.image_of_caption, k)
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
    assert stages[-1] == ("ranks", 23 * 46, 23 * 46)


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


def test_a_stopped_run_goes_on_to_the_same_digits(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_IMAGE_CHUNK", 8)
    monkeypatch.setattr(evaluation, "_TEXT_CHUNK", 8)
    whole = measure(Model(), dataset, batch_size=5, bootstrap=20)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "texts" and done >= 16:
            raise KeyboardInterrupt

    first, folder = Model(), tmp_path / "new" / "vectors"
    with pytest.raises(KeyboardInterrupt):
        measure(first, dataset, batch_size=5, progress=stop, cache=FeatureCache(folder, first))
    again = Model()
    cache = FeatureCache(folder, again)
    resumed = measure(again, dataset, batch_size=5, bootstrap=20, cache=cache)
    assert again.images == 0
    assert resumed.result["images_from_cache"] == 23
    assert resumed.result["metrics"] == whole.result["metrics"]
    assert np.array_equal(resumed.images, whole.images)
    assert np.array_equal(resumed.texts, whole.texts)
    assert len(list(folder.iterdir())) == 3 + 5
    cache.drop()
    assert not folder.exists()


def test_kept_vectors_of_other_content_are_not_taken(dataset, tmp_path):
    model = Model()
    measure(model, dataset, bootstrap=0, cache=FeatureCache(tmp_path, model))
    other = Model(seed=1)
    assert FeatureCache(tmp_path, other).find_images(dataset.images) is None
    same = FeatureCache(tmp_path, model)
    assert same.find_images(dataset.images) is not None
    assert same.find_images(dataset.images[::-1]) is None
    path = dataset.images[3]
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert same.find_images(dataset.images) is None
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-7])  # cut by a crash
    with pytest.warns(UserWarning, match="is damaged; its vectors are computed again"):
        assert same.find_images(dataset.images) is None
    with pytest.warns(UserWarning, match="is damaged"):
        assert measure(model, dataset, bootstrap=0, cache=same).result["images_from_cache"] == 23
    assert same.find_images(dataset.images) is not None
    for file in tmp_path.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert same.find_images(dataset.images) is None


def test_vectors_that_cannot_be_kept_stop_nothing(dataset, tmp_path):
    model = Model()
    (tmp_path / "file").touch()
    cache = FeatureCache(tmp_path / "file" / "below", model)
    with pytest.warns(UserWarning, match="not kept"):
        measure(model, dataset, bootstrap=0, cache=cache)


class Cutting(Model):
    """Reads 8 characters of a text."""

    def text_vectors(self, texts) -> np.ndarray:
        self.truncated_texts += sum(len(text) > 8 for text in texts)
        return super().text_vectors([text[:8] for text in texts])


def test_long_captions_are_counted_or_refused_as_the_protocol_says(dataset, tmp_path):
    model = Cutting()
    cache = FeatureCache(tmp_path, model)
    distinct = len(set(dataset.captions))
    for _ in range(2):  # the second time from the cache
        result = measure(model, dataset, bootstrap=0, cache=cache).result
        assert result["n_captions_truncated"] == distinct
    with pytest.raises(DatasetError, match="longer than the 8 tokens"):
        measure(model, replace(dataset, refuse_long=True), bootstrap=0)


def test_wrong_arguments_are_refused(dataset):
    with pytest.raises(ValueError, match="recall_k"):
        evaluate(Model(), dataset, (0, 1))
    with pytest.raises(ValueError, match="batch_size"):
        embed_images(Model(), dataset.images, batch_size=0)


@pytest.mark.slow
def test_the_shipped_model_beats_the_probe_on_flickr8k():
    from retrieval.model.loading import load

    data = Path(os.environ.get("ENN_DATA", "../shared/data")) / "flickr8k"
    if not data.is_dir():
        pytest.skip(f"Flickr8k is not in ENN_DATA ({data})")
    val = load_karpathy(data / "dataset_flickr8k.json", data / "images", "val")
    metrics = evaluate(load(), val)["metrics"]
    assert metrics["image_retrieval_recall@10_low"] > 0.56
    assert metrics["text_retrieval_recall@10_low"] > 0.60
