"""Captioned images for evaluation: which photo, which captions, which split.

Karpathy's JSON, as used for Flickr8k, Flickr30k and COCO:
`{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}, ...]}, ...]}`, with COCO's
optional `filepath` folder in front of the file name; plain or gzip-compressed.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CaptionDataset", "DatasetError", "load_karpathy"]


class DatasetError(ValueError):
    """A data set that cannot be used; one line that says what was given and what to do."""


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """Images with their captions.

    Attributes:
        name: for reports, such as "dataset_flickr8k".
        split: as in the file, such as "val" or "train+restval".
        protocol: which convention the counts follow, for reports.
        images: N paths, in the file's order.
        captions: M texts, the captions of one image next to each other.
        image_of_caption: (M,) int64, position in images.
    """

    name: str
    split: str
    protocol: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]
    image_of_caption: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        owners = np.asarray(self.image_of_caption)
        if owners.shape != (len(self.captions),):
            raise DatasetError(
                f"image_of_caption must have shape ({len(self.captions)},), got {owners.shape}"
            )
        counts = np.bincount(owners, minlength=len(self.images)) if len(owners) else np.zeros(0)
        if len(counts) != len(self.images) or not len(owners) or counts.min() == 0:
            raise DatasetError("every image needs a caption and every caption an image of the set")


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
    file, folder = Path(file), Path(images)
    rows = _rows(file)
    wanted = [part.strip() for part in split.split("+")]
    present = Counter(str(row.get("split")) for row in rows)
    absent = [part for part in wanted if part not in present]
    if absent:
        raise DatasetError(
            f"{file.name} has no split {absent[0]!r}; it has "
            + ", ".join(f"{name} ({count:,} images)" for name, count in sorted(present.items()))
        )
    if captions_per_image is not None and captions_per_image < 1:
        raise DatasetError(f"captions_per_image must be at least 1, got {captions_per_image}")
    paths: list[Path] = []
    captions: list[str] = []
    owners: list[int] = []
    for row in rows:
        if row.get("split") not in wanted:
            continue
        texts = _captions(row, file)[:captions_per_image]
        owners += [len(paths)] * len(texts)
        captions += texts
        paths.append(_find(folder, row))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing):,} of {len(paths):,} images of split {split} are not in {folder}; "
            f"the first is {missing[0].name}"
        )
    kept = "all captions" if captions_per_image is None else f"first {captions_per_image} captions"
    return CaptionDataset(
        name=file.name.removesuffix(".gz").removesuffix(".json"),
        split=split,
        protocol=f"karpathy, {kept}",
        images=tuple(paths),
        captions=tuple(captions),
        image_of_caption=np.asarray(owners, dtype=np.int64),
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(_text(file))
    except FileNotFoundError:
        raise DatasetError(f"caption file not found: {file}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"cannot read {file} as JSON: {reason}") from error
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise DatasetError(f'{file} is not in Karpathy\'s form: expected {{"images": [...]}}')
    return rows


def _text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


def _captions(row: dict[str, Any], file: Path) -> list[str]:
    sentences: Iterable[Any] = row.get("sentences") or ()
    texts = [str(item.get("raw", "")).strip() for item in sentences if isinstance(item, dict)]
    texts = [text for text in texts if text]
    if not texts or not row.get("filename"):
        raise DatasetError(
            f"{file.name}: image {row.get('filename')!r} has no file name or no caption "
            '("sentences": [{"raw": ...}])'
        )
    return texts


def _find(folder: Path, row: dict[str, Any]) -> Path:
    name = str(row["filename"])
    nested = folder / str(row.get("filepath", "")) / name
    return nested if row.get("filepath") and nested.is_file() else folder / name
