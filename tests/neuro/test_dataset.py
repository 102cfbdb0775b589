"""Brains with ages, and folds that stay the same."""

from __future__ import annotations

import hashlib

import nibabel
import numpy as np
import pytest
from brain_cases import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from neuro.dataset import (
    BrainDataset,
    DatasetError,
    folds,
    read_ages,
)
from neuro.scans.grid import GRID, as_input, crop
from neuro.scans.read import VolumeError
from neuro.scans.template import MNI_AFFINE, MNI_SHAPE


def test_a_folder_is_read_and_cropped(tmp_path):
    ages = write_dataset(tmp_path)
    data = BrainDataset.read(tmp_path)
    assert data.ids == ("sub-0", "sub-1", "sub-2")
    assert data.ages.tolist() == ages
    assert data.volumes.shape == (3, *GRID)
    assert data.volumes.dtype == np.uint8
    assert data.take([2, 0]).ids == ("sub-2", "sub-0")
    x = as_input(data.volumes)
    assert x.shape == (3, 1, *GRID)
    assert 0.9 < np.percentile(x[x > 0], 99) <= 1.01


def test_other_scales_become_uint8(tmp_path):
    write_dataset(tmp_path)
    path = tmp_path / "sub-1_T1w.nii.gz"
    values = np.asarray(nibabel.load(path).dataobj).astype(np.float32) * 17
    nibabel.save(nibabel.Nifti1Image(values, MNI_AFFINE), path)
    volume = BrainDataset.read(tmp_path).volumes[1]
    assert volume.dtype == np.uint8
    assert np.percentile(volume[volume > 0], 99) == 200


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("participant_id\tsex\nsub-0\tF\n", "columns participant_id and age"),
        ("participant_id\tage\nsub-0\tn/a\n", "line 2: age 'n/a'"),
        ("participant_id\tage\nsub-0\t-4\n", "line 2: age '-4'"),
        ("participant_id\tage\nsub-0\t30\nsub-0\t31\n", "line 3: sub-0 is there twice"),
        ("participant_id\tage\n", "no participants"),
        ("participant_id\tage\nsub-9\t30\n", "no volume of sub-9"),
    ],
)
def test_bad_tables_are_named(tmp_path, table, message):
    write_dataset(tmp_path)
    (tmp_path / "participants.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(DatasetError, match=message) as caught:
        BrainDataset.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_volumes_are_named(tmp_path):
    write_dataset(tmp_path)
    path = tmp_path / "sub-1_T1w.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 9, 9), np.uint8), MNI_AFFINE), path)
    with pytest.raises(DatasetError, match=r"sub-1_T1w.*\(9, 9, 9\)"):
        BrainDataset.read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="sub-1_T1w"):
        BrainDataset.read(tmp_path)
    with pytest.raises(DatasetError, match=r"no participants\.tsv"):
        BrainDataset.read(tmp_path / "a" / "b")


def test_byte_order_marks_do_not_matter(tmp_path):
    path = tmp_path / "participants.tsv"
    path.write_text("participant_id\tage\na\t30\n", encoding="utf-8-sig")
    assert read_ages(path) == {"a": 30.0}


@settings(max_examples=60)
@given(
    ages=st.lists(st.integers(18, 90), min_size=5, max_size=60),
    parts=st.integers(2, 5),
    seed=st.integers(0, 5),
)
def test_folds_hold_each_subject_once_and_equal_ages(ages, parts, seed):
    ids = [f"s{i}" for i in range(len(ages))]
    dealt = folds(ids, ages, parts, seed)
    assert sorted(np.concatenate(dealt)) == list(range(len(ages)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    # One subject of each round of neighbours in age, so sums differ by one round's spread at most.
    ordered = np.sort(ages)
    for part in dealt:
        mine = np.sort(np.array(ages)[part])
        for round_, age in enumerate(mine[: len(ages) // parts]):
            assert ordered[round_ * parts] <= age <= ordered[round_ * parts + parts - 1]


def test_folds_do_not_depend_on_the_order_of_the_table():
    ids, ages = [f"s{i}" for i in range(30)], list(range(20, 80, 2))
    dealt = folds(ids, ages, 5, 0)
    turned = folds(ids[::-1], ages[::-1], 5, 0)
    names = [{ids[i] for i in part} for part in dealt]
    assert names == [{ids[::-1][i] for i in part} for part in turned]


def test_folds_are_the_published_ones():
    """Changing how subjects are dealt would make every number in `benchmarks/results` another's."""
    ids, ages = [f"s{i}" for i in range(23)], [20 + (7 * i) % 41 for i in range(23)]
    dealt = [part.tolist() for part in folds(ids, ages, 5, 0)]
    digest = hashlib.sha256(str(dealt).encode()).hexdigest()
    assert digest[:16] == "e0e9c1cf28bead16"


def test_too_many_folds_are_refused():
    with pytest.raises(DatasetError, match="3 subjects to 5 folds"):
        folds(["a", "b", "c"], [1, 2, 3], 5, 0)


def test_crop_refuses_other_grids():
    assert crop(np.zeros(MNI_SHAPE, np.uint8)).shape == GRID
    with pytest.raises(VolumeError, match="enn brain preprocess"):
        crop(np.zeros((91, 109, 91)))
