"""A test model with the interface of `retrieval.models.RetrievalModel`; not a search model.

It is a real linear map (through `EigenBasis`) of an image shrunk to 8 x 8, so that everything about
an index can be tested in milliseconds per image.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from retrieval.eigen import EigenBasis

SIDE = 8


class TinyPreprocess:
    hash = "shrink-to-8x8"
    draft_size = (2 * SIDE, 2 * SIDE)

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


class TinyTestModel:
    """Linear image tower of random weights."""

    runtime = "numpy"
    context_length = 8

    def __init__(self, seed: int = 0, dim: int = 16) -> None:
        rng = np.random.default_rng(seed)
        self.name = f"tiny-test-model-{seed}"
        weight = rng.normal(size=(dim, 3 * SIDE * SIDE))
        self.weights_hash = hashlib.sha256(weight.tobytes()).hexdigest()
        self.basis = EigenBasis.from_weight(weight, rng.normal(size=dim))
        self.preprocess = TinyPreprocess()
        self.dim = self.basis.dim
        self.calls = 0
        self.images = 0

    def image_vectors(self, pixels: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.images += len(pixels)
        return self.basis.vectors(pixels.reshape(len(pixels), -1) / 127.5 - 1)

    def text_vectors(self, texts) -> np.ndarray:
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        t = np.stack([np.random.default_rng(seed).normal(size=self.dim) for seed in seeds])
        return self.basis.query(t / np.linalg.norm(t, axis=1, keepdims=True))

    def fingerprint(self) -> dict:
        return {
            "model": self.name,
            "weights": self.weights_hash,
            "preprocess": self.preprocess.hash,
            "dim": self.dim,
        }
