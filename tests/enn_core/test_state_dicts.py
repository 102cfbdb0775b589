"""State dicts that do not fit, and what a file says of itself wrongly: one line each."""

from __future__ import annotations

import json

import pytest
import torch

from enn_core.convert import ConversionError
from enn_core.state_dicts import convert, fuse, plain_shapes


@pytest.mark.parametrize(
    "note",
    [
        {"shapes": {"l.weight": [2, -1, -2]}, "dtypes": {}},
        {"shapes": {"l.weight": [2, 2]}, "dtypes": {"l.weight": "save"}},
        {"shapes": {"l.weight": [2, 2]}, "dtypes": {"l.weight": "float99"}},
        {"shapes": {"l.weight": [float("inf")]}, "dtypes": {}},
        "[" * 100_000,
    ],
)
def test_damaged_notes_of_shapes_and_types(note):
    tensors = convert({"l.weight": torch.randn(2, 2)}).tensors
    text = note if isinstance(note, str) else json.dumps(note)
    with pytest.raises(ConversionError, match=r"^the input's metadata is damaged; give"):
        plain_shapes(tensors, {"eigen": text})


@pytest.mark.parametrize(
    ("Q", "scale", "P"),
    [((2, 2, 2), (5, 2), (2, 2, 2)), ((2, 2, 2), (2, 2), (3, 2, 2)), ((2, 2), (2,), (2,))],
)
def test_factors_that_do_not_fit_each_other(Q, scale, P):
    tensors = {"l.Q": torch.ones(Q), "l.Lambda": torch.ones(scale), "l.P": torch.ones(P)}
    with pytest.raises(ConversionError, match=r"^the factors of l do not fit each other: Q"):
        fuse(tensors, {"l.weight": (2, 2)}, {})
