"""Image files: finding them, reading them unchanged, decoding them into plain RGB.

Everything that can be wrong with a file ends as one `ImageError` whose text is a reason fit to
show to a user. No global PIL state is read or changed: the pixel cap is our own and is checked on
the header, before any pixel is decoded, and PIL's list of plugins is not asked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from retrieval.formats import (
    FORMATS,
    HEAD_BYTES,
    HEIC,
    OTHER_ENDINGS,
    SUFFIXES,
    looks_like_picture,
    what_else,
)
from retrieval.ignore import Ignored

__all__ = [
    "HEIF_MISSING",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MEMORY_SHORT",
    "PHOTO_FORMATS",
    "SUFFIXES",
    "Decoded",
    "FoundFile",
    "ImageBytes",
    "ImageError",
    "TooManyPixels",
    "decode",
    "decode_with_size",
    "find_images",
    "is_picture",
    "pixels_in_memory",
    "read_stable",
    "scan",
    "thumbnail",
]

PHOTO_FORMATS = {".jpg": "JPEG", ".png": "PNG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffixes of what data sets hold and we write, the likeliest first, with PIL's names."""

MAX_BYTES = 256 * 2**20
"""Largest file that is read, in bytes."""

MAX_PIXELS = 201_000_000
"""Largest image that is decoded, in pixels: above the largest phone sensors, below a bomb."""

# Images above this many pixels are decoded one at a time, so that memory does not grow with the
# number of threads (an RGBA image of 32 Mpx is 128 MB).
_LARGE_PIXELS = 32_000_000
_one_large = threading.Lock()
# What PIL decodes in Python takes about a second per megapixel: its pixels count so many times.
_SLOW_COST = 16
_COSTS = {"JPEG2000": 4}  # it is decoded into 32-bit numbers, all of it at once

# Reasons that may be over at the next try.
HEIF_MISSING = "HEIC needs the package pillow-heif, which is missing"
MEMORY_SHORT = "there is not enough memory to decode it"

# Bytes that a pixel takes while it is decoded and made RGB, at the least.
_PIXEL_BYTES = 8

# Without waiting: a pipe may have taken the place of a file that was found.
_READ_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _READ_FLAGS |= getattr(os, _flag, 0)

# A changed file is looked at once more after this pause (seconds): long enough for a small copy.
_SETTLE_SECONDS = 0.05
# A file written to this shortly ago (ns) is watched for as long before it is believed to be whole.
_FRESH_NS = 20_000_000


class ImageError(ValueError):
    """A file that cannot become an image; the text is the reason, in one line."""


class TooManyPixels(ImageError):
    """An image larger than the limit.

    Attributes:
        width, height: the file's.
        needed: value of `max_pixels` with which it is read; None if no value would do, since this
            machine's memory does not hold so many.
    """

    def __init__(self, width: int, height: int, max_pixels: int, *, cost: int = 1) -> None:
        pixels, fits = width * height, width * height <= pixels_in_memory()
        limits = []
        if pixels * cost > max_pixels:
            limits.append(f"the limit of {max_pixels / cost / 1e6:,.0f} megapixels")
        if not fits:
            limits.append("this machine's memory holds")
        super().__init__(f"{width} x {height} pixels are more than {', and than '.join(limits)}")
        self.width, self.height = width, height
        self.needed = pixels * cost if fits else None


