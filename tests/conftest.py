"""What holds for every test: no one's own profiles are read or written, and time is no failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no failure of the code, and CI judges the change, not the luck of the draw.
settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="session")
def _no_profiles_of_the_developer(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENN_PROFILES", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="session")
def _usual_umask() -> Iterator[None]:
    """New files are 0644 unless their writer makes them something else."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order: what is compared bit by bit with another process needs that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def v0_1(tmp_path, monkeypatch) -> Path:
    """A copy of the files that version 0.1 wrote; its profiles are the user's."""
    folder = tmp_path / "v0.1"
    shutil.copytree(Path(__file__).with_name("fixtures") / "v0.1", folder)
    (folder / "index").rename(folder / "photos" / ".enn-index")
    monkeypatch.setenv("ENN_PROFILES", str(folder / "profiles"))
    return folder


@pytest.fixture
def expected(v0_1) -> dict[str, Any]:
    """What version 0.1 read in them."""
    return json.loads((v0_1 / "expected.json").read_text("utf-8"))
