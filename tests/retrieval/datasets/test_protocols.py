"""Named protocols: every difference between them that decides numbers, and finding the files."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from retrieval.datasets import protocols
from retrieval.datasets.captioned import CaptionDataset, DatasetError
from retrieval.datasets.protocols import DATASETS, PROTOCOLS, find_protocol, open_dataset

DATA = Path(os.environ.get("ENN_DATA", "../shared/data"))


@pytest.fixture(autouse=True)
def _no_data_of_the_developer(monkeypatch):
    monkeypatch.delenv("ENN_DATA", raising=False)


def touch(folder: Path, names) -> Path:
    """Empty files: what is tested here looks at names alone."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def refusal(*args, **options) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small(monkeypatch):
    """The protocols with counts that a test can write down."""

    def counts(dataset: str, name: str, images: int, captions: int) -> None:
        changed = [
            replace(p, images=images, captions=captions)
            if (p.dataset, p.name) == (dataset, name)
            else p
            for p in protocols.PROTOCOLS
        ]
        monkeypatch.setattr(protocols, "PROTOCOLS", tuple(changed))

    return counts


def row(name: str, split: str, *captions: str, **extra) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": c} for c in captions], **extra}


# --- what the protocols are --------------------------------------------------------------------


def test_the_table_of_protocols():
    """The published counts, splits and rules, as read in the published scripts."""
    found = {
        (p.dataset, p.name): (p.split, p.images, p.captions, p.captions_per_image, p.refuse_long)
        for p in PROTOCOLS
    }
    assert found == {
        # CLIP_benchmark, LAVIS: Karpathy's test, all captions (ten photos have six).
        ("coco", "karpathy"): ("test", 5_000, 25_010, None, False),
        # Long-CLIP's coco.py: val2017, captions[0:5]; longer than the context raises there.
        ("coco", "longclip"): ("val2017", 5_000, 25_000, 5, True),
        ("flickr30k", "karpathy"): ("test", 1_000, 5_000, None, False),
        # Long-CLIP's flickr30k.py: the whole results_20130124.token, truncate=True.
        ("flickr30k", "longclip"): ("all", 31_783, 158_915, None, False),
        ("flickr8k", "karpathy"): ("test", 1_000, 5_000, None, False),
        # Long-CLIP's Urban1k.py: pairs, first line of each caption file, truncate=True.
        ("urban1k", "longclip"): ("test", 1_000, 1_000, 1, False),
    }


def test_results_of_two_protocols_never_share_a_name():
    assert len({p.label for p in PROTOCOLS}) == len(PROTOCOLS)
    karpathy = {p.label for p in PROTOCOLS if p.name == "karpathy"}
    assert karpathy == {"mscoco_captions", "flickr30k", "flickr8k"}  # CLIP_benchmark's names


def test_no_address_that_needs_a_registry():
    for p in PROTOCOLS:
        assert "\n" not in p.how
        assert not any(word in p.how for word in ("kaggle", "huggingface", "http"))


def test_unknown_protocols_and_names_list_what_there_is():
    assert "karpathy (1,000 images, 5,000 captions), longclip (31,783 images" in refusal(
        "flickr30k", protocol="karpaty", images="."
    )
    assert "has no protocol 'longclip'; it has karpathy" in refusal(
        "flickr8k", protocol="longclip", images="."
    )
    assert find_protocol("urban1k").name == "longclip"
    unknown = refusal("flicker30k", images=".")
    assert all(name in unknown for name in DATASETS)
    assert "leave --protocol out" in refusal("some.json", protocol="karpathy", images=".")


# --- Karpathy ----------------------------------------------------------------------------------


