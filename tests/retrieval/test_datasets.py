"""Reading captioned images."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrieval.datasets import CaptionDataset, DatasetError, load_karpathy


def row(name: str, split: str, *captions: str, **extra: str) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": c} for c in captions], **extra}


ROWS = [
    row("b.jpg", "val", "one", " two ", "three"),
    row("a ü.jpg", "val", "four"),
    row("c.jpg", "train", "five"),
    row("d.jpg", "restval", "six", "seven"),
    row("e.jpg", "test", "eight", filepath="val2014"),
]


@pytest.fixture
def data(tmp_path) -> Path:
    for name in ("b.jpg", "a ü.jpg", "c.jpg", "d.jpg", "val2014/e.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "set.json").write_text(json.dumps({"images": ROWS}), encoding="utf-8")
    return tmp_path


def test_a_split_in_file_order(data):
    loaded = load_karpathy(data / "set.json", data / "images", "val")
    assert [path.name for path in loaded.images] == ["b.jpg", "a ü.jpg"]
    assert loaded.captions == ("one", "two", "three", "four")
    assert loaded.image_of_caption.tolist() == [0, 0, 0, 1]
    assert (loaded.name, loaded.split) == ("set", "val")
    assert loaded.protocol == "karpathy, all captions"


def test_splits_join_compressed_files_open_and_folders_nest(data):
    with gzip.open(data / "set.json.gz", "wt") as file:
        json.dump({"images": ROWS}, file)
    both = load_karpathy(data / "set.json.gz", str(data / "images"), "train+restval")
    assert both.captions == ("five", "six", "seven")
    assert both.name == "set"
    nested = load_karpathy(data / "set.json", data / "images", "test")
    assert nested.images[0] == data / "images" / "val2014" / "e.jpg"


def test_first_captions_only(data):
    loaded = load_karpathy(data / "set.json", data / "images", "val", captions_per_image=2)
    assert loaded.captions == ("one", "two", "four")
    assert loaded.protocol == "karpathy, first 2 captions"


def test_a_missing_split_lists_what_there_is(data):
    with pytest.raises(DatasetError, match=r"no split 'tset'; it has .*test \(1 .*val \(2 images"):
        load_karpathy(data / "set.json", data / "images", "tset")


def test_missing_images_are_counted_and_the_first_is_named(data):
    (data / "images" / "a ü.jpg").unlink()
    (data / "images" / "b.jpg").unlink()
    with pytest.raises(DatasetError, match=r"2 of 2 images .* the first is b.jpg"):
        load_karpathy(data / "set.json", data / "images", "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "as JSON"),
        ("[]", "Karpathy"),
        ('{"images": {}}', "Karpathy"),
        ('{"images": []}', "Karpathy"),
        (json.dumps({"images": [row("b.jpg", "val")]}), "no caption"),
        (json.dumps({"images": [{"split": "val", "sentences": [{"raw": "x"}]}]}), "no file name"),
    ],
)
def test_other_files_are_refused(data, content, message):
    (data / "bad.json").write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        load_karpathy(data / "bad.json", data / "images", "val")
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_named(data):
    with pytest.raises(DatasetError, match=r"not found: .*none.json"):
        load_karpathy(data / "none.json", data / "images", "val")
    (data / "cut.json.gz").write_bytes(gzip.compress(b"{" * 100)[:20])
    with pytest.raises(DatasetError, match="cannot read"):
        load_karpathy(data / "cut.json.gz", data / "images", "val")


def test_a_set_with_loose_ends_is_refused():
    with pytest.raises(DatasetError, match="every image"):
        CaptionDataset("x", "y", "z", (Path("a"), Path("b")), ("c",), np.array([0]))
    with pytest.raises(DatasetError, match="shape"):
        CaptionDataset("x", "y", "z", (Path("a"),), ("c",), np.array([0, 0]))


def test_the_published_files_have_their_published_counts():
    data = Path(os.environ.get("ENN_DATA", "../shared/data"))
    file = data / "flickr8k" / "dataset_flickr8k.json"
    if not file.is_file():
        pytest.skip(f"Flickr8k is not in ENN_DATA ({data})")
    val = load_karpathy(file, data / "flickr8k" / "images", "val")
    assert (len(val.images), len(val.captions)) == (1000, 5000)
