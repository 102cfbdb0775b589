"""Small made volumes, and files of them in every format."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from places import DATA

__all__ = ["DATA", "OBLIQUE", "blob", "needs_brains", "needs_heads", "rearranged", "write"]


needs_heads = pytest.mark.skipif(
    not (DATA / "ixi_hh" / "heads_2mm").is_dir(), reason=f"no IXI heads under {DATA} (set ENN_DATA)"
)
needs_brains = pytest.mark.skipif(
    not (DATA / "ixi_hh" / "brains_mni_2mm").is_dir(),
    reason=f"no IXI brains under {DATA} (set ENN_DATA)",
)

# Turned by a few degrees, as people lie in a scanner, with voxels of 4 x 5 x 6 mm.
_A, _B = np.cos(0.2), np.sin(0.2)
OBLIQUE = np.array(
    [[4.0, 0, 0, -31.25], [0, 5 * _A, -6 * _B, 11.5], [0, 5 * _B, 6 * _A, -70.125], [0, 0, 0, 1]]
)


def blob(shape: tuple[int, ...] = (40, 36, 30), dtype: str = "int16") -> np.ndarray:
    """A volume without symmetry: a bright, shaded ellipsoid in noise."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(axis=0) < 0.6
    values = inside * (300 + 100 * grid[0] + 50 * grid[-1]) + rng.integers(0, 20, shape)
    return values.astype(dtype)


def rearranged(
    image: nib.Nifti1Image, order: tuple[int, ...], flips: tuple[int, ...]
) -> nib.Nifti1Image:
    """The same image in another axis order and with other signs."""
    orientation = np.array(list(zip(order, flips, strict=True)), float)
    return image.as_reoriented(orientation)


def write(path: Path, values: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    """A file in the format that the name says; `.img` is NIfTI, or Analyze below `analyze`."""
    name = path.name
    if name.endswith((".mgz", ".mgh")):
        image = nib.MGHImage(values, affine)
    elif name.endswith((".img", ".img.gz")):
        kind = nib.Spm2AnalyzeImage if "analyze" in name else nib.Nifti1Pair
        image = kind(values, affine)
    else:
        image = (nib.Nifti2Image if "nifti2" in name else nib.Nifti1Image)(values, affine)
    image.to_filename(path)
    return path
