"""Captioned images: which photo, which captions, which split.

`load_karpathy`, `load_captions` and `load_webdataset` read files and folders;
`retrieval.datasets.protocols.open_dataset` finds the published data sets under their protocols.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval.datasets.caption_files import CaptionRow, DatasetError, read_captions

__all__ = [
    "CaptionDataset",
    "DatasetError",
    "TarImage",
    "image_source",
    "load_captions",
    "load_karpathy",
    "load_webdataset",
]


# A caption member of a tar is read into memory whole.
_MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class TarImage:
    """An image inside an uncompressed tar, read from its place without unpacking."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read(self) -> bytes:
        """The image file's bytes.

        Raises:
            OSError: if the tar cannot be read any more.
        """
        from retrieval.images import MAX_BYTES, ImageError

        if self.size > MAX_BYTES:
            raise ImageError(f"{self.size:,} bytes; the limit is {MAX_BYTES:,}")
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def image_source(image: Path | TarImage) -> Path | bytes:
    """What `retrieval.images.decode` takes: the path, or the bytes of a tar's member."""
    return image.read() if isinstance(image, TarImage) else image


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """Images with their captions.

    Attributes:
        name: for reports, such as "dataset_flickr8k".
        split: as in the file, such as "val" or "train+restval".
        protocol: which convention the counts follow, for reports.
        images: N paths (or members of tars), in the file's order.
        captions: M texts, the captions of one image next to each other.
        image_of_caption: (M,) int64, position in images.
        deviations: in what this is not the protocol's whole split, such as "first 100 images".
        refuse_long: whether a caption longer than the model's context is an error, not cut.
        image_ids: N numbers of COCO, or none.
        caption_ids: M numbers of COCO (-1: unknown), or none.
    """

    name: str
    split: str
    protocol: str
    images: tuple[Path | TarImage, ...]
    captions: tuple[str, ...]
    image_of_caption: npt.NDArray[np.int64]
    deviations: str = ""
    refuse_long: bool = False
    image_ids: tuple[int, ...] = ()
    caption_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        owners = np.asarray(self.image_of_caption)
        if owners.shape != (len(self.captions),):
            raise DatasetError(
                f"image_of_caption must have shape ({len(self.captions)},), got {owners.shape}"
            )
        counts = np.bincount(owners, minlength=len(self.images)) if len(owners) else np.zeros(0)
        if len(counts) != len(self.images) or not len(owners) or counts.min() == 0:
            raise DatasetError("every image needs a caption and every caption an image of the set")

    @property
    def hash(self) -> str:
        """sha256 hex of what is asked: names of the images, captions, and which belongs to which.

        The same wherever the files lie; the images' contents are not part of it.
        """
        digest = hashlib.sha256()
        for image in self.images:
            name = image.name.rpartition("/")[2] if isinstance(image, TarImage) else image.name
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        for caption, owner in zip(self.captions, self.image_of_caption.tolist(), strict=True):
            digest.update(f"{owner}\0{caption}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def limited(self, images: int) -> CaptionDataset:
        """The first images alone, for a quick look.

        Raises:
            DatasetError: for a limit below 1.
        """
        if images < 1:
            raise DatasetError(f"the limit must be at least 1 image, got {images}")
        if images >= len(self.images):
            return self
        keep = np.flatnonzero(self.image_of_caption < images)
        note = f"first {images} of {len(self.images)} images"
        return replace(
            self,
            images=self.images[:images],
            captions=tuple(self.captions[i] for i in keep),
            image_of_caption=self.image_of_caption[keep],
            deviations="; ".join(filter(None, (self.deviations, note))),
            image_ids=self.image_ids[:images],
            caption_ids=tuple(self.caption_ids[i] for i in keep) if self.caption_ids else (),
        )


def load_karpathy(
    file: str | os.PathLike[str],
    images: str | os.PathLike[str],
    split: str,
    *,
    captions_per_image: int | None = None,
) -> CaptionDataset:
    """Read one split of a Karpathy file.

    Args:
        file: the JSON, or JSON.gz.
        images: folder of the image files.
        split: "test", "val", ...; several joined by "+", as in "train+restval".
        captions_per_image: keep only the first so many of each image. COCO's test split has 25,010
            captions; protocols that report 25,000 take the first five.

    Raises:
        DatasetError: if the file cannot be read, the split is not in it (the message lists those
            that are), an image has no caption, or image files are missing.
    """
    return load_captions(file, images, split, captions_per_image=captions_per_image)


def load_captions(
    file: str | os.PathLike[str],
    images: str | os.PathLike[str],
    split: str | None = None,
    *,
    captions_per_image: int | None = None,
    how: str = "",
    default_split: str = "test",
) -> CaptionDataset:
    """Read a caption file of any form that `retrieval.datasets.caption_files` knows.

    Args:
        file: the captions.
        images: folder of the image files.
        split: as for `load_karpathy`; None takes `default_split` where the file has splits, else
            all.
        captions_per_image: as for `load_karpathy`.
        how: what to do about missing images, for the error.
        default_split: what is meant where no split is named.

    Raises:
        DatasetError: as `load_karpathy`; also if a split is named and the file has none.
    """
    file, folder = Path(file), Path(images)
    rows = read_captions(file)
    rows, split = choose_split(rows, split, file, default_split)
    if captions_per_image is not None and captions_per_image < 1:
        raise DatasetError(f"captions_per_image must be at least 1, got {captions_per_image}")
    kept = "all captions" if captions_per_image is None else f"first {captions_per_image} captions"
    form = "karpathy" if file.name.removesuffix(".gz").endswith(".json") else "own"
    return assemble(
        rows,
        [find(folder, row.image) for row in rows],
        name=file.name.removesuffix(".gz").rpartition(".")[0] or file.name,
        split=split,
        protocol=f"{form}, {kept}",
        captions_per_image=captions_per_image,
        where=str(folder),
        how=how,
    )


def load_webdataset(
    folder: str | os.PathLike[str],
    split: str = "test",
    *,
    captions_per_image: int | None = None,
) -> CaptionDataset:
    """Read captioned images from tars, in CLIP_benchmark's layout.

    `FOLDER/SPLIT/*.tar`, in each `KEY.jpg` (or png, webp) and `KEY.txt` with a caption per line;
    the number of tars is in `FOLDER/SPLIT/nshards.txt`, if that is there. Nothing is unpacked.

    Raises:
        DatasetError: if there is no such split (the message lists those that are), a tar cannot be
            read, or an image has no captions.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"there is no folder '{root}'; give the folder of the tars' splits")
    kind = root / "dataset_type.txt"
    if kind.is_file() and (said := kind.read_text(encoding="utf-8").strip()) != "retrieval":
        raise DatasetError(f"{kind} says {said[:40]!r}; expected captioned images, 'retrieval'")
    tars = _shards(root, split)
    rows, images = [], []
    for tar in tars:
        for image, captions in _members(tar):
            rows.append(CaptionRow(image.name, captions))
            images.append(image)
    if not rows:
        raise DatasetError(f"the tars in {root / split} hold no images")
    return assemble(
        rows,
        list(images),
        name=f"wds/{root.resolve().name}",
        split=split,
        protocol="own, all captions"
        if captions_per_image is None
        else f"own, first {captions_per_image} captions",
        captions_per_image=captions_per_image,
        where=str(root),
    )


# --- parts, for protocols ----------------------------------------------------------------------


def choose_split(
    rows: Sequence[CaptionRow], split: str | None, file: Path, default: str = "test"
) -> tuple[list[CaptionRow], str]:
    """Rows of a split ("a+b" joins; None is the default), and its name.

    A file without splits is one split; its name may say which, as in `coco_karpathy_test.json`.
    """
    present = Counter(row.split for row in rows if row.split is not None)
    if not present:
        words = file.name.replace(".", "_").split("_")
        said = next((word for word in ("test", "val", "train") if word in words), "all")
        if split is None or split in ("all", said):
            return list(rows), said
        raise DatasetError(
            f"{file.name} has no split {split!r}; it does not name splits, so leave --split out"
        )
    wanted = [part.strip() for part in (split or default).split("+")]
    absent = [part for part in wanted if part not in present]
    if absent:
        raise DatasetError(
            f"{file.name} has no split {absent[0]!r}; it has "
            + ", ".join(f"{name} ({count:,} images)" for name, count in sorted(present.items()))
        )
    return [row for row in rows if row.split in wanted], "+".join(wanted)


def find(folder: Path, image: str) -> Path:
    """Where an image lies: below the folder as the caption file says, or flat in it."""
    nested, flat = folder / image, folder / image.replace("\\", "/").rpartition("/")[2]
    return nested if nested != flat and nested.is_file() else flat


def assemble(
    rows: Sequence[CaptionRow],
    images: Sequence[Path | TarImage],
    *,
    name: str,
    split: str,
    protocol: str,
    captions_per_image: int | None = None,
    where: str = "",
    how: str = "",
    refuse_long: bool = False,
) -> CaptionDataset:
    """A data set of rows and their images.

    Raises:
        DatasetError: naming the first image file that is missing, and how to get them.
    """
    missing = [path for path in images if isinstance(path, Path) and not path.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing):,} of {len(images):,} images of split {split} are not in {where}; "
            f"the first is {missing[0].name}" + (f"; {how}" if how else "")
        )
    captions: list[str] = []
    owners: list[int] = []
    ids: list[int] = []
    for position, row in enumerate(rows):
        texts = row.captions[:captions_per_image]
        owners += [position] * len(texts)
        captions += texts
        ids += row.caption_ids[:captions_per_image]
    numbers = tuple(row.image_id for row in rows if row.image_id is not None)
    return CaptionDataset(
        name=name,
        split=split,
        protocol=protocol,
        images=tuple(images),
        captions=tuple(captions),
        image_of_caption=np.asarray(owners, dtype=np.int64),
        refuse_long=refuse_long,
        image_ids=numbers if len(numbers) == len(rows) else (),
        caption_ids=tuple(ids) if len(ids) == len(captions) else (),
    )


# --- tars --------------------------------------------------------------------------------------


def _shards(root: Path, split: str) -> list[Path]:
    folder = root / split
    tars = sorted(folder.glob("*.tar"), key=lambda p: (len(p.name), p.name))
    if not tars:
        there = sorted(p.name for p in root.iterdir() if p.is_dir() and any(p.glob("*.tar")))
        raise DatasetError(
            f"{root} has no split {split!r} with tars ({split}/0.tar, ...); "
            f"it has {', '.join(there) or 'none'}"
        )
    count = folder / "nshards.txt"
    if count.is_file():
        try:
            wanted = int(count.read_text(encoding="utf-8"))
        except ValueError:
            raise DatasetError(f"{count} does not hold a number of tars") from None
        absent = [i for i in range(wanted) if not (folder / f"{i}.tar").is_file()]
        if absent:
            raise DatasetError(
                f"{count} says {wanted} tars, but {folder / f'{absent[0]}.tar'} is not there"
            )
        return [folder / f"{i}.tar" for i in range(wanted)]
    return tars


def _members(tar: Path) -> list[tuple[TarImage, tuple[str, ...]]]:
    from retrieval.formats import SUFFIXES

    images: dict[str, TarImage] = {}
    captions: dict[str, tuple[str, ...]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                if not member.isfile() or member.issparse() or not stem:
                    continue
                if suffix in SUFFIXES:
                    images[key] = TarImage(tar, member.name, member.offset_data, member.size)
                elif suffix == ".txt" and member.size <= _MAX_CAPTION_BYTES:
                    content = file.extractfile(member)
                    text = content.read().decode("utf-8") if content is not None else ""
                    captions[key] = tuple(filter(None, (x.strip() for x in text.splitlines())))
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"cannot read {tar}: {reason}") from error
    bare = next((image for key, image in images.items() if not captions.get(key)), None)
    if bare is not None:
        raise DatasetError(f"{bare} has no captions: expected a .txt beside it, one per line")
    return [(image, captions[key]) for key, image in images.items()]
