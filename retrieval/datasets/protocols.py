"""Published evaluation protocols by name, and finding a data set's files.

The same names hide different tests: "COCO" is Karpathy's 5,000 photos of val2014 with all their
25,010 captions (CLIP_benchmark, LAVIS, most papers), or the 5,000 of val2017 with five captions
each (Long-CLIP); "Flickr30k" is 1,000 photos or all 31,783. Recalls differ by up to 40 points, so
a protocol fixes its counts: files with other counts are refused under its name.

Common to all: an image counts as found if any of its captions is in the top K; the model runs in
float32 and scores are cosines, where the published scripts use half precision (and Long-CLIP's
Flickr script a softmax of it, which ties answers that differ); ties: `retrieval.eval.ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from retrieval.datasets.caption_files import CaptionRow, DatasetError, read_captions
from retrieval.datasets.captioned import (
    CaptionDataset,
    assemble,
    choose_split,
    find,
    load_captions,
    load_webdataset,
)

__all__ = ["DATASETS", "PROTOCOLS", "Protocol", "find_protocol", "open_dataset"]


@dataclass(frozen=True)
class Protocol:
    """What one published test asks.

    Attributes:
        name: "karpathy" or "longclip".
        dataset: name that users give.
        label: `dataset` of results: CLIP_benchmark's name where the test is CLIP_benchmark's, so
            that no table mixes two tests under one name.
        split: the split that is the test.
        images: images of that split.
        captions: captions of that split.
        captions_per_image: the first so many of each image; None takes all.
        refuse_long: a caption longer than the context is an error (Long-CLIP's COCO script), not
            cut with its last token kept as the end (all others).
        annotations: names of caption files, the first that is there counts; {split} is filled in.
        folders: folders of the images, below the folder that is searched.
        how: how to get the files.
    """

    name: str
    dataset: str
    label: str
    split: str
    images: int
    captions: int
    captions_per_image: int | None
    refuse_long: bool
    annotations: tuple[str, ...]
    folders: tuple[str, ...]
    how: str


_KARPATHY_FILES = (
    "Karpathy's caption_datasets.zip (cs.stanford.edu/people/karpathy/deepimagesent) has the "
    "captions"
)

PROTOCOLS: tuple[Protocol, ...] = (
    Protocol(
        name="karpathy",
        dataset="coco",
        label="mscoco_captions",
        split="test",
        images=5_000,
        captions=25_010,
        captions_per_image=None,
        refuse_long=False,
        annotations=(
            "dataset_coco.json",
            "coco_{split}_karpathy.json",
            "coco_karpathy_{split}.json",
            "dataset_coco_karpathy_{split}5k.json",
        ),
        folders=("val2014", "images/val2014", "images", "train2014"),
        how="the images are COCO's 2014 Train and Val (cocodataset.org); " + _KARPATHY_FILES,
    ),
    Protocol(
        name="longclip",
        dataset="coco",
        label="coco-longclip",
        split="val2017",
        images=5_000,
        captions=25_000,
        captions_per_image=5,
        refuse_long=True,
        annotations=("captions_val2017.json", "annotations/captions_val2017.json"),
        folders=("val2017", "images/val2017", "images"),
        how="images and captions are COCO's 2017 Val images and Train/Val annotations "
        "(cocodataset.org)",
    ),
    Protocol(
        name="karpathy",
        dataset="flickr30k",
        label="flickr30k",
        split="test",
        images=1_000,
        captions=5_000,
        captions_per_image=None,
        refuse_long=False,
        annotations=(
            "dataset_flickr30k.json",
            "flickr30k_{split}_karpathy.txt",
            "flickr30k_{split}.json",
        ),
        folders=("flickr30k-images", "flickr30k_images", "images", "Images"),
        how="the images are given out by the Flickr30k page of the University of Illinois, on a "
        "form; " + _KARPATHY_FILES,
    ),
    Protocol(
        name="longclip",
        dataset="flickr30k",
        label="flickr30k-longclip",
        split="all",
        images=31_783,
        captions=158_915,
        captions_per_image=None,
        refuse_long=False,
        annotations=("results_20130124.token",),
        folders=("flickr30k-images", "flickr30k_images", "images", "Images"),
        how="the images and results_20130124.token (in flickr30k.tar.gz) are given out by the "
        "Flickr30k page of the University of Illinois, on a form",
    ),
    Protocol(
        name="karpathy",
        dataset="flickr8k",
        label="flickr8k",
        split="test",
        images=1_000,
        captions=5_000,
        captions_per_image=None,
        refuse_long=False,
        annotations=("dataset_flickr8k.json", "flickr8k_{split}_karpathy.txt"),
        folders=("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"),
        how="the images are Flickr8k_Dataset.zip of the University of Illinois; " + _KARPATHY_FILES,
    ),
    Protocol(
        name="longclip",
        dataset="urban1k",
        label="urban1k",
        split="test",
        images=1_000,
        captions=1_000,
        captions_per_image=1,
        refuse_long=False,
        annotations=(),
        folders=("Urban1k", "urban1k"),
        how="Urban1k.zip of the Long-CLIP project holds the folders image and caption",
    ),
)

DATASETS = tuple(dict.fromkeys(protocol.dataset for protocol in PROTOCOLS))

_FOLDER_CAPTIONS = ("captions.csv", "captions.tsv", "captions.txt", "results.csv")
_CAPTION_SUFFIXES = (".csv", ".tsv", ".json", ".token")


def find_protocol(dataset: str, name: str | None = None) -> Protocol:
    """The protocol of a named data set; without a name its first.

    Raises:
        DatasetError: if the data set has no such protocol; the message lists those it has.
    """
    own = [protocol for protocol in PROTOCOLS if protocol.dataset == dataset]
    for protocol in own:
        if name is None or protocol.name == name:
            return protocol
    raise DatasetError(
        f"{dataset} has no protocol {name!r}; it has "
        + ", ".join(f"{p.name} ({p.images:,} images, {p.captions:,} captions)" for p in own)
    )


def open_dataset(
    spec: str,
    *,
    protocol: str | None = None,
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    split: str | None = None,
    data: str | os.PathLike[str] | None = None,
    captions_per_image: int | None = None,
    limit: int | None = None,
    default_split: str = "test",
) -> CaptionDataset:
    """A data set as `enn search eval --dataset` names it.

    Args:
        spec: one of `DATASETS`; a folder with a captions file; a captions file (then give
            images); "wds:DIR" for tars.
        protocol: of a named data set, "karpathy" or "longclip".
        images: folder of the images; by default looked for in data.
        annotations: captions file; by default looked for in images and data.
        split: None takes the `default_split`, or all where the data set has no parts.
        data: folder that data sets lie in, by default $ENN_DATA.
        captions_per_image: keep the first so many of each image; a deviation from a protocol.
        limit: keep the first so many images; a deviation.
        default_split: "test", or "train" to train on; protocols of a single part have that one.

    Raises:
        DatasetError: which file is missing, where it was looked for, how to get it; a split that
            is not there; counts that are not the protocol's.
    """
    if data is None:
        data = os.environ.get("ENN_DATA") or None
    folder = Path(images) if images is not None else None
    if folder is not None and not folder.is_dir():
        raise DatasetError(f"there is no folder '{folder}'; give the folder of the images")
    file = Path(annotations) if annotations is not None else None
    read = partial(
        load_captions,
        split=split,
        captions_per_image=captions_per_image,
        default_split=default_split,
    )
    if spec in DATASETS:
        named = find_protocol(spec, protocol)
        if named.name == "karpathy" and default_split != named.split:
            split = split or default_split
        found = _named(
            named,
            folder,
            file,
            split,
            Path(data) if data is not None else None,
            captions_per_image,
        )
    elif protocol is not None:
        raise DatasetError(
            f"protocol {protocol!r} belongs to {', '.join(DATASETS)}; {spec!r} has none, "
            "leave --protocol out"
        )
    elif spec.startswith("wds:"):
        if folder is not None or file is not None:
            raise DatasetError(f"{spec} brings images and captions; give neither beside it")
        found = load_webdataset(
            spec.removeprefix("wds:"), split or default_split, captions_per_image=captions_per_image
        )
    elif Path(spec).is_dir():
        found = _folder(Path(spec), folder, file, read)
    else:
        found = _file(spec, folder, read)
    return found if limit is None else found.limited(limit)


# --- named data sets ---------------------------------------------------------------------------


def _named(
    protocol: Protocol,
    images: Path | None,
    annotations: Path | None,
    split: str | None,
    data: Path | None,
    captions_per_image: int | None,
) -> CaptionDataset:
    if images is None and data is None:
        raise DatasetError(
            f"where is {protocol.dataset}? give its folder with --images, or the folder that data "
            f"sets lie in with --data or $ENN_DATA; {protocol.how}"
        )
    if protocol.dataset == "urban1k":
        rows, found = _urban1k(protocol, images, data)
        split = _only_split(protocol, split)
        where = str(found)
    else:
        annotations = annotations or _find_annotations(protocol, images, data, split)
        rows = read_captions(annotations)
        rows, split = _select(protocol, rows, split, annotations)
        found, where = _find_images(protocol, rows, images, data)
    whole = split == protocol.split
    counted = protocol.captions_per_image
    total = sum(len(row.captions[:counted]) for row in rows)
    if whole and (len(rows), total) != (protocol.images, protocol.captions):
        raise DatasetError(
            f"{annotations or found} has {len(rows):,} images and {total:,} captions; the "
            f"{protocol.name} protocol of {protocol.dataset} has {protocol.images:,} and "
            f"{protocol.captions:,}; to evaluate other captions, give the file as --dataset"
        )
    notes = [] if whole else [f"split {split}"]
    if captions_per_image is not None and captions_per_image != counted:
        notes.append(f"first {captions_per_image} captions")
        counted = captions_per_image
    result = assemble(
        rows,
        [find(found, row.image) for row in rows],
        name=protocol.label,
        split=split,
        protocol=protocol.name,
        captions_per_image=counted,
        where=where,
        how=protocol.how,
        refuse_long=protocol.refuse_long,
    )
    return replace(result, deviations="; ".join(notes))


def _select(
    protocol: Protocol, rows: Sequence[CaptionRow], split: str | None, file: Path
) -> tuple[list[CaptionRow], str]:
    if protocol.name == "longclip":
        if any(row.split is not None for row in rows):
            raise DatasetError(
                f"{file.name} has Karpathy's splits; the longclip protocol of {protocol.dataset} "
                f"reads {protocol.annotations[0]}"
            )
        return list(rows), _only_split(protocol, split)
    chosen, name = choose_split(rows, split, file)
    if name == "all":
        raise DatasetError(
            f"{file.name} does not say which split it is; the karpathy protocol of "
            f"{protocol.dataset} reads {' or '.join(_names(protocol, protocol.split))}"
        )
    return chosen, name


def _only_split(protocol: Protocol, split: str | None) -> str:
    if split not in (None, protocol.split):
        raise DatasetError(
            f"the {protocol.name} protocol of {protocol.dataset} has no split {split!r}; "
            f"it has {protocol.split} ({protocol.images:,} images)"
        )
    return protocol.split


def _names(protocol: Protocol, split: str | None) -> list[str]:
    name = split or protocol.split
    return list(dict.fromkeys(item.format(split=name) for item in protocol.annotations))


def _roots(protocol: Protocol, images: Path | None, data: Path | None) -> list[Path]:
    """Folders that belong to a data set, the most particular first."""
    roots = [] if images is None else [images]
    if data is not None:
        roots += [data / protocol.dataset, data]
    return roots


def _find_annotations(
    protocol: Protocol, images: Path | None, data: Path | None, split: str | None
) -> Path:
    places: list[Path] = []
    for root in _roots(protocol, images, data):
        places += [root, root / "annotations", root / "captions"]
    if images is not None:
        places += [images.parent, images.parent / "annotations"]
    names = _names(protocol, split)
    for place in places:
        for name in names:
            for file in (place / name, place / f"{name}.gz"):
                if file.is_file():
                    return file
    raise DatasetError(
        f"no captions of {protocol.dataset} for the protocol {protocol.name}: looked for "
        f"{', '.join(names)} (or .gz) in {_listed(places)}; give the file with --annotations; "
        f"{protocol.how}"
    )


def _find_images(
    protocol: Protocol, rows: Sequence[CaptionRow], images: Path | None, data: Path | None
) -> tuple[Path, str]:
    """The folder that has the first images, and what was searched."""
    places: list[Path] = []
    for root in [images] if images is not None else _roots(protocol, images, data):
        places += [root, *(root / folder for folder in protocol.folders)]
    for row in rows[:20]:
        for place in places:
            if find(place, row.image).is_file():
                return place, str(place)
    raise DatasetError(
        f"no images of {protocol.dataset}: looked for {rows[0].image} in {_listed(places)}; give "
        f"their folder with --images; {protocol.how}"
    )


def _urban1k(
    protocol: Protocol, images: Path | None, data: Path | None
) -> tuple[list[CaptionRow], Path]:
    """Pairs image/N.jpg and caption/N.txt; the first line of each caption file counts."""
    from retrieval.images import PHOTO_FORMATS

    places: list[Path] = []
    for root in _roots(protocol, images, data):
        places += [root, *(root / folder for folder in protocol.folders)]
    place = next((p for p in places if (p / "image").is_dir() and (p / "caption").is_dir()), None)
    if place is None:
        raise DatasetError(
            f"no Urban1k: looked for folders image and caption in {_listed(places)}; give the "
            f"folder that holds both with --images; {protocol.how}"
        )
    rows = []
    # Long-CLIP takes the directory's order, which is different everywhere; ours is by number.
    files = sorted((place / "caption").glob("*.txt"), key=lambda p: (len(p.stem), p.stem))
    for file in files:
        image = next(
            (f"image/{file.stem}{s}" for s in PHOTO_FORMATS
             if (place / "image" / f"{file.stem}{s}").is_file()),
            None,
        )  # fmt: skip
        if image is None:
            raise DatasetError(f"Urban1k: {place / 'image' / file.stem}.jpg is missing")
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        if not text:
            raise DatasetError(f"Urban1k: {file} is empty")
        rows.append(CaptionRow(image, (text.splitlines()[0].strip(),)))
    return rows, place


def _listed(places: Sequence[Path]) -> str:
    shown = [str(place) for place in dict.fromkeys(places) if place.is_dir()]
    return ", ".join(shown) or f"{places[0]} (no such folder)"


# --- other data --------------------------------------------------------------------------------


def _folder(
    folder: Path,
    images: Path | None,
    annotations: Path | None,
    read: Callable[[Path, Path], CaptionDataset],
) -> CaptionDataset:
    file = annotations
    if file is None:
        named = [folder / name for name in _FOLDER_CAPTIONS if (folder / name).is_file()]
        others = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and path.name.removesuffix(".gz").endswith(_CAPTION_SUFFIXES)
        ]
        candidates = named[:1] or others
        if len(candidates) != 1:
            raise DatasetError(
                f"{folder} has {len(candidates) or 'no'} captions files: expected captions.csv "
                "with columns image and caption; give the file itself and its --images, or wds:DIR "
                "for tars"
            )
        file = candidates[0]
    place = images or (folder / "images" if (folder / "images").is_dir() else folder)
    return replace(read(file, place), name=folder.resolve().name)


def _file(
    spec: str, images: Path | None, read: Callable[[Path, Path], CaptionDataset]
) -> CaptionDataset:
    file = Path(spec)
    if not file.is_file() and not file.suffix:
        raise DatasetError(
            f"there is no data set {spec!r}: give {', '.join(DATASETS)}, a folder with a captions "
            "file, a captions file (Karpathy's JSON, CSV, ...), or wds:DIR"
        )
    if not file.is_file():
        raise DatasetError(f"caption file not found: {file}")
    place = images or (file.parent / "images" if (file.parent / "images").is_dir() else None)
    if place is None:
        raise DatasetError(f"where are the images of {file.name}? give their folder with --images")
    return read(file, place)
