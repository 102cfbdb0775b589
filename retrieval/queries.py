"""The language of queries, and the eigen-coordinates of what they ask for.

Queries have parts with weights, positive or negative:

>>> parse_query("2:golden retriever + snow - person")
[Part(text='golden retriever', weight=2.0), Part(text='snow', weight=1.0), Part(text='person', \
weight=-1.0)]
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.index.eigen_index import EigenIndex
from retrieval.index.manifest import EmbeddingModel

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | os.PathLike[str] | bytes | Image
    """A picture to ask with: a path, the bytes of a file, or a PIL image."""


__all__ = [
    "Asked",
    "Mapping",
    "Part",
    "QueryError",
    "QueryModel",
    "Ranked",
    "image_vectors",
    "parse_query",
    "query_coordinates",
    "rank",
    "under",
]

Asked = Literal["words", "picture", "mixed"]
"""What a query consists of: words, a picture, or words beside a picture."""

# Spaces before a sign make it an operator; a hyphen inside a word is text.
_OPERATOR = re.compile(r"(?:^|(?<=\s))[+-]")
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+):(?!\d)\s*")
_MAX_WEIGHT = 1000.0

# A part whose scores vary less than this over the gallery (as in a gallery of one image) is not
# blown up further.
_LEAST_SPREAD = 0.01


class QueryError(ValueError):
    """A query that cannot be searched for; one line, fit to show."""


@dataclass(frozen=True)
class Part:
    """One part of a query: a text and its weight, negative for what should not be there."""

    text: str
    weight: float = 1.0


class Mapping(Protocol):
    """What was taught, as a change of queries and of the spectrum."""

    @property
    def delta(self) -> npt.NDArray[np.float32] | None:
        """(r,) changed spectrum over base spectrum, or None."""

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """(N, r) taught coordinates of text queries (N, r)."""

    def recall(
        self, kind: Asked, asked: npt.NDArray[np.floating], rows: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float32]:
        """(N, r) what becomes of queries of any kind, by what was taught about them as a whole.

        Args:
            kind: what they consist of; words are mapped.
            asked: (N, r) unit directions without any teaching.
            rows: (N, r) with what was taught about their words.
        """


def parse_query(text: str) -> list[Part]:
    """Split a query into weighted parts.

    " + " and " - " between parts (or "-word" after a space) add and subtract; "2:" before a part
    is its weight; double quotes protect signs and colons. A hyphen inside a word is text, and so
    is a colon between digits, as in "at 10:30".

    Raises:
        QueryError: if nothing is left to search for, or a weight is out of range.
    """
    pieces: list[tuple[float, list[str]]] = [(1.0, [])]
    for i, segment in enumerate(_outside_quotes(text)):
        quoted = i % 2 == 1
        if quoted:
            pieces[-1][1].append(f'"{segment}"')
            continue
        start = 0
        for match in _OPERATOR.finditer(segment):
            if match.start() == 0 and i > 0:
                continue  # right behind a closing quote: part of the same word
            pieces[-1][1].append(segment[start : match.start()])
            pieces.append((-1.0 if match.group() == "-" else 1.0, []))
            start = match.end()
        pieces[-1][1].append(segment[start:])
    parts = []
    for sign, fragments in pieces:
        content = "".join(fragments).strip()
        weight = 1.0
        prefix = _WEIGHT.match(content)
        if prefix:
            weight = float(prefix.group(1))
            content = content[prefix.end() :]
            if not 0 < weight <= _MAX_WEIGHT:
                raise QueryError(
                    f"weight {prefix.group(1)} is out of range; valid: above 0, up to "
                    f"{_MAX_WEIGHT:.0f}"
                )
        content = " ".join(_unquote(content).split())
        if content:
            parts.append(Part(content, sign * weight))
    if not parts:
        raise QueryError("the query is empty: give some words, an image, or both")
    return parts


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a query finds.

    Attributes:
        hits: (id, score), best first, equal scores by id.
        query: (r,) coordinates that they were ranked by.
        asked: (r,) direction of the query without any teaching.
        kind: what it consists of.
        delta: (r,) changed spectrum over base spectrum under which they were, or None.
    """

    hits: list[tuple[int, float]]
    query: npt.NDArray[np.float32]
    asked: npt.NDArray[np.floating]
    kind: Asked
    delta: npt.NDArray[np.float32] | None


class QueryModel(EmbeddingModel, Protocol):
    """What queries ask of a model; `retrieval.model.loading.RetrievalModel` has it."""

    def text_vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


def rank(
    model: QueryModel,
    index: EigenIndex,
    text: str | None = None,
    image: Picture | None = None,
    *,
    like: int | None = None,
    mapping: Mapping | None = None,
    k: int = 20,
    ids: Sequence[int] | np.ndarray | None = None,
) -> Ranked:
    """The k images closest to a query, or to an indexed image without itself.

    Args:
        model, index, text, image, mapping: as `query_coordinates`.
        like: id of an indexed image, in place of a query.
        k: number of results, fewer if the index is smaller.
        ids: rank these images only.

    Raises:
        QueryError, ImageError: as `query_coordinates`.
        KeyError: if no searchable image has the id `like`.
    """
    delta = mapping.delta if mapping is not None else None
    if like is None:
        query, asked, kind = _coordinates(model, index, text, image, mapping)
        return Ranked(index.search(query, k, delta=delta, ids=ids), query, asked, kind, delta)
    own = index.vectors([like])
    query = _as_taught(own, mapping)[0]
    hits = [hit for hit in index.search(query, k + 1, delta=delta, ids=ids) if hit[0] != like]
    return Ranked(hits[:k], query, own[0], "picture", delta)


