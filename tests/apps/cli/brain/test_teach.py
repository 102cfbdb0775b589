"""`enn brain teach`, `history`, `undo`, `forget`, `profiles`, `export` and `import`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer

nib = pytest.importorskip("nibabel")

from small_disk import fill, small_disk  # noqa: E402
from tiny_brain_models import tiny_model  # noqa: E402

from apps.cli.main import app  # noqa: E402
from neuro.age.model import both_sides, features_of  # noqa: E402
from neuro.age.population import summarise  # noqa: E402
from neuro.scans.grid import as_input, crop  # noqa: E402
from neuro.scans.template import MNI_AFFINE, load_template  # noqa: E402

COMMAND = typer.main.get_command(app)


def run(*args: str | Path) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = COMMAND.main(["brain", *map(os.fspath, args)], standalone_mode=False)
        except Exception as error:
            code, _ = 2, err.write(str(error))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def document(*args: str | Path):
    done = run(*args, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SimpleNamespace:
    """Two brains and a model with statistics of others."""
    import torch

    folder = tmp_path_factory.mktemp("taught")
    template = load_template()[0]
    for name, scale in (("sub-01", 200), ("sub-02", 150)):
        values = (template * scale).astype(np.uint8)
        nib.Nifti1Image(values, MNI_AFFINE).to_filename(folder / f"{name}_T1w.nii.gz")
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-02\t58\n")
    model = tiny_model()
    rng = np.random.default_rng(0)
    brain = crop((template * 180).astype(np.uint8)).astype(np.float32)
    rows = []
    for _ in range(5):
        noisy = np.clip(brain + (brain > 0) * rng.normal(0, 20, brain.shape), 0, 255)
        x = torch.from_numpy(as_input(noisy.astype(np.uint8)[None]))
        read = [both_sides(m.net, m.target, m.net.stem(x))[1][0].numpy() for m in model.members]
        rows.append(features_of(model, np.stack(read)))
    model.population = summarise(rows)
    model.save(folder / "model.safetensors")
    tiny_model().save(folder / "bare.safetensors")
    return SimpleNamespace(
        folder=folder, one=folder / "sub-01_T1w.nii.gz", two=folder / "sub-02_T1w.nii.gz"
    )


@pytest.fixture
def model(study, tmp_path, monkeypatch) -> tuple[str | Path, ...]:
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    return ("--model", study.folder / "model.safetensors")


@pytest.fixture
def scan(study, model) -> tuple[str | Path, ...]:
    return (*model, "--input", "mni", "--cache", study.folder / "cache")


def test_teach_undo_forget(study, model, scan, tmp_path):
    preview = document("teach", study.one, "--age", "60", "--preview", *scan)
    assert (preview["lesson"], preview["preview"], preview["profile"]) == (None, True, "default")
    assert not (tmp_path / "profiles").exists()

    done = run("teach", study.one, "--age", "60", "--force", *scan)
    assert done.code == 0
    assert "told 60.0 years" in done.out
    assert "never the scan" in done.out
    assert "learnt: lesson 1 of profile default" in done.out
    assert "although" not in done.out
    assert str(study.folder) not in done.out

    second = document("teach", study.two, "--force", *scan)
    assert (second["lesson"], second["age"]) == (2, 58)
    assert [each["name"] for each in second["earlier"]] == ["sub-01"]
    lessons = document("history", *model)
    assert [(each["lesson"], each["active"]) for each in lessons] == [(1, True), (2, True)]
    assert document("undo", *model)["lesson"] == 2
    assert document("undo", "1", *model)["active"] is False
    assert "nothing left to undo" in run("undo", *model).err
    assert "--yes" in run("forget", *model).err
    assert document("forget", "2", "--yes", *model)["forgotten"] == 1
    assert document("forget", "--yes", *model)["forgotten"] == 1
    assert document("history", *model) == []


def test_export_import_and_profiles(study, model, scan, tmp_path):
    document("teach", study.one, "--age", "60", "--profile", "site-a", "--force", *scan)
    file = tmp_path / "a.json"
    assert document("export", file, "--profile", "site-a", *model)["lessons"] == 1
    assert "--force" in run("export", file, "--profile", "site-a", *model).err
    made = document("import", file, "--profile", "site-b", *model)
    assert (made["lessons"], made["total"]) == (1, 1)
    assert document("import", file, "--profile", "site-b", *model)["lessons"] == 0
    found = document("profiles", *model)
    assert [(each["profile"], each["scans"]) for each in found] == [("site-a", 1), ("site-b", 1)]


def test_refusals_are_one_line(study, model, scan, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"format": "enn-feedback"}')
    bare = ("--model", study.folder / "bare.safetensors", *scan[2:])
    for args, why in (
        (("teach", study.one, *scan), "--age"),
        (("teach", study.one, "--age", "634", *scan), "valid is 0 to 120"),
        (("teach", study.folder, "--age", "60", *scan), "2 scans"),
        (("teach", study.one, "--age", "60", *bare), "no statistics"),
        (("teach", study.one, "--age", "60", "--profile", "a/b", *scan), "profile's name"),
        (("teach", study.one, "--age", "60", "--preview", "--force", *scan), "exclude"),
        (("undo", *model), "there is no profile"),
        (("export", tmp_path / "x.json", "--profile", "no", *model), "there is no profile"),
        (("export", tmp_path / "x.csv", *model), "valid is .json (lessons)"),
        (("import", bad, *model), "cannot import"),
    ):
        done = run(*args)
        assert done.code == 2
        assert why in done.err
        assert "\n" not in done.err.strip()
    assert not (tmp_path / "profiles").exists()


def test_a_far_age_is_refused_unless_forced(study, model, scan):
    done = run("teach", study.one, "--age", "5", *scan)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("refused: ")]
    assert "years apart" in line
    assert "--force" in line
    assert document("history", *model) == []
    done = run("teach", study.one, "--age", "5", "--force", *scan)
    assert done.code == 0
    assert "learnt: lesson 1 of profile default, although the age told is 5.0" in done.out
    assert "refused" not in done.out + done.err


def test_at_a_terminal_the_user_is_asked(study, model, scan, monkeypatch):
    asked = []
    monkeypatch.setattr("apps.cli.terminal._is_terminal", lambda: True)
    monkeypatch.setattr("apps.cli.brain.teach.asks", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text))
    assert run("teach", study.one, "--age", "60", "--force", *scan).code == 0
    assert asked == ["Learn this under profile default?"]


def test_a_damaged_lesson_is_listed_and_can_be_forgotten(study, scan, model):
    for path, age in ((study.one, "60"), (study.two, "45")):
        assert run("teach", path, "--age", age, "--force", *scan).code == 0
    file = document("profiles", *model)[0]["file"]
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE events SET details = replace(details, '60', '61') WHERE seq = 1")
    assert "entry 1 is damaged" in run("predict", study.one, "--profile", "default", *scan).err
    done = run("history", *model)
    assert (done.code, done.out.split()[0]) == (1, "2")
    assert "lesson 1 is damaged" in done.err
    assert "there is no lesson 3" in run("forget", "3", "--yes", *model).err
    assert run("forget", "1", "--yes", *model).out == "1 lesson of profile default erased\n"
    assert [each["lesson"] for each in document("history", *model)] == [2]
    assert run("predict", study.one, "--profile", "default", *scan).code == 0


def test_a_full_disk_hides_nothing(study, scan, model, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 8) as disk:
        monkeypatch.setenv("ENN_PROFILES", str(disk))
        assert run("teach", study.one, "--age", "60", "--force", *scan).code == 0
        ages, told = run("predict", study.two, *scan).out, document("history", *model)
        fill(disk)
        assert run("predict", study.two, *scan).out == ages
        assert document("history", *model) == told
        assert run("export", tmp_path / "site.json", *model).code == 0
        assert "the disk is full" in run("undo", *model).err
        assert run("forget", "--yes", *model).code == 0
        assert document("history", *model) == []
