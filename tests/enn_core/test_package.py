"""All names of the package are there, and torch comes with the first that needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import enn_core


def test_all_names_are_there() -> None:
    for name in enn_core.__all__:
        assert getattr(enn_core, name).__name__ == name
        assert name in dir(enn_core)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convert_model'"):
        _ = enn_core.convert_model


@pytest.mark.parametrize(
    "module", ["enn_core", "enn_core.files.atomic", "enn_core.files.tensors", "enn_core.feedback"]
)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
