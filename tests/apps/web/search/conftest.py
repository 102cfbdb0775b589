"""A folder of pictures, each of one colour."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    root = tmp_path / "Bilder ä"
    root.mkdir()
    for number, colour in enumerate(("red", "darkred", "green", "blue", "navy", "yellow")):
        Image.new("RGB", (8, 6), colour).save(root / f"{number} {colour}.png")
    (root / "broken.jpg").write_bytes(b"no")
    return root
