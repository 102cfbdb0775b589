"""Labelled images as their publishers pack them: IDX, CIFAR's pickles, zips and folders of images.

Every reader returns a `Source`: the published parts, whole and in a fixed order.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataError", "ImageFiles", "Images", "Source"]

# Data sets to classify come without loss too (BMP, PPM), but not as phones store photos; what the
# search takes for images is in `retrieval.formats`, which the core does not know.
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".pgm"}
)


class DataError(ValueError):
    """A data set that is not there or cannot be read; one line."""


class ImageFiles:
    """Images that stay on disk: `files[i]` is (3, H, W) uint8, decoded each time.

    Args:
        paths: of the images.
        size: side of the square that indexing gives (shorter side resized to 8/7 of it, centre
            cut out; 64 px and less: resized to it); `decode` gives the whole image.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def decode(self, index: int) -> Tensor:
        """The whole image, (3, H, W) uint8.

        Raises:
            DataError: it cannot be read.
        """
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot read the image '{path}' ({reason}); repair or remove it"
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """One image (3, size, size), or those of a tensor of indices (n, 3, size, size)."""
        if isinstance(index, Tensor) and index.ndim:
            return torch.stack([self[int(i)] for i in index])
        from torchvision.transforms.v2 import functional

        image, side = self.decode(int(index)), self.size
        shorter = side if side <= 64 else side * 8 // 7
        image = functional.resize(image, [shorter], antialias=True)
        return functional.center_crop(image, [side, side])

    def select(self, rows: Tensor) -> ImageFiles:
        """The images of some rows, in their order."""
        return ImageFiles([self.paths[int(row)] for row in rows], self.size)


Images = Tensor | ImageFiles


@dataclass(frozen=True)
class Source:
    """A published data set.

    Attributes:
        train_x, train_y: images (N, C, H, W), float32 in [0, 1] or uint8, and labels (N,) int64.
        test_x, test_y: the test part.
        classes: names.
        valid: images and labels for validation, where the publisher cut them.
        per_channel: mean and standard deviation per channel in [0, 1]; None: of the training part.
    """

    train_x: Images
    train_y: Tensor
    test_x: Images
    test_y: Tensor
    classes: tuple[str, ...]
    valid: tuple[Images, Tensor] | None = None
    per_channel: tuple[tuple[float, ...], tuple[float, ...]] | None = None


# --- Fashion-MNIST: IDX ------------------------------------------------------------------------

FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(root: Path | None) -> Source:
    """Fashion-MNIST from its four IDX files, gzipped or not: 60,000 + 10,000 of (1, 28, 28)."""
    folders = [root / part for part in ("FashionMNIST/raw", "fashion-mnist", ".")] if root else []
    folders.append(_DEBIAN)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        for folder in folders:
            for file in (folder / f"{name}.gz", folder / name):
                if file.is_file():
                    return read_idx(file, shape)
        where = ", ".join(f"'{folder}'" for folder in folders)
        raise DataError(
            f"Fashion-MNIST's {name}.gz is missing (looked in {where}); install the Debian package "
            "dataset-fashion-mnist, or put the four files into fashion-mnist in the data directory"
        )

    images, labels = (28, 28), ()
    train_x, test_x = (read(f"{n}-images-idx3-ubyte", images) for n in ("train", "t10k"))
    train_y, test_y = (read(f"{n}-labels-idx1-ubyte", labels) for n in ("train", "t10k"))
    return Source(train_x[:, None], train_y.long(), test_x[:, None], test_y.long(), FASHION)


def read_idx(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Items of an IDX file of bytes, (N, *shape) uint8.

    Raises:
        DataError: it is something else, or cut off.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read '{file}' ({error}); get it anew") from error
    axes = len(shape) + 1
    header = np.frombuffer(raw[4 : 4 + 4 * axes], ">u4")
    if raw[:4] != bytes([0, 0, 8, axes]) or tuple(header[1:]) != shape:
        raise DataError(f"'{file}' is no IDX file of items of {shape or 'one'} bytes; get it anew")
    if len(raw) != 4 + 4 * axes + int(np.prod(header, dtype=np.int64)):
        raise DataError(f"'{file}' is cut off; get it anew")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).copy()).view(
        -1, *shape
    )


# --- CIFAR -------------------------------------------------------------------------------------

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's batches are dicts of lists, bytes and numpy arrays: nothing else is made of them."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module, name)


