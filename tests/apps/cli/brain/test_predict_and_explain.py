"""`enn brain predict` and `explain`: tables, refusals, maps, what is printed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

nib = pytest.importorskip("nibabel")

from tiny_brain_models import tiny_model  # noqa: E402

from apps.cli.main import app  # noqa: E402
from neuro.age.calibrate import BiasCorrection, Calibration, Conformal  # noqa: E402
from neuro.age.predict import BrainAge  # noqa: E402
from neuro.scans.template import MNI_AFFINE, load_template  # noqa: E402

COMMAND = typer.main.get_command(app)


def run_command(*args: str | Path) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = COMMAND.main(["brain", *(os.fspath(arg) for arg in args)], standalone_mode=False)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def run(*args: str | Path) -> SimpleNamespace:
    return run_command("predict", *args)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two brains, one that lies elsewhere, a truncated file; a model and a calibration."""
    folder = tmp_path_factory.mktemp("predicted")
    scans = folder / "scans"
    scans.mkdir()
    template = load_template()[0]
    for name, scale, shift in (("sub-01", 200, 0), ("sub-02", 150, 0), ("sub-03", 200, 25)):
        values = np.roll((template * scale).astype(np.uint8), shift, 0)
        nib.Nifti1Image(values, MNI_AFFINE).to_filename(scans / f"{name}_T1w.nii.gz")
    (scans / "cut.nii.gz").write_bytes((scans / "sub-01_T1w.nii.gz").read_bytes()[:3000])
    (scans / "participants.tsv").write_text(
        "participant_id\tage\nsub-01\t63.4\nsub-02\t40\nsub-03\t30\n"
    )
    model = tiny_model(
        conformal=Conformal(tuple(np.linspace(-8, 8, 40))),
        bias=BiasCorrection("cole", 0.8, 10.0, 40),
    )
    model.save(folder / "model.safetensors")
    brain = BrainAge.load(folder / "model.safetensors")
    Calibration({"a": BiasCorrection("offset", 0.0, 3.0, 5)}, brain.sha256).save(folder / "a.json")
    Calibration({"a": BiasCorrection("offset", 0.0, 3.0, 5)}, "other").save(folder / "b.json")
    return folder


@pytest.fixture(scope="module")
def common(study) -> tuple[str | Path, ...]:
    return ("--input", "mni", "--model", study / "model.safetensors", "--cache", study / "cache")


