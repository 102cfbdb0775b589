"""Flipped bytes in every kind of stored file: never used without a word, never in the way.

`benchmarks/flips.py` is the same with more tries.
"""

from __future__ import annotations

import pytest
from flip_cases import KINDS, verdicts
from stored_files import Stored

# What is not yet as it should be: take those out that are.
NOT_YET = {
    "journal, then teach and undo": "of a damaged header or entry the file is not named",
    "journal of brains": "of a damaged header or entry the file is not named",
}
SLOW = {"checkpoint.pt of a search model"}


def marks(kind: str) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if kind in SLOW else []
    if kind not in NOT_YET:
        return slow
    return [*slow, pytest.mark.xfail(reason=NOT_YET[kind], raises=AssertionError, strict=False)]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks(kind)) for kind in KINDS])
def test_damage_is_named_or_does_no_harm(stored: Stored, kind: str) -> None:
    for verdict, said in verdicts(stored, kind, -(-KINDS[kind].tries // 10)):
        assert verdict in ("named", "harmless"), said