@dataclass(frozen=True)
class ImageBytes:
    """A file's bytes, read while the file did not change."""

    data: bytes
    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class FoundFile:
    """One file of a scan.

    Attributes:
        path: relative to the scanned root, with forward slashes.
        size: bytes.
        mtime_ns: time of its last change.
        named: whether its name is a picture's; of others only the first bytes tell (`is_picture`).
    """

    path: str
    size: int
    mtime_ns: int
    named: bool = True


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image and the size of the upright original, before any draft reduction."""

    image: Image.Image
    width: int
    height: int


# --- finding -----------------------------------------------------------------------------------


def scan(
    root: str | os.PathLike[str],
    on_error: Callable[[str, str], None],
    ignored: Ignored | None = None,
    on_other: Callable[[str], None] = lambda path: None,
) -> Iterator[FoundFile]:
    """Walk a folder for files that may be images, in a fixed order; none is opened.

    Hidden files and folders are left out, and what is `ignored`. Linked folders are followed after
    all real ones and every real folder is visited once, so that loops end and a photo inside the
    root keeps its real path.

    Args:
        root: folder to walk.
        on_error: called with (path relative to root, reason) for an unreadable folder, a dangling
            link and anything that has an image's name but is no regular file. The path of a folder
            ends with "/".
        ignored: what is left out; by default what root's `.ennignore` and `Ignored` itself name.
        on_other: called with the relative path of a file whose name is that of something else.

    Raises:
        NotADirectoryError: if root is not a folder that can be listed.
        ValueError, OSError: as `Ignored` does.
    """
    top = os.fspath(root)
    try:
        os.scandir(top).close()
    except OSError as error:
        raise NotADirectoryError(
            f"{top!r} is not a folder that can be read ({_os_reason(error)}); give a photo folder"
        ) from None
    ignored = ignored or Ignored(top)
    visited: set[tuple[int, int]] = set()
    links: list[str] = [""]
    while links:
        batch, links = sorted(links, key=os.fsencode), []
        for start in batch:
            yield from _walk(top, start, visited, links, on_error, ignored, on_other)


def _walk(
    top: str,
    start: str,
    visited: set[tuple[int, int]],
    links: list[str],
    on_error: Callable[[str, str], None],
    ignored: Ignored,
    on_other: Callable[[str], None],
) -> Iterator[FoundFile]:
    """Walk one real tree depth first; linked folders met on the way are appended to `links`."""
    stack = [start]
    while stack:
        prefix = stack.pop()
        folder = os.path.join(top, prefix) if prefix else top
        try:
            info = os.stat(folder)
            identity = (info.st_dev, info.st_ino)
            if info.st_ino and identity in visited:
                continue
            visited.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            on_error(prefix, f"folder cannot be read: {_os_reason(error)}")
            continue
        folders = []
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            path = prefix + name
            suffix = os.path.splitext(name)[1].lower()
            is_image = suffix in SUFFIXES
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not ignored.leaves_out(path + "/"):
                        folders.append(path + "/")
                    continue
                if ignored.leaves_out(path):
                    continue
                if suffix in OTHER_ENDINGS and not entry.is_symlink():
                    on_other(path)
                    continue
                info = entry.stat()
            except OSError as error:
                on_error(path, _link_reason(error))  # it may have led to an image or a folder
                continue
            if stat.S_ISDIR(info.st_mode):
                if not ignored.leaves_out(path + "/"):
                    links.append(path + "/")
            elif suffix in OTHER_ENDINGS:
                on_other(path)
            elif stat.S_ISREG(info.st_mode):
                yield FoundFile(path, info.st_size, info.st_mtime_ns, is_image)
            elif is_image:
                on_error(path, "not a regular file")
            else:
                on_other(path)
        stack.extend(reversed(folders))


def find_images(
    root: str | os.PathLike[str], *, on_error: Callable[[Path, str], None] | None = None
) -> Iterator[Path]:
    """Image files below a folder, sorted; see `scan` for what is left out and reported.

    Args:
        root: folder to walk.
        on_error: called with (path, reason); without it problems are passed over.

    Raises:
        NotADirectoryError: if root is not a folder that can be listed.
    """
    base = Path(root)

    def report(path: str, reason: str) -> None:
        if on_error is not None:
            on_error(base / path, reason)

    files = scan(root, report)
    found = [file.path for file in files if file.named or is_picture(base / file.path)]
    return (base / path for path in sorted(found, key=os.fsencode))


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as pictures of the formats do that are read; False if it cannot be."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
        try:
            return looks_like_picture(os.read(descriptor, HEAD_BYTES))
        finally:
            os.close(descriptor)
    except OSError:
        return False


def _link_reason(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "dangling link"
    if error.errno == errno.ELOOP:
        return "link that points to itself"
    return f"cannot be read: {_os_reason(error)}"


def _os_reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


# --- reading -----------------------------------------------------------------------------------


def read_stable(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> ImageBytes:
    """Read a whole file and make sure that it did not change meanwhile.

    Never blocks on a pipe or device: only a regular file is read. A file that changes is tried
    once more.

    Args:
        path: the file.
        max_bytes: larger files are refused.

    Raises:
        FileNotFoundError: if the file is gone (a file deleted since it was listed is no bad image).
        ImageError: if it is empty, too large, no regular file, cannot be read, or keeps changing.
    """
    for attempt in range(2):
        if attempt:
            time.sleep(_SETTLE_SECONDS)
        result = _read_once(path, max_bytes)
        if result is not None:
            return result
    raise ImageError("the file changed while it was read; it is tried again at the next update")


def _read_once(path: str | os.PathLike[str], max_bytes: int) -> ImageBytes | None:
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ImageError(f"cannot be read: {_os_reason(error)}") from None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ImageError("not a regular file")
        if before.st_size > max_bytes:
            raise ImageError(
                f"file of {before.st_size / 2**20:,.0f} MiB is larger than the limit of "
                f"{max_bytes / 2**20:,.0f} MiB"
            )
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            data = _read_all(file, before.st_size + 1)
        if abs(time.time_ns() - os.fstat(descriptor).st_mtime_ns) < _FRESH_NS:
            # Perhaps in the middle of being written: the clock of file times ticks slowly.
            time.sleep(_FRESH_NS / 1e9)
        after = os.fstat(descriptor)
    except OSError as error:
        raise ImageError(f"cannot be read: {_os_reason(error)}") from None
    finally:
        os.close(descriptor)
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if not same or len(data) != before.st_size:
        return None
    if not data:
        raise ImageError("empty file (0 bytes)")
    return ImageBytes(data, hashlib.sha256(data).hexdigest(), len(data), before.st_mtime_ns)


def _read_all(file: io.RawIOBase | Any, limit: int) -> bytes:
    parts = []
    left = limit
    while left > 0:
        part = file.read(left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# --- decoding ----------------------------------------------------------------------------------


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    draft_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    reduce: bool = False,
) -> Image.Image:
    """Decode the first frame of an image file into an upright RGB image.

    Args:
        data: the file's bytes, or its path.
        draft_size: (width, height) that will do; a JPEG may then be decoded at 1/2, 1/4 or 1/8 of
            its size, never smaller than this.
        max_pixels: larger images are refused, on the header alone.
        reduce: instead of refusing them, decode them at a part of their size where the format can:
            JPEG (not progressive), JPEG 2000, TIFF that holds a smaller copy.

    Returns:
        Image in mode RGB and sRGB's colours: EXIF rotation and ICC profile applied, transparency
        laid on white, 16 bits scaled to 8, palette and CMYK converted, nothing of the file's
        metadata left.

    Raises:
        ImageError: if the bytes are no complete image of a known format.
        FileNotFoundError: if a path is given and there is no such file.
    """
    return decode_with_size(data, draft_size=draft_size, max_pixels=max_pixels, reduce=reduce).image


def decode_with_size(
    data: bytes | str | os.PathLike[str],
    *,
    draft_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    reduce: bool = False,
) -> Decoded:
    """Like `decode`, with the size of the upright original beside the image."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        data = read_stable(data).data
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        return _decode(bytes(data), draft_size, max_pixels, reduce)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(MEMORY_SHORT) from None
    # The decoders raise almost anything on damaged data: struct.error, IndexError, OverflowError,
    # ZeroDivisionError ... What they say themselves is about the file, not the decoder.
    except Exception as error:
        own = isinstance(error, OSError | SyntaxError) and error.__cause__ is None
        reason = _one_line(error) if own else "it is cut off, or its header is garbled"
        raise ImageError(f"damaged image: {reason}") from None