def query_coordinates(
    model: QueryModel,
    index: EigenIndex,
    text: str | None = None,
    image: Picture | None = None,
    mapping: Mapping | None = None,
) -> npt.NDArray[np.float32]:
    """(r,) eigen-coordinates of a query.

    One part alone is taken as it is. Several are first divided by the spread of their own scores
    over the gallery: cosines of texts lie close together and those of images far apart, and a sum
    of both would be ruled by the image. The sum has unit norm.

    Args:
        model: gives the coordinates of the parts.
        index: whose gallery it is.
        text: words, with weights and negatives as `parse_query` reads them.
        image: path, file bytes or PIL image.
        mapping: what was taught about words applies to the sum of the texts; what was taught about
            pictures, or about words beside a picture, to such queries as a whole.

    Raises:
        QueryError: if the query is empty or its parts cancel.
        ImageError: if the image cannot be read.
    """
    return _coordinates(model, index, text, image, mapping)[0]


def _coordinates(
    model: QueryModel,
    index: EigenIndex,
    text: str | None,
    image: Picture | None,
    mapping: Mapping | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.floating], Asked]:
    """`query_coordinates`, the direction without teaching, and what the query consists of."""
    parts = parse_query(text) if text and text.strip() else []
    if not parts and image is None:
        raise QueryError("the query is empty: give some words, an image, or both")
    rows = [model.text_vectors([part.text for part in parts])] if parts else []
    weights = [part.weight for part in parts]
    if image is not None:
        rows.append(image_vectors(model, image))
        weights.append(1.0)
    vectors = np.concatenate(rows)
    kind: Asked = "words" if image is None else "mixed" if parts else "picture"
    if len(vectors) == 1:
        alone = vectors * np.float32(np.sign(weights[0]))
        if kind == "picture":
            return _as_taught(alone, mapping)[0], alone[0], kind
        return (alone if mapping is None else mapping.map(alone))[0], alone[0], kind
    _, covariance = index.moments()
    exact = vectors.astype(np.float64)
    spread = np.sqrt(np.einsum("ir,rs,is->i", exact, covariance, exact).clip(min=0))
    norms = np.linalg.norm(exact, axis=1)
    scale = np.maximum(spread, _LEAST_SPREAD * norms)
    shares = np.asarray(weights) / np.where(scale > 0, scale, 1)
    least = 1e-6 * np.abs(np.asarray(weights)).max()
    words = shares[: len(parts)] @ exact[: len(parts)]
    asked = total = words
    if mapping is not None:
        total = mapping.map(words[None])[0].astype(np.float64)
    if image is not None:
        delta = mapping.delta if mapping is not None else None
        total = total + shares[-1] * under(delta, exact[-1:])[0]
        asked = words + shares[-1] * exact[-1]
    total, asked = _unit(total, least), _unit(asked, least)
    if mapping is not None and kind == "mixed":
        total = mapping.recall(kind, asked[None], total[None])[0]
    return np.asarray(total, dtype=np.float32), asked, kind


def _unit(total: npt.NDArray[np.float64], least: float) -> npt.NDArray[np.float64]:
    length = np.linalg.norm(total)
    if length <= least:
        raise QueryError("the parts of the query cancel each other; change a weight")
    return total / length


def _as_taught(vectors: np.ndarray, mapping: Mapping | None) -> np.ndarray:
    """Pictures (N, r) as queries."""
    if mapping is None:
        return vectors
    return mapping.recall("picture", vectors, under(mapping.delta, vectors))


def under(delta: np.ndarray | None, vectors: np.ndarray) -> np.ndarray:
    """Images (N, r) as queries under a changed spectrum: their own vectors under it."""
    if delta is None:
        return vectors
    changed = vectors * delta
    lengths = np.linalg.norm(changed, axis=1, keepdims=True)
    return np.divide(changed, lengths, out=np.zeros_like(changed), where=lengths > 0)


def image_vectors(model: QueryModel, image: Picture) -> npt.NDArray[np.float32]:
    """(1, r) stored form of a picture."""
    from retrieval.images import decode

    preprocess = model.preprocess
    if isinstance(image, bytes | str | os.PathLike):
        # Own files may be huge; bytes may come from anywhere.
        own = not isinstance(image, bytes)
        upright = decode(image, draft_size=preprocess.draft_size, reduce=own)
    else:
        upright = _upright(image)
    return model.image_vectors(preprocess(upright)[None])


def _outside_quotes(text: str) -> list[str]:
    """Pieces outside and inside double quotes, alternating; an unpaired quote is text."""
    pieces = re.split(r'["“”]', text)
    if len(pieces) % 2 == 0:
        pieces[-2:] = [f"{pieces[-2]} {pieces[-1]}"]
    return pieces


def _unquote(text: str) -> str:
    return text.replace('"', "")


def _upright(image: Image) -> Image:
    """A PIL image as `retrieval.images.decode` would give it."""
    from PIL import ImageOps

    from retrieval.images import decode

    turned = ImageOps.exif_transpose(image)
    profile = turned.info.get("icc_profile")
    if turned.mode == "RGB" and not turned.has_transparency_data and not profile:
        return turned
    if profile and turned.mode in ("CMYK", "LAB", "YCbCr"):
        from retrieval.colour import to_srgb

        return to_srgb(turned, profile).convert("RGB")
    if turned.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        return turned.convert("RGB")
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", compress_level=0)
    return decode(buffer.getvalue())
