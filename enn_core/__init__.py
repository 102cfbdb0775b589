"""Eigenbasis layers, `W = Q diag(Lambda) P^T` instead of `W`, and local learning of any network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enn_core.convert import ConversionError, ConversionReport, conversion_report, fuse, to_enn
    from enn_core.cuts import CutError, cut, local_blocks
    from enn_core.factors import FactorError, svd_factors
    from enn_core.heads import make_head
    from enn_core.layers import ENNConv1d, ENNConv2d, ENNConv3d, ENNLinear
    from enn_core.local import LocalBlock, LocalTrainer
    from enn_core.orthogonality import (
        Retraction,
        orthogonality_error,
        orthogonality_penalty,
        param_groups,
        retract_,
    )
    from enn_core.pipeline import Pipeline, PipelineError

__all__ = [
    "ConversionError",
    "ConversionReport",
    "CutError",
    "ENNConv1d",
    "ENNConv2d",
    "ENNConv3d",
    "ENNLinear",
    "FactorError",
    "LocalBlock",
    "LocalTrainer",
    "Pipeline",
    "PipelineError",
    "Retraction",
    "conversion_report",
    "cut",
    "fuse",
    "local_blocks",
    "make_head",
    "orthogonality_error",
    "orthogonality_penalty",
    "param_groups",
    "retract_",
    "svd_factors",
    "to_enn",
]

_MODULES = ["convert", "cuts", "factors", "heads", "layers", "local", "orthogonality", "pipeline"]


def __getattr__(name: str) -> Any:
    """Names are imported when they are used (PEP 562): parts of the package do without torch."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
