"""Data sets of the classifiers: the right images in the right parts, and errors that help."""

from __future__ import annotations

import gzip
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_sets import (
    cifar10_folder,
    cifar100_folder,
    encoded,
    image_folder,
    photo,
    tar_of,
    tiny_imagenet,
)
from PIL import Image

from enn_core.lab.classify import dataset_files as sources
from enn_core.lab.classify.batches import Augment, Batches, feed
from enn_core.lab.classify.datasets import DATA_NAMES, DataError, ImageFiles, load_data, mixed_order

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _no_data(monkeypatch):
    monkeypatch.delenv("ENN_DATA", raising=False)


def rows(x: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def test_digits_are_cut_in_three_parts_that_share_nothing():
    data = load_data("digits", seed=3)
    assert data.shape == (1, 8, 8)
    assert [len(y) for y in (data.train_y, data.valid_y, data.test_y)] == [1260, 140, 397]
    parts = [rows(x) for x in (data.train_x, data.valid_x, data.test_x)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    other = load_data("digits", seed=4)
    assert torch.equal(other.test_x, data.test_x)
    assert rows(other.valid_x) != parts[1]
    assert 0 <= float(data.train_x.min()) < float(data.train_x.max()) <= 1
    normalized = data.normalized(data.train_x)
    assert abs(float(normalized.mean())) < 1e-5
    assert abs(float(normalized.std()) - 1) < 1e-3


def test_fewer_training_images_leave_the_other_parts_as_they_are():
    whole, few = load_data("digits"), load_data("digits", train=400)
    assert torch.equal(few.train_x, whole.train_x[:400])
    assert torch.equal(few.valid_x, whole.valid_x)
    assert set(few.train_y.bincount().tolist()) <= {39, 40, 41}
    assert len(load_data("digits", valid=0, train=1400).valid_y) == 0
    assert len(load_data("digits", valid=7).valid_y) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 1300}, "1260 training images beside 140 for validation; give 1 to 1260"),
        ({"train": 0}, "train=0 is invalid"),
        ({"valid": 1.0}, "give a share from 0 to below 1"),
        ({"valid": 1400}, "a number below 1400"),
        ({"valid": -0.5}, "valid=-0.5"),
    ],
)
def test_parts_that_cannot_be(options, message):
    with pytest.raises(DataError, match=message):
        load_data("digits", **options)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_every_beginning_of_an_order_has_the_classes_in_proportion(counts, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = mixed_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for k in range(1, len(labels) + 1):
        found = labels[order[:k]].bincount(minlength=len(counts))
        wanted = k * torch.tensor(counts) / len(labels)
        slack = 1 + len(counts) * torch.tensor(counts) / len(labels)
        assert bool(((found - wanted).abs() <= slack).all())


def idx(items: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, items.ndim]) + struct.pack(f">{items.ndim}I", *items.shape)
    return header + items.tobytes()


