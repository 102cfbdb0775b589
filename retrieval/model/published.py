"""What open_clip publishes, read from its files: importing it takes longer than a hub's answer."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

__all__ = ["has_architecture", "sources_of"]


def has_architecture(name: str) -> bool:
    """Whether open_clip has an architecture of that name, "/" written for "-" or not."""
    return (_package() / "model_configs" / f"{name.replace('/', '-')}.json").is_file()


def sources_of(tag: str) -> set[str]:
    """Where weights of that tag are published, of whatever architecture; none if it is no tag.

    Returns:
        "org/name" of repositories of the hub, and addresses of other files.
    """
    try:
        table = ast.parse((_package() / "pretrained.py").read_text("utf-8"))
    except (OSError, SyntaxError):
        return set()
    wanted, found = _plain(tag), set()
    for name, value in _entries(table):
        if _plain(name) == wanted and isinstance(value, ast.Call):
            given = {each.arg: each.value for each in value.keywords}
            for kind in ("hf_hub", "url"):
                source = given.get(kind)
                if isinstance(source, ast.Constant) and source.value:
                    text = str(source.value)
                    # A file's name may follow the repository's.
                    found.add("/".join(text.split("/")[:2]) if kind == "hf_hub" else text)
    return found


def _entries(table: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """What the table's dictionaries hold, however they are written."""
    for node in ast.walk(table):
        if isinstance(node, ast.Call):
            yield from ((each.arg, each.value) for each in node.keywords if each.arg)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


def _plain(tag: str) -> str:
    return tag.lower().replace("-", "_")


def _package() -> Path:
    found = importlib.util.find_spec("open_clip")
    return Path((found and found.origin) or "").parent
