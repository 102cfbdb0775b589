"""Where the repository and what the tests read lie."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CASES", "DATA", "GALLERY", "ROOT"]

CASES = Path(__file__).resolve().parent
ROOT = CASES.parents[1]
GALLERY = ROOT / "apps" / "gallery"
DATA = Path(os.environ.get("ENN_DATA", ROOT.parent / "shared" / "data"))
