"""From a head to a brain on the grid that the networks see.

2 mm voxels -> brain extraction (deepbet) -> affine registration to nilearn's MNI152 2 mm template
(ANTs) -> intensities. Each step runs in a fixed number of threads with a fixed seed, so that the
same voxels give the same bits.

>>> from neuro.scans.read import read_volume                             # doctest: +SKIP
>>> prepare = Preprocessor()                                          # doctest: +SKIP
>>> prepared = prepare(read_volume("scan.nii.gz"))                    # doctest: +SKIP
>>> prepared.image.shape, prepared.quality.dice                       # doctest: +SKIP
((99, 117, 95), 0.951)
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from neuro.scans.intensity import white_level
from neuro.scans.quality import Quality, dice, field_of_view
from neuro.scans.read import Volume, VolumeError
from neuro.scans.template import FULL_SCALE, MNI_AFFINE, MNI_SHAPE, load_template

__all__ = [
    "VERSION",
    "InputKind",
    "Prepared",
    "Preprocessor",
    "check_kind",
    "parameters",
    "to_native",
    "to_uint8",
]

VERSION = 2
"""Of the steps below; whoever changes what they return increases it."""

InputKind = Literal["head", "brain", "mni"]

_SPACING = 2.0
# Within this of `_SPACING` a grid stays as it is: one interpolation less.
_SPACING_SLACK = 0.02
_TORCH_THREADS = 2
_SEED = 1
# Of the 99th percentile: what is darker is not counted as brain where there is no mask.
_DARK = 0.1


@dataclass(frozen=True)
class Prepared:
    """A brain on the template's grid.

    Attributes:
        image: (99, 117, 95) uint8; `FULL_SCALE` is the `white_level` of the brain.
        to_mni: (4, 4) voxel indices of the file -> mm in MNI space.
        quality: what was measured on the way.
        record: JSON: version, parameters, steps with seconds, the input and what was odd about it.
    """

    image: np.ndarray
    to_mni: np.ndarray
    quality: Quality
    record: dict[str, Any]


def check_kind(kind: str) -> InputKind:
    """`kind` if there is such an input.

    Raises:
        VolumeError: naming those that there are.
    """
    for known in get_args(InputKind):
        if kind == known:
            return known
    raise VolumeError(f"got input kind {kind!r}, valid are {', '.join(get_args(InputKind))}")


@functools.cache
def parameters() -> dict[str, Any]:
    """Everything that the result depends on besides the volume."""
    return {
        "version": VERSION,
        "spacing_mm": _SPACING,
        "extraction": {"method": "deepbet", "version": version("deepbet"), "threshold": 0.5},
        "registration": {
            "method": "antspyx Affine, Mattes",
            "version": version("antspyx"),
            "template": f"nilearn MNI152 2 mm, {version('nilearn')}",
            "seed": _SEED,
        },
        "intensity": {"percentile": 99, "without": "what shines", "value": FULL_SCALE},
        "threads": _TORCH_THREADS,
    }


class Preprocessor:
    """The steps, with their networks and template loaded once (at the first use).

    Not for several threads at once: ANTs and deepbet keep their own state.
    """

    def __init__(self) -> None:
        self._extraction: Any = None

    def __call__(
        self,
        volume: Volume,
        kind: InputKind = "head",
        *,
        progress: Callable[[str], None] | None = None,
    ) -> Prepared:
        """Prepare one volume.

        Args:
            volume: as `read_volume` returns it.
            kind: "head" (with skull), "brain" (all else is 0 or one value), or "mni" (a brain in
                MNI space, which is only brought to the grid).
            progress: called with the name of each step as it begins.

        Raises:
            VolumeError: no brain is found, or it cannot be registered.
        """
        kind = check_kind(kind)
        log = _Log(progress)
        if kind == "mni":
            image = log.step("to the grid", lambda: on_mni_grid(volume))
            moved = image > np.percentile(image[image > 0], 99) * _DARK
            to_mni, scaling, millilitres = volume.file_affine, np.eye(3), None
        else:
            voxels, affine = log.step("2 mm", lambda: at_2_mm(volume.voxels, volume.affine))
            if kind == "head":
                mask = log.step("brain extraction", lambda: self._extract(voxels, affine))
            else:
                mask = log.step("brain mask", lambda: foreground(voxels))
            brain = np.where(mask, voxels, np.float32(0))
            matrix, image, moved = log.step("registration", lambda: register(brain, mask, affine))
            to_mni = matrix @ volume.affine @ volume.to_canonical
            scaling = matrix[:3, :3]
            millilitres = float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)
        scaled = log.step("intensity", lambda: to_uint8(image))
        stretch = np.linalg.svd(scaling, compute_uv=False)
        quality = Quality(
            dice=round(dice(moved, load_template()[1]), 4),
            brain_ml=None if millilitres is None else round(millilitres, 1),
            field_of_view=round(field_of_view(to_mni, volume.file_shape), 4),
            stretch=(round(float(stretch.min()), 4), round(float(stretch.max()), 4)),
            spacing_mm=round(max(volume.spacing), 4),
        )
        record = {
            "parameters": parameters(),
            "input": {
                "kind": kind,
                "sha256": volume.sha256,
                "shape": list(volume.file_shape),
                "orientation": volume.orientation,
                "spacing_mm": [round(mm, 4) for mm in volume.spacing],
                "notes": list(volume.notes),
            },
            "steps": log.steps,
            "quality": quality.as_record(),
            "to_mni": to_mni.tolist(),
        }
        return Prepared(scaled, to_mni, quality, record)

    def _extract(self, voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Mask of the brain in a head, by deepbet."""
        import nibabel

        with _torch_threads(_TORCH_THREADS):
            if self._extraction is None:
                from deepbet import BrainExtraction

                with warnings.catch_warnings():
                    # Its networks are TorchScript, which torch would rather see replaced.
                    warnings.simplefilter("ignore", FutureWarning)
                    self._extraction = BrainExtraction(no_gpu=True)
            try:
                _, mask, _ = self._extraction.run(nibabel.Nifti1Image(voxels, affine))
            except (AssertionError, ValueError, IndexError, RuntimeError) as error:
                if "memory" in str(error):
                    raise MemoryError from None
                # It expects to find something.
                raise VolumeError(
                    "shows no brain that could be extracted; is it a T1-weighted head?"
                ) from None
        found = np.asarray(mask.dataobj) > 0
        if not found.any():
            raise VolumeError("shows no brain that could be extracted; is it a T1-weighted head?")
        return found


