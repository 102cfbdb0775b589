"""Brain age from T1-weighted MRI. A research tool, not a medical device.

>>> import neuro                                                      # doctest: +SKIP
>>> brain = neuro.BrainAge.load()                                     # doctest: +SKIP
>>> prepared, _ = neuro.prepare_scan("scan.nii.gz")                   # doctest: +SKIP
>>> estimate = brain.estimate(brain.look(prepared))                   # doctest: +SKIP
>>> estimate.age, estimate.low, estimate.high, estimate.flags         # doctest: +SKIP
(61.2, 49.8, 72.6, [])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.batch import Outcome, prepare_all, prepare_scan
    from neuro.bundle import write_bundle
    from neuro.calibrate import BiasCorrection, Calibration
    from neuro.dataset import BrainDataset
    from neuro.model import BrainAgeModel
    from neuro.predict import BrainAge, Estimate, Seen
    from neuro.preprocess import Prepared, Preprocessor, to_native
    from neuro.quality import Flag, IntensityReference, Quality, judge, save_picture
    from neuro.scans import Scan, ScanError, find_scans
    from neuro.teaching import Site
    from neuro.train import TrainConfig, fit
    from neuro.volumes import Volume, VolumeError, read_volume

# Imported on first use: nibabel, torch and ANTs take seconds.
_HOME = {
    "BiasCorrection": "neuro.calibrate",
    "BrainAge": "neuro.predict",
    "BrainAgeModel": "neuro.model",
    "BrainDataset": "neuro.dataset",
    "Calibration": "neuro.calibrate",
    "Estimate": "neuro.predict",
    "Flag": "neuro.quality",
    "IntensityReference": "neuro.quality",
    "Outcome": "neuro.batch",
    "Prepared": "neuro.preprocess",
    "Preprocessor": "neuro.preprocess",
    "Quality": "neuro.quality",
    "Scan": "neuro.scans",
    "ScanError": "neuro.scans",
    "Seen": "neuro.predict",
    "Site": "neuro.teaching",
    "TrainConfig": "neuro.train",
    "Volume": "neuro.volumes",
    "VolumeError": "neuro.volumes",
    "find_scans": "neuro.scans",
    "fit": "neuro.train",
    "judge": "neuro.quality",
    "prepare_all": "neuro.batch",
    "prepare_scan": "neuro.batch",
    "read_volume": "neuro.volumes",
    "save_picture": "neuro.quality",
    "to_native": "neuro.preprocess",
    "write_bundle": "neuro.bundle",
}

__all__ = [
    "BiasCorrection",
    "BrainAge",
    "BrainAgeModel",
    "BrainDataset",
    "Calibration",
    "Estimate",
    "Flag",
    "IntensityReference",
    "Outcome",
    "Prepared",
    "Preprocessor",
    "Quality",
    "Scan",
    "ScanError",
    "Seen",
    "Site",
    "TrainConfig",
    "Volume",
    "VolumeError",
    "find_scans",
    "fit",
    "judge",
    "prepare_all",
    "prepare_scan",
    "read_volume",
    "save_picture",
    "to_native",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
