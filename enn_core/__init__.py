"""Eigenbasis layers, `W = Q diag(Lambda) P^T` instead of `W`, and local learning of any network."""

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
