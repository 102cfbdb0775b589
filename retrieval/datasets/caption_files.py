"""Caption files in the forms they are published in, read into one row per image.

- Karpathy's JSON (`dataset_coco.json`): `{"images": [{"filename", "split", "sentences": [...]}]}`,
  with COCO's optional `filepath` folder;
- COCO's own (`captions_val2017.json`, CLIP_benchmark's `coco_test_karpathy.json`):
  `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`;
- LAVIS' (`coco_karpathy_test.json`): `[{"image", "caption": [...]}]`;
- Flickr30k's (`results_20130124.token`): `NAME.jpg#0<tab>caption`;
- CLIP_benchmark's (`flickr30k_test_karpathy.txt`): a header, then `NAME.jpg,caption`, unquoted;
- tables with a header (.csv, .tsv, .txt): columns image and caption, optionally split.
JSON and tables may be gzip-compressed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CaptionRow", "DatasetError", "read_captions"]

_IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "file", "filepath", "path")
_CAPTION_COLUMNS = ("caption", "comment", "text", "raw", "title", "sentence")


class DatasetError(ValueError):
    """A data set that cannot be used; one line that says what was given and what to do."""


@dataclass(frozen=True)
class CaptionRow:
    """An image of a caption file.

    Attributes:
        image: path relative to the folder of images, with forward slashes.
        captions: in the file's order.
        split: as the file says; None if it says nothing.
        image_id: COCO's number, if there is one.
        caption_ids: COCO's numbers of the captions (-1: unknown), if there are.
    """

    image: str
    captions: tuple[str, ...]
    split: str | None = None
    image_id: int | None = None
    caption_ids: tuple[int, ...] = ()


def read_captions(file: Path) -> list[CaptionRow]:
    """Rows of a caption file, in its order (COCO's own form: by image id, as its tools do).

    Raises:
        DatasetError: if the file is missing, damaged, of no known form, or an image has no caption.
    """
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix in (".csv", ".tsv", ".txt", ".token"):
        text = _text(file)
        if suffix == ".token" or "#0\t" in text[:4096]:
            return _token(file, text)
        if suffix == ".txt" and "_karpathy" in file.name:
            return _unquoted(file, text)
        return _table(file, text)
    return _json(file)


# --- JSON --------------------------------------------------------------------------------------


def _json(file: Path) -> list[CaptionRow]:
    text = _text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"cannot read {file} as JSON: {_reason(error)}") from error
    rows = content.get("images") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(
            f'{file} is not in Karpathy\'s form: expected {{"images": [...]}}, '
            "COCO's (images and annotations), or a list of image and caption"
        )
    if isinstance(content, list):
        return _grouped(file, _lavis(rows))
    if isinstance(content.get("annotations"), list):
        return _coco(file, rows, content["annotations"])
    return [_karpathy(row, file) for row in rows]


def _karpathy(row: dict[str, Any], file: Path) -> CaptionRow:
    sentences: Iterable[Any] = row.get("sentences") or ()
    items = [item for item in sentences if isinstance(item, dict) and _clean(item.get("raw"))]
    name = str(row.get("filename") or "")
    if not items or not name:
        raise DatasetError(
            f"{file.name}: image {row.get('filename')!r} has no file name or no caption "
            '("sentences": [{"raw": ...}])'
        )
    ids = [_number(item.get("sentid")) for item in items]
    return CaptionRow(
        image=f"{row['filepath']}/{name}" if row.get("filepath") else name,
        captions=tuple(_clean(item["raw"]) for item in items),
        split=str(row["split"]) if row.get("split") is not None else None,
        image_id=_number(row.get("cocoid")),
        caption_ids=tuple(-1 if i is None else i for i in ids) if any(ids) else (),
    )


def _coco(file: Path, images: list[Any], annotations: list[Any]) -> list[CaptionRow]:
    captions: dict[Any, list[tuple[str, Any]]] = {}
    for item in annotations:
        if isinstance(item, dict) and _clean(item.get("caption")):
            pair = (_clean(item["caption"]), item.get("id"))
            captions.setdefault(item.get("image_id"), []).append(pair)
    names = {row.get("id"): str(row.get("file_name") or "") for row in images}
    rows = []
    # The order of COCO's own tools, hence of torchvision, CLIP_benchmark and Long-CLIP.
    for number in sorted(names, key=lambda n: (not isinstance(n, int), n if n is not None else 0)):
        own = captions.get(number)
        if not own or not names[number]:
            raise DatasetError(f"{file.name}: image {number!r} has no file name or no caption")
        ids = tuple(i for _, i in own if isinstance(i, int))
        rows.append(
            CaptionRow(
                image=names[number],
                captions=tuple(text for text, _ in own),
                image_id=_number(number),
                caption_ids=ids if len(ids) == len(own) else (),
            )
        )
    return rows


def _lavis(rows: list[Any]) -> Iterable[tuple[str, str, str | None]]:
    for row in rows:
        texts = row.get("caption")
        for text in texts if isinstance(texts, list) else [texts]:
            yield str(row.get("image") or ""), _clean(text), None


# --- text --------------------------------------------------------------------------------------


def _token(file: Path, text: str) -> list[CaptionRow]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise DatasetError(f"{file.name}, line {number}: expected NAME.jpg#0<tab>caption")
            pairs.append((name.rpartition("#")[0] or name, _clean(caption), None))
    return _grouped(file, pairs)


def _unquoted(file: Path, text: str) -> list[CaptionRow]:
    """CLIP_benchmark's: the header is skipped; quotes, if any, belong to the caption."""
    pairs = []
    for number, line in enumerate(text.splitlines()[1:], 2):
        if line.strip():
            # At the first: CLIP_benchmark itself fails on a caption that contains ".jpg,".
            name, found, caption = line.partition(".jpg,")
            if not found:
                raise DatasetError(f"{file.name}, line {number}: expected NAME.jpg,caption")
            pairs.append((name.strip() + ".jpg", _clean(caption), None))
    return _grouped(file, pairs)


def _table(file: Path, text: str) -> list[CaptionRow]:
    header = text.partition("\n")[0]
    for delimiter in ("\t", ",", ";", "|"):
        names = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        image = next((names.index(n) for n in _IMAGE_COLUMNS if n in names), None)
        caption = next((names.index(n) for n in _CAPTION_COLUMNS if n in names), None)
        if image is not None and caption is not None:
            break
    else:
        raise DatasetError(
            f"{file.name} has no header with columns image and caption (optionally split); "
            f"its first line is {header[:80]!r}"
        )
    split = names.index("split") if "split" in names else None
    pairs = []
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        next(reader)
        for row in reader:
            if row:
                if len(row) <= max(image, caption, split or 0):
                    raise DatasetError(f"{file.name}, line {reader.line_num}: too few columns")
                part = row[split].strip() if split is not None else None
                pairs.append((row[image].strip(), _clean(row[caption]), part))
    except csv.Error as error:
        raise DatasetError(f"{file.name}, line {reader.line_num}: {error}") from error
    return _grouped(file, pairs)


def _grouped(file: Path, pairs: Iterable[tuple[str, str, str | None]]) -> list[CaptionRow]:
    """Captions of one image next to each other, images in the order they first appear."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for name, caption, split in pairs:
        if not name or not caption:
            raise DatasetError(f"{file.name}: image {name!r} has no file name or no caption")
        found.setdefault((name, split), []).append(caption)
    if not found:
        raise DatasetError(f"{file} holds no captions")
    return [CaptionRow(name, tuple(texts), split) for (name, split), texts in found.items()]


# --- shared ------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"caption file not found: {file}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DatasetError(f"cannot read {file}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _clean(text: Any) -> str:
    # JSON can escape half a character, which no tokenizer takes.
    whole = text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""
    return whole.strip()


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None
