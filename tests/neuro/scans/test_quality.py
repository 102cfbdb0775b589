"""Measures and flags, the reference of intensities, and the picture."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from volume_cases import DATA, needs_brains

from neuro.scans.quality import (
    IntensityReference,
    Quality,
    dice,
    field_of_view,
    intensity_features,
    judge,
    save_picture,
    told_apart,
)
from neuro.scans.template import FULL_SCALE, MNI_AFFINE, MNI_SHAPE, load_template

GOOD = Quality(0.945, 1400.0, 1.0, (0.95, 1.2), 1.2)


def brain(seed: int = 0, noise: float = 6.0, shade: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    template, mask = load_template()
    values = template / np.percentile(template[mask], 99) * FULL_SCALE
    values = values * (
        1 + rng.normal(0, 0.03) + shade * np.linspace(-1, 1, MNI_SHAPE[0])[:, None, None]
    )
    values = values + rng.normal(0, noise + rng.normal(0, 0.5), MNI_SHAPE)
    return np.where(mask, np.clip(values, 0, 255), 0).astype(np.uint8)


def test_dice():
    mask = load_template()[1]
    assert dice(mask, mask) == 1
    assert dice(mask, ~mask) == 0
    assert dice(mask & False, mask & False) == 0


def test_field_of_view():
    assert field_of_view(MNI_AFFINE, MNI_SHAPE) == 1
    whole = load_template()[1].sum()
    upper = load_template()[1][:, :, 40:].sum()
    cut = MNI_AFFINE.copy()
    cut[2, 3] += 80
    assert field_of_view(cut, (99, 117, 55)) == pytest.approx(upper / whole, abs=0.03)
    assert field_of_view(np.diag([2.0, 2, 2, 1]), (3, 3, 3)) < 0.001


@pytest.mark.parametrize(
    ("quality", "name", "fatal"),
    [
        ({"dice": 0.93}, "registration", False),
        ({"dice": 0.911}, "registration", True),
        ({"dice": 0.5}, "registration", True),
        ({"dice": float("nan")}, "registration", True),
        ({"field_of_view": 0.9}, "field_of_view", False),
        ({"field_of_view": 0.5}, "field_of_view", True),
        ({"brain_ml": 400.0}, "brain_volume", True),
        ({"brain_ml": 850.0}, "brain_volume", False),
        ({"brain_ml": 2500.0}, "brain_volume", True),
        ({"stretch": (0.5, 1.1)}, "stretch", False),
        ({"spacing_mm": 6.0}, "coarse", False),
    ],
)
def test_flags(quality, name, fatal):
    assert judge(GOOD) == []
    assert judge(Quality(**{**GOOD.as_record(), "brain_ml": None})) == []
    (flag,) = judge(Quality(**{**GOOD.as_record(), **quality}))
    assert (flag.name, flag.fatal) == (name, fatal)
    assert "\n" not in flag.text


@pytest.mark.parametrize(("share", "fatal"), [(0.02, False), (0.028, True)])
def test_a_brain_that_shines_is_flagged_and_refused_where_much_of_it_does(share, fatal):
    image = np.rint(load_template()[0] * 200).astype(np.uint8)
    inside = np.flatnonzero(image)
    np.put(image, inside[np.random.default_rng(0).random(inside.size) < share], 255)
    (flag,) = judge(GOOD, image=image)
    assert (flag.name, flag.fatal) == ("bright", fatal)
    assert "contrast agent" in flag.text


def test_flags_of_people_and_scanners():
    assert judge(GOOD, distance=0.9, age=20, trained_ages=(20, 82)) == []
    names = [flag.name for flag in judge(GOOD, distance=1.5, age=7, trained_ages=(20, 82))]
    assert names == ["intensity", "age"]
    assert judge(GOOD, age=7) == []
    bad = judge(Quality(0.3, 400.0, 0.9, (0.9, 1.0), 1.0))
    assert [flag.fatal for flag in bad] == [True, True, False]


def test_what_fits_after_much_stretching_is_no_brain():
    """A knee came through with Dice 0.82, 822 mL and a stretch of 1.81."""
    knee = judge(Quality(0.82, 822.0, 1.0, (0.83, 1.81), 2.0))
    assert [(flag.name, flag.fatal) for flag in knee] == [
        *(("registration", True), ("brain_volume", False), ("stretch", False)),
    ]
    assert not any(flag.fatal for flag in judge(Quality(0.95, 822.0, 1.0, (0.9, 1.6), 1.0)))


def test_record_comes_back():
    assert Quality.from_record(json.loads(json.dumps(GOOD.as_record()))) == GOOD


def test_reference(tmp_path):
    reference = IntensityReference.fit(brain(seed) for seed in range(20))
    assert reference.count == 20
    assert reference.distance(brain(0)) <= 1
    assert reference.distance(brain(99)) < 1.5
    assert reference.distance(brain(99, noise=20)) > 2
    assert reference.distance(255 - brain(99)) > 2
    assert reference.distance(np.zeros(MNI_SHAPE, np.uint8)) == np.inf
    reference.save(tmp_path / "r.json")
    again = IntensityReference.load(tmp_path / "r.json")
    assert again.distance(brain(99)) == reference.distance(brain(99))
    for content in (
        "{}",
        "[]",
        "no json",
        '{"format": 1, "mean": [1], "covariance": [], "limit": 1}',
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(ValueError, match="no statistics"):
            IntensityReference.load(tmp_path / "r.json")


def test_reference_wants_brains():
    with pytest.raises(ValueError, match="at least 20"):
        IntensityReference.fit([brain()])
    with pytest.raises(ValueError, match="no brain"):
        IntensityReference.fit([np.zeros(MNI_SHAPE, np.uint8)] * 20)


def test_picture(tmp_path):
    save_picture(brain(), tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (117 * 3, (99 + 99 + 117) * 3, 3)
    # The brain is grey, the outline is not, and both are there.
    grey = picture.max(axis=2) == picture.min(axis=2)
    assert 1000 < (~grey).sum() < 10_000
    assert (picture[grey] > 100).mean() > 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


@pytest.mark.slow
@needs_brains
def test_reference_of_real_brains():
    import nibabel as nib

    files = sorted((DATA / "ixi_hh" / "brains_mni_2mm").iterdir())
    images = [np.asarray(nib.load(path).dataobj) for path in files]
    reference = IntensityReference.fit(images[:100])
    others = np.array([reference.distance(image) for image in images[100:]])
    assert (others < 1).mean() > 0.9
    assert others.max() < 2
    noisy = np.clip(images[-1] + np.random.default_rng(0).normal(0, 15, MNI_SHAPE), 0, 255)
    assert reference.distance(np.where(images[-1] > 0, noisy, 0).astype(np.uint8)) > 2
    assert len(intensity_features(images[0])) == 10


def test_what_is_too_far_from_any_training_scan_is_refused():
    """Old people at another scanner have 1.9 to 3.7, averaged templates up to 5.5."""
    for distance, fatal in ((3.7, False), (5.5, False), (7.2, True), (float("inf"), True)):
        (flag,) = judge(GOOD, distance=distance)
        assert (flag.name, flag.fatal) == ("intensity", fatal)


def test_what_lies_outside_of_the_scan_cannot_overlap():
    cut = judge(Quality(0.89, 1400.0, 0.9, (0.95, 1.2), 1.2))
    assert [(flag.name, flag.fatal) for flag in cut] == [("field_of_view", False)]


def test_another_contrast_is_flagged_unless_the_distance_says_so():
    (flag,) = judge(GOOD, contrast=-2.6)
    assert (flag.name, flag.fatal) == ("contrast", False)
    assert "flatter" in flag.text
    assert [flag.name for flag in judge(GOOD, contrast=5.0, distance=1.5)] == ["intensity"]
    assert judge(GOOD, contrast=1.2) == []
    assert judge(GOOD, contrast=float("nan")) != []


@pytest.mark.parametrize("power", [0.8, 1.0, 1.25])
def test_a_t1_weighted_brain_is_one_whatever_its_gamma(power):
    image = ((brain() / 200.0) ** power * 200).clip(0, 255).astype(np.uint8)
    assert "not_t1" not in [flag.name for flag in judge(GOOD, image=image)]


@pytest.mark.parametrize("kind", ["inverted", "t2", "pd"])
def test_what_is_not_t1_weighted_is_refused(kind):
    value = brain(noise=2.0) / 200.0
    other = {
        "inverted": 1.2 - value,
        "t2": np.clip(1.1 - 0.75 * value, 0, None),
        "pd": 0.55 + 0.25 * np.sin(np.clip(value, 0, 1) * np.pi) - 0.1 * value,
    }[kind]
    image = (np.where(value > 0, other, 0) * 200).clip(0, 255).astype(np.uint8)
    flags = judge(GOOD, image=image)
    assert ("not_t1", True) in [(flag.name, flag.fatal) for flag in flags]


@pytest.mark.parametrize("value", [1.0004, 1.03, 1.049, 1.3])
def test_a_number_is_told_from_its_limit(value):
    text = told_apart(value, 1.0)[0]
    assert float(text) > 1
    assert len(text) <= 6


def test_a_barely_far_scan_is_not_one_time_as_far():
    (flag,) = judge(GOOD, distance=1.03)
    assert "1.03 times as far" in flag.text
    (flag,) = judge(GOOD, distance=6.52)
    assert "6.52 times" in flag.text
    assert "up to 6.5 get" in flag.text
    (flag,) = judge(GOOD, age=82.3, trained_ages=(20.17, 82.0))
    assert "20.2 to 82.0, this person is 82.3" in flag.text
    (flag,) = judge(replace(GOOD, brain_ml=899.8))
    assert "899.8 mL (adults: 900" in flag.text