class _Log:
    """Runs steps and keeps how long they took."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.steps: list[dict[str, Any]] = []
        self._progress = progress

    def step(self, name: str, run: Callable[[], Any]) -> Any:
        if self._progress is not None:
            self._progress(name)
        start = time.perf_counter()
        result = run()
        self.steps.append({"step": name, "seconds": round(time.perf_counter() - start, 3)})
        return result


# --- steps -------------------------------------------------------------------------------------


def at_2_mm(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of 2 mm over the same field of view, along the same axes.

    Finer voxels are smoothed to the new width first, as a scanner with larger voxels would do.

    Returns:
        float32 values, and the affine of the new grid, 0 at its centre.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(spacing - _SPACING).max() <= _SPACING_SLACK:
        return voxels, affine
    from nibabel import Nifti1Image
    from nibabel.processing import resample_from_to, smooth_image

    width = np.sqrt(np.clip(_SPACING**2 - spacing**2, 0, None))
    source = Nifti1Image(voxels, affine)
    if width.max() > 0:
        source = smooth_image(source, width, mode="nearest")
    shape = np.maximum(1, np.round(np.array(voxels.shape) * spacing / _SPACING)).astype(int)
    target = np.eye(4)
    target[:3, :3] = affine[:3, :3] / spacing * _SPACING
    target[:3, 3] = -target[:3, :3] @ ((shape - 1) / 2)
    # Half a voxel may lie outside of the old grid: it continues as at its edge.
    image = resample_from_to(source, (tuple(shape), target), order=1, mode="nearest")
    return np.ascontiguousarray(image.get_fdata(dtype=np.float32)), target


def foreground(voxels: np.ndarray) -> np.ndarray:
    """Mask of a brain that was extracted already: what differs from the value around it.

    Raises:
        VolumeError: too much or too little differs.
    """
    faces = [np.take(voxels, side, axis).ravel() for axis in range(3) for side in (0, -1)]
    around = np.median(np.concatenate(faces))
    high = np.percentile(np.abs(voxels - around), 99.5)
    mask = np.abs(voxels - around) > 0.02 * high
    share = float(mask.mean())
    if not 0.02 < share < 0.75:
        raise VolumeError(
            f"is no extracted brain: {100 * share:.0f} % of the voxels differ from the background; "
            "a head with its skull is --input head"
        )
    return mask


def register(
    brain: np.ndarray, mask: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Affine registration to the template by ANTs.

    Args:
        brain: float32, 0 outside of `mask`.
        mask: bool, same shape.
        affine: (4, 4) voxel indices -> mm.

    Returns:
        (4, 4) mm of the brain's space -> mm of MNI space; the brain (float32, about 1 at its
        brightest) and its mask (bool) on the template's grid.

    Raises:
        VolumeError: ANTs finds no registration.
    """
    ants = _ants()
    fixed = _ants_image(load_template()[0], MNI_AFFINE)
    # Metrics are computed in single precision: about 1 is a good size.
    scale = np.float32(np.percentile(brain[mask], 99))
    if not scale > 0:
        raise VolumeError("holds no values above 0 where its brain is; is it a T1-weighted image?")
    moving = _ants_image(brain / scale, affine)
    with tempfile.TemporaryDirectory(prefix="enn-registration-") as folder:
        # Sampling of the metric is random; a seed of an earlier caller must not matter.
        ants.config.set_ants_deterministic(False, _SEED)
        try:
            result = ants.registration(
                fixed, moving, type_of_transform="Affine", outprefix=str(Path(folder) / "to_")
            )
            transforms = result["fwdtransforms"]
            pull = _matrix(ants.read_transform(transforms[0]))
            moved = ants.apply_transforms(
                fixed,
                _ants_image(mask.astype(np.float32), affine),
                transforms,
                interpolator="nearestNeighbor",
            )
        except (RuntimeError, IndexError, ValueError):
            raise VolumeError("could not be registered to the template") from None
    image = np.ascontiguousarray(result["warpedmovout"].numpy(), np.float32)
    if not np.isfinite(pull).all() or abs(np.linalg.det(pull)) < 1e-3:
        raise VolumeError("could not be registered to the template")
    return np.linalg.inv(pull), image, moved.numpy() > 0.5


