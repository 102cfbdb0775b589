"""What the tests of the index share: a test model, small photos, and what must hold.

The test model has the interface of `retrieval.RetrievalModel` but is no search model: a real
linear map (through `EigenBasis`) of an image shrunk to 8 x 8, so that everything about an index can
be tested in milliseconds per image.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from retrieval.eigen_coordinates import EigenBasis
from retrieval.images import decode
from retrieval.index.eigen_index import EigenIndex

SIDE = 8


class TinyPreprocess:
    hash = "shrink-to-8x8"
    draft_size = (2 * SIDE, 2 * SIDE)

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


class TinyTestModel:
    """Linear image tower of random weights."""

    runtime = "numpy"
    precision = "f32"
    context_length = 8
    truncated_texts = 0

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
            "precision": self.precision,
        }


def photo(path: Path, seed: int) -> Path:
    """Write a small noise image whose content depends on the seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def age(root: Path) -> None:
    """Set all times a minute back, as those of photos that lie there for a while."""
    for path in root.rglob("*"):
        if path.is_file() and ".enn-index" not in path.parts:
            info = path.stat()
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns - 60_000_000_000))


def queries(count: int = 3, dim: int = 16) -> np.ndarray:
    q = np.random.default_rng(99).normal(size=(count, dim)).astype(np.float32)
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def ranking(index: EigenIndex, q: np.ndarray, delta=None) -> list[tuple[str, float]]:
    """All images by path, best first; images of equal score in the order of their paths."""
    found = index.search(q, max(len(index), 1), delta=delta)
    named = [(index.entry(id_).path, score) for id_, score in found]
    return sorted(named, key=lambda item: (-round(item[1], 5), item[0]))


def assert_same_ranking(ours: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> None:
    """The same paths in the same order; a scan sums in another order than another scan."""
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    np.testing.assert_allclose(
        [score for _, score in ours], [score for _, score in theirs], atol=2e-6
    )


def assert_like_fresh(index: EigenIndex, root: Path, folder: Path, model=None) -> None:
    """Invariant 5: results, compared by path, equal those of a fresh build."""
    model = model or TinyTestModel()
    with EigenIndex.create(folder, model) as fresh:
        fresh.update(root, model)
        assert len(index) == len(fresh)
        for q in queries():
            for delta in (None, np.linspace(0.2, 3, len(q))):
                assert_same_ranking(ranking(index, q, delta), ranking(fresh, q, delta))
        assert sorted((entry.path, entry.error) for entry in index.skipped()) == sorted(
            (entry.path, entry.error) for entry in fresh.skipped()
        )


def assert_sound(index: EigenIndex, root: Path, model=None) -> None:
    """Every vector is that of the content its row names; every search result has a row."""
    model = model or TinyTestModel()
    indexed = {entry.id: entry for entry in index.entries("indexed")}
    assert sorted(indexed) == index.ids().tolist()
    by_hash = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path
        for path in root.rglob("*.png")
        if path.is_file()
    }
    for id_, entry in indexed.items():
        source = by_hash.get(entry.sha256 or "")
        if source is not None:
            pixels = model.preprocess(decode(source))[None]
            np.testing.assert_allclose(
                index.vectors([id_])[0], model.image_vectors(pixels)[0], atol=1e-5
            )
