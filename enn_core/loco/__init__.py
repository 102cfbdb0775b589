"""LOCO: learning from forward passes and one broadcast number, with projected updates."""

from enn_core.loco.initial_weights import calibrate_
from enn_core.loco.input_projection import PROJECTIONS, InputProjection
from enn_core.loco.node_perturbation import Estimate, Perturbation, perturb
from enn_core.loco.rule import LOCO
from enn_core.loco.stages import Stage, UnsupportedModel, to_stages

__all__ = [
    "LOCO",
    "PROJECTIONS",
    "Estimate",
    "InputProjection",
    "Perturbation",
    "Stage",
    "UnsupportedModel",
    "calibrate_",
    "perturb",
    "to_stages",
]