def cifar10(root: Path | None) -> Source:
    """CIFAR-10: the python version, unpacked or as a tar; else 12,000 of it from a zip."""
    read = _cifar_files(root, "cifar-10-batches-py", "cifar-10-python.tar.gz")
    if read is not None:
        parts = [_batch(*read(f"data_batch_{i}"), "labels") for i in range(1, 6)]
        test_x, test_y = _batch(*read("test_batch"), "labels")
        train_x, train_y = (torch.cat(part) for part in zip(*parts, strict=True))
        return Source(train_x, train_y, test_x, test_y, CIFAR10)
    if root is not None and (root / "cifar10_12k.zip").is_file():
        return zipped(root / "cifar10_12k.zip")
    raise DataError(
        _missing("CIFAR-10", "cifar-10-batches-py, cifar-10-python.tar.gz or cifar10_12k.zip", root)
    )


def cifar100(root: Path | None) -> Source:
    """CIFAR-100, the python version, unpacked or as a tar; fine labels."""
    read = _cifar_files(root, "cifar-100-python", "cifar-100-python.tar.gz")
    if read is None:
        raise DataError(_missing("CIFAR-100", "cifar-100-python or cifar-100-python.tar.gz", root))
    train, test, meta = read("train"), read("test"), read("meta")
    names = [name.decode() for name in _entry(*meta, "fine_label_names")]
    return Source(
        *_batch(*train, "fine_labels"), *_batch(*test, "fine_labels"), classes=tuple(names)
    )


def _missing(title: str, wanted: str, root: Path | None) -> str:
    return (
        f"{title} is missing: {wanted} ({_looked(root)}); get the python version from its "
        "authors' page, unpacked or not, and give the directory that it lies in with --data-dir "
        "or $ENN_DATA"
    )


def _looked(root: Path | None) -> str:
    return f"looked in '{root}'" if root is not None else "no data directory was given"


Loaded = tuple[dict[bytes, Any], str]  # what a pickle holds, and its file


def _cifar_files(root: Path | None, folder: str, tar: str) -> Callable[[str], Loaded] | None:
    """How to read a pickle of a CIFAR by its name; None if neither folder nor tar is there."""
    if root is None:
        return None
    place = root / folder
    if place.is_dir():
        return lambda name: _unpickle(_bytes_of(place / name), str(place / name))
    if not (root / tar).is_file():
        return None
    members: dict[str, bytes] = {}

    def read(name: str) -> Loaded:
        where = f"{folder}/{name} in {root / tar}"
        if not members:  # a gzipped tar has no index: all in one go
            try:
                with tarfile.open(root / tar) as archive:
                    for member in archive:
                        file = archive.extractfile(member) if member.isfile() else None
                        if file is not None:
                            members[PurePosixPath(member.name).name] = file.read()
            except (OSError, EOFError, tarfile.TarError) as error:
                raise DataError(f"cannot read '{root / tar}' ({error}); get it anew") from error
        if name not in members:
            raise DataError(f"there is no {where}; get the tar anew")
        return _unpickle(members[name], where)

    return read


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read '{file}' ({error.strerror}); unpack the tar anew") from error


def _unpickle(raw: bytes, where: str) -> Loaded:
    try:
        loaded = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle makes Python raise
        raise DataError(f"{where} is no batch of CIFAR ({error}); get it anew") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{where} is no batch of CIFAR; get it anew")
    return loaded, where


def _entry(loaded: dict[bytes, Any], where: str, key: str) -> Any:
    if key.encode() not in loaded:
        raise DataError(f"{where} has no {key}; get it anew")
    return loaded[key.encode()]


def _batch(loaded: dict[bytes, Any], where: str, labels: str) -> tuple[Tensor, Tensor]:
    x = np.asarray(_entry(loaded, where, "data"))
    y = torch.tensor(_entry(loaded, where, labels), dtype=torch.int64)
    if x.dtype != np.uint8 or x.shape != (len(y), 3072):
        raise DataError(f"{where} holds images of {x.shape} {x.dtype}; get it anew")
    return torch.from_numpy(x.copy()).view(-1, 3, 32, 32), y


# --- images in a zip or in folders -------------------------------------------------------------


