"""The code in docs/index.md and docs/python.md runs, from the first block to the last."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from places import GALLERY, ROOT

pytest.importorskip("faiss")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_reference_is_built(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "enn_core.html").read_text(encoding="utf-8")
    assert "Convert a model's linear and convolution layers" in page


def test_start_page():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (block,) = BLOCK.findall(page)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/index.md", "exec"), names)
    assert len(names["losses"]) == 4
    assert not any(name.endswith("Lambda") for name in names["plain"].state_dict())


def test_python_page(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(page)
    assert len(blocks) == 10
    names = ("gc_duck", "gc_mars", "gc_bison", "gc_alpaca")
    (tmp_path / "Photos").mkdir()
    for name in names:
        shutil.copy(GALLERY / f"{name}.webp", tmp_path / "Photos")
    shutil.copy(GALLERY / "jx_cliff_by_sea.webp", tmp_path / "beach.jpg")
    (tmp_path / "Photos" / "broken.png").touch()
    rows = [
        {"filename": f"{name}.webp", "split": "val", "sentences": [{"raw": name[3:]}]}
        for name in names
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": rows}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    names_so_far: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names_so_far)
    shown = capsys.readouterr().out
    assert shown.count(str(tmp_path / "Photos")) >= 4
    assert "broken.png" in shown
    assert "2 converted, 0 plain" in shown
    written = {"out.parquet", "r.json", "plain.pt", "trained.pt", "losses.png", "taught.json"}
    assert {path.name for path in tmp_path.iterdir()} >= written
