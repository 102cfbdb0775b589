"""File names from templates, every query's rank, and the sheet of failures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_cases import TinyTestModel, photo
from PIL import Image

from retrieval.datasets.captioned import CaptionDataset
from retrieval.eval.contact_sheet import write_contact_sheet
from retrieval.eval.recall import Evaluation, measure
from retrieval.eval.report import ReportError, output_path, write_ranks


class Model(TinyTestModel):
    truncated_texts = 0


def measured(folder: Path, *, right: bool = False) -> Evaluation:
    """Twelve photos with two captions each, some awkward; with `right`, all answers are right."""
    names = [f"{i}.png" for i in range(12)]
    names[3] = os.fsdecode(b"na\xefve\n.png")
    try:
        paths = tuple(photo(folder / name, i) for i, name in enumerate(names))
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    captions = [f"caption {i}" for i in range(24)]
    captions[0] = "word " * 300 + "\x07\n日本語 " + "x" * 500
    owners = np.repeat(np.arange(12), 2)
    dataset = CaptionDataset("tiny", "val", "own", paths, tuple(captions), owners)
    result = measure(Model(), dataset, bootstrap=0)
    if right:
        ones = np.ones(24, dtype=np.int64), np.ones(12, dtype=np.int64)
        return Evaluation(result.result, dataset, result.texts, result.images, *ones)
    return result


def name(template: str, **changes: str) -> str:
    given = {"dataset": "coco", "model": "ViT-B-32:laion2b", "pretrained": None}
    given |= {"protocol": "karpathy", "split": "test"} | changes
    return os.fspath(output_path(template, **given))


def test_names():
    assert name("{dataset}_{model}_{protocol}.json") == "coco_ViT-B-32_karpathy.json"
    assert name("r/{pretrained}-{split}-{task}-{language}.json") == (
        "r/laion2b-test-zeroshot_retrieval-en.json"
    )
    plain = {"model": "ViT-B-32", "pretrained": "/data/weights/my b.safetensors"}
    assert name("{model}_{pretrained}", **plain) == "ViT-B-32_my_b.safetensors"
    assert name("{model}", model="hf-hub:org/name") == "hf-hub_org_name"
    assert name("{model}_{pretrained}", model="local-dir:/models/mine") == "mine_own"
    assert name("{model}", model="./runs/mine/") == "mine"
    assert name("{dataset}-{protocol}", dataset="wds/x", protocol="own, all captions") == (
        "wds_x-own"
    )
    assert name("{{x}}.json") == "{x}.json"


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_name_leads_elsewhere(dataset, model):
    made = output_path(
        "out/{dataset}_{model}.json",
        dataset=dataset, model=model, pretrained=None, protocol="own", split="all",
    )  # fmt: skip
    assert made.parent == Path("out")
    assert ".." not in made.parts


@pytest.mark.parametrize("template", ["{x}", "{}", "{0}", "{dataset!r}", "{dataset:>9}", "{", "}"])
def test_templates_that_are_refused(template):
    with pytest.raises(ReportError, match=r"valid.*\{dataset\}") as caught:
        name(template)
    assert "\n" not in str(caught.value)


def test_every_query_is_in_the_table(tmp_path):
    evaluation = measured(tmp_path / "p")
    write_ranks(evaluation, tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    rows = table.to_pylist()
    assert [row["rank"] for row in rows[:24]] == evaluation.to_image.tolist()
    assert [row["rank"] for row in rows[24:]] == evaluation.to_text.tolist()
    assert [row["query"] for row in rows] == [*range(24), *range(12)]
    for row in rows[:24]:
        cosine = evaluation.texts[row["query"]] @ evaluation.images[row["query"] // 2]
        assert row["score"] == pytest.approx(cosine, abs=1e-6)
    for n, row in enumerate(rows[24:]):
        assert row["score"] == max(rows[2 * n]["score"], rows[2 * n + 1]["score"])
    about = json.loads(table.schema.metadata[b"evaluation"])
    assert about["weights_hash"] == evaluation.result["weights_hash"]
    for k in (1, 5, 10):
        share = np.mean([row["rank"] <= k for row in rows[:24]])
        assert share == evaluation.result["metrics"][f"image_retrieval_recall@{k}"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_sheet_shows_the_worst(tmp_path, suffix):
    evaluation = measured(tmp_path / "p")
    write_contact_sheet(evaluation, tmp_path / f"s{suffix}", count=3)
    with Image.open(tmp_path / f"s{suffix}") as sheet:
        assert sheet.width == 5 * 208 + 8
        assert 6 * 226 < sheet.height < 6 * 226 + 120
    assert len(list(tmp_path.iterdir())) == 2


def test_the_sheet_without_failures_says_so(tmp_path):
    evaluation = measured(tmp_path / "p", right=True)
    write_contact_sheet(evaluation, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.height < 120
        assert len(sheet.getcolors(10**6)) > 5  # the words


def test_a_sheet_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"s\.gif is no picture's name; valid: \.png"):
        write_contact_sheet(measured(tmp_path / "p", right=True), tmp_path / "s.gif")
