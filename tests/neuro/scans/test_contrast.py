"""How a power law on a brain's intensities shows, on the brains that its numbers were fitted to."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from volume_cases import DATA, needs_brains

from enn_core.files.shipped import NotInstalledError
from neuro.age.predict import BrainAge
from neuro.scans.contrast import FITTED_TO, LEAST_WHITE_TO_GREY, LIMIT, deviation, white_to_grey
from neuro.scans.grid import crop, uncrop
from neuro.scans.preprocess import to_uint8


@needs_brains
def test_a_gamma_shows_and_ordinary_brains_do_not():
    paths = sorted((DATA / "ixi_hh" / "brains_mni_2mm").iterdir())[::15]
    images = [np.asarray(nib.load(path).dataobj) for path in paths]

    def away(gamma: float) -> np.ndarray:
        changed = [to_uint8((image / 200).astype(np.float32) ** gamma) for image in images]
        return np.array([deviation(uncrop(crop(image))) for image in changed])

    assert (np.abs(away(1.0)) <= LIMIT).mean() >= 0.9
    assert (away(0.8) < -LIMIT).mean() >= 0.9
    assert (away(1.25) > LIMIT).mean() >= 0.9
    assert all(white_to_grey(image) > LEAST_WHITE_TO_GREY for image in images)


def test_the_numbers_belong_to_the_shipped_model():
    try:
        brain = BrainAge.load()
    except NotInstalledError as error:
        pytest.skip(str(error))
    assert brain.sha256 == FITTED_TO