def _decode(
    data: bytes, draft_size: tuple[int, int] | None, max_pixels: int, reduce: bool
) -> Decoded:
    if HEIC.match(data[:HEAD_BYTES]):
        return _decode_heic(data, max_pixels)
    stream = _Stream(data)
    with contextlib.closing(_open(stream, data[:HEAD_BYTES])) as image:
        slow = any(tile[0] in Image.DECODERS for tile in image.tile)
        cost = _SLOW_COST if slow else _COSTS.get(image.format, 1)
        limit = min(max_pixels // cost, pixels_in_memory())
        width, height = image.size
        if width * height == 0:
            raise ImageError("image without pixels")
        side = max(draft_size) if draft_size else None  # rotation comes later: both ways must do
        if width * height > limit or image.format == "JPEG2000":
            from retrieval import reduced

            within = width * height <= limit or (
                reduce and reduced.is_plausible(image, limit, len(data))
            )
            if not within or not reduced.reduce(image, stream, limit, side):
                raise TooManyPixels(width, height, max_pixels, cost=cost)
        elif side is not None and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (side, side))
        with _gate(width * height):
            # OpenJPEG reads beyond the end of any file; its data end with a mark of their own.
            stream.strict = image.format != "JPEG2000"
            if ImageFile.LOAD_TRUNCATED_IMAGES and not (stream.strict or b"\xff\xd9" in data):
                raise ImageError(_TRUNCATED)
            image.load()
            stream.strict = False
            # After loading: PIL turns TIFF images by itself and then deletes the tag.
            method = _orientation(image)
            rgb = _to_rgb(image)
    if method is not None:
        rgb = rgb.transpose(method)
        if method in _SWAPPING:
            width, height = height, width
    rgb.info = {}
    return Decoded(rgb, width, height)


