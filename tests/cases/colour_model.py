"""A model of colours, for tests of the page around a collection."""

from __future__ import annotations

import threading

import numpy as np

from retrieval.eigen_coordinates import EigenBasis


class _Small:
    draft_size = (4, 4)
    hash = "4x4"

    def __call__(self, image):
        return np.asarray(image.resize((4, 4)), np.uint8)


class Colours:
    """A model whose vectors are mean colours; can be held up to watch a running update."""

    name = "colours"
    basis = EigenBasis.identity(3)
    dim = 3
    preprocess = _Small()

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()

    def image_vectors(self, pixels):
        assert self.go.wait(30)
        rows = pixels.reshape(len(pixels), -1, 3).mean(1).astype(np.float32) + 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def text_vectors(self, texts):
        names = {"red": (1, 0, 0), "blue": (0, 0, 1)}
        return np.asarray([names.get(text, (0.6, 0.6, 0.5)) for text in texts], np.float32)

    def fingerprint(self):
        return {"model": "colours", "weights": "0" * 64, "preprocess": "4x4", "dim": 3}
