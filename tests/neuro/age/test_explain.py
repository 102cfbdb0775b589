"""Maps of what a model reacts to: where it looks, they show something, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_brain_models import tiny_model
from torch import nn

from neuro.age.explain import ExplainError, explain, gradient, occlusion, save_overlay
from neuro.age.model import BrainAgeModel, Member
from neuro.age.targets import AgeValue
from neuro.scans.grid import ORIGIN, crop, uncrop
from neuro.scans.template import load_template

# On the template's grid, and on the grid that networks see.
PLACE = (slice(25, 41), slice(75, 91), slice(32, 48))
INSIDE = tuple(slice(s.start - o, s.stop - o) for s, o in zip(PLACE, ORIGIN, strict=True))


class Reader(nn.Module):
    """A network whose only head is the mean brightness of one place."""

    def forward(self, x):
        return [x[(slice(None), slice(None), *INSIDE)].mean((2, 3, 4))]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return (load_template()[0] * 200).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> BrainAgeModel:
    return BrainAgeModel([Member(Reader(), AgeValue(50.0, 10.0))])


def center_of(values: np.ndarray) -> np.ndarray:
    weights = np.abs(values) / np.abs(values).sum()
    return np.array([(axis * weights).sum() for axis in np.indices(weights.shape)])


def test_occlusion_finds_the_place_and_what_it_adds(model, image):
    told: list[tuple[int, int]] = []
    values = occlusion(model, image, mask=32, progress=lambda *of: told.append(of))
    assert values.shape == image.shape
    assert values.dtype == np.float32
    assert (values[uncrop(crop(image)) == 0] == 0).all()
    middle = [(s.start + s.stop) / 2 for s in PLACE]
    assert np.abs(center_of(values) - middle).max() < 4
    whole = 10 * image[PLACE].mean() / 200
    assert 0.2 * whole < values.max() < whole
    assert values.min() > -1e-4
    assert told[-1][0] == told[-1][1] > 50


def test_the_gradient_finds_the_place_and_its_mirror_image(model, image):
    values = gradient(model, image)
    each = 10 * 0.1 * 125 / 16**3 / 2
    assert values[PLACE].max() == pytest.approx(each, rel=0.05)
    mirrored = uncrop(crop(uncrop(crop(values)))[::-1])
    assert np.abs(values - mirrored)[image > 0].max() < each
    assert np.abs(values).sum() == pytest.approx(2 * each * 16**3, rel=0.1)


def test_the_gradient_is_that_of_the_answer(image):
    model = tiny_model(2)
    values = gradient(model, image)
    assert (values[uncrop(crop(image)) == 0] == 0).all()
    ages = []
    for step in (-0.01, 0.01):
        x = crop(image).astype(np.float32) / 200
        x = torch.from_numpy(np.where(x > 0, x + np.float32(step), 0))[None, None]
        with torch.no_grad():
            said = [
                member.target.ages(head).mean()
                for member in model.members
                for side in (x, x.flip(2))
                for head in member.net(side)
            ]
        ages.append(float(torch.stack(said).mean()))
    rise = (ages[1] - ages[0]) / 0.02 * 0.1
    assert float(values.sum()) / 125 == pytest.approx(rise, rel=0.3)


def test_a_picture(image, tmp_path):
    values = np.zeros(image.shape, np.float32)
    values[40:60, 40:80, 30:50] = 2
    assert save_overlay(image, values, tmp_path / "a.png", unit="years") == 2
    pixels = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert (pixels[..., 0] - pixels[..., 2] > 60).mean() > 0.01
    assert save_overlay(image, np.zeros_like(values), tmp_path / "b.png") == 0


def test_bad_requests(model, image):
    with pytest.raises(ExplainError, match="valid are occlusion, gradient"):
        explain(model, image, "lime")
    with pytest.raises(ExplainError, match="got places of 200 voxels"):
        occlusion(model, image, mask=200)
    with pytest.raises(ExplainError, match="expected"):
        save_overlay(image[1:], image[1:].astype(np.float32), "x.png")
