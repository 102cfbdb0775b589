"""`enn brain train`, `evaluate` and `calibrate` on made-up brains."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

nib = pytest.importorskip("nibabel")

from tiny_brain_models import tiny_model  # noqa: E402

from apps.cli.main import app  # noqa: E402
from neuro.age import networks  # noqa: E402
from neuro.age.calibrate import Calibration  # noqa: E402
from neuro.age.model import BrainAgeModel  # noqa: E402
from neuro.age.predict import BrainAge  # noqa: E402
from neuro.age.published_weights import published_names  # noqa: E402
from neuro.scans.quality import IntensityReference  # noqa: E402
from neuro.scans.template import MNI_AFFINE, load_template  # noqa: E402

COMMAND = typer.main.get_command(app)
AGES = (25.0, 38, 47, 52, 60, 77)


def run(*args: str | Path) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = COMMAND.main(["brain", *(os.fspath(arg) for arg in args)], standalone_mode=False)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(*args: str | Path) -> str:
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.count("\n") == 1, done.err
    return done.err


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Brains in MNI space, darker inside with age; one person twice, one scan without an age."""
    folder = tmp_path_factory.mktemp("trained")
    scans = folder / "scans"
    scans.mkdir()
    template = load_template()[0] * 200
    lines = ["participant_id\tage"]
    for i, age in enumerate(AGES):
        values = template.copy()
        values[35:65, 40:80, 30:50] *= 1.2 - age / 100
        image = nib.Nifti1Image(np.clip(values, 0, 255).astype(np.uint8), MNI_AFFINE)
        image.to_filename(scans / f"sub-{i:02d}_T1w.nii.gz")
        lines.append(f"sub-{i:02d}\t{age}")
    again = (scans / "sub-00_T1w.nii.gz").read_bytes()
    (scans / "sub-00_run-2_T1w.nii.gz").write_bytes(again)
    (scans / "unknown.nii.gz").write_bytes(again)
    (scans / "participants.tsv").write_text("\n".join(lines) + "\n")
    tiny_model().save(folder / "tiny.safetensors")
    return folder


@pytest.fixture(scope="module")
def common(study) -> tuple[str | Path, ...]:
    return ("--input", "mni", "--cache", study / "cache")


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture():
    def tiny(outputs: int):
        parts = networks.ARCHITECTURES["bins4"]
        return parts(outputs, widths=(4, 4, 4, 4), strides=(2, 2, 1, 1), bins=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.ARCHITECTURES, "tiny", tiny)
        yield


@pytest.fixture(scope="module")
def trained(study, common) -> SimpleNamespace:
    done = run(
        *("train", study / "scans", "--out", study / "run", *common, "--json"),
        *(
            "--architecture",
            "tiny",
            "--epochs",
            "1",
            "--members",
            "2",
            "--views",
            "1",
            "--batch-size",
            "2",
        ),
    )
    assert done.code == 0, done.err
    return SimpleNamespace(**vars(done), folder=study / "run", about=json.loads(done.out))


@pytest.fixture(scope="module")
def scored(study, common, trained) -> SimpleNamespace:
    done = run(
        *("evaluate", study / "scans", "--out", study / "scores", *common, "--variants", "--json"),
        *("--model", study / "tiny.safetensors"),
    )
    assert done.code == 0, done.err
    return SimpleNamespace(**vars(done), folder=study / "scores", said=json.loads(done.out))


def test_training_writes_a_model_and_its_curves(trained):
    assert {path.name for path in trained.folder.iterdir()} == {
        *("model.safetensors", "report.json", "curves.csv", "curves.png", "left_out.csv"),
    }
    assert trained.about["subjects"] == trained.about["out_of_fold"]["n"] == 6
    assert "1 scan without a known age" in trained.err
    assert "1 further scan of people who have one already" in trained.err
    assert read(trained.folder / "left_out.csv") == []
    assert {row["network"] for row in read(trained.folder / "curves.csv")} == {"1", "2"}
    brain = BrainAge.load(trained.folder / "model.safetensors")
    assert brain.trained_ages == (25, 77)
    assert brain.model.population is not None
    assert brain.model.population.count == 6
    assert {file.stat().st_mode & 0o777 for file in trained.folder.iterdir()} == {0o644}