@pytest.mark.parametrize("where", ["fashion-mnist", "FashionMNIST/raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, where, packed):
    random = np.random.default_rng(0)
    x = {"train": random.integers(0, 256, (40, 28, 28), dtype=np.uint8)}
    x["t10k"] = random.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for part, images in x.items():
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        for name, items in (("images-idx3", images), ("labels-idx1", labels)):
            raw = idx(items)
            file = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(raw) if packed else raw)
    data = load_data("fashion-mnist", root=tmp_path, valid=0)
    assert data.train_x.dtype == torch.uint8
    assert rows(data.train_x) == {image.tobytes() for image in x["train"]}
    assert np.array_equal(data.test_x[:, 0].numpy(), x["t10k"])
    assert data.test_y.tolist() == [i % 10 for i in range(20)]


def test_idx_files_that_are_damaged(tmp_path):
    raw = idx(np.zeros((3, 28, 28), np.uint8))
    for name, content, message in (
        ("short", raw[:-1], "cut off"),
        ("other", idx(np.zeros((3, 8, 8), np.uint8)), "no IDX file of items of"),
        ("empty", b"", "no IDX file"),
        ("broken.gz", gzip.compress(raw)[:20], "cannot read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            sources.read_idx(tmp_path / name, (28, 28))


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package is not installed")
def test_fashion_mnist_of_debian():
    data = load_data("fashion-mnist")
    assert [len(y) for y in (data.train_y, data.valid_y, data.test_y)] == [54000, 6000, 10000]
    assert data.test_y.bincount().tolist() == [1000] * 10
    assert data.test_y[:5].tolist() == [9, 2, 1, 1, 6]
    assert data.classes[9] == "Ankle boot"


def test_cifar_is_read_unpacked_and_packed(tmp_path):
    folder = cifar10_folder(tmp_path / "a")
    tar_of(folder, tmp_path / "cifar-10-python.tar.gz")
    unpacked = load_data("cifar10", root=tmp_path / "a", valid=0.2)
    packed = load_data("cifar10", root=tmp_path, valid=0.2)
    assert torch.equal(unpacked.train_x, packed.train_x)
    assert unpacked.shape == (3, 32, 32)
    assert len(unpacked.valid_y) == 20
    first = pickle.loads((folder / "test_batch").read_bytes(), encoding="bytes")
    assert np.array_equal(unpacked.test_x.flatten(1).numpy(), first[b"data"])

    folder = cifar100_folder(tmp_path / "b")
    tar_of(folder, tmp_path / "cifar-100-python.tar.gz")
    unpacked = load_data("cifar100", root=tmp_path / "b")
    assert torch.equal(unpacked.train_x, load_data("cifar100", root=tmp_path).train_x)
    assert unpacked.classes[7] == "class 7"


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_cifar_batches_are_data_not_programs(tmp_path, capsys):
    folder = cifar10_folder(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(DataError, match="is no batch of CIFAR"):
        load_data("cifar10", root=tmp_path)
    assert capsys.readouterr().out == ""
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 3), np.uint8)}))
    with pytest.raises(DataError, match="has no labels"):
        load_data("cifar10", root=tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="No such file"):
        load_data("cifar10", root=tmp_path)


def test_a_zip_of_small_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "cifar10_12k.zip", "w") as archive:
        for part, count in (("train", 5), ("test", 2)):
            for c, label in enumerate(("cat", "dog")):
                for i in range(count):
                    archive.writestr(f"{part}/{label}/{i}.png", encoded(100 * c + i))
    data = load_data("cifar10", root=tmp_path, valid=0)
    assert data.classes == ("cat", "dog")
    assert (len(data.train_y), data.test_y.tolist()) == (10, [0, 0, 1, 1])
    assert tuple(data.test_x.shape) == (4, 3, 32, 32)
    with zipfile.ZipFile(tmp_path / "cifar10_12k.zip", "w") as archive:
        archive.writestr("train/cat/1.png", b"no image")
    with pytest.raises(DataError, match="does not hold images of one size"):
        load_data("cifar10", root=tmp_path)


def test_folders_of_images_stay_on_disk(tmp_path):
    image_folder(tmp_path / "set", {"train": 6, "test": 2}, ("blue", "red"))
    (tmp_path / "set" / "train" / "red" / "notes.txt").write_text("no image")
    data = load_data(f"imagefolder:{tmp_path / 'set'}", valid=2, size=32)
    assert isinstance(data.train_x, ImageFiles)
    assert (len(data.train_y), len(data.valid_y), len(data.test_y)) == (10, 2, 4)
    assert data.classes == ("blue", "red")
    assert data.shape == (3, 32, 32)
    assert [path.parent.name for path in data.train_x.paths] == [
        data.classes[y] for y in data.train_y.tolist()
    ]
    batch = data.train_x[torch.tensor([1, 0])]
    assert tuple(batch.shape) == (2, 3, 32, 32)
    assert torch.equal(batch[1], data.train_x[0])
    whole = data.train_x.decode(0)
    with Image.open(data.train_x.paths[0]) as image:
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.array(image))
    # From the data directory, and with a validation part of its own.
    image_folder(tmp_path / "set", {"val": 3}, ("blue", "red"))
    own = load_data("imagefolder:set", root=tmp_path)
    assert (len(own.train_y), len(own.valid_y), len(own.test_y)) == (12, 6, 4)
    assert own.shape == (3, 224, 224)