def zipped(file: Path) -> Source:
    """A zip of small images of one size, train/CLASS/* and test/CLASS/*, into memory."""
    from PIL import Image

    try:
        with zipfile.ZipFile(file) as archive:
            names = sorted(n for n in archive.namelist() if _is_image(PurePosixPath(n)))
            found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
            for name in names:
                part, label = PurePosixPath(name).parts[-3:-1]
                found.setdefault(part, []).append((label, name))
            classes = tuple(sorted({label for label, _ in found["train"]}))
            number = {label: i for i, label in enumerate(classes)}
            parts = []
            for part in ("train", "test"):
                x = []
                for _, name in found[part]:
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        x.append(np.array(image.convert("RGB")))
                pixels = torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).contiguous()
                parts += [pixels, torch.tensor([number[label] for label, _ in found[part]])]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"'{file}' does not hold images of one size as train/CLASS/* and test/CLASS/* "
            f"({' '.join(str(error).split())})"
        ) from error
    train_x, train_y, test_x, test_y = parts
    return Source(train_x, train_y, test_x, test_y, classes)


# Photos have the statistics that pretrained networks were trained with.
PHOTOS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tiny_imagenet(root: Path | None, size: int = 64) -> Source:
    """Tiny ImageNet: 200 classes, 100,000 to train; its validation part, 10,000, is the test.

    Its own test part has no labels. Images stay on disk.
    """
    name = "tiny-imagenet-200"
    folder = root / name if root is not None else None
    if folder is None or not (folder / "wnids.txt").is_file():
        raise DataError(
            f"Tiny ImageNet is missing: {name}/wnids.txt ({_looked(root)}); unpack {name}.zip of "
            "its authors' page, and give the directory that it lies in with --data-dir or $ENN_DATA"
        )
    classes = tuple(sorted((folder / "wnids.txt").read_text().split()))
    number = {label: i for i, label in enumerate(classes)}
    train, train_y = [], []
    for label in classes:
        images = list(_images_below(folder / "train" / label))
        train += images
        train_y += [number[label]] * len(images)
    test, test_y = [], []
    table = folder / "val" / "val_annotations.txt"
    try:
        for line in table.read_text().splitlines():
            image, label = line.split("\t")[:2]
            test.append(folder / "val" / "images" / image)
            test_y.append(number[label])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read '{table}' ({error}); unpack {name}.zip anew") from error
    if not train or not test:
        raise DataError(f"there are no images in '{folder}'; unpack {name}.zip anew")
    return Source(
        ImageFiles(train, size), torch.tensor(train_y), ImageFiles(test, size),
        torch.tensor(test_y), classes, per_channel=PHOTOS,
    )  # fmt: skip


def image_folder(folder: Path, size: int = 224) -> Source:
    """A folder with train/CLASS/*, and test/CLASS/* or val/CLASS/*; images stay on disk.

    With both, val is for validation and test for the test; one of them alone (as in ImageNet) is
    the test.
    """
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}'; give imagefolder:DIR with images in DIR/train/CLASS "
            "and DIR/test/CLASS"
        )
    tests = [name for name in ("test", "val") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        raise DataError(
            f"'{folder}' needs folders train/CLASS and test/CLASS (or val/CLASS) with images; it "
            f"has: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"
        )
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if _is_class(p)))
    train = _labelled(folder / "train", classes, size)
    test = _labelled(folder / tests[0], classes, size)
    valid = _labelled(folder / "val", classes, size) if len(tests) == 2 else None
    return Source(*train, *test, classes=classes, valid=valid, per_channel=PHOTOS)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _labelled(part: Path, classes: Sequence[str], size: int) -> tuple[ImageFiles, Tensor]:
    unknown = sorted({p.name for p in part.iterdir() if _is_class(p)} - set(classes))
    if unknown:
        raise DataError(
            f"'{part}' has classes that train has not: {', '.join(unknown[:5])}; the folders of "
            "all parts must be named alike"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for number, label in enumerate(classes):
        found = list(_images_below(part / label)) if (part / label).is_dir() else []
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise DataError(
            f"there are no images in '{part}/CLASS'; kinds that are read: "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return ImageFiles(paths, size), torch.tensor(labels)


def _images_below(folder: Path) -> Iterable[Path]:
    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            if path.is_dir():
                yield from walk(path)
            elif _is_image(path):
                yield path

    return walk(folder) if folder.is_dir() else ()


def _is_image(path: Path | PurePosixPath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
