"""Flipped bytes in every kind of stored file: never used without a word, never in the way.

`benchmarks/flips.py` is the same with more tries.
"""

from __future__ import annotations

import pytest
from flip_cases import KINDS, verdicts
from stored_files import Stored

SLOW = {"checkpoint.pt of a search model"}


def marks(kind: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if kind in SLOW else []


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks(kind)) for kind in KINDS])
def test_damage_is_named_or_does_no_harm(stored: Stored, kind: str) -> None:
    for verdict, said in verdicts(stored, kind, -(-KINDS[kind].tries // 10)):
        assert verdict in ("named", "harmless"), said