def test_karpathy_coco_is_val2014_with_all_captions(tmp_path):
    file = DATA / "captions" / "dataset_coco_karpathy_test5k.json.gz"
    if not file.is_file():
        pytest.skip(f"COCO's captions are not in ENN_DATA ({DATA})")
    rows = json.loads(gzip.decompress(file.read_bytes()))["images"]
    touch(tmp_path / "coco" / "val2014", (r["filename"] for r in rows))
    (tmp_path / "captions").mkdir()
    os.symlink(file.resolve(), tmp_path / "captions" / file.name)
    coco = open_dataset("coco", data=tmp_path)
    assert (len(coco.images), len(coco.captions)) == (5_000, 25_010)
    assert (coco.name, coco.protocol, coco.split) == ("mscoco_captions", "karpathy", "test")
    assert coco.deviations == ""
    assert len(coco.image_ids) == 5_000
    assert len(coco.caption_ids) == 25_010
    assert coco.caption_ids[0] == 770337
    five = open_dataset("coco", data=tmp_path, captions_per_image=5, limit=4000)
    assert len(five.captions) == 20_000
    assert five.deviations == "first 5 captions; first 4000 of 5000 images"
    assert five.hash != coco.hash
    # The same photos do not pass for Long-CLIP's protocol.
    assert "captions_val2017.json" in refusal("coco", protocol="longclip", data=tmp_path)
    missing = next((tmp_path / "coco" / "val2014").iterdir())
    missing.unlink()
    said = refusal("coco", data=tmp_path)
    assert f"1 of 5,000 images of split test are not in {tmp_path / 'coco'};" in said
    assert missing.name in said
    assert "cocodataset.org" in said


@pytest.mark.slow
def test_karpathy_flickr_is_the_thousand_of_the_test_split(tmp_path):
    file = DATA / "captions" / "dataset_flickr30k.json.gz"
    if not file.is_file():
        pytest.skip(f"Flickr30k's captions are not in ENN_DATA ({DATA})")
    rows = json.loads(gzip.decompress(file.read_bytes()))["images"]
    touch(tmp_path, (r["filename"] for r in rows if r["split"] in ("test", "val")))
    test = open_dataset("flickr30k", images=tmp_path, annotations=file)
    assert (len(test.images), len(test.captions), test.split) == (1_000, 5_000, "test")
    val = open_dataset("flickr30k", images=tmp_path, annotations=file, split="val")
    assert (len(val.images), val.deviations) == (1_014, "split val")
    said = refusal("flickr30k", images=tmp_path, annotations=file, split="dev")
    assert "no split 'dev'; it has test (1,000 images), train (29,000 images), val (1,0" in said
    quick = test.limited(7)
    assert (len(quick.images), len(quick.captions)) == (7, 35)
    assert quick.deviations == "first 7 of 1000 images"


def test_clip_benchmarks_own_files_are_read_as_it_reads_them(tmp_path, small):
    small("flickr30k", "karpathy", 2, 4)
    touch(tmp_path, ("1.jpg", "2.jpg"))
    text = (
        'image,caption\n1.jpg,a dog, running\n1.jpg,"quoted"\n2.jpg,a file.jpg, shown\n\n2.jpg,b\n'
    )
    (tmp_path / "flickr30k_test_karpathy.txt").write_text(text)
    found = open_dataset("flickr30k", images=tmp_path)
    # The header is skipped, quotes stay; where its own reader fails (".jpg," twice) ours does not.
    assert found.captions == ("a dog, running", '"quoted"', "a file.jpg, shown", "b")
    assert found.split == "test"
    said = refusal("flickr30k", images=tmp_path, split="val")
    assert "flickr30k_val_karpathy.txt" in said
    annotations = tmp_path / "flickr30k_test_karpathy.txt"
    said = refusal("flickr30k", images=tmp_path, annotations=annotations, split="val")
    assert "no split 'val'" in said


