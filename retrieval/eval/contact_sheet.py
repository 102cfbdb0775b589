"""The worst failures of an evaluation on one picture, to see what a model gets wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from enn_core.files.atomic import replacing
from retrieval.datasets.captioned import TarImage, image_source
from retrieval.eval.ranks import best_captions, top_items
from retrieval.images import PHOTO_FORMATS, decode

if TYPE_CHECKING:
    from retrieval.eval.recall import Evaluation

__all__ = ["FORMATS", "write_contact_sheet"]

FORMATS = {".png": "PNG", **PHOTO_FORMATS}  # what suits a sheet best is named first

_CELL, _GAP, _LABEL = 200, 8, 18
_ANSWERS = 3
# Label, its colour, and a text or an image.
_Cell = tuple[str, str, str | Path | TarImage]
_INK, _PALE, _GOOD, _BAD = "#1c1c1c", "#f4f4f2", "#1b7f4d", "#a33a2c"


def write_contact_sheet(
    evaluation: Evaluation, path: str | os.PathLike[str], *, count: int = 8
) -> None:
    """Draw the queries whose right answers rank last, beside what ranked first instead.

    One row each: query, right answer with its rank, the three answers on top. First captions
    (at most one of an image), then images.

    Args:
        evaluation: with its ranks; answers that rank first are no failures and are left out.
        path: .png, .jpg or .webp.
        count: rows of each direction, at most.

    Raises:
        ValueError: for another kind of file.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path.name} is no picture's name; valid: {', '.join(FORMATS)}")
    data = evaluation.dataset
    rows: list[tuple[str, list[_Cell]]] = []
    wrong = _worst(evaluation.to_image, np.asarray(data.image_of_caption), count)
    top = top_items(evaluation.texts, evaluation.images, wrong, _ANSWERS)
    for query, answers in zip(wrong, top, strict=True):
        rank = f"its image: rank {evaluation.to_image[query]:,}"
        right = data.images[data.image_of_caption[query]]
        cells: list[_Cell] = [("caption", _INK, data.captions[query]), (rank, _GOOD, right)]
        cells += [(f"rank {n}", _BAD, data.images[i]) for n, i in enumerate(answers, 1)]
        rows.append(("text to image", cells))
    wrong = _worst(evaluation.to_text, np.arange(len(data.images)), count)
    top = top_items(evaluation.images, evaluation.texts, wrong, _ANSWERS)
    best = best_captions(evaluation.texts, evaluation.images, data.image_of_caption)
    for query, answers in zip(wrong, top, strict=True):
        rank = f"its best caption: rank {evaluation.to_text[query]:,}"
        cells = [("image", _INK, data.images[query]), (rank, _GOOD, data.captions[best[query]])]
        cells += [(f"rank {n}", _BAD, data.captions[i]) for n, i in enumerate(answers, 1)]
        rows.append(("image to text", cells))
    result = evaluation.result
    title = f"{result['model']} on {result['dataset']} {result['split']}: worst answers"
    sheet = _draw(title, rows)
    with replacing(path) as temporary:
        sheet.save(temporary, FORMATS[path.suffix.lower()])


def _worst(ranks: np.ndarray, owners: np.ndarray, count: int) -> list[int]:
    """Queries by falling rank, one of each image, none that ranks first."""
    found: list[int] = []
    seen: set[int] = set()
    for query in np.argsort(-ranks, kind="stable"):
        if len(found) == count or ranks[query] == 1:
            break
        if int(owners[query]) not in seen:
            seen.add(int(owners[query]))
            found.append(int(query))
    return found


def _draw(title: str, rows: Sequence[tuple[str, list[_Cell]]]) -> Image.Image:
    columns = 2 + _ANSWERS
    step = _CELL + _LABEL + _GAP
    headings = len({kind for kind, _ in rows})
    width = columns * (_CELL + _GAP) + _GAP
    height = 2 * _GAP + 22 + len(rows) * step + headings * 24 + (0 if rows else 24)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    draw.text((_GAP, _GAP), _fit(_line(title), large, width - 2 * _GAP), _INK, large)
    y = _GAP + 26
    if not rows:
        draw.text((_GAP, y), "every right answer ranks first", _GOOD, small)
    last = ""
    for kind, cells in rows:
        if kind != last:
            draw.text((_GAP, y), kind, _INK, large)
            y, last = y + 24, kind
        for column, (label, colour, content) in enumerate(cells):
            x = _GAP + column * (_CELL + _GAP)
            draw.text((x, y), _fit(label, small, _CELL), colour, small)
            top = y + _LABEL
            draw.rectangle((x, top, x + _CELL - 1, top + _CELL - 1), _PALE)
            if isinstance(content, str):
                _write(draw, content, small, x + 6, top + 6)
            else:
                _paste(sheet, content, x, top)
        y += step
    return sheet


def _paste(sheet: Image.Image, image: Path | TarImage, x: int, y: int) -> None:
    photo = decode(image_source(image), draft_size=(_CELL, _CELL))
    photo = ImageOps.contain(photo, (_CELL, _CELL))
    sheet.paste(photo, (x + (_CELL - photo.width) // 2, y + (_CELL - photo.height) // 2))


def _write(draw: ImageDraw.ImageDraw, text: str, font: Any, x: int, y: int) -> None:
    lines, room = [""], (_CELL - 12) // 16
    for word in _line(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= _CELL - 12:
            lines[-1] = longer
        else:
            lines.append(word)
        if len(lines) > room:
            lines = [*lines[: room - 1], f"{lines[room - 1]} …"]
            break
    for number, line in enumerate(lines):
        draw.text((x, y + 16 * number), _fit(line, font, _CELL - 12), _INK, font)


def _fit(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _line(text: str) -> str:
    """One line of what a font can draw."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
