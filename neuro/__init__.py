"""Brain age from T1-weighted MRI. A research tool, not a medical device.

>>> import neuro                                                      # doctest: +SKIP
>>> prepared, _ = neuro.prepare_scan("scan.nii.gz")                   # doctest: +SKIP
>>> prepared.image.shape, neuro.judge(prepared.quality)               # doctest: +SKIP
((99, 117, 95), [])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.batch import Outcome, prepare_all, prepare_scan
    from neuro.preprocess import Prepared, Preprocessor, to_native
    from neuro.quality import Flag, IntensityReference, Quality, judge, save_picture
    from neuro.scans import Scan, ScanError, find_scans
    from neuro.volumes import Volume, VolumeError, read_volume

# Imported on first use: nibabel, torch and ANTs take seconds.
_HOME = {
    "Flag": "neuro.quality",
    "IntensityReference": "neuro.quality",
    "Outcome": "neuro.batch",
    "Prepared": "neuro.preprocess",
    "Preprocessor": "neuro.preprocess",
    "Quality": "neuro.quality",
    "Scan": "neuro.scans",
    "ScanError": "neuro.scans",
    "Volume": "neuro.volumes",
    "VolumeError": "neuro.volumes",
    "find_scans": "neuro.scans",
    "judge": "neuro.quality",
    "prepare_all": "neuro.batch",
    "prepare_scan": "neuro.batch",
    "read_volume": "neuro.volumes",
    "save_picture": "neuro.quality",
    "to_native": "neuro.preprocess",
}

__all__ = [
    "Flag",
    "IntensityReference",
    "Outcome",
    "Prepared",
    "Preprocessor",
    "Quality",
    "Scan",
    "ScanError",
    "Volume",
    "VolumeError",
    "find_scans",
    "judge",
    "prepare_all",
    "prepare_scan",
    "read_volume",
    "save_picture",
    "to_native",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