def test_published_weights_are_learnt_on(study, common, tmp_path, monkeypatch):
    sfcn = networks.ARCHITECTURES["sfcn"]

    def of_4_mm(outputs: int, norm: str = "batch", eps: float = 1e-5):
        return torch.nn.AvgPool3d(2), *sfcn(outputs, norm, eps)[1:]

    monkeypatch.setitem(networks.ARCHITECTURES, "sfcn", of_4_mm)
    torch.manual_seed(3)
    given = networks.build("sfcn", outputs=40, layers="plain")
    for name, value in given.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    file = tmp_path / "run_20190719.p"
    torch.save(published_names(given), file)
    asked = ["train", study / "scans", *common, "--weights", file, "--layers", "plain"]
    told = refused(*asked, "--out", tmp_path / "a")
    assert "those of an sfcn, the network is bins4" in told
    (tmp_path / "b.p").write_bytes(b"no checkpoint")
    told = refused(*asked, "--out", tmp_path / "a", "--weights", tmp_path / "b.p")
    assert "b.p" in told
    assert not (tmp_path / "a").exists()

    how = ("--epochs", "1", "--members", "2", "--views", "1", "--batch-size", "3", "--lr", "1e-7")
    done = run(*asked, "--architecture", "sfcn", *how, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(done.out)["weights"] == {"file": file.name, "sha256": digest}
    model = BrainAgeModel.load(tmp_path / "run" / "model.safetensors")
    ours = given.blocks.state_dict()
    for name, value in model.members[1].net.blocks.state_dict().items():
        if name.endswith("conv.weight"):
            torch.testing.assert_close(value, ours[name], atol=1e-5, rtol=0)
    assert model.members[0].net.blocks[5].head.out.out_features == 1


def test_a_trained_model_is_not_overwritten(study, common, trained):
    assert "holds a trained model" in refused("train", study / "scans", "--out", study / "run")


def test_training_refuses_what_cannot_be_trained_on(study, common, tmp_path):
    scans, out = study / "scans", tmp_path / "out"
    for extra, expected in (
        (("--architecture", "resnet"), "valid are bins4, yin2023, sfcn"),
        (("--layers", "orthogonal"), "valid are enn and plain"),
        (("--rule", "loco"), "valid are local, backprop"),
        (("--lr", "3"), "between 0 and 1"),
        (("--device", "tpu9"), "there is no device"),
    ):
        assert expected in refused("train", scans, "--out", out, *common, *extra)
    done = run("train", scans, "--out", out, *common, "--batch-size", "20")
    assert done.code == 2
    assert "6 scans of known age; 5 networks and batches of 20 need 25 or more" in done.err
    assert "no age is known of 1 scan" in refused(
        "train", scans / "unknown.nii.gz", "--out", out, *common
    )


def test_evaluation_of_scans(scored):
    rows = scored.said["scores"]
    assert [row["variant"] for row in rows] == [
        *("as predicted", "2 networks, mirrored", "one network (mean of each), mirrored"),
        *("2 networks, not mirrored", "one network (mean of each), not mirrored"),
    ]
    assert rows[0]["n"] == 7  # both scans of one person
    assert rows[0]["mae"] == pytest.approx(rows[1]["mae"], abs=1e-6)
    assert rows[2]["mae"] >= rows[1]["mae"] - 1e-9
    assert sum(row["n"] for row in scored.said["by_decade"]) == 7
    assert {path.name for path in scored.folder.iterdir()} == {
        *("ages.csv", "scores.csv", "by_decade.csv", "agreement.png", "left_out.csv"),
    }


@pytest.fixture
def one_far(study, tmp_path, monkeypatch) -> Path:
    """A model by which the intensities of the first scan that it looks at are unlike all others."""
    distances = iter([99.0, *[0.5] * 6])
    monkeypatch.setattr(IntensityReference, "distance", lambda self, image: next(distances))
    count = 10
    tiny_model(
        reference=IntensityReference(np.zeros(count), np.eye(count), 1.0, 20),
    ).save(tmp_path / "far.safetensors")
    return tmp_path / "far.safetensors"


def test_evaluation_leaves_out_what_the_model_refuses(study, common, one_far, tmp_path):
    out = tmp_path / "o"
    done = run("evaluate", study / "scans", "--out", out, *common, "--model", one_far, "--variants")
    assert done.code == 1, done.err
    assert "(6 known ages)" in done.out
    (row,) = read(out / "left_out.csv")
    assert "99.0 times as far" in row["error"]
    assert "contrast agent?" in row["error"]
    rows = read(out / "ages.csv")
    assert len(rows) == 6
    assert list(rows[0]) == ["participant_id", "predicted_age", "flags", "age"]


def test_calibration_leaves_out_what_the_model_refuses(study, common, one_far, tmp_path):
    done = run(
        *("calibrate", study / "scans", "--out", tmp_path / "c.json", "--method", "offset"),
        *("--json", "--model", one_far, *common),
    )
    assert done.code == 1, done.err
    said = json.loads(done.out)
    assert (said["sites"][0]["n"], len(said["left_out"])) == (6, 1)


def test_rows_of_refused_scans_are_left_out_of_a_table(tmp_path):
    lines = ["file,predicted_age,flags,age", "x,90,refused: no age is given of it,20"]
    lines += [f"{age},{age + 3},intensity: it is far,{age}" for age in (30, 40, 50)]
    (tmp_path / "ages.csv").write_text("\n".join(lines) + "\n")
    done = run("calibrate", tmp_path / "ages.csv", "--out", tmp_path / "c.json", "--method=offset")
    assert done.code == 0, done.err
    assert "left out: 1 row of refused scans" in done.err
    assert "intercept +3.00 years from 3 scans" in done.out


def test_evaluation_of_a_table_says_the_same(scored, tmp_path):
    done = run("evaluate", scored.folder / "ages.csv", "--out", tmp_path / "again")
    assert done.code == 0
    (row,) = read(tmp_path / "again" / "scores.csv")
    assert float(row["mae"]) == pytest.approx(scored.said["scores"][0]["mae"], abs=0.01)
    assert f"MAE {float(row['mae']):.2f} years" in done.out
    assert "(7 known ages)" in done.out


def ages_table(path: Path, with_sites: bool = True) -> Path:
    """Site a predicts 0.8 x age + 10, site b 4 years more."""
    lines = ["participant_id,site,predicted_age,interval_low,interval_high,age"]
    for i, age in enumerate(np.linspace(20, 80, 12)):
        for site, more in (("a", 0), ("b", 4)):
            said = 0.8 * age + 10 + more + (-1) ** i * 0.5
            name = site if with_sites else ""
            lines.append(f"{site}{i},{name},{said},{said - 9},{said + 9},{age}")
    path.write_text("\n".join([*lines, "x,a,,,,50", "y,a,44,,,"]) + "\n")
    return path


def test_calibration_of_sites(study, tmp_path):
    table = ages_table(tmp_path / "ages.csv")
    done = run("calibrate", table, "--out", tmp_path / "c.json", "--json")
    assert done.code == 0
    assert "does not know which model" in done.err
    rows = {row["site"]: row for row in json.loads(done.out)["sites"]}
    assert list(rows) == ["a", "b", "all"]
    assert rows["a"]["slope"] == pytest.approx(0.8, abs=0.02)
    assert rows["b"]["intercept"] == pytest.approx(14, abs=0.7)
    assert rows["a"]["mae_after"] < 1 < rows["a"]["mae_before"]
    fitted = Calibration.load(tmp_path / "c.json")
    assert fitted.of(None).n == 24
    assert fitted.of("b").apply(np.array([0.8 * 50 + 14]))[0] == pytest.approx(50, abs=0.7)
    offset = run("calibrate", table, "--out", tmp_path / "o.json", "--method", "offset")
    assert "b: offset, intercept +4.00 years from 12 scans" in offset.out
    for args, expected in (
        (("--out", tmp_path / "c.json"), "exists"),
        (("--out", tmp_path / "c.csv"), "valid is .json (a calibration)"),
        (("--out", tmp_path / "d.json", "--method", "smith"), "valid are offset, cole"),
        (("--out", tmp_path / "d.json", "--intervals"), "give --write-model"),
    ):
        assert expected in refused("calibrate", table, *args)


def test_calibration_into_a_copy_of_the_model(study, tmp_path):
    table = ages_table(tmp_path / "ages.csv", with_sites=False)
    source, copy = study / "tiny.safetensors", tmp_path / "copy.safetensors"
    done = run(
        *("calibrate", table, "--out", tmp_path / "c.json", "--site", "mine"),
        *("--model", source, "--write-model", copy, "--intervals"),
    )
    assert done.code == 0
    model = BrainAgeModel.load(copy)
    assert model.bias is not None
    assert model.bias.slope == pytest.approx(0.8, abs=0.02)
    assert len(model.conformal.residuals) == 24
    assert BrainAge.load(copy).sha256 == BrainAge.load(source).sha256
    assert Calibration.load(tmp_path / "c.json").weights == BrainAge.load(source).sha256


def test_tables_that_cannot_be_scored(tmp_path):
    (tmp_path / "a.csv").write_text("file,predicted_age\nx,50\n")
    assert "has no column age" in refused("evaluate", tmp_path / "a.csv", "--out", tmp_path / "o")
    (tmp_path / "b.csv").write_text("file,predicted_age,age\nx,50,\n")
    assert "no row with both" in refused("evaluate", tmp_path / "b.csv", "--out", tmp_path / "o")
    assert "give it alone" in refused(
        *("evaluate", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "o")
    )


def test_a_bundle_for_monai(study, tmp_path):
    model = ("--model", study / "tiny.safetensors")
    done = run("export-bundle", tmp_path / "bundle", *model)
    assert (done.code, done.out) == (0, f"MONAI bundle in {tmp_path / 'bundle'}\n")
    assert (tmp_path / "bundle" / "configs" / "inference.json").is_file()
    assert "is not empty" in refused("export-bundle", tmp_path / "bundle", *model)
    assert "is a file" in refused("export-bundle", study / "tiny.safetensors", *model)
