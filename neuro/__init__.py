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
    from neuro.age.calibrate import BiasCorrection, Calibration
    from neuro.age.model import BrainAgeModel
    from neuro.age.predict import BrainAge, Estimate, Seen
    from neuro.bundle import write_bundle
    from neuro.dataset import BrainDataset
    from neuro.scans.batch import Outcome, prepare_all, prepare_scan
    from neuro.scans.find import Scan, ScanError, find_scans
    from neuro.scans.preprocess import Prepared, Preprocessor, to_native
    from neuro.scans.quality import Flag, IntensityReference, Quality, judge, save_picture
    from neuro.scans.read import Volume, VolumeError, read_volume
    from neuro.teach import Site
    from neuro.train import TrainConfig, fit

# Imported on first use: nibabel, torch and ANTs take seconds.
_HOME = {
    "BiasCorrection": "neuro.age.calibrate",
    "BrainAge": "neuro.age.predict",
    "BrainAgeModel": "neuro.age.model",
    "BrainDataset": "neuro.dataset",
    "Calibration": "neuro.age.calibrate",
    "Estimate": "neuro.age.predict",
    "Flag": "neuro.scans.quality",
    "IntensityReference": "neuro.scans.quality",
    "Outcome": "neuro.scans.batch",
    "Prepared": "neuro.scans.preprocess",
    "Preprocessor": "neuro.scans.preprocess",
    "Quality": "neuro.scans.quality",
    "Scan": "neuro.scans.find",
    "ScanError": "neuro.scans.find",
    "Seen": "neuro.age.predict",
    "Site": "neuro.teach",
    "TrainConfig": "neuro.train",
    "Volume": "neuro.scans.read",
    "VolumeError": "neuro.scans.read",
    "find_scans": "neuro.scans.find",
    "fit": "neuro.train",
    "judge": "neuro.scans.quality",
    "prepare_all": "neuro.scans.batch",
    "prepare_scan": "neuro.scans.batch",
    "read_volume": "neuro.scans.read",
    "save_picture": "neuro.scans.quality",
    "to_native": "neuro.scans.preprocess",
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