def test_clip_benchmarks_and_lavis_coco_files(tmp_path, small):
    small("coco", "karpathy", 2, 3)
    touch(tmp_path / "val2014", ("COCO_9.jpg", "COCO_4.jpg"))
    images = [{"id": 9, "file_name": "COCO_9.jpg"}, {"id": 4, "file_name": "COCO_4.jpg"}]
    annotations = [
        {"image_id": 9, "id": 1, "caption": "nine"},
        {"image_id": 4, "id": 3, "caption": "four\n"},
        {"image_id": 9, "id": 2, "caption": "neuf"},
    ]
    file = tmp_path / "coco_test_karpathy.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    coco = open_dataset("coco", images=tmp_path)
    # By id, as COCO's tools order images; captions in the file's order.
    assert coco.captions == ("four", "nine", "neuf")
    assert [path.name for path in coco.images] == ["COCO_4.jpg", "COCO_9.jpg"]
    assert (coco.image_ids, coco.caption_ids) == ((4, 9), (3, 1, 2))
    file.rename(tmp_path / "other.json")
    lavis = [
        {"image": "val2014/COCO_9.jpg", "caption": ["nine", "neuf"]},
        {"image": "val2014/COCO_4.jpg", "caption": ["four"]},
    ]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(lavis))
    again = open_dataset("coco", images=tmp_path / "val2014")
    assert again.captions == ("nine", "neuf", "four")
    assert {path.name for path in again.images} == {path.name for path in coco.images}


def test_flickr8k_without_its_test_split_says_what_there_is():
    if not (DATA / "flickr8k").is_dir():
        pytest.skip(f"Flickr8k is not in ENN_DATA ({DATA})")
    said = refusal("flickr8k", data=DATA)
    assert "no split 'test'; it has restval (91 images), train (6,000 images), val (1,000" in said
    val = open_dataset("flickr8k", data=DATA, split="val")
    assert (len(val.images), len(val.captions)) == (1_000, 5_000)
    assert (val.name, val.split, val.deviations) == ("flickr8k", "val", "split val")


def test_other_counts_are_refused_under_a_protocols_name(tmp_path):
    touch(tmp_path, ("1.jpg",))
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": [row("1.jpg", "test", "one")]}))
    said = refusal("flickr30k", images=tmp_path)
    assert "has 1 images and 1 captions" in said
    assert "1,000 and 5,000" in said
    assert "as --dataset" in said
    assert len(open_dataset(str(file), images=tmp_path).images) == 1


# --- Long-CLIP ---------------------------------------------------------------------------------


def test_longclip_coco_is_val2017_with_five_captions(tmp_path, small):
    small("coco", "longclip", 2, 10)
    touch(tmp_path / "val2017", ("000000000139.jpg", "000000000285.jpg"))
    images = [{"id": 139, "file_name": "000000000139.jpg"}]
    images += [{"id": 285, "file_name": "000000000285.jpg"}]
    captions = [
        {"image_id": number, "id": 10 * number + i, "caption": f"{number} {i}"}
        for i in range(6)
        for number in (285, 139)
    ]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    for options in ({"images": tmp_path}, {"images": tmp_path / "val2017"}, {"data": tmp_path}):
        coco = open_dataset("coco", protocol="longclip", **options)
        assert coco.captions == tuple(f"{n} {i}" for n in (139, 285) for i in range(5))
    assert (coco.name, coco.protocol, coco.split) == ("coco-longclip", "longclip", "val2017")
    assert coco.refuse_long
    said = refusal("coco", protocol="longclip", images=tmp_path, split="test")
    assert "no split 'test'; it has val2017 (2 images)" in said