def _decode_heic(data: bytes, max_pixels: int) -> Decoded:
    """HEIC turns its images itself; its EXIF orientation is a leftover to be ignored."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(HEIF_MISSING) from None
    heif = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    width, height = heif.size
    if width * height > min(max_pixels, pixels_in_memory()):
        raise TooManyPixels(width, height, max_pixels)
    if width * height == 0:
        raise ImageError("image without pixels")
    with _gate(width * height):
        rgb = _to_rgb(heif.to_pillow())
    rgb.info = {}
    return Decoded(rgb, width, height)


def pixels_in_memory() -> int:
    """How many pixels of one picture this machine's whole memory could hold."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _PIXEL_BYTES
    except (AttributeError, OSError, ValueError):  # not on every system
        return 2**40


def _gate(pixels: int) -> contextlib.AbstractContextManager[Any]:
    return _one_large if pixels > _LARGE_PIXELS else contextlib.nullcontext()


_SWAPPING = frozenset(
    (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
)
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The turn that EXIF asks for; unreadable EXIF data asks for nothing."""
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        return None


_TRUNCATED = "damaged image: image file is truncated"


class _Stream(io.BytesIO):
    """A file in memory that does not end quietly.

    Other code may have set PIL's process-wide LOAD_TRUNCATED_IMAGES, and then half an image would
    load as if it were whole.
    """

    strict = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size != 0 and self.strict and ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ImageError(_TRUNCATED)
        return data


def _open(stream: io.BytesIO, head: bytes) -> Any:
    """Read the header with the plugin that the first bytes ask for.

    `PIL.Image.open` would try plugins that run other programs, and check the size against a
    process-wide limit that warns or raises by its own rules; other code may have changed it.
    """
    for form in FORMATS:
        if form.begins.match(head):
            module, name = form.reader
            return getattr(importlib.import_module(f"PIL.{module}"), name)(stream)
    other = what_else(head)
    raise ImageError(
        "not a JPEG, PNG, WebP, TIFF, GIF, HEIC, AVIF or other picture that is read"
        + (f", but {other}" if other else "")
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode, its colours to sRGB's, transparency on white."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        linear = not image.mode.startswith("I;16")  # measurements, whose range is stretched
        image = _scale_to_8_bits(image)
        profile = None if linear else profile
    if profile:
        from retrieval.colour import to_srgb

        image = to_srgb(image, profile)
    transparent = image.has_transparency_data
    if image.mode == "LAB":
        from PIL import ImageCms

        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        return ImageCms.applyTransform(image, transform) or image
    if not transparent:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits divide by 257; 32-bit and float ones are stretched to their range."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values - low) * scale).astype(np.uint8))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]


# --- thumbnails --------------------------------------------------------------------------------


def thumbnail(
    image: Image.Image | bytes | str | os.PathLike[str],
    size: int | tuple[int, int],
    *,
    quality: int = 82,
) -> bytes:
    """A small JPEG of an image, without any of its metadata.

    Args:
        image: an image, a file's bytes, or a path.
        size: longest side, or the (width, height) to fit into; the aspect is kept and small images
            are not enlarged.
        quality: JPEG quality, 1 to 95.

    Raises:
        ImageError: if the image cannot be decoded.
    """
    box = (size, size) if isinstance(size, int) else size
    small = (
        _to_rgb(ImageOps.exif_transpose(image))
        if isinstance(image, Image.Image)
        else decode(image, draft_size=box, reduce=True)
    )
    small.thumbnail(box, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    # A fresh image: `save` would otherwise carry EXIF, ICC and comments over from `info`.
    clean = Image.frombytes("RGB", small.size, small.tobytes())
    clean.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()
