"""Eigenbasis layers: networks that learn `W = Q diag(Lambda) P^T` instead of `W`."""

from enn_core.convert import ConversionError, ConversionReport, conversion_report, fuse, to_enn
from enn_core.factors import FactorError, svd_factors
from enn_core.layers import ENNConv1d, ENNConv2d, ENNConv3d, ENNLinear
from enn_core.orthogonality import (
    Retraction,
    orthogonality_error,
    orthogonality_penalty,
    param_groups,
    retract_,
)

__all__ = [
    "ConversionError",
    "ConversionReport",
    "ENNConv1d",
    "ENNConv2d",
    "ENNConv3d",
    "ENNLinear",
    "FactorError",
    "Retraction",
    "conversion_report",
    "fuse",
    "orthogonality_error",
    "orthogonality_penalty",
    "param_groups",
    "retract_",
    "svd_factors",
    "to_enn",
]
