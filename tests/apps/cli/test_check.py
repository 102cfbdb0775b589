"""`enn check`, and `enn search backup`, on what the real commands stored."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import GALLERY, document, load_models_once, run
from places import ROOT
from typer.testing import CliRunner

from apps.cli.main import app
from enn_core.files import shipped
from enn_core.files.digests import sealed
from enn_core.files.tensors import write_state, write_tensors
from neuro.age.calibrate import BiasCorrection, Calibration

pytest.importorskip("faiss")
PHOTOS = ("gc_alpaca", "gc_bison", "gc_duck", "gc_giraffe_head", "gc_kitten_on_box", "gc_mars")


@pytest.fixture(autouse=True, scope="module")
def _model_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        load_models_once(patch)
        yield


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An indexed folder of photos that was taught something."""
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in PHOTOS:
        shutil.copy(GALLERY / f"{name}.webp", photos)
    monkeypatch.chdir(photos)
    assert run("index", photos).code == 0
    ids = {Path(hit["path"]).stem: hit["id"] for hit in document("query", "animals")["results"]}
    marks = ("--good", str(ids["gc_bison"]), "--bad", str(ids["gc_duck"]), "--force")
    assert run("teach", "a wild animal", *marks).code == 0
    return tmp_path


def check(*args: str | Path, code: int = 0) -> dict:
    done = CliRunner().invoke(app, ["check", *map(str, args), "--json"], standalone_mode=False)
    assert done.return_value == code, done.output
    return json.loads(done.stdout)


def flip(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def test_all_that_is_a_users_is_looked_at(home) -> None:
    found = check()
    assert found["damaged"] == 0
    kinds = [each["kind"] for each in found["checked"]]
    assert kinds[:2] == ["index", "profile"]
    assert {"model", "photos"} <= set(kinds)
    assert all(each["damage"] == [] for each in found["checked"])


def test_targets_by_name_folder_and_file(home) -> None:
    run("export", home / "out.parquet")
    run("export", home / "lessons.json")
    (home / "empty").mkdir()
    Calibration({"a": BiasCorrection("offset", 0.0, 3.5, 5)}).save(home / "calibration.json")
    wanted = {
        "default": "profile",
        home / "photos": "index",
        home / "photos" / ".enn-index": "index",
        home / "out.parquet": "export",
        home / "lessons.json": "document",
        ROOT / "neuro" / "weights": "model",
        home / "calibration.json": "document",
    }
    for target, kind in wanted.items():
        (found,) = check(target)["checked"]
        assert (found["kind"], found["damage"]) == (kind, []), target
    for target in ("nobody", home / "empty", GALLERY / "gc_duck.webp"):
        done = CliRunner().invoke(app, ["check", str(target)], standalone_mode=False)
        assert done.return_value == 2
        assert done.output.count("\n") == 1


@pytest.mark.parametrize("name", ["out.parquet", "lessons.json"])
def test_a_damaged_file_is_named(home, name) -> None:
    run("export", home / name)
    flip(home / name)
    (found,) = check(home / name, code=1)["checked"]
    (damage,) = found["damage"]
    assert damage["file"].endswith(name)
    assert damage["remedy"]


def test_damage_is_found_and_repaired(home) -> None:
    before = document("query", "a wild animal")["results"]
    (vectors,) = (home / "photos" / ".enn-index").glob("vectors-*.faiss")
    flip(vectors)
    content = vectors.read_bytes()
    assert check(code=1)["damaged"] == 1
    assert vectors.read_bytes() == content  # looking changes nothing
    refusal = run("query", "a wild animal")
    assert (refusal.code, refusal.out) == (2, "")
    assert "enn check" in refusal.err
    repaired = check("--repair", home / "photos")
    assert repaired["damaged"] == 0
    assert all(each["repaired"] for each in repaired["checked"][0]["damage"])
    assert check()["damaged"] == 0
    assert document("query", "a wild animal")["results"] == before


def test_a_backup_is_an_index_with_its_lessons(home, monkeypatch) -> None:
    before = document("query", "a wild animal")["results"]
    made = document("backup", home / "copy")
    assert (made["images"], made["profiles"]) == (6, ["local/default"])
    assert "there already" in run("backup", home / "copy").err
    shutil.rmtree(home / "photos" / ".enn-index")
    shutil.rmtree(home / "profiles")
    monkeypatch.setenv("ENN_PROFILES", str(home / "copy" / "profiles"))
    after = document("query", "a wild animal", "--index", home / "copy")
    assert after["results"] == before
    assert after["profile"] == "default"


def test_a_damaged_brain_in_the_cache_is_deleted(tmp_path) -> None:
    pytest.importorskip("nibabel")
    np.savez_compressed(tmp_path / "one.npz", image=np.zeros(3))
    (found,) = check(tmp_path, code=1)["checked"]
    assert found["kind"] == "cache"
    assert check(tmp_path, "--repair")["damaged"] == 0
    assert os.listdir(tmp_path) == []


def test_what_is_not_installed_is_no_damage(home, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "__file__", str(home / "enn_core" / "files" / "shipped.py"))
    monkeypatch.setattr(shipped, "_PACKAGE", "no_such_package")
    found = check()
    assert [each["kind"] for each in found["checked"]] == ["index", "profile"]
    copy = home / "apps" / "gallery"
    shutil.copytree(GALLERY, copy)
    flip(copy / "gc_alpaca.webp")
    (damage,) = check(code=1)["checked"][-1]["damage"]
    assert "gc_alpaca.webp" in damage["lost"]


def test_a_runs_folder_is_checked_file_by_file(home) -> None:
    folder = home / "run"
    folder.mkdir()
    write_tensors(folder / "model.safetensors", {"w": torch.ones(50)})
    write_state({"w": torch.ones(50)}, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps(sealed({"dim": 3})))
    assert [Path(each["path"]).name for each in check(folder)["checked"]] == [
        "checkpoint.pt", "config.json", "model.safetensors",
    ]  # fmt: skip
    for file in folder.iterdir():
        content = file.read_bytes()
        file.write_bytes(content.replace(b"dim", b"din").replace(b"\x80\x3f", b"\x81\x3f"))
    assert check(folder, code=1)["damaged"] == 3
