"""Processes that end with the one that started them, however that ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import psutil
import pytest

# Each starts processes for work that takes long, and says when they are at it.
POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from enn_core.child_process import follow_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=follow_parent) as pool:
        waiting = [pool.submit(time.sleep, 600) for _ in range(2)]
        pool.submit(int)  # the second one is started
        time.sleep(1)
        print("at work", flush=True)
"""

NOISE = """
import sys
from pathlib import Path
import numpy as np, nibabel
from neuro.scans.batch import prepare_all
from neuro.scans.find import find_scans
from apps.web.brain.worker import Worker

def at_work(*_):
    print("at work", flush=True)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    noise = np.random.default_rng(0).integers(0, 255, (220, 220, 220)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), folder / "a.nii.gz")
"""

SCANS = (
    NOISE
    + """
    for _ in prepare_all(find_scans([folder]), on_step=at_work):
        pass
"""
)

PAGE = (
    NOISE
    + """
    Worker().prepare(folder / "a.nii.gz", "head", folder, at_work)
"""
)


@pytest.mark.parametrize("program", [POOL, SCANS, PAGE], ids=["pool", "scans", "page"])
def test_killed_with_the_first_process(program, tmp_path) -> None:
    script = tmp_path / "program.py"
    script.write_text(program)
    folder = tmp_path / "scans"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True
    )
    own = []
    try:
        assert process.stdout.readline() == "at work\n"
        own = psutil.Process(process.pid).children(recursive=True)
        assert own
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(own, timeout=30)
        assert not alive
    finally:
        for left in (process, *own):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
