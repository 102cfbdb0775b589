"""A model that puts images and texts into one space, ready for the eigen-index."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.eigen_coordinates import EigenBasis
from retrieval.model.checkpoints import OpenClip
from retrieval.model.preprocess import Preprocess
from retrieval.model.runtime import ImageRuntime

if TYPE_CHECKING:
    from torch import nn

    from retrieval.model.text_towers import TextTower

__all__ = ["RetrievalModel"]

# Queries whose vectors are remembered: 2 MB at r = 512.
_REMEMBERED_QUERIES = 1024

# Images per call of the tower; bounds memory whatever the caller passes.
_MAX_BATCH = 64


class RetrievalModel:
    """An image tower and a text tower that share a space, in eigen-coordinates.

    Attributes:
        name: what `load` takes to get this model again.
        weights_hash: sha256 hex of the tensors, independent of the file format.
        preprocess: PIL image -> uint8 (H, W, 3) pixels.
        basis: the final linear map of the image tower, factored in float64.
        dim: r, the length of the stored vectors.
        context_length: tokens of a text that are read.
        clip: the plain network with tokenizer and configuration, None if it is no CLIP.
    """

    def __init__(
        self,
        *,
        name: str,
        weights_hash: str,
        preprocess: Preprocess,
        basis: EigenBasis,
        text: TextTower,
        images: ImageRuntime,
        image_tower: Callable[[], nn.Module],
        clip: OpenClip | None = None,
    ) -> None:
        """Put a model together; `load` does this.

        image_tower gives the eigen form of the whole image tower.
        """
        self.clip = clip
        self.name = name
        self.weights_hash = weights_hash
        self.preprocess = preprocess
        self.basis = basis
        self.dim = basis.dim
        self.context_length = text.context_length
        self._text = text
        self._images = images
        self._make_image_tower = image_tower
        self._image_tower: nn.Module | None = None
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"RetrievalModel({self.name!r}, dim={self.dim}, runtime={self.runtime!r}, "
            f"weights={self.weights_hash[:12]})"
        )

    @property
    def runtime(self) -> str:
        """ "openvino" or "torch": what runs the image tower."""
        return self._images.name

    @property
    def precision(self) -> str:
        """ "f32" or "bf16": what the image tower computes in."""
        return self._images.precision

    @property
    def image_tower(self) -> nn.Module:
        """The image tower as eigen layers, float pixels as the original takes them -> (N, d).

        Converted on first access: factoring every layer takes seconds to minutes, text queries
        do not need it, and `image_vectors` runs the fused form, which has the same outputs.
        """
        with self._lock:
            if self._image_tower is None:
                self._image_tower = self._make_image_tower()
            return self._image_tower

    @property
    def truncated_texts(self) -> int:
        """How many texts were longer than the context so far."""
        return self._text.truncated

    def image_vectors(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Vectors to store.

        Args:
            pixels: (N, H, W, 3) uint8 from `preprocess`.

        Returns:
            (N, r) float32 of unit norm.

        Raises:
            ValueError: for pixels of another size or type.
        """
        rows = [
            self.basis.vectors(self._images(pixels[start : start + _MAX_BATCH]))
            for start in range(0, max(len(pixels), 1), _MAX_BATCH)
        ]
        return np.concatenate(rows)

    def text_vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Eigen-coordinates of texts; recent ones are remembered.

        Args:
            texts: N strings; what exceeds the context is cut, counted and logged.

        Returns:
            (N, r) float32. Their products with stored vectors are cosines.

        Raises:
            TypeError: if one string is passed instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string: pass [text]")
        with self._lock:
            known = {text: self._remembered[text] for text in texts if text in self._remembered}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            coordinates = self.basis.query(self._text.encode(missing))
            known.update(zip(missing, coordinates, strict=True))
        with self._lock:
            for text in texts[-_REMEMBERED_QUERIES:]:
                self._remembered[text] = known[text]
                self._remembered.move_to_end(text)
            while len(self._remembered) > _REMEMBERED_QUERIES:
                self._remembered.popitem(last=False)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.stack([known[text] for text in texts])

    def fingerprint(self) -> dict[str, Any]:
        """What an index remembers, and refuses to mix."""
        return {
            "model": self.name,
            "weights": self.weights_hash,
            "preprocess": self.preprocess.hash,
            "dim": self.dim,
            "precision": self.precision,
        }
