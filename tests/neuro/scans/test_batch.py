"""Many scans in processes of their own: none stops the others."""

from __future__ import annotations

import contextlib
import json

import nibabel as nib
import numpy as np
import psutil
import pytest
from volume_cases import blob, write

from neuro.scans.batch import prepare_all, prepare_scan, write_outputs
from neuro.scans.find import find_scans
from neuro.scans.read import VolumeError
from neuro.scans.template import MNI_AFFINE, MNI_SHAPE, load_template


def brain(path, scale: float = 200):
    return write(path, (load_template()[0] * scale).astype(np.uint8), MNI_AFFINE)


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_outputs_are_what_goes_in(tmp_path):
    prepared, _ = prepare_scan(brain(tmp_path / "a.nii.gz"), "mni")
    write_outputs(prepared, tmp_path, "b")
    again, _ = prepare_scan(tmp_path / "b_T1w.nii.gz", "mni")
    assert np.array_equal(again.image, prepared.image)
    assert (tmp_path / "b_T1w.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "b_T1w.json").read_text()) == prepared.record
    image = nib.load(tmp_path / "b_T1w.nii.gz")
    assert (image.shape, image.get_data_dtype()) == (MNI_SHAPE, np.uint8)
    before = (tmp_path / "b_T1w.nii.gz").read_bytes()
    write_outputs(prepared, tmp_path, "c")
    assert (tmp_path / "c_T1w.nii.gz").read_bytes() == before


def test_one_scan_here(tmp_path):
    steps: list[str] = []
    prepare_scan(brain(tmp_path / "a.nii.gz"), "mni", progress=steps.append)
    assert steps == ["reading", "to the grid", "intensity"]
    with pytest.raises(VolumeError, match="no such file"):
        prepare_scan(tmp_path / "b.nii.gz")


def test_a_damaged_entry_of_the_cache_is_told_and_replaced(tmp_path):
    brain(tmp_path / "a.nii.gz")
    cache = tmp_path / "cache"
    prepare_scan(tmp_path / "a.nii.gz", "mni", cache=cache)
    (entry,) = cache.iterdir()
    whole = bytearray(entry.read_bytes())
    whole[len(whole) // 2] ^= 1
    entry.write_bytes(whole)
    scans = find_scans([tmp_path / "a.nii.gz"])
    for damaged in (True, False):
        (outcome,) = prepare_all(scans, kind="mni", cache=cache)
        assert outcome.prepared is not None
        assert (outcome.cached, str(entry) in outcome.remark) == (not damaged, damaged)


def test_a_process_that_dies_costs_one_scan(tmp_path):
    """As if the kernel had killed it for its memory, each time it reads a certain scan."""
    brain(tmp_path / "a.nii.gz")
    noise = np.random.default_rng(0).integers(0, 255, (220, 220, 220)).astype(np.uint8)
    write(tmp_path / "b.nii.gz", noise, np.diag([1.0, 1, 1, 1]))
    write(tmp_path / "c.nii.gz", blob((40, 36, 9)))
    brain(tmp_path / "d.nii.gz", 100)

    def kill(scan, step):
        if scan.name == "b" and step == "reading":
            for worker in workers():
                worker.kill()

    outcomes = {
        outcome.scan.name: outcome
        for outcome in prepare_all(find_scans([tmp_path]), kind="mni", on_step=kill)
    }
    assert sorted(outcomes) == ["a", "b", "c", "d"]
    assert outcomes["b"].prepared is None
    assert "ended the process" in outcomes["b"].error
    assert "only 9 slices" in outcomes["c"].error
    for name in "ad":
        assert outcomes[name].error == ""
        assert outcomes[name].prepared.quality.dice > 0.99


def test_leaving_early_ends_the_processes(tmp_path):
    for number in range(4):
        brain(tmp_path / f"{number}.nii.gz", 100 + number)
    outcomes = prepare_all(find_scans([tmp_path]), kind="mni")
    assert next(outcomes).error == ""
    here = workers()
    assert here
    outcomes.close()
    _, alive = psutil.wait_procs(here, timeout=60)
    assert not alive
