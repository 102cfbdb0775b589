"""Temporary files: what a killed process left goes, what a living one writes stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from enn_core.files import atomic
from enn_core.files.atomic import clear_strays, new_folder, own_name, replacing

KILLED = """
import os, signal, sys
from pathlib import Path
from enn_core.files.atomic import new_folder, replacing
what, target = sys.argv[1], Path(sys.argv[2])
with new_folder(target) if what == "folder" else replacing(target, shared=True) as new:
    (new / "part" if what == "folder" else new).write_bytes(b"half")
    print(new.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["folder", "file"])
def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path, what: str) -> None:
    target = tmp_path / "target"

    def write() -> None:
        if what == "folder":
            with new_folder(target) as new:
                (new / "whole").write_bytes(b"all")
            (target / "whole").unlink()
        else:
            with replacing(target, shared=True) as new:
                new.write_bytes(b"all")

    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, what, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    left = child.stdout.readline().strip()
    write()
    assert (tmp_path / left).exists()  # its writer lives
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert (tmp_path / left).exists()
    write()
    assert os.listdir(tmp_path) == ["target"]


def test_others_files_stay(tmp_path: Path, monkeypatch) -> None:
    names = ["target.tmp", "target.12345678-1.tmp", "another.txt", own_name("other")]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    clear_strays(tmp_path, "target.")
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    monkeypatch.setattr(atomic.socket, "gethostname", lambda: "far away")
    far = tmp_path / own_name("target")
    far.write_bytes(b"")
    monkeypatch.undo()
    clear_strays(tmp_path, "target.")
    assert far.exists()  # nobody here knows that machine's processes
    old = time.time() - 25 * 3600
    os.utime(far, (old, old))
    clear_strays(tmp_path, "target.")
    assert not far.exists()