@pytest.mark.parametrize("count", [40, pytest.param(31_783, marks=pytest.mark.slow)])
def test_longclip_flickr_is_the_whole_set(tmp_path, small, count):
    if count == 40:
        small("flickr30k", "longclip", count, 5 * count)
    names = [f"{number}.jpg" for number in range(count)]
    touch(tmp_path / "flickr30k-images", names)
    lines = [f"{name}#{i}\tcaption {i} of {name} ." for name in names for i in range(5)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    flickr = open_dataset("flickr30k", protocol="longclip", images=tmp_path)
    assert (len(flickr.images), len(flickr.captions)) == (count, 5 * count)
    assert (flickr.name, flickr.split) == ("flickr30k-longclip", "all")
    assert not flickr.refuse_long
    assert flickr.captions[5] == "caption 0 of 1.jpg ."
    assert "dataset_flickr30k.json" in refusal("flickr30k", images=tmp_path)
    (tmp_path / "results_20130124.token").write_text("\n".join(lines[:-5]) + "\n")
    said = refusal("flickr30k", protocol="longclip", images=tmp_path)
    assert f"{count - 1:,} images and {5 * count - 5:,} captions" in said


def test_urban1k_is_pairs_and_first_lines(tmp_path, small):
    small("urban1k", "longclip", 3, 3)
    touch(tmp_path / "Urban1k" / "image", ("1.jpg", "2.jpg", "10.jpg"))
    (tmp_path / "Urban1k" / "caption").mkdir()
    for number in (10, 1, 2):
        text = f"text {number}\nmore of it\n"
        (tmp_path / "Urban1k" / "caption" / f"{number}.txt").write_text(text)
    urban = open_dataset("urban1k", images=tmp_path)
    assert urban.captions == ("text 1", "text 2", "text 10")
    assert [path.stem for path in urban.images] == ["1", "2", "10"]
    assert (urban.protocol, urban.split, urban.deviations) == ("longclip", "test", "")
    assert "no split 'val'; it has test" in refusal("urban1k", images=tmp_path, split="val")
    (tmp_path / "Urban1k" / "image" / "2.jpg").unlink()
    assert "2.jpg is missing" in refusal("urban1k", images=tmp_path)
    assert "looked for folders image and caption in" in refusal("urban1k", data=tmp_path / "no")


# --- missing files -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: f"{p.dataset}-{p.name}")
def test_missing_files_say_what_where_and_how_to_get_them(tmp_path, protocol):
    name, how = protocol.dataset, protocol.how
    said = refusal(name, protocol=protocol.name)
    assert f"where is {name}?" in said
    assert how in said
    said = refusal(name, protocol=protocol.name, data=tmp_path)
    assert str(tmp_path) in said
    assert how in said
    assert all(a.format(split=protocol.split) in said for a in protocol.annotations)
    if protocol.annotations:
        rows = [row("x/1.jpg", protocol.split, "one")]
        form: dict = {"images": rows}
        if protocol.dataset == "coco" and protocol.name == "longclip":
            form = {"images": [{"id": 1, "file_name": "x/1.jpg"}]}
            form["annotations"] = [{"image_id": 1, "caption": "one"}]
        file = tmp_path / protocol.annotations[0]
        text = json.dumps(form) if file.suffix == ".json" else "x/1.jpg#0\tone"
        file.write_text(text)
        said = refusal(name, protocol=protocol.name, data=tmp_path)
        assert f"no images of {name}: looked for x/1.jpg in {tmp_path}" in said
        assert how in said


def test_the_data_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_DATA", str(tmp_path))
    assert f"in {tmp_path}" in refusal("flickr8k")


# --- everything else ---------------------------------------------------------------------------


def test_a_folder_with_a_table_of_captions(tmp_path):
    touch(tmp_path / "set ü", ("b.jpg", "a é.jpg"))
    table = tmp_path / "set ü" / "captions.csv"
    table.write_text('Image,caption\nb.jpg,"one, two"\na é.jpg,three\nb.jpg,four\n', "utf-8-sig")
    found = open_dataset(str(tmp_path / "set ü"))
    assert found.captions == ("one, two", "four", "three")
    assert found.image_of_caption.tolist() == [0, 0, 1]
    assert (found.name, found.split, found.protocol) == ("set ü", "all", "own, all captions")
    assert "it does not name splits" in refusal(str(tmp_path / "set ü"), split="val")
    table.write_text("filename\tsplit\tcaption\nb.jpg\tval\tone\na é.jpg\ttest\ttwo\n", "utf-8")
    assert open_dataset(str(tmp_path / "set ü")).captions == ("two",)
    assert open_dataset(str(tmp_path / "set ü"), split="val+test").captions == ("one", "two")
    said = refusal(str(tmp_path / "set ü"), split="train")
    assert "it has test (1 images), val (1 images)" in said
    table.write_text("image|comment_number| comment\nb.jpg|0| one\n", "utf-8")  # Kaggle's
    assert open_dataset(str(tmp_path / "set ü")).captions == ("one",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1.jpg,x\n", "no header with columns image and caption"),
        ("image,caption\n1.jpg\n", "line 2: too few columns"),
        ("image,caption\n1.jpg,\n", "no caption"),
        ("image,caption\n", "holds no captions"),
        ("image,caption\n2.jpg,x\n", "the first is 2.jpg"),
        ("image,caption\n1.jpg,\xff\n", "cannot read"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    touch(tmp_path, ("1.jpg",))
    (tmp_path / "captions.csv").write_text(text, "latin-1")
    assert message in refusal(str(tmp_path))


def test_training_takes_the_part_of_that_name_or_all(tmp_path):
    def count(*args, **options) -> tuple[str, int]:
        found = open_dataset(*args, default_split="train", **options)
        return found.split, len(found.images)

    folder = touch(tmp_path / "own", ["a.jpg", "b.jpg", "c.jpg"])
    table = folder / "captions.csv"
    table.write_text("image,caption\na.jpg,one\nb.jpg,two\n")
    assert count(str(folder)) == ("all", 2)
    table.write_text("image,caption,split\na.jpg,one,test\nb.jpg,two,train\nc.jpg,three,train\n")
    assert count(str(folder)) == ("train", 2)
    assert count(str(folder), split="test") == ("test", 1)
    assert count(str(table), images=folder) == ("train", 2)
    table.write_text("image,caption,split\na.jpg,one,test\n")
    assert "has no split 'train'; it has test" in refusal(str(folder), default_split="train")
    rows = [row("a.jpg", "train", "one"), row("b.jpg", "train", "two"), row("c.jpg", "test", "x")]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": rows}))
    assert count("flickr8k", images=folder) == ("train", 2)
    (tmp_path / "tars").mkdir()
    assert "no split 'train'" in refusal(f"wds:{tmp_path / 'tars'}", default_split="train")


def test_folders_whose_captions_are_not_clear(tmp_path):
    touch(tmp_path, ("1.jpg",))
    assert "has no captions files: expected captions.csv" in refusal(str(tmp_path))
    (tmp_path / "x.csv").write_text("image,caption\n1.jpg,x\n")
    assert open_dataset(str(tmp_path)).captions == ("x",)
    (tmp_path / "y.csv").write_text("image,caption\n1.jpg,y\n")
    assert "has 2 captions files" in refusal(str(tmp_path))
    assert open_dataset(str(tmp_path), annotations=tmp_path / "y.csv").captions == ("y",)
    assert "where are the images of" in refusal(str(tmp_path / "y.csv"))
    assert open_dataset(str(tmp_path / "y.csv"), images=tmp_path).captions == ("y",)


def test_a_limit_keeps_whole_images(tmp_path):
    touch(tmp_path, ("1.jpg", "2.jpg", "3.jpg"))
    rows = [row(f"{i}.jpg", "test", f"{i}a", f"{i}b") for i in (1, 2, 3)]
    (tmp_path / "set.json").write_text(json.dumps({"images": rows}))
    spec = str(tmp_path / "set.json")
    found = open_dataset(spec, images=tmp_path, limit=2)
    assert found.captions == ("1a", "1b", "2a", "2b")
    assert found.deviations == "first 2 of 3 images"
    whole = open_dataset(spec, images=tmp_path, limit=3)
    assert isinstance(whole, CaptionDataset)
    assert whole.deviations == ""
    assert "at least 1" in refusal(spec, images=tmp_path, limit=0)
