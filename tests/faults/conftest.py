"""One folder of stored files, and one server, for all tests of damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

for _package in ("faiss", "nibabel", "pyarrow"):
    pytest.importorskip(_package)

from command_server import CommandServer, build_faults  # noqa: E402
from stored_files import Stored  # noqa: E402


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> tuple[Path | None, str]:
    """The library that injects faults, or the reason why there is none."""
    return build_faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def stored(tmp_path_factory, library) -> Iterator[Stored]:
    with CommandServer(library[0]) as server:
        yield Stored(tmp_path_factory.mktemp("stored") / "files", server)
