"""The plain alternative to teaching: fine-tune the image tower by backprop, embed everything again.

The trained half of `long-eclip-mini` (blocks 4 to 6, head and last map; depthwise filters stay, as
in its training) learns from marks against the frozen text. The frozen half's outputs are cached,
31 kB per picture, which flatters the times: an index keeps no such cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from feedback_data import Gallery, cache_folder, pixels
from torch import nn
from torch.nn import functional as F

import retrieval
from retrieval.mini.learner import Learner
from retrieval.model.mini_tower import MiniTower
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.model.tower_folder import load_mini

FIRST_BLOCK = 4
# Chosen on CIFAR-10's training pictures, which the model never saw, for one query alone: AP gains
# of .077 (3e-4), .213 (1e-4) and .248 (3e-5) among 600 pictures, .200 (1e-5) among 300 of them.
# The rate was not chosen for lessons in sequence, where a lower one forgets less.
STEPS = 10
RATE = 3e-5
_TEMPERATURE = 0.05
_BATCH = 64
_WEIGHTS = Path(retrieval.__file__).parent / "weights" / "long-eclip-mini"


@dataclass(frozen=True, eq=False)
class Marked:
    """What one lesson of fine-tuning learns from.

    Attributes:
        text: (d,) float32 unit vector of the query.
        good, bad: positions of marked pictures in the gallery.
    """

    text: np.ndarray
    good: np.ndarray
    bad: np.ndarray


def block_inputs(model: RetrievalModel, gallery: Gallery) -> np.ndarray:
    """What the first trained block reads of every picture, (N, C, H, W) float16; kept on disk."""
    name = f"{gallery.name} {len(gallery.pictures)} inputs.npy".replace(" ", "-")
    file = cache_folder(model) / name
    if not file.exists():
        tower = load_mini(_WEIGHTS)
        rows = []
        for start in range(0, len(gallery.pictures), _BATCH):
            photos = pixels(model, gallery.pictures[start : start + _BATCH])
            rows.append(_stem(tower, torch.from_numpy(photos)).half().numpy())
        np.save(file, np.concatenate(rows))
    return np.load(file, mmap_mode="r")


class Finetuning:
    """A copy of the tower that is trained by marks."""

    def __init__(self, basis_q: np.ndarray) -> None:
        """The shipped weights.

        Args:
            basis_q: (d, r) orthonormal, into the coordinates of the index.
        """
        self._learner = Learner(load_mini(_WEIGHTS), FIRST_BLOCK).requires_grad_(False)
        self._start = copy.deepcopy(self._learner.state_dict())
        self._basis = basis_q
        tower = self._learner.tower
        for part in (*self._learner.blocks, tower.norm, tower.hidden, tower.proj):
            part.requires_grad_(True)
        for part in tower.modules():
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                part.requires_grad_(False)
        self._trained = [p for p in self._learner.parameters() if p.requires_grad]

    @property
    def bytes(self) -> int:
        """Of the weights that change."""
        return sum(p.numel() * p.element_size() for p in self._trained)

    def reset(self) -> None:
        """Back to the shipped weights."""
        self._learner.load_state_dict(self._start)

    def learn(self, inputs: np.ndarray, lessons: Sequence[Marked], *, steps: int = STEPS) -> float:
        """Learn the marks of one query, or of several in turns, all of a query's in every step.

        Args:
            inputs: (N, C, H, W) block inputs of the gallery.
            lessons: the marks.
            steps: per lesson.

        Returns:
            Seconds.
        """
        started = time.perf_counter()
        optimizer = torch.optim.AdamW(self._trained, lr=RATE, weight_decay=0.0)
        order = np.random.default_rng(0)
        middles: dict[int, torch.Tensor] = {}
        for _ in range(steps):
            for number in order.permutation(len(lessons)).tolist():
                loss = self._loss(inputs, lessons[number], number, middles)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return time.perf_counter() - started

    def _loss(
        self, inputs: np.ndarray, lesson: Marked, number: int, middles: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Good pictures belong above the middle of the marked ones, as it was at first; bad below.

        Both kinds weigh the same, where there are both.
        """
        chosen = np.concatenate([lesson.good, lesson.bad])
        sign = torch.where(torch.arange(len(chosen)) < len(lesson.good), 1.0, -1.0)
        weight = torch.zeros(len(chosen))
        for kind in (1.0, -1.0):
            weight[sign == kind] = 1 / max(int((sign == kind).sum()), 1)
        weight /= weight.sum()
        scores = self._learner.images(_batch(inputs, chosen)) @ torch.from_numpy(lesson.text)
        middle = middles.setdefault(number, (scores * weight).sum().detach())
        return (weight * F.softplus(-sign * (scores - middle) / _TEMPERATURE)).sum()

    @torch.no_grad()
    def vectors(self, inputs: np.ndarray) -> tuple[np.ndarray, float]:
        """All pictures embedded again, (N, r) float32 in the index's coordinates, and seconds."""
        started = time.perf_counter()
        rows = [
            _images(self._learner.tower, _batch(inputs, np.arange(start, min(start + 32, end))))
            for end in [len(inputs)]
            for start in range(0, end, 32)
        ]
        vectors = (torch.cat(rows).double().numpy() @ self._basis).astype(np.float32)
        return vectors, time.perf_counter() - started


@torch.no_grad()
def _stem(tower: MiniTower, photos: torch.Tensor) -> torch.Tensor:
    backbone = tower.backbone
    x = photos.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
    x = backbone.bn1(backbone.conv_stem(x / 127.5 - 1.0))
    for block in backbone.blocks[:FIRST_BLOCK]:
        x = block(x)
    return x


def _images(tower: MiniTower, inputs: torch.Tensor) -> torch.Tensor:
    """Block inputs -> unit image vectors (N, d), in float32 throughout."""
    backbone = tower.backbone
    x = inputs
    for block in backbone.blocks[FIRST_BLOCK:]:
        x = block(x)
    pooled = backbone.bn2(backbone.conv_head(x)).mean((2, 3))
    return F.normalize(tower.proj(tower.head(pooled)), dim=-1)


def _batch(inputs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    chosen = torch.from_numpy(np.asarray(inputs[rows]))
    return chosen.float().contiguous(memory_format=torch.channels_last)
