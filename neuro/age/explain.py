"""Which places of a brain make it look older or younger to a model.

- `occlusion`: hides one place after the other (MONAI's OcclusionSensitivity) and tells by how many
  years the predicted age falls without it.
- `gradient`: how much the predicted age rises with the brightness of each place.

Both tell what the model reacts to, which need not be what ages. Maps are on the template's grid;
`neuro.scans.preprocess.to_native` brings them to the scan.

>>> years = gradient(brain, prepared.image)                           # doctest: +SKIP
>>> years.shape                                                       # doctest: +SKIP
(99, 117, 95)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuro.age.model import BrainAgeModel, Member
from neuro.scans.grid import as_input, crop, uncrop
from neuro.scans.template import MNI_SHAPE

__all__ = ["UNITS", "ExplainError", "explain", "gradient", "occlusion", "save_overlay"]

UNITS = {
    "occlusion": "years that this place adds to the predicted age",
    "gradient": "years of predicted age for 10 % more brightness in 1 cm3",
}
"""Methods, and what their maps hold."""

# 40 mm: smaller places change less than the prediction is off, and take longer.
_MASK = 20
_OVERLAP = 0.5
_BATCH = 4
_SMOOTH = 2.0
_CM3 = 125  # voxels of 2 mm


class ExplainError(ValueError):
    """A method or a size that there is not."""


def explain(
    model: BrainAgeModel,
    image: np.ndarray,
    method: str = "occlusion",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """A map by the method of this name: see `UNITS`.

    Raises:
        ExplainError: there is no such method.
    """
    if method == "occlusion":
        return occlusion(model, image, progress=progress)
    if method == "gradient":
        return gradient(model, image)
    raise ExplainError(f"got method {method!r}, valid are {', '.join(UNITS)}")


def occlusion(
    model: BrainAgeModel,
    image: np.ndarray,
    *,
    mask: int = _MASK,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Years that each place adds to the predicted age: without it, the age is so much lower.

    Places are dimmed smoothly towards 0, what is outside of the brain. About 400 forward passes
    (without the mirror image): minutes on two cores.

    Args:
        model: the networks, whose answers are averaged.
        image: (99, 117, 95) uint8, `Prepared.image`.
        mask: side of a place in voxels of 2 mm; neighbours overlap by half.
        progress: called with how many passes are done, of about how many.

    Returns:
        (99, 117, 95) float32, 0 outside of the brain.

    Raises:
        ExplainError: a place that is larger than the image, or a voxel.
    """
    from monai.visualize import OcclusionSensitivity

    volume = crop(image)
    if not 2 <= mask <= min(volume.shape):
        raise ExplainError(f"got places of {mask} voxels, valid are 2 to {min(volume.shape)}")
    x = torch.from_numpy(as_input(volume[None]))
    total = int(np.prod([-(-(n - mask) // max(1, mask // 2)) + 1 for n in volume.shape]))
    answer = _Answer(model, progress, total)
    with torch.no_grad(), warnings.catch_warnings():
        # MONAI indexes by lists, which torch would rather see as tuples.
        warnings.filterwarnings("ignore", "Using a non-tuple sequence")
        age = float(answer(x))
        # `activate`: its default is for class scores.
        hidden, _ = OcclusionSensitivity(
            answer, mask_size=mask, n_batch=_BATCH, overlap=_OVERLAP, activate=False, verbose=False
        )(x)
    return _on_template(age - np.asarray(hidden)[0, 0], volume)


def gradient(model: BrainAgeModel, image: np.ndarray) -> np.ndarray:
    """Years that the predicted age rises for 10 % more brightness in 1 cm3 around each voxel.

    The gradient of the answer (the mean over both mirror images), smoothed over 4 mm.

    Args:
        model: the networks.
        image: (99, 117, 95) uint8, `Prepared.image`.

    Returns:
        (99, 117, 95) float32, 0 outside of the brain.
    """
    from monai.transforms import GaussianSmooth

    volume = crop(image)
    x = torch.from_numpy(as_input(volume[None])).requires_grad_()
    total = torch.zeros_like(x)
    for member in model.members:  # one graph at a time
        one = _Answer(BrainAgeModel([member], model.answer))
        for side in (x, x.flip(2)):
            total += torch.autograd.grad(one(side).sum(), x)[0] / 2
    mean = total[0] / len(model.members)
    # Only voxels of the brain have a brightness that may change.
    inside = torch.from_numpy((volume > 0)[None].astype(np.float32))
    smooth: Any = GaussianSmooth(sigma=_SMOOTH)
    values = np.asarray(smooth(mean * inside))[0] / np.maximum(np.asarray(smooth(inside))[0], 0.1)
    return _on_template(values * 0.1 * _CM3, volume)


class _Answer(nn.Module):
    """Volumes (n, 1, i, j, k) -> the model's answer (n, 1), years; gradients reach the volumes."""

    def __init__(
        self,
        model: BrainAgeModel,
        progress: Callable[[int, int], None] | None = None,
        total: int = 0,
    ) -> None:
        super().__init__()
        self.members: list[Member] = list(model.members)
        self.last = model.answer == "last"
        self.progress, self.total, self.done = progress, total, 0

    def forward(self, x: Tensor) -> Tensor:
        ages = []
        for member in self.members:
            said = torch.stack([member.target.ages(one) for one in member.net(x)], dim=1)
            ages.append(said[:, -1] if self.last else said.mean(1))
        self.done = min(self.total, self.done + len(x))
        if self.progress is not None:
            self.progress(self.done, self.total)
        return torch.stack(ages).mean(0)[:, None]


def _on_template(values: np.ndarray, volume: np.ndarray) -> np.ndarray:
    return uncrop(np.where(volume > 0, values, 0).astype(np.float32))


# --- picture -----------------------------------------------------------------------------------

_SLICES = {2: (14, 24, 34, 44, 54, 64), 1: (25, 40, 55, 70, 85, 100), 0: (22, 33, 44, 54, 65, 76)}
_WARM, _COLD = np.array([230.0, 70, 30]), np.array([50.0, 120, 240])


def save_overlay(
    image: np.ndarray, values: np.ndarray, path: Path | str, *, unit: str = "", scale: int = 2
) -> float:
    """Slices in three planes, what makes older in red, what makes younger in blue, as a PNG.

    Args:
        image: (99, 117, 95) uint8, `Prepared.image`.
        values: same shape, a map of this module.
        path: PNG file.
        unit: written below, see `UNITS`.
        scale: pixels per voxel.

    Returns:
        The value of full colour.
    """
    from PIL import Image, ImageDraw

    from enn_core.files.atomic import replacing

    if image.shape != MNI_SHAPE or values.shape != MNI_SHAPE:
        raise ExplainError(f"got shapes {image.shape} and {values.shape}, expected {MNI_SHAPE}")
    inside = np.abs(values[image > 0])
    top = float(np.percentile(inside, 99.5)) if inside.size else 0.0
    share = np.clip(values / top, -1, 1) if top > 0 else np.zeros(MNI_SHAPE)
    rows = []
    for axis, places in _SLICES.items():
        panels = [_panel(image, share, axis, place, scale) for place in places]
        rows.append(np.concatenate(panels, axis=1))
    width, height = max(row.shape[1] for row in rows), sum(row.shape[0] for row in rows)
    sheet = Image.new("RGB", (width, height + 22))
    below = 0
    for row in rows:
        sheet.paste(Image.fromarray(row), ((width - row.shape[1]) // 2, below))
        below += row.shape[0]
    text = f"red +{top:.2g}, blue -{top:.2g} {unit}".rstrip()
    ImageDraw.Draw(sheet).text((6, height + 5), text, fill=(255, 255, 255))
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
    return top


def _panel(image: np.ndarray, share: np.ndarray, axis: int, place: int, scale: int) -> np.ndarray:
    """One slice in colour, (rows, columns, 3) uint8."""
    grey, part = (
        np.repeat(np.repeat(np.take(values, place, axis).T[::-1], scale, 0), scale, 1)
        for values in (image, share)
    )
    cover = np.sqrt(np.abs(part))[..., None] * 0.8
    colour = np.where(part[..., None] > 0, _WARM, _COLD)
    return ((1 - cover) * grey[..., None] + cover * colour).astype(np.uint8)
