"""`enn brain preprocess`: outputs, tables, exit codes, and what it says."""

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

from apps.cli.main import app  # noqa: E402
from neuro.scans.template import MNI_AFFINE, load_template  # noqa: E402

COMMAND = typer.main.get_command(app)


def run(*args: str | Path) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = COMMAND.main(
            ["brain", "preprocess", *(os.fspath(arg) for arg in args)], standalone_mode=False
        )
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(*args: str | Path) -> str:
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.count("\n") == 1
    return done.err


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two brains in MNI space, a series, a truncated file, and ages."""
    folder = tmp_path_factory.mktemp("study")
    template = load_template()[0]
    for name, scale in (("sub-01", 200), ("sub-02", 150)):
        values = (template * scale).astype(np.uint8)
        nib.Nifti1Image(values, MNI_AFFINE).to_filename(folder / f"{name}_T1w.nii.gz")
    series = np.zeros((20, 20, 20, 6), np.int16)
    nib.Nifti1Image(series, np.diag([8.0, 8, 8, 1])).to_filename(folder / "dwi.nii.gz")
    (folder / "cut.nii.gz").write_bytes((folder / "sub-01_T1w.nii.gz").read_bytes()[:3000])
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-01\t63.4\nsub-02\t n/a\n")
    return folder


@pytest.fixture(scope="module")
def first(study) -> SimpleNamespace:
    out = study.parent / "out"
    done = run(study, "--input", "mni", "--out", out, "--cache", study.parent / "cache", "--json")
    return SimpleNamespace(**vars(done), folder=out)


def test_a_scan_that_fails_stops_nothing(first):
    assert first.code == 1
    document = json.loads(first.out)
    assert document["failed"] == 2
    rows = {row["name"]: row for row in document["scans"]}
    assert list(rows) == ["cut", "dwi", "sub-01", "sub-02"]
    assert "series of 6 volumes" in rows["dwi"]["error"]
    assert rows["cut"]["error"]
    for name in ("sub-01", "sub-02"):
        assert (rows[name]["error"], rows[name]["flags"], rows[name]["cached"]) == ("", "", False)
        assert rows[name]["qc_dice"] > 0.99
    assert rows["sub-01"]["age"] == 63.4
    assert "series of 6 volumes" in first.err
    assert "Traceback" not in first.err


def test_what_is_written(first):
    names = {f"sub-0{i}_T1w.{end}" for i in (1, 2) for end in ("nii.gz", "json", "png")}
    assert {path.name for path in first.folder.iterdir()} == names | {"qc.csv", "participants.tsv"}
    with (first.folder / "qc.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["cut", "dwi", "sub-01", "sub-02"]
    assert [bool(row["error"]) for row in rows] == [True, True, False, False]
    table = (first.folder / "participants.tsv").read_text()
    assert table == "participant_id\tage\nsub-01\t63.4\n"


def test_the_next_run_takes_what_is_there(first, study):
    out = study.parent / "again"
    scan = study / "sub-01_T1w.nii.gz"
    done = run(scan, "--input", "mni", "--out", out, "--cache", study.parent / "cache")
    assert done.code == 0
    assert "1 brain of 1 scan" in done.out
    assert "1 prepared before" in done.out
    same = ("sub-01_T1w.nii.gz", "sub-01_T1w.png")
    assert all((out / n).read_bytes() == (first.folder / n).read_bytes() for n in same)


def test_users_errors(study, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "valid are head, brain, mni" in refused(study, "--input", "knee", *out)
    assert "no file or folder" in refused(tmp_path / "missing", *out)
    assert "exclude each other" in refused(study, *out, "--cache", tmp_path, "--no-cache")
    assert "is a file" in refused(study, "--out", study / "dwi.nii.gz")
    assert "would be overwritten" in refused(study / "sub-01_T1w.nii.gz", "--out", study)
    assert "--out" in refused(study)
    (tmp_path / "empty").mkdir()
    assert "holds no .nii" in refused(tmp_path / "empty", *out)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_how_a_file_and_its_age_were_read_is_said_and_kept(study, tmp_path):
    for visit in (1, 2):
        folder = tmp_path / "bids" / "sub-01" / f"ses-{visit}" / "anat"
        folder.mkdir(parents=True)
        content = (study / "sub-01_T1w.nii.gz").read_bytes()
        (folder / f"sub-01_ses-{visit}_T1w.nii.gz").write_bytes(content + b"!" * visit)
    table = tmp_path / "bids" / "participants.tsv"
    table.write_text("participant_id\tsession_id\tage\nsub-01\t1\t23\n")
    out = tmp_path / "out"
    done = run(tmp_path / "bids", "--input", "mni", "--out", out, "--no-cache")
    assert done.code == 0, done.err
    with (out / "qc.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["age"], second["age"]) == ("23.0", "")
    assert first["notes"] == "What follows the compressed data is left out (1 bytes)."
    assert second["notes"].startswith("participants.tsv has no row of sub-01 for ses-2; no age")
    for row in (first, second):
        assert f"note: {row['file']}: {row['notes']}\n" in done.err
