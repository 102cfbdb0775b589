"""What open_clip publishes, read from its files: importing it takes longer than a hub's answer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

__all__ = ["has_architecture", "has_tag"]


def has_architecture(name: str) -> bool:
    """Whether open_clip has an architecture of that name, "/" written for "-" or not."""
    return (_package() / "model_configs" / f"{name.replace('/', '-')}.json").is_file()


def has_tag(name: str) -> bool:
    """Whether some architecture of open_clip's has weights of that tag."""
    if not name:
        return False
    tag = re.escape(name.lower().replace("-", "_"))
    try:
        table = (_package() / "pretrained.py").read_text("utf-8")
    except OSError:
        return False
    return re.search(rf"""(?<!\w){tag}["']?\s*[=:]\s*\w*cfg\(""", table) is not None


def _package() -> Path:
    found = importlib.util.find_spec("open_clip")
    return Path((found and found.origin) or "").parent
