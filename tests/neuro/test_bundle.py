"""A model as a MONAI bundle: MONAI reads it, checks it and predicts with it as we do."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.bundle.properties import MetaProperties
from tiny_brain_models import tiny_model

from neuro.bundle import AgeTable, write_bundle
from neuro.scans.batch import prepare_scan
from neuro.scans.grid import as_input, crop
from neuro.scans.template import MNI_AFFINE, load_template


@pytest.fixture(scope="module")
def model():
    about = {"ages": [20.0, 82.0], "data": "Some scans", "data_licence": "CC BY-SA 3.0"}
    return tiny_model(about=about)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return write_bundle(model, tmp_path_factory.mktemp("bundle") / "mine", "# Card\n")


def test_the_files_of_a_bundle(bundle):
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        *("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"),
        *("docs/README.md", "docs/data_license.txt"),
    }
    assert "CC BY-SA 3.0" in (bundle / "docs/data_license.txt").read_text()
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    assert "not for diagnosis" in metadata["intended_use"]
    for name, told in MetaProperties.items():
        if told["required"]:
            assert name in metadata


def test_monai_accepts_the_network(bundle):
    configs = bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
    )


def test_monai_predicts_what_the_model_predicts(bundle, model, tmp_path):
    image = (load_template()[0] * 200).astype(np.uint8)
    nib.Nifti1Image(image, MNI_AFFINE).to_filename(tmp_path / "a.nii.gz")
    nib.Nifti1Image(np.roll(image, 25, 0), MNI_AFFINE).to_filename(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii.gz").write_bytes(b"no volume")
    workflow = ConfigWorkflow(
        str(bundle / "configs/inference.json"),
        str(bundle / "configs/metadata.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        kind="mni",
        device=torch.device("cpu"),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.run()
    with (tmp_path / "out" / "ages.csv").open(newline="") as file:
        good, shifted, broken = csv.DictReader(file)
    prepared, _ = prepare_scan(tmp_path / "a.nii.gz", "mni")
    wanted = model.predict(crop(prepared.image)[None]).ages[0]
    assert float(good["predicted_age"]) == pytest.approx(wanted, abs=0.02)
    assert (shifted["predicted_age"], broken["predicted_age"]) == ("", "")
    assert list(good)[:3] == ["file", "predicted_age", "flags"]
    assert "Dice" in shifted["error"]
    assert broken["error"]
    with torch.no_grad():
        said = workflow.network_def(torch.from_numpy(as_input(crop(image)[None])))
    assert said.shape == (1, 1)


def test_no_age_of_the_table_is_negative_and_flags_stand_beside_it(tmp_path):
    item = {"file": "a.nii", "image": torch.zeros(1, 2), "flags": "coarse: 5 mm", "error": ""}
    told = AgeTable(
        torch.nn.Identity(), [item], lambda x, _: x.sum() - 7, "cpu", str(tmp_path / "ages.csv")
    ).run()
    assert told == [
        {"file": "a.nii", "predicted_age": "0.00", "flags": "coarse: 5 mm", "error": ""}
    ]
