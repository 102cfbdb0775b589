"""Rule "local"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_STORED = 128


@dataclass(frozen=True, eq=False)
class LocalLesson:
    c: np.ndarray
    good: np.ndarray
    bad: np.ndarray
    keep: bool = False


@dataclass(frozen=True, eq=False)
class Turned:
    R: np.ndarray
    delta: npt.NDArray[np.float32]

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return np.asarray(rows @ self.R.T, np.float32)


def learn(lessons: Sequence[LocalLesson], anchors: np.ndarray) -> Turned:
    dim = anchors.shape[1]
    return Turned(np.eye(dim), np.ones(dim, np.float32))
