"""Reading captioned images."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from index_cases import TinyTestModel
from PIL import Image

from retrieval.datasets.captioned import (
    CaptionDataset,
    DatasetError,
    TarImage,
    load_karpathy,
    load_webdataset,
)
from retrieval.eval.recall import embed_images


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


def test_half_characters_do_not_reach_the_model(data):
    (data / "half.json").write_text(json.dumps({"images": [row("b.jpg", "test", "a \udcff dog")]}))
    assert load_karpathy(data / "half.json", data / "images", "test").captions == ("a ? dog",)


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


# --- tars --------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tars(tmp_path) -> Path:
    for shard in range(11):
        text = f"caption {shard}\n\n second {shard} \n".encode()
        members = {"a/0.png": picture(shard), "a/0.txt": text, "a/0.json": b"{}"}
        write_tar(tmp_path / "test" / f"{shard}.tar", members)
    return tmp_path


def test_tars_are_read_in_the_order_of_their_numbers(tars):
    found = load_webdataset(tars)
    assert found.captions == tuple(t for i in range(11) for t in (f"caption {i}", f"second {i}"))
    assert (found.name, found.split) == (f"wds/{tars.name}", "test")
    for number, image in enumerate(found.images):
        assert isinstance(image, TarImage)
        assert image.read() == picture(number)
    assert str(found.images[0]) == f"{tars / 'test' / '0.tar'}:a/0.png"
    assert len(load_webdataset(tars, captions_per_image=1).captions) == 11
    vectors = embed_images(TinyTestModel(), found.images)
    assert len(np.unique(vectors, axis=0)) == 11


def test_tars_that_cannot_be_used(tars):
    def refusal(*args) -> str:
        with pytest.raises(DatasetError) as caught:
            load_webdataset(*args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in refusal(tars / "no")
    assert "has no split 'val' with tars (val/0.tar, ...); it has test" in refusal(tars, "val")
    (tars / "test" / "nshards.txt").write_text("12")
    assert "says 12 tars" in refusal(tars)
    assert "11.tar is not there" in refusal(tars)
    (tars / "test" / "nshards.txt").write_text("many")
    assert "does not hold a number" in refusal(tars)
    (tars / "test" / "nshards.txt").write_text("2")
    assert len(load_webdataset(tars).images) == 2
    (tars / "dataset_type.txt").write_text("classification")
    assert "says 'classification'" in refusal(tars)
    (tars / "dataset_type.txt").unlink()
    write_tar(tars / "test" / "1.tar", {"x.png": picture(1)})
    assert "x.png has no captions" in refusal(tars)
    (tars / "test" / "1.tar").write_bytes(b"no tar")
    assert "cannot read" in refusal(tars)
    write_tar(tars / "bare" / "0.tar", {"x.txt": b"caption"})
    assert "hold no images" in refusal(tars, "bare")


def test_hashes_tell_questions_apart(data):
    def load(split: str, **options) -> str:
        return load_karpathy(data / "set.json", data / "images", split, **options).hash

    assert load("val") == load("val")
    assert len({load("val"), load("train"), load("val", captions_per_image=1)}) == 3


# --- real files --------------------------------------------------------------------------------


def test_the_published_files_have_their_published_counts():
    data = Path(os.environ.get("ENN_DATA", "../shared/data"))
    file = data / "flickr8k" / "dataset_flickr8k.json"
    if not file.is_file():
        pytest.skip(f"Flickr8k is not in ENN_DATA ({data})")
    val = load_karpathy(file, data / "flickr8k" / "images", "val")
    assert (len(val.images), len(val.captions)) == (1000, 5000)
