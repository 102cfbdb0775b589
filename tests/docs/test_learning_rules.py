"""The tables of docs/learning-rules.md are what the benchmarks' files say."""

from __future__ import annotations

import subprocess
import sys

from places import ROOT


def test_tables_are_those_of_the_files():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "run python benchmarks/tables.py"
