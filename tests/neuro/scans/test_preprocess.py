"""From a head to the grid: the steps by themselves, and real heads against the shipped brains."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from volume_cases import DATA, OBLIQUE, blob, needs_brains, needs_heads, rearranged, write

from neuro.scans.preprocess import (
    Preprocessor,
    at_2_mm,
    foreground,
    parameters,
    to_native,
    to_uint8,
)
from neuro.scans.quality import Quality, dice, judge
from neuro.scans.read import VolumeError, read_volume
from neuro.scans.template import FULL_SCALE, MNI_AFFINE, MNI_SHAPE, load_template

HEADS = DATA / "ixi_hh" / "heads_2mm"
BRAINS = DATA / "ixi_hh" / "brains_mni_2mm"
NAME = "IXI601-HH-2700_T1w.nii.gz"


@pytest.fixture(scope="session")
def prepare() -> Preprocessor:
    return Preprocessor()


def head(name: str = NAME) -> nib.Nifti1Image:
    return nib.load(HEADS / name)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return dice(one > FULL_SCALE // 10, other > FULL_SCALE // 10)


# --- steps -------------------------------------------------------------------------------------


def test_2_mm_stays():
    affine = np.diag([2.0, -2.0, 2.01, 1])
    voxels, same = at_2_mm(blob(dtype="float32"), affine)
    assert same is affine
    assert np.array_equal(voxels, blob(dtype="float32"))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.9, 0.9, 1.4), (1.0, 1.0, 4.0)])
def test_2_mm_keeps_where_things_are(spacing):
    # A smooth ball at a known place, seen through another grid.
    centre = np.array([7.0, -4.0, 3.0])
    shape = np.round(120 / np.array(spacing)).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2)

    def ball(shape: np.ndarray, affine: np.ndarray) -> np.ndarray:
        points = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
        return np.exp(-((points - centre) ** 2).sum(axis=-1) / (2 * 12**2)).astype(np.float32)

    voxels, target = at_2_mm(ball(shape, affine), affine)
    assert voxels.dtype == np.float32
    assert np.allclose(np.linalg.norm(target[:3, :3], axis=0), 2)
    assert np.allclose(np.array(voxels.shape) * 2, 120, atol=2)
    assert np.abs(voxels - ball(np.array(voxels.shape), target)).max() < 0.02


def test_foreground():
    values = np.zeros((30, 30, 30), np.float32)
    values[8:20, 8:20, 8:20] = 100
    assert np.array_equal(foreground(values), values > 0)
    assert np.array_equal(foreground(values - 50), values > 0)
    with pytest.raises(VolumeError, match="--input head"):
        foreground(np.random.default_rng(0).random((30, 30, 30), np.float32))


def test_intensity():
    values = np.zeros(MNI_SHAPE, np.float32)
    values[20:60, 20:60, 20:60] = np.linspace(1, 1000, 40)
    scaled = to_uint8(values)
    assert scaled.dtype == np.uint8
    assert np.percentile(scaled[scaled > 0], 99) == FULL_SCALE
    assert np.array_equal(to_uint8(scaled.astype(np.float32)), scaled)
    assert np.array_equal(to_uint8(values * 37), scaled)
    with pytest.raises(VolumeError, match="no brain"):
        to_uint8(np.zeros(MNI_SHAPE, np.float32))


def test_input_kind_that_there_is_not(prepare, tmp_path):
    volume = read_volume(write(tmp_path / "a.nii", blob()))
    with pytest.raises(VolumeError, match="valid are head, brain, mni"):
        prepare(volume, "knee")


# --- volumes in MNI space ----------------------------------------------------------------------


def test_template_as_mni(prepare, tmp_path):
    values = (load_template()[0] * 1000).astype(np.int16)
    prepared = prepare(read_volume(write(tmp_path / "a.nii.gz", values, MNI_AFFINE)), "mni")
    assert prepared.image.shape == MNI_SHAPE
    assert prepared.quality.dice > 0.99
    assert prepared.quality.field_of_view == 1
    assert prepared.quality.brain_ml is None
    assert judge(prepared.quality) == []
    assert np.allclose(prepared.to_mni, MNI_AFFINE)
    record = json.loads(json.dumps(prepared.record))
    assert record["parameters"] == parameters()
    assert Quality.from_record(record["quality"]) == prepared.quality
    assert [step["step"] for step in record["steps"]] == ["to the grid", "intensity"]


def test_mni_in_another_order_is_the_same(prepare, tmp_path):
    values = (load_template()[0] * 200).astype(np.uint8)
    image = nib.Nifti1Image(values, MNI_AFFINE)
    images = []
    for number, copy in enumerate((image, rearranged(image, (2, 1, 0), (-1, 1, -1)))):
        copy.to_filename(tmp_path / f"{number}.nii.gz")
        images.append(prepare(read_volume(tmp_path / f"{number}.nii.gz"), "mni").image)
    assert np.array_equal(*images)


def test_mni_of_1_mm(prepare, tmp_path):
    from nilearn.datasets import load_mni152_template

    path = tmp_path / "a.nii.gz"
    load_mni152_template(resolution=1).to_filename(path)
    prepared = prepare(read_volume(path), "mni")
    assert prepared.quality.dice > 0.97


def test_no_mni_space(prepare, tmp_path):
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 500
    values = (load_template()[0] * 200).astype(np.uint8)
    with pytest.raises(VolumeError, match="not in MNI space"):
        prepare(read_volume(write(tmp_path / "a.nii.gz", values, affine)), "mni")


@needs_brains
def test_shipped_brains_stay_as_they_are(prepare):
    for path in sorted(BRAINS.iterdir())[::30]:
        prepared = prepare(read_volume(path), "mni")
        assert np.array_equal(prepared.image, np.asarray(nib.load(path).dataobj))
        assert judge(prepared.quality) == []


# --- real heads --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared_head(prepare):
    steps: list[str] = []
    return prepare(read_volume(HEADS / NAME), progress=steps.append), steps


@needs_heads
@needs_brains
def test_head_becomes_the_shipped_brain(prepared_head):
    prepared, steps = prepared_head
    assert steps == ["2 mm", "brain extraction", "registration", "intensity"]
    shipped = np.asarray(nib.load(BRAINS / NAME).dataobj)
    assert overlap(prepared.image, shipped) > 0.985
    inside = (prepared.image > 20) & (shipped > 20)
    assert np.corrcoef(prepared.image[inside], shipped[inside])[0, 1] > 0.98
    assert prepared.quality.dice > 0.93
    assert 1000 < prepared.quality.brain_ml < 1800
    assert judge(prepared.quality) == []


@needs_heads
def test_maps_go_back_to_the_scan(prepared_head):
    prepared, _ = prepared_head
    volume = read_volume(HEADS / NAME)
    back = to_native(prepared.image, prepared.to_mni, volume)
    assert back.shape == volume.file_shape
    assert np.allclose(back.affine, head().affine)
    values, raw = back.get_fdata(), head().get_fdata()
    inside = values > 40
    assert inside.sum() * 8 / 1000 == pytest.approx(prepared.quality.brain_ml, rel=0.25)
    # Where the map has the brain, the scan has it too.
    assert np.corrcoef(values[inside], raw[inside])[0, 1] > 0.95


@pytest.mark.slow
@needs_heads
@pytest.mark.parametrize(("order", "flips"), [((0, 1, 2), (-1, -1, -1)), ((2, 0, 1), (1, -1, 1))])
def test_flips_and_permutations_give_the_same_brain(prepare, prepared_head, tmp_path, order, flips):
    rearranged(head(), order, flips).to_filename(tmp_path / "a.nii.gz")
    again = prepare(read_volume(tmp_path / "a.nii.gz"))
    assert np.array_equal(again.image, prepared_head[0].image)
    assert again.quality == prepared_head[0].quality


@pytest.mark.slow
@needs_heads
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.2, 1.8), (1.7, 3.0, 1.7)])
def test_resampled_heads_give_nearly_the_same_brain(prepare, prepared_head, tmp_path, spacing):
    from nibabel.processing import resample_to_output

    # On another grid along the world's axes, and turned by what the header says.
    resample_to_output(head(), spacing, order=1).to_filename(tmp_path / "a.nii.gz")
    again = prepare(read_volume(tmp_path / "a.nii.gz"))
    assert overlap(again.image, prepared_head[0].image) > 0.97


@pytest.mark.slow
@needs_heads
def test_brain_that_was_extracted_elsewhere(prepare, prepared_head, tmp_path):
    prepared, _ = prepared_head
    mask = to_native(prepared.image, prepared.to_mni, read_volume(HEADS / NAME)).get_fdata() > 10
    image = nib.Nifti1Image(np.where(mask, head().get_fdata(), 0).astype("float32"), head().affine)
    image.to_filename(tmp_path / "a.nii.gz")
    again = prepare(read_volume(tmp_path / "a.nii.gz"), "brain")
    assert overlap(again.image, prepared.image) > 0.97
    assert judge(again.quality) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["IXI533-Guys-1066-T1_fullres", "colin27_ch2", "brainchop_t1_crop"]
)
def test_full_resolution_heads_of_other_places(prepare, name):
    path = DATA / "t1w_misc" / f"{name}.nii.gz"
    if not path.is_file():
        pytest.skip(f"no {path} (set ENN_DATA)")
    prepared = prepare(read_volume(path))
    assert prepared.quality.dice > 0.93
    assert prepared.quality.field_of_view > 0.97
    assert not [flag for flag in judge(prepared.quality) if flag.fatal]


@pytest.mark.slow
def test_what_is_no_head_is_never_passed_on_silently(prepare, tmp_path):
    rng = np.random.default_rng(0)
    cases = {
        "noise": rng.integers(0, 1000, (90, 90, 90)),
        "ball": blob((90, 90, 90)),
        "bars": (np.indices((90, 90, 90)).sum(axis=0) // 12 % 2) * 500
        + rng.integers(0, 9, (90,) * 3),
    }
    for name, values in cases.items():
        path = write(tmp_path / f"{name}.nii.gz", values.astype("int16"), np.diag([2.0, 2, 2, 1]))
        try:
            prepared = prepare(read_volume(path))
        except VolumeError:
            continue
        assert judge(prepared.quality), name


def test_oblique_headers_are_no_trouble_for_ants():
    from neuro.scans.preprocess import _ants_image

    image = _ants_image(blob(dtype="float32"), OBLIQUE)
    assert np.allclose(image.spacing, (4, 5, 6))
