"""Predicted ages with intervals and refusals, from models made on the spot."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_brain_models import tiny_model

from neuro.age.calibrate import BiasCorrection, CalibrationError, Conformal
from neuro.age.model import ModelError
from neuro.age.predict import BrainAge
from neuro.dataset import BrainDataset
from neuro.scans.grid import crop, uncrop
from neuro.scans.preprocess import Prepared
from neuro.scans.quality import Flag, IntensityReference, Quality
from neuro.scans.template import MNI_AFFINE, load_template
from neuro.train import describe_scans_

FINE = Quality(0.95, 1400.0, 1.0, (0.9, 1.1), 1.0)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return (load_template()[0] * 200).astype(np.uint8)


@pytest.fixture(scope="module")
def prepared(image) -> Prepared:
    return Prepared(image, MNI_AFFINE, FINE, {})


@pytest.fixture(scope="module")
def reference(image) -> IntensityReference:
    rng = np.random.default_rng(0)
    return IntensityReference.fit(
        np.clip(image * rng.uniform(0.9, 1.1) + (image > 0) * rng.uniform(0, 9), 0, 255).astype(
            np.uint8
        )
        for _ in range(20)
    )


@pytest.fixture(scope="module")
def brain(tmp_path_factory, reference) -> BrainAge:
    made = tiny_model(
        conformal=Conformal(tuple(np.linspace(-8, 8, 40))),
        bias=BiasCorrection("cole", 0.8, 10.0, 40),
        reference=reference,
    )
    return BrainAge.load(made.save(tmp_path_factory.mktemp("model") / "m.safetensors"))


@pytest.fixture(scope="module")
def seen(brain, prepared):
    return brain.look(prepared, name="me", age=63.5)


def test_looking_is_the_models_own_prediction(brain, prepared, seen, reference):
    said = brain.model.predict(crop(prepared.image)[None])
    assert seen.raw_age == pytest.approx(said.ages[0], abs=1e-4)
    assert np.allclose(seen.by_head, said.by_head[0], atol=1e-4)
    assert (seen.by_head.shape, seen.name, seen.age) == ((2, 4), "me", 63.5)
    assert seen.distance == pytest.approx(reference.distance(uncrop(crop(prepared.image))))
    assert seen.block_inputs.dtype == np.float16
    for inputs, member in zip(seen.block_inputs, brain.model.members, strict=True):
        x = torch.from_numpy(crop(prepared.image)[None, None].astype(np.float32) / 200)
        with torch.no_grad():
            wanted = member.net.block_input(x, -1)[0]
        assert np.allclose(inputs, wanted, atol=2e-3, rtol=2e-3)


def test_an_estimate_has_an_interval_and_a_gap(brain, seen):
    estimate = brain.estimate(seen)
    assert estimate.age == estimate.raw == seen.raw_age
    assert estimate.low < estimate.age < estimate.high
    assert estimate.gap == pytest.approx(estimate.age - 63.5)
    assert (estimate.corrected, estimate.error) == (None, "")
    narrow = brain.estimate(seen, confidence=0.5)
    assert estimate.low < narrow.low < narrow.high < estimate.high
    with pytest.raises(CalibrationError, match="valid is between 0 and 1"):
        brain.estimate(seen, confidence=1.5)


def test_too_few_residuals_leave_the_interval_open(brain, seen):
    assert brain.estimate(seen, confidence=0.99).low is None
    bare = dataclasses.replace(brain, model=tiny_model(), reference=None)
    estimate = bare.estimate(seen)
    assert (estimate.low, estimate.high) == (None, None)
    assert estimate.age is not None


def test_a_corrected_age_stands_apart(brain, seen):
    estimate = brain.estimate(seen, bias=brain.model.bias)
    assert estimate.age == seen.raw_age
    assert estimate.corrected == pytest.approx((seen.raw_age - 10) / 0.8)
    assert (estimate.uncorrected, brain.estimate(seen).uncorrected) == ("", "")
    needs_age = BiasCorrection("beheshti", -0.2, 10.0, 40)
    assert brain.estimate(seen, bias=needs_age).corrected is not None
    unknown = dataclasses.replace(seen, age=None)
    assert brain.estimate(unknown, bias=needs_age).corrected is None
    assert "known age" in brain.estimate(unknown, bias=needs_age).uncorrected
    assert brain.estimate(unknown).gap is None


def test_no_correction_where_the_bias_is_not_known(brain, seen):
    bias = brain.model.bias
    odd = dataclasses.replace(seen, flags=[Flag("coarse", "its slices are 5 mm thick")])
    assert brain.estimate(odd, bias=bias).corrected is None
    assert brain.estimate(odd, bias=bias).age == seen.raw_age
    assert "flagged" in brain.estimate(odd, bias=bias).uncorrected
    young, old = (dataclasses.replace(brain, trained_ages=ages) for ages in ((0, 1), (100, 120)))
    for other in (young, old):
        assert other.estimate(seen, bias=bias).corrected is None
    steep = BiasCorrection("cole", 0.01, 10.0, 40)  # an age of thousands of years
    far = dataclasses.replace(brain, trained_ages=(0, 120)).estimate(seen, bias=steep)
    assert (far.corrected, far.flags) == (None, [])
    assert "beyond the trained ages, 0 to 120" in far.uncorrected


def test_no_age_is_negative(brain, seen):
    low = dataclasses.replace(seen, raw_age=-7.0)
    for estimate in (
        brain.estimate(low, bias=brain.model.bias),
        brain.estimate(low, site=Taught()),
    ):
        assert (estimate.age, estimate.raw, estimate.low) == (0, 0, 0)
        assert estimate.high > 0
        assert estimate.corrected is None


class Taught:
    def corrections(self, seen):
        return np.full(len(seen), -3.0)


def test_what_a_site_taught_moves_age_and_interval(brain, seen):
    plain, taught = brain.estimate(seen), brain.estimate(seen, site=Taught())
    assert taught.age == pytest.approx(plain.age - 3)
    assert taught.low == pytest.approx(plain.low - 3)
    assert taught.raw == plain.raw
    assert taught.gap == pytest.approx(plain.gap - 3)


def test_a_fatal_flag_refuses(brain, prepared):
    bad = dataclasses.replace(prepared, quality=dataclasses.replace(FINE, dice=0.5))
    estimate = brain.estimate(brain.look(bad, age=40), site=Taught())
    assert (estimate.age, estimate.low, estimate.high, estimate.gap) == (None,) * 4
    assert estimate.error.startswith("the brain overlaps the template's with Dice 0.50")


def test_a_brain_with_a_hole_is_refused(brain, prepared, image):
    """Where a scan held no finite numbers, say; its outline may well be that of a brain."""
    for end, fatal in ((53, False), (75, True)):
        holed = image.copy()
        holed[50:end] = 0
        seen = brain.look(dataclasses.replace(prepared, image=holed))
        (hole,) = (flag for flag in seen.flags if flag.name == "holes")
        assert hole.fatal == fatal
        assert (brain.estimate(seen).age is None) == fatal


def test_scans_unlike_the_training_scans_are_flagged(brain, prepared, image, seen):
    assert seen.flags == []
    bright = dataclasses.replace(prepared, image=np.where(image > 0, 250, 0).astype(np.uint8))
    strange = brain.look(bright, age=7)
    assert {flag.name for flag in strange.flags} == {"intensity", "not_t1", "age"}
    assert strange.distance > 1
    old = dataclasses.replace(seen, raw_age=99.0)
    (flag,) = brain.estimate(old).flags
    assert flag.name == "predicted_age"
    assert "99 lies beyond" in flag.text


def test_the_hash_is_of_the_weights_alone(tmp_path, brain):
    again = dataclasses.replace(brain.model, bias=None, reference=None, about={})
    source = tmp_path / "source.safetensors"
    brain.model.save(source)
    other = BrainAge.load(again.save_beside(source, tmp_path / "other.safetensors"))
    brain = BrainAge.load(source)
    assert other.sha256 == brain.sha256
    assert len(brain.sha256) == 64
    assert other.reference is None
    assert other.trained_ages == (0, 120)
    assert math.isnan(
        other.look(Prepared(load_template()[0].astype(np.uint8), MNI_AFFINE, FINE, {})).distance
    )
    less = BrainAge.load(tiny_model(1).save(tmp_path / "less.safetensors"))
    assert less.sha256 != brain.sha256


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing at all")
    with pytest.raises(ModelError, match="no intact"):
        BrainAge.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no model at"):
        BrainAge.load(tmp_path / "b.safetensors")


def test_a_model_describes_its_training_scans(image):
    rng = np.random.default_rng(1)
    volumes = np.stack(
        [
            np.clip(crop(image) * rng.uniform(0.9, 1.1) + rng.integers(0, 5), 0, 255)
            for _ in range(20)
        ]
    ).astype(np.uint8)
    data = BrainDataset(tuple(map(str, range(20))), np.linspace(20, 80, 20), volumes)
    described = describe_scans_(tiny_model(1), data)
    assert described.reference is not None
    assert 0 < described.reference.distance(uncrop(volumes[0])) <= 1
    assert described.population is not None
    assert described.population.count == 20
    assert describe_scans_(tiny_model(1), data.take(range(2))).reference is None


def test_any_scan_gives_a_number_that_stays_marked(brain, prepared):
    bad = dataclasses.replace(prepared, quality=dataclasses.replace(FINE, dice=0.5))
    seen = brain.look(bad)
    assert brain.estimate(seen).age is None
    estimate = brain.estimate(seen, any_scan=True)
    assert estimate.age == seen.raw_age
    assert estimate.error == ""
    assert [flag.name for flag in estimate.flags] == ["refused", "registration"]
