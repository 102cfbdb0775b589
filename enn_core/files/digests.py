"""Digests: whether a file's content is what was written, and how damage is told.

A digest that is there and does not fit refuses the content. One that is missing says nothing: files
of earlier versions have none, and get one when they are written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Damage", "DigestError", "check_seal", "file_sha256", "sealed"]

SEAL = "sha256"
"""Key of a JSON object's digest, over all its other keys."""


class DigestError(ValueError):
    """Content that is not what was written; one line, to follow the file's name."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with what is stored, fit for JSON.

    Attributes:
        file: its path.
        part: block, row or entry of it; "" for the whole.
        lost: what cannot be used, and what that means.
        remedy: what to do, "" if it is repaired.
        repaired: whether it was put right.
    """

    file: str
    part: str
    lost: str
    remedy: str = ""
    repaired: bool = False


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its content under `SEAL`."""
    return {**content, SEAL: _json_sha256(content)}


def check_seal(content: Mapping[str, Any]) -> None:
    """Raise DigestError if a JSON object has a digest that does not fit."""
    if SEAL in content and content[SEAL] != _json_sha256(content):
        raise DigestError("is damaged: its content does not fit its digest")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_sha256(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != SEAL}
    # Numbers are read and written back to the same digits, so what was parsed has its digest.
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