def test_folders_that_are_not_as_they_should_be(tmp_path):
    def told(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            load_data(f"imagefolder:{folder}", valid=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in told(tmp_path / "no")
    (tmp_path / "red").mkdir()
    assert "needs folders train/CLASS and test/CLASS" in told(tmp_path)
    image_folder(tmp_path, {"train": 1, "test": 1}, ("blue",))
    photo(tmp_path / "test" / "green" / "1.png", 1)
    assert "has classes that train has not: green" in told(tmp_path)
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    (tmp_path / "test" / "green").rmdir()
    assert "there are no images in" in told(tmp_path)
    (tmp_path / "test" / "blue" / "x.jpg").write_bytes(b"no image")
    data = load_data(f"imagefolder:{tmp_path}", valid=0)
    with pytest.raises(DataError, match=r"cannot read the image '.*x\.jpg'"):
        data.test_x[torch.tensor([0])]


def test_tiny_imagenet(tmp_path):
    tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", root=tmp_path, valid=2)
    assert data.classes == ("n01443537", "n01629819")
    assert data.shape == (3, 64, 64)
    assert data.test_y.tolist() == [0, 1]
    assert (len(data.train_y), len(data.valid_y)) == (6, 2)
    # Not resized, not cut.
    assert torch.equal(data.train_x[0], data.train_x.decode(0))


@pytest.mark.parametrize("name", [n for n in DATA_NAMES if n[:5] in ("cifar", "tiny-")])
def test_missing_data_is_told_with_what_to_do(name, tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(DataError) as caught:
            load_data(name, root=root)
        text = str(caught.value)
        assert "missing" in text
        assert (str(tmp_path) if root else "no data directory was given") in text
        assert "\n" not in text
    with pytest.raises(DataError, match="give one of digits, fashion-mnist"):
        load_data("mnist")


def test_batches_continue_anywhere_and_are_shared():
    whole = list(Batches(50, 8, epochs=3, seed=1))
    assert len(whole) == 18
    assert {epoch for batch in whole for epoch, _ in batch} == {0, 1, 2}
    for start in (0, 1, 5, 6, 7, 17, 18):
        rest = Batches(50, 8, epochs=3, seed=1, start=start)
        assert list(rest) == whole[start:]
        assert len(rest) == len(whole[start:])
    halves = [list(Batches(50, 8, epochs=3, seed=1, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    x = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    y = torch.arange(12)
    augment = Augment(pad=2, flip=True, randaugment=(2, 9))
    whole = list(feed(x, y, Batches(12, 4, epochs=2, seed=5), augment, 0))
    torch.rand(3)
    rest = list(feed(x, y, Batches(12, 4, epochs=2, seed=5, start=2), augment, 0))
    for (a, labels), (b, others) in zip(whole[2:], rest, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, others)
    images = torch.cat([a for a, _ in whole])
    assert images.dtype == torch.uint8
    assert not torch.equal(images[:12][whole_order(whole, 0)], images[12:][whole_order(whole, 1)])
    plain = list(feed(x, y, Batches(12, 4, epochs=1, seed=5), Augment(), 0))
    assert all(torch.equal(a, x[labels]) for a, labels in plain)


def whole_order(batches, epoch: int) -> torch.Tensor:
    return torch.cat([y for _, y in batches[3 * epoch : 3 * epoch + 3]]).argsort()


@pytest.mark.slow
def test_workers_give_the_same_batches(tmp_path):
    image_folder(tmp_path, {"train": 6, "test": 1}, ("blue", "red"))
    data = load_data(f"imagefolder:{tmp_path}", valid=0, size=32)
    augment = Augment(crop=(0.3, 1.0), flip=True)
    runs = [
        list(feed(data.train_x, data.train_y, Batches(12, 4, epochs=2, seed=0), augment, workers))
        for workers in (0, 2)
    ]
    for (a, _), (b, _) in zip(*runs, strict=True):
        assert torch.equal(a, b)
        assert tuple(a.shape[1:]) == (3, 32, 32)