def to_uint8(image: np.ndarray) -> np.ndarray:
    """`FULL_SCALE` at the `white_level` of what is above 0; what is brighter ends at 255.

    A uint8 volume that is scaled so stays as it is.

    Raises:
        VolumeError: nothing is above 0.
    """
    inside = image[image > 0]
    if not inside.size:
        raise VolumeError("holds no brain on the template's grid")
    scaled = image * np.float32(FULL_SCALE / white_level(inside))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def to_native(values: np.ndarray, prepared_to_mni: np.ndarray, volume: Volume) -> Any:
    """A map on the template's grid as an image on the grid of the file it came from.

    Args:
        values: (99, 117, 95), for example what an explanation says of each voxel.
        prepared_to_mni: `Prepared.to_mni` of that file.
        volume: the file as it was read.

    Returns:
        A nibabel Nifti1Image, linear in between, 0 outside of the template's grid.
    """
    from nibabel import Nifti1Image
    from nibabel.processing import resample_from_to

    source = Nifti1Image(np.asarray(values, np.float32), MNI_AFFINE)
    image = resample_from_to(source, (volume.file_shape, prepared_to_mni), order=1)
    return Nifti1Image(image.get_fdata(dtype=np.float32), volume.file_affine)


def on_mni_grid(volume: Volume) -> np.ndarray:
    """Values of a volume in MNI space on the template's grid."""
    from nibabel import Nifti1Image
    from nibabel.processing import resample_from_to

    affine = volume.file_affine @ np.linalg.inv(volume.to_canonical)
    if volume.voxels.shape == MNI_SHAPE and np.allclose(affine, MNI_AFFINE, atol=0.01):
        image = volume.voxels
    else:
        source = Nifti1Image(volume.voxels, affine)
        image = resample_from_to(source, (MNI_SHAPE, MNI_AFFINE), order=1)
        image = image.get_fdata(dtype=np.float32)
    if np.mean(image > 0) < 0.05:
        raise VolumeError(
            "is not in MNI space: its header places it elsewhere; give --input head or brain"
        )
    return np.clip(image, 0, None)


# --- libraries ---------------------------------------------------------------------------------


def _ants() -> Any:
    """antspyx, in one thread: with more of them its sums come in any order."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    import ants

    return ants


def _ants_image(values: np.ndarray, affine: np.ndarray) -> Any:
    """An ANTs image; its world is LPS, ours RAS."""
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    # It wants directions that are orthonormal; a header's may be so to a few digits.
    left, _, right = np.linalg.svd(matrix[:3, :3] / spacing)
    return _ants().from_numpy(
        np.ascontiguousarray(values, np.float32),
        origin=[float(mm) for mm in matrix[:3, 3]],
        spacing=[float(mm) for mm in spacing],
        direction=left @ right,
    )


def _matrix(transform: Any) -> np.ndarray:
    """(4, 4) RAS mm of the template -> RAS mm of the moving image."""
    values = np.asarray(transform.parameters, np.float64)
    centre = np.asarray(transform.fixed_parameters, np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = values[:9].reshape(3, 3)
    matrix[:3, 3] = values[9:] + centre - matrix[:3, :3] @ centre
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    return flip @ matrix @ flip


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """A fixed number of threads: sums depend on it in their last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
