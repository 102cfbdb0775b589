"""Rule "lookup": a query moves as the taught queries near it did, and nothing else moves.

With the taught directions c_i, what they became b_i, and a query x of unit length,

    x' = unit(x + sum_i w_i (b_i - c_i) / max(1, sum_i w_i)),
    w_i = clip((cos(x, c_i) - low_i) / (high_i - low_i), 0, 1).

No matrix is kept: a lesson is two rows, undo removes them, and a lesson costs what a row costs.
A taught query gets its own b_i; this fades out with the angle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.queries import Asked

__all__ = ["OTHER", "SAME", "LookedUp", "Recalled", "near_pictures", "near_words"]

SAME, OTHER = 1 - 1e-6, 0.98
"""Cosine with a taught query from which on it is that query (it is kept in half precision), and up
to which it is another one."""

# Words: unrelated generic queries are hardly ever nearer to each other than in this share of pairs.
_UNRELATED, _ABOVE, _WIDTH = 0.99, 0.03, 0.15
# Pictures: nearer than nearly all of a collection (chosen on CIFAR-10 train, docs/decisions.md).
_APART, _PICTURE_WIDTH = 0.995, 0.25


def near_words(anchors: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Cosines from which on words are taken for another wording, and for the same.

    A text model has its own scale of cosines: what unrelated queries have in common is measured on
    the protected ones.

    Args:
        anchors: (m, r) unit coordinates of the protected queries.
    """
    cosines = anchors @ anchors.T
    apart = cosines[np.triu_indices(len(anchors), 1)]
    low = float(np.quantile(apart, _UNRELATED)) + _ABOVE if len(apart) else 0.5
    low = min(max(low, 0.0), OTHER - _WIDTH)
    return low, low + _WIDTH


def near_pictures(
    c: npt.NDArray[np.float64], sample: npt.NDArray[np.floating]
) -> tuple[float, float]:
    """The same for a picture, or words beside one, among the pictures of an index.

    Args:
        c: (r,) unit direction.
        sample: (N, r) unit vectors of pictures.
    """
    cosines = sample.astype(np.float64) @ c
    low = float(np.quantile(cosines, _APART)) if len(sample) else 0.5
    low = min(max(low, 0.0), OTHER - _PICTURE_WIDTH)
    return low, low + _PICTURE_WIDTH


class LookedUp:
    """Rows that move as the taught ones near them did, at the length they had.

    Args:
        inputs: (n, r) taught directions of about unit length.
        targets: (n, r) what they became.
        near: (n, 2) cosines with each from which on a row moves with it, and moves in full.
    """

    def __init__(
        self,
        inputs: npt.NDArray[np.float64],
        targets: npt.NDArray[np.float64],
        near: npt.NDArray[np.float64],
    ) -> None:
        self.inputs, self.targets, self.near = inputs, targets, near
        self._lengths = np.sqrt(np.einsum("nr,nr->n", inputs, inputs))

    def __len__(self) -> int:
        return len(self.inputs)

    def with_rows(
        self,
        keep: int,
        inputs: npt.NDArray[np.float64],
        targets: npt.NDArray[np.float64],
        near: npt.NDArray[np.float64],
    ) -> LookedUp:
        """The first `keep` pairs and these."""
        return LookedUp(
            np.concatenate([self.inputs[:keep], inputs]),
            np.concatenate([self.targets[:keep], targets]),
            np.concatenate([self.near[:keep], near]),
        )

    def shares(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(N, n) share of each taught move that rows (N, r) take, 0..1, at most 1 in all."""
        return self._shares(np.asarray(rows, np.float64))[0]

    def _shares(
        self, rows: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """`shares`, and (N,) how far a row is a taught one itself."""
        if not len(self):
            return np.zeros((len(rows), 0)), np.zeros(len(rows))
        lengths = np.sqrt(np.einsum("nr,nr->n", rows, rows))
        units = rows / np.where(lengths > 0, lengths, 1)[:, None]
        cosines = _products(units, self.inputs) / self._lengths
        low, high = self.near.T
        shares = np.clip((cosines - low) / (high - low), 0, 1)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        # Of two ways to say the same, the one taught last.
        most = cosines.max(axis=1)
        same = cosines >= most[:, None] - (1 - SAME)
        nearest = len(self) - 1 - same[:, ::-1].argmax(axis=1)
        own = np.clip((most - OTHER) / (SAME - OTHER), 0, 1)
        shares *= 1 - own[:, None]
        shares[np.arange(len(rows)), nearest] += own
        return shares, own

    def map(
        self,
        rows: npt.NDArray[np.floating],
        asked: npt.NDArray[np.floating] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Rows (N, r), moved.

        Args:
            rows: what would be ranked by.
            asked: (N, r) unit directions that they are looked up by, where those are others.
        """
        given = np.asarray(rows, np.float64)
        wanted = np.linalg.norm(given, axis=-1, keepdims=True)
        moved = given / np.where(wanted > 0, wanted, 1)
        if asked is None:
            shares = self.shares(given)
        else:
            # What was taught itself is answered as it was taught, whatever its parts became since.
            directions = np.asarray(asked, np.float64)
            shares, own = self._shares(directions)
            moved += own[:, None] * (directions - moved)
        for row, share in enumerate(shares):
            used = np.flatnonzero(share)
            moves = self.targets[used] - self.inputs[used]
            moved[row] += np.einsum("n,nr->r", share[used], moves)
        lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
        usable = (lengths > 1e-6) & shares.any(1, keepdims=True)  # others stay as they are
        scaled = np.where(usable, moved * (wanted / np.where(usable, lengths, 1)), given)
        return scaled.astype(np.float32)


def _products(
    rows: npt.NDArray[np.float64], others: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(N, n) products; those of a single row have the same bits on any number of threads."""
    return np.einsum("nr,mr->nm", rows, others) if len(rows) == 1 else rows @ others.T


@dataclass(frozen=True, eq=False)
class Recalled:
    """What was taught by rule "lookup": each kind of query among its own.

    Attributes:
        words: of queries in words.
        pictures: of pictures.
        mixed: of words beside a picture.
        near: cosines from which on words move with taught ones, and move in full.
    """

    words: LookedUp
    pictures: LookedUp
    mixed: LookedUp
    near: tuple[float, float]

    delta = None

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return self.words.map(rows)

    def recall(
        self, kind: Asked, asked: npt.NDArray[np.floating], rows: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float32]:
        return self.map(rows) if kind == "words" else self.of(kind).map(rows, asked)

    def shares(self, kind: Asked, asked: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(N, n) share that queries (N, r) of one kind take of each taught move of that kind."""
        return self.of(kind).shares(asked)

    def with_rows(
        self, parts: dict[Asked, tuple[int, np.ndarray, np.ndarray, np.ndarray]]
    ) -> Recalled:
        """Of each kind the first pairs, as many as said, and some more: inputs, targets, near."""
        made = {}
        for kind, (keep, inputs, targets, near) in parts.items():
            held = self.of(kind)
            same = keep == len(held) and not len(inputs)
            made[kind] = held if same else held.with_rows(keep, inputs, targets, near)
        return Recalled(made["words"], made["picture"], made["mixed"], self.near)

    def of(self, kind: Asked) -> LookedUp:
        """The taught queries of one kind."""
        return {"words": self.words, "picture": self.pictures, "mixed": self.mixed}[kind]
