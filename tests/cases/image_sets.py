"""Small data sets, packed as their publishers pack them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["cifar10_folder", "cifar100_folder", "image_folder", "photo", "tar_of", "tiny_imagenet"]


def _pickled(file: Path, content: dict[bytes, object]) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


def _batch(random: np.random.Generator, count: int, key: str, classes: int) -> dict[bytes, object]:
    x = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": x, key.encode(): [i % classes for i in range(count)]}


def cifar10_folder(root: Path, per_batch: int = 20) -> Path:
    """CIFAR-10's python version with five batches of so many images and as many for the test."""
    random = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        _pickled(folder / name, _batch(random, per_batch, "labels", 10))
    return folder


def cifar100_folder(root: Path, train: int = 200) -> Path:
    random = np.random.default_rng(1)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    _pickled(folder / "train", _batch(random, train, "fine_labels", 100))
    _pickled(folder / "test", _batch(random, 100, "fine_labels", 100))
    _pickled(folder / "meta", {b"fine_label_names": [f"class {i}".encode() for i in range(100)]})
    return folder


def tar_of(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, folder.name)
    return file


def photo(file: Path, seed: int, height: int = 40, width: int = 56) -> None:
    """A picture of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def encoded(seed: int, side: int = 32) -> bytes:
    """A small square picture as PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def image_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...]) -> Path:
    """ROOT/PART/CLASS/*.png, so many of each class."""
    for p, (part, count) in enumerate(parts.items()):
        for c, label in enumerate(classes):
            for i in range(count):
                photo(root / part / label / f"{i}.png", 1000 * p + 100 * c + i)
    return root


def tiny_imagenet(root: Path, per_class: int = 4) -> Path:
    """Two classes of Tiny ImageNet."""
    folder = root / "tiny-imagenet-200"
    labels = ("n01443537", "n01629819")
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(labels)) + "\n")
    lines = []
    for c, label in enumerate(labels):
        for i in range(per_class):
            photo(folder / "train" / label / "images" / f"{label}_{i}.JPEG", 10 * c + i, 64, 64)
        photo(folder / "val" / "images" / f"val_{c}.JPEG", 50 + c, 64, 64)
        lines.append(f"val_{c}.JPEG\t{label}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder
