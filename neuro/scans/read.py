"""Reading one head or brain from a file that nobody vouches for.

NIfTI-1 and -2 (one file or two), MGH/MGZ and Analyze, compressed or not, told apart by content and
not by name. A volume comes back as float32 in the nearest "RAS" axis order, so that flipped and
permuted copies of the same image give the same bits; everything that is no single 3-D magnitude
image of a head's size is refused in one line, before memory is spent on it.

>>> volume = read_volume("scan.nii.gz")                               # doctest: +SKIP
>>> volume.voxels.shape, volume.orientation, volume.spacing           # doctest: +SKIP
((90, 120, 120), 'PSR', (2.0, 2.0, 2.0))
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuro.scans.dicom import DICOM_ADVICE, dicom_problem, holds_dicom
from neuro.scans.padding import CT_LOW, padding

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_VOXELS",
    "Volume",
    "VolumeError",
    "content_hash",
    "is_volume_name",
    "read_volume",
]

MAX_FILE_BYTES = 2**30
MAX_VOXELS = 2**27
"""512 x 512 x 512."""

_MIN_VOXELS = 16
_FIELD_MM = (90.0, 600.0)
_SPACING_MM = (0.1, 12.0)

# Bytes read to learn what a file is: the longest header (NIfTI-2, 540) and some more.
_HEAD = 1024
_GZIP = b"\x1f\x8b"
# zlib's name of a deflate stream with gzip's header and checksum.
_GZIP_STREAM = 31
_BLOCK = 2**20
# Header extensions, and what MGH keeps behind the voxels.
_MAX_EXTRA = 16 * 2**20
_MGH_FOOTER = 20

_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".mgh.gz", ".img", ".img.gz", ".hdr", ".hdr.gz")

# What else may be given by mistake: first bytes at an offset, and what to do.
_STRANGERS = (
    (0, b"NRRD", "is an NRRD file; convert it to NIfTI (.nii.gz) first"),
    (0, b"CDF", "is a MINC file; convert it to NIfTI (.nii.gz) first"),
    (0, b"\x89HDF", "is an HDF5 or MINC file; convert it to NIfTI (.nii.gz) first"),
    (0, b"PK\x03\x04", "is a zip archive; unpack it first"),
    (0, b"\x89PNG", "is a picture; a 3-D volume is needed (.nii, .nii.gz, .mgz, Analyze)"),
    (0, b"\xff\xd8\xff", "is a picture; a 3-D volume is needed (.nii, .nii.gz, .mgz, Analyze)"),
)
_KNOWN = "a NIfTI (.nii, .nii.gz, .hdr with .img), MGH (.mgz) or Analyze volume is needed"

# NIfTI's codes of length units, in mm.
_UNITS_MM = {1: 1000.0, 3: 0.001}


class VolumeError(ValueError):
    """A file is no volume that can be used; one line without the file's name."""


@dataclass(frozen=True)
class Volume:
    """One 3-D image in the nearest "RAS" axis order: i to the right, j to the front, k up.

    Attributes:
        voxels: (I, J, K) float32, contiguous, finite; scale factors of the file are applied.
        affine: (4, 4) voxel indices -> mm, RAS+, 0 at the centre of the grid. Where the scanner had
            its origin is left out: it says nothing about the head.
        to_canonical: (4, 4) voxel indices of the file -> indices of `voxels`.
        file_affine: (4, 4) voxel indices of the file -> mm, as the file has it.
        file_shape: shape of the file's grid.
        orientation: the file's axes, such as "PSR".
        spacing: mm along i, j, k.
        sha256: of the file's bytes (header and voxels if it is two files).
        notes: what was odd and how it was read, one sentence each.
    """

    voxels: np.ndarray
    affine: np.ndarray
    to_canonical: np.ndarray
    file_affine: np.ndarray
    file_shape: tuple[int, int, int]
    orientation: str
    sha256: str
    notes: tuple[str, ...]

    @property
    def spacing(self) -> tuple[float, float, float]:
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)


def is_volume_name(name: str) -> bool:
    """Whether a file of this name should hold a volume; of two-file formats the voxels' file."""
    name = name.lower()
    return name.endswith(_SUFFIXES) and not name.endswith((".hdr", ".hdr.gz"))


def content_hash(path: Path | str) -> str:
    """sha256 of what `read_volume` would read.

    Raises:
        VolumeError: not there, unreadable or too large.
    """
    return _sha256(_read_files(Path(path)))


def read_volume(path: Path | str) -> Volume:
    """Read a volume.

    Raises:
        VolumeError: one line that says what is wrong and what to do.
    """
    from nibabel.imageglobals import LoggingOutputSuppressor

    files = _read_files(Path(path))
    with LoggingOutputSuppressor(), np.errstate(all="ignore"):
        image, dtype, notes = _parse(files)
        file_affine = _affine(image, notes)
        voxels = _voxels(image, dtype, notes)
    return _canonical(voxels, file_affine, notes, _sha256(files))


# --- bytes -------------------------------------------------------------------------------------


def _read_files(path: Path) -> list[bytes]:
    """Contents of the file, or of header and voxels if it is a pair."""
    first = _read_bytes(path)
    head, _ = _unpack(first, _HEAD)
    pair = head[344:348] == b"ni1\0" or head[4:7] == b"ni2" or _is_analyze(head)
    name = path.name.lower().removesuffix(".gz")
    if pair:
        # An Analyze header with its voxels behind it is NIfTI by another magic; these are apart.
        return [first, _read_bytes(_partner(path, ".img", "voxels"))]
    if _is_single(head):
        return [first]
    if problem := dicom_problem(first, path.name):
        raise VolumeError(problem)
    if name.endswith(".img"):
        return [_read_bytes(_partner(path, ".hdr", "header")), first]
    return [first]


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            if holds_dicom(path):
                raise VolumeError(f"is a folder of DICOM files; {DICOM_ADVICE}")
            raise VolumeError("is a folder; give a volume file")
        if path.exists() and not path.is_file():
            raise VolumeError("is no regular file; give a volume file")
        size = os.stat(path).st_size
        if size > MAX_FILE_BYTES:
            raise VolumeError(
                f"has {size / 2**30:.1f} GiB; at most {MAX_FILE_BYTES / 2**30:.0f} GiB are read"
            )
        with open(path, "rb") as file:
            content = file.read(size + 1 if size else MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise VolumeError("there is no such file; check the path") from None
    except OSError as error:
        raise VolumeError(f"cannot be read: {error.strerror or error}") from None
    if len(content) > (size or MAX_FILE_BYTES):
        raise VolumeError("grows while it is read; give a finished file")
    if not content:
        raise VolumeError("is empty (0 bytes); copy or convert it again")
    return content


def _partner(path: Path, suffix: str, what: str) -> Path:
    stem = path.name[: -len("".join(path.suffixes[-2:]))] if _is_gz(path) else path.stem
    for ending in (suffix, suffix + ".gz", suffix.upper()):
        partner = path.with_name(stem + ending)
        if partner != path and partner.is_file():
            return partner
    raise VolumeError(
        f"is one of two files, and the one with the {what} ({stem}{suffix}) is missing"
    )


def _is_gz(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _sha256(files: list[bytes]) -> str:
    digest = hashlib.sha256()
    for content in files:
        digest.update(content)
    return digest.hexdigest()


def _unpack(content: bytes, limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes, unpacked if the content is gzip: never more, whatever it says.

    Returns:
        The bytes, and how many behind the end of the compressed data are none of it.
    """
    if content[:2] != _GZIP:
        return (content[:limit] if limit < len(content) else content), 0
    pieces: list[bytes] = []
    whole = start = at = 0
    stream = zlib.decompressobj(_GZIP_STREAM)
    while limit > 0 and at < len(content):
        block = content[at : at + _BLOCK]
        try:
            pieces.append(stream.decompress(block, limit))
        except zlib.error:
            break
        limit -= len(pieces[-1])
        at += len(block) - len(stream.unused_data or stream.unconsumed_tail)
        if stream.eof:
            if content[at : at + 1] == b"\0":
                # Tapes and some archives fill the last block.
                at = len(content) - len(content[at:].lstrip(b"\0"))
            whole, start = len(pieces), at
            if content[at : at + 2] != _GZIP:
                break
            stream = zlib.decompressobj(_GZIP_STREAM)
    else:
        if limit <= 0:
            return b"".join(pieces), 0
        if not start:
            raise VolumeError("ends in the middle of its compressed data; copy it again")
    if not start:
        raise VolumeError("is damaged: its compressed data cannot be read; copy it again")
    return b"".join(pieces[:whole]), len(content) - start


# --- header ------------------------------------------------------------------------------------


def _is_mgh(head: bytes) -> bool:
    return head[:4] == b"\0\0\0\1"


def _is_single(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:7] == b"n+2" or _is_mgh(head)


def _is_analyze(head: bytes) -> bool:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    return 348 in sizes and head[344:347] not in (b"n+1", b"ni1") and len(head) == 348


def _image_class(head: bytes) -> Any:
    import nibabel

    if head[344:348] == b"n+1\0":
        return nibabel.Nifti1Image
    if head[344:348] == b"ni1\0":
        return nibabel.Nifti1Pair
    if head[4:7] == b"n+2":
        return nibabel.Nifti2Image
    if head[4:7] == b"ni2":
        return nibabel.Nifti2Pair
    if _is_analyze(head):
        return nibabel.Spm2AnalyzeImage
    if _is_mgh(head):
        return nibabel.MGHImage
    for offset, magic, text in _STRANGERS:
        if head[offset : offset + len(magic)] == magic:
            raise VolumeError(text)
    if len(head) < 348 and not head.strip(b"\0"):
        raise VolumeError("holds nothing but zeros; copy or convert it again")
    raise VolumeError(f"is in no known format; {_KNOWN}")


def _parse(files: list[bytes]) -> tuple[Any, np.dtype, list[str]]:
    """The image, its voxels still packed, their type, and notes; refuses what can be no head."""
    from nibabel.fileholders import FileHolder

    head, _ = _unpack(files[0], _HEAD)
    image_class = _image_class(head)

    header = _guarded(lambda: image_class.header_class(_header_block(image_class, head)))
    shape = tuple(int(n) for n in _guarded(header.get_data_shape))
    dtype = _guarded(header.get_data_dtype)
    _check_shape(shape)
    _check_dtype(dtype)
    count = int(np.prod([max(n, 1) for n in shape], dtype=object))
    bytes_needed = count * dtype.itemsize
    offset = int(_guarded(header.get_data_offset))
    if not 0 <= offset <= _MAX_EXTRA:
        raise VolumeError(f"says that its voxels begin at byte {offset:,}; the header is damaged")
    unpacked = [_unpack(content, bytes_needed + offset + 2 * _HEAD) for content in files]
    contents = [content for content, _ in unpacked]
    behind = sum(count for _, count in unpacked)
    if len(contents[-1]) < offset + bytes_needed:
        if behind:
            raise VolumeError("is damaged: its compressed data cannot be read; copy it again")
        raise VolumeError(
            f"is truncated: {' x '.join(map(str, shape))} voxels need {offset + bytes_needed:,} "
            f"bytes, {len(contents[-1]):,} are there; copy it again"
        )

    if _is_mgh(head):
        # What may stand behind the voxels need not be there.
        contents[0] = contents[0].ljust(offset + bytes_needed + _MGH_FOOTER, b"\0")

    def load() -> Any:
        names = ["image"] if len(contents) == 1 else ["header", "image"]
        holders = {
            name: FileHolder(fileobj=io.BytesIO(content))
            for name, content in zip(names, contents, strict=True)
        }
        # SPM's third file says where the origin is, which is not looked at.
        holders["mat"] = FileHolder(fileobj=io.BytesIO())
        return image_class.from_file_map(holders)

    notes = [f"What follows the compressed data is left out ({behind:,} bytes)."] if behind else []
    return _guarded(load), dtype, notes


def _header_block(image_class: Any, head: bytes) -> bytes:
    size = image_class.header_class.template_dtype.itemsize
    if _is_mgh(head):
        return head[: size - _MGH_FOOTER] + bytes(_MGH_FOOTER)
    if len(head) < size:
        raise VolumeError(f"is truncated within its header of {size} bytes; copy it again")
    return head[:size]


def _guarded(call: Callable[[], Any]) -> Any:
    """What a library says of a damaged file, in one line."""
    try:
        return call()
    except VolumeError:
        raise
    except MemoryError:
        raise VolumeError("is larger than the memory that is free") from None
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise VolumeError(f"has a damaged header: {text[:160]}") from None


def _check_shape(shape: tuple[int, ...]) -> None:
    text = " x ".join(map(str, shape))
    if not shape or any(n < 1 for n in shape):
        raise VolumeError(f"has no voxels: its shape is {text or 'empty'}")
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise VolumeError(f"is too large: {text} voxels, at most {MAX_VOXELS:,} are read")
    if len(shape) > 3 and max(shape[3:]) > 1:
        volumes = int(np.prod(shape[3:], dtype=object))
        raise VolumeError(
            f"is a series of {volumes} volumes ({text}), as in diffusion or functional MRI; "
            "give one T1-weighted volume"
        )
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise VolumeError(f"is a single slice ({text}); a 3-D volume is needed")
    if min(shape[:3]) < _MIN_VOXELS:
        raise VolumeError(
            f"has only {min(shape[:3])} slices ({text}); at least {_MIN_VOXELS} are needed"
        )


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.names is not None:
        raise VolumeError("holds colours, as a rendered map; a T1-weighted volume is needed")
    if dtype.kind == "c":
        raise VolumeError("holds complex numbers; give the magnitude image")
    if dtype.kind not in "iuf":
        raise VolumeError(f"has voxels of type {dtype}, which is no number")


# --- where the voxels lie ----------------------------------------------------------------------


def _affine(image: Any, notes: list[str]) -> np.ndarray:
    """Voxel indices -> mm; of several answers in the header the first that can be true."""
    header = image.header
    shape = image.shape[:3]
    found: dict[str, np.ndarray] = {}
    if hasattr(header, "get_sform"):
        for name, get in (("sform", header.get_sform), ("qform", header.get_qform)):
            try:
                matrix, code = get(coded=True)
            except Exception:
                notes.append(f"The {name} is damaged and left out.")
                continue
            if code and matrix is not None:
                found[name] = np.asarray(matrix, np.float64)
        spare = "voxel sizes"
    else:
        found["header"] = np.asarray(image.affine, np.float64)
        spare = "header"
        if not image.__class__.__name__.startswith("MGH"):
            notes.append("Analyze has no orientation; left and right may be exchanged.")
    if hasattr(header, "get_base_affine"):
        found.setdefault(spare, np.asarray(header.get_base_affine(), np.float64))
    scale = _unit(header)
    usable = {}
    for name, matrix in found.items():
        for factor in dict.fromkeys((1.0, scale)):
            fitted = np.diag([factor, factor, factor, 1.0]) @ matrix
            if _plausible(fitted, shape):
                usable[name] = fitted
                if factor != 1:
                    notes.append(f"Lengths are given in units of {factor:g} mm.")
                break
    if not usable:
        raise VolumeError(_implausible(next(iter(found.values()), np.eye(4)), shape))
    name, affine = next(iter(usable.items()))
    if next(iter(found)) != name:
        notes.append(f"The {next(iter(found))} cannot be true; the {name} is used.")
    elif spare == name and "sform" not in found and hasattr(header, "get_sform"):
        notes.append("The header has no orientation; left and right may be exchanged.")
    other = usable.get("qform")
    if name == "sform" and other is not None:
        span = np.linalg.norm((affine - other)[:3, :3] * np.array(shape), axis=0).max()
        if span > 5:
            notes.append(f"sform and qform differ by {span:.0f} mm across; the sform is used.")
    return affine


def _unit(header: Any) -> float:
    try:
        return _UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    except (KeyError, ValueError, IndexError):
        return 1.0


def _plausible(affine: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether this can be a head's grid: finite, not flat, about orthogonal, of a head's size."""
    linear = affine[:3, :3]
    if not np.isfinite(affine).all():
        return False
    spacing = np.linalg.norm(linear, axis=0)
    if spacing.min() < _SPACING_MM[0] or spacing.max() > _SPACING_MM[1]:
        return False
    field = spacing * shape
    if field.min() < _FIELD_MM[0] or field.max() > _FIELD_MM[1]:
        return False
    return bool(abs(np.linalg.det(linear / spacing)) > 0.7)


def _implausible(affine: np.ndarray, shape: tuple[int, ...]) -> str:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(spacing).all() or spacing.min() <= 0:
        return "has no usable voxel size or orientation in its header; convert it again"
    field = " x ".join(f"{mm:.0f}" for mm in spacing * shape)
    return (
        f"covers {field} mm (voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm); a head "
        f"needs {_FIELD_MM[0]:.0f} to {_FIELD_MM[1]:.0f} mm along each axis"
    )


def _canonical(
    voxels: np.ndarray, file_affine: np.ndarray, notes: list[str], sha256: str
) -> Volume:
    from nibabel.orientations import aff2axcodes, apply_orientation, inv_ornt_aff, io_orientation

    shape = voxels.shape
    orientation = io_orientation(file_affine)
    to_canonical = np.linalg.inv(inv_ornt_aff(orientation, shape))
    voxels = np.ascontiguousarray(apply_orientation(voxels, orientation))
    # Copies of an image in other axis orders carry other rounding errors: a ten-thousandth of a
    # millimetre is more than these and less than anything that matters.
    linear = np.round((file_affine @ np.linalg.inv(to_canonical))[:3, :3], 4) + 0.0
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = -linear @ ((np.array(voxels.shape) - 1) / 2)
    return Volume(
        voxels=voxels,
        affine=affine,
        to_canonical=np.round(to_canonical),
        file_affine=file_affine,
        file_shape=(shape[0], shape[1], shape[2]),
        orientation="".join(str(code) for code in aff2axcodes(file_affine)),
        sha256=sha256,
        notes=tuple(notes),
    )


# --- values ------------------------------------------------------------------------------------


def _voxels(image: Any, dtype: np.dtype, notes: list[str]) -> np.ndarray:
    """(I, J, K) float32 in the file's axis order, scaled, finite."""
    values = _guarded(lambda: image.get_fdata(dtype=np.float32, caching="unchanged"))
    values = np.asarray(values).reshape(values.shape[:3])
    if dtype.itemsize == 8 and not np.isfinite(values).all():
        # Beyond what float32 holds: the scale of an image means nothing.
        exact = _guarded(lambda: np.asarray(image.dataobj, np.float64)).reshape(values.shape)
        largest = np.abs(exact[np.isfinite(exact)]).max(initial=0.0)
        values = (exact / max(largest, 1.0)).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise VolumeError("holds no finite numbers (all NaN)")
    if not finite.all():
        share = 1 - finite.mean()
        notes.append(f"{100 * share:.2g} % of the voxels are no finite numbers, set to 0.")
        values = np.where(finite, values, np.float32(0))
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise VolumeError(f"is empty: every voxel is {low:g}")
    if np.mean(values < CT_LOW) > 0.05:
        padded = padding(values)
        if padded is None:
            raise VolumeError(
                f"has values down to {low:.0f}, as the Hounsfield units of a CT; a T1-weighted MR "
                "image is needed"
            )
        notes.append(f"The background of {padded:g} is padding, set to 0.")
        values = np.maximum(values, np.float32(0))
        if not values.any():
            raise VolumeError(f"is empty: every voxel is {low:g} or 0")
    background = np.median(values)
    share = float(np.mean(values != background))
    if share < 0.02:
        raise VolumeError(f"is nearly empty: {100 * (1 - share):.1f} % of the voxels are equal")
    return values
