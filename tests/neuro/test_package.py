"""`import neuro` is light, and all of its names are there."""

from __future__ import annotations

import subprocess
import sys

import neuro


def test_import_is_light():
    code = """
import sys, neuro, neuro.scans.find, neuro.scans.batch, neuro.scans.read, neuro.scans.preprocess
import neuro.scans.prep_cache
heavy = {"torch", "nibabel", "nilearn", "ants", "deepbet", "monai", "scipy", "retrieval"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there():
    assert all(getattr(neuro, name).__name__ == name for name in neuro.__all__)
    assert set(neuro.__all__) <= set(dir(neuro))