@pytest.fixture(scope="module")
def table(study, common) -> SimpleNamespace:
    done = run(
        *(study / "scans", "--out", study / "ages.csv", "--pictures", study / "qc"),
        *("--bias", "beheshti", *common),
    )
    with (study / "ages.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(**vars(done), rows={row["participant_id"]: row for row in rows})


def test_the_table_tells_ages_and_why_there_is_none(table):
    assert table.code == 1
    assert list(table.rows) == ["cut", "sub-01", "sub-02", "sub-03"]
    first = table.rows["sub-01"]
    assert list(first)[:9] == [
        *("file", "participant_id", "predicted_age", "flags", "interval_low", "interval_high"),
        *("age", "gap", "corrected_age"),
    ]
    low, age, high = (
        float(first[name]) for name in ("interval_low", "predicted_age", "interval_high")
    )
    assert low < age < high
    assert float(first["gap"]) == pytest.approx(age - 63.4, abs=0.01)
    assert float(first["corrected_age"]) == pytest.approx(age - (-0.2 * 63.4 + 10), abs=0.02)
    assert first["untaught_age"] == first["predicted_age"]
    assert float(first["qc_dice"]) > 0.99
    for name, why in (("cut", ""), ("sub-03", "overlaps the template's with Dice")):
        row = table.rows[name]
        assert why in row["error"] != ""
        assert (row["predicted_age"], row["gap"], row["corrected_age"]) == ("", "", "")
    assert "Traceback" not in table.err
    assert "2 ages of 4 scans" in table.out
    assert "MAE" in table.out
    assert "2 known ages" in table.out


def test_pictures(table, study):
    assert {path.name for path in (study / "qc").iterdir()} == {
        f"sub-0{number}.png" for number in (1, 2, 3)
    }


def test_json_with_a_calibration(table, study, common):
    scan = study / "scans" / "sub-02_T1w.nii.gz"
    done = run(scan, *common, "--json", "--calibration", study / "a.json", "--confidence", "0.5")
    assert done.code == 0
    document = json.loads(done.out)
    (row,) = document["scans"]
    first = table.rows["sub-02"]
    assert row["predicted_age"] == float(first["predicted_age"])
    assert row["corrected_age"] == pytest.approx(row["predicted_age"] - 3, abs=0.02)
    assert row["interval_high"] < float(first["interval_high"])
    assert (document["confidence"], document["scores"], document["failed"]) == (0.5, None, 0)


def test_ages_are_printed_without_a_table(table, study, common):
    plain = study / "alone.nii.gz"
    plain.write_bytes((study / "scans" / "sub-01_T1w.nii.gz").read_bytes())
    done = run(plain, *common, "--confidence", "0.99")
    age = float(table.rows["sub-01"]["predicted_age"])
    assert done.out == f"{plain}: {age:.1f} years\n"
    assert "40 residuals, too few for 99%" in done.err


@pytest.mark.parametrize("insists", ["--any-scan", "--force"])
def test_a_refused_scan_has_a_marked_number_on_insistence(table, study, common, insists):
    lying = study / "scans" / "sub-03_T1w.nii.gz"
    refused = run(lying, *common)
    assert refused.code == 1
    assert ": no age: the brain overlaps" in refused.out
    done = run(lying, *common, insists)
    assert done.code == 0
    assert " years [flagged: refused, registration" in done.out
    (row,) = json.loads(run(lying, *common, insists, "--json").out)["scans"]
    assert row["predicted_age"] >= 0
    assert row["flags"].startswith("refused: ")
    assert (row["corrected_age"], row["error"]) == (None, "")


def test_why_no_age_is_corrected_stands_in_the_table(study, common):
    scan = study / "scans" / "sub-01_T1w.nii.gz"
    steep = BiasCorrection("cole", 0.01, 10.0, 40)
    brain = BrainAge.load(study / "model.safetensors")
    Calibration({"a": steep}, brain.sha256).save(study / "steep.json")
    done = run(scan, *common, "--calibration", study / "steep.json", "--json")
    (row,) = json.loads(done.out)["scans"]
    assert (row["corrected_age"], row["flags"]) == (None, "")
    assert "no corrected age: it would be" in row["notes"]


def test_a_flag_stands_beside_the_age_of_a_map(study, common, tmp_path):
    (tmp_path / "young").mkdir()
    scan = tmp_path / "young" / "sub-01_T1w.nii.gz"
    scan.write_bytes((study / "scans" / "sub-01_T1w.nii.gz").read_bytes())
    (tmp_path / "young" / "participants.tsv").write_text("participant_id\tage\nsub-01\t12\n")
    done = run_command(
        *("explain", tmp_path / "young", "--out", tmp_path / "why", "--method", "gradient"),
        *("--json", *common),
    )
    (row,) = json.loads(done.out)["scans"]
    assert row["flags"].startswith("age: ")


def test_flags_of_one_file_of_two_people_are_each_ones_own(study, common, tmp_path):
    scan = study / "scans" / "sub-01_T1w.nii.gz"
    (tmp_path / "list.csv").write_text(f"file,participant_id,age\n{scan},A,5\n{scan},B,50\n")
    done = run(tmp_path / "list.csv", *common)
    assert done.code == 0
    assert ["[flagged: age]" in line for line in done.out.splitlines()[:2]] == [True, False]


def test_users_errors(table, study, common, tmp_path):
    def refused(*args: str | Path) -> str:
        done = run(*args)
        assert (done.code, done.out) == (2, ""), done.err
        assert done.err.count("\n") == 1
        return done.err

    scans = study / "scans"
    assert "exists" in refused(scans, *common, "--out", study / "ages.csv")
    assert "ends with .csv" in refused(scans, *common, "--out", tmp_path / "ages.xls")
    assert "valid is between 0 and 1" in refused(scans, *common, "--confidence", "90")
    assert "no file or folder" in refused(tmp_path / "none", *common)
    assert "no model at" in refused(scans, "--model", tmp_path / "none.safetensors")
    assert "valid are offset, cole" in refused(scans, *common, "--bias", "smith")
    assert "give that too" in refused(scans, *common, "--site", "a")
    for extra, expected in (
        (("--calibration", tmp_path / "none.json"), "there is no file"),
        (("--calibration", study / "ages.csv"), "no calibration"),
        (("--calibration", study / "b.json"), "for another model"),
        (("--calibration", study / "a.json", "--site", "b"), "it has a"),
        (("--calibration", study / "a.json", "--bias", "cole"), "cannot be made of"),
    ):
        assert expected in refused(scans, *common, *extra)


def test_what_is_odd_stands_beside_the_age_of_a_map(study, common, tmp_path):
    scan = study / "scans" / "sub-01_T1w.nii.gz"
    (tmp_path / "list.csv").write_text(f"file,age\n{scan},5\n")
    done = run_command(
        *("explain", tmp_path / "list.csv", "--out", tmp_path / "why", "--method", "gradient"),
        *common,
    )
    assert done.code == 0
    assert "odd: " in done.err
    with (tmp_path / "why" / "explain.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row)[:3] == ["file", "predicted_age", "flags"]
    assert row["flags"].startswith("age: the model has learnt from")


def test_explaining_writes_a_map_on_the_scans_own_grid(table, study, common, tmp_path):
    scans = study / "scans"
    source = nib.load(scans / "sub-01_T1w.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    turned.to_filename(tmp_path / "turned.nii.gz")
    done = run_command(
        *("explain", tmp_path / "turned.nii.gz", scans / "sub-03_T1w.nii.gz"),
        *("--out", tmp_path / "why", "--method", "gradient", "--json", *common),
    )
    assert done.code == 1
    first, refused_one = json.loads(done.out)["scans"]
    assert first["predicted_age"] == float(table.rows["sub-01"]["predicted_age"])
    assert list(first)[:3] == ["file", "predicted_age", "flags"]
    assert refused_one["map"] is None
    assert "overlaps the template's" in refused_one["error"]
    written = nib.load(tmp_path / "why" / first["map"])
    assert written.shape == turned.shape
    assert np.allclose(written.affine, turned.affine)
    values = written.get_fdata()
    assert np.abs(values).max() > 0
    assert np.abs(values[turned.get_fdata() == 0]).mean() < 0.1 * np.abs(values).mean()
    assert {path.name for path in (tmp_path / "why").iterdir()} == {
        *("explain.csv", "turned_gradient.nii.gz", "turned_gradient.png"),
    }
    bad = run_command("explain", scans, "--out", tmp_path / "o", "--method", "lime", *common)
    assert (bad.code, bad.err.count("\n")) == (2, 1)
