"""One picture in every format, by which a reader shows that it turns and colours nothing."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

RED, GREEN, BLUE = (220, 20, 30), (10, 190, 40), (20, 40, 200)


def quarters(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red top left, green top right, blue below: no rotation or flip leaves it as it is."""
    width, height = size
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    width, height = image.size
    places = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
    return [image.getpixel((int(x * width), int(y * height))) for x, y in places]


def assert_upright(image: Image.Image, tolerance: int = 12) -> None:
    assert image.mode == "RGB"
    found = np.array(corners(image), int)
    assert np.abs(found - np.array([RED, GREEN, BLUE, BLUE])).max() <= tolerance


def heic(image: Image.Image, **options) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=95, **options)
    return out.getvalue()


FORMATS = {
    "jpeg": lambda: encoded(quarters(), "JPEG", quality=95),
    "progressive jpeg": lambda: encoded(quarters(), "JPEG", quality=95, progressive=True),
    "png": lambda: encoded(quarters(), "PNG"),
    "interlaced palette png": lambda: encoded(quarters().quantize(8), "PNG"),
    "webp": lambda: encoded(quarters(), "WEBP", quality=95),
    "lossless webp": lambda: encoded(quarters(), "WEBP", lossless=True),
    "tiff": lambda: encoded(quarters(), "TIFF"),
    "lzw tiff": lambda: encoded(quarters(), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": lambda: encoded(quarters(), "TIFF", big_tiff=True),
    "gif": lambda: encoded(quarters(), "GIF"),
    "heic": lambda: heic(quarters()),
    "cmyk jpeg": lambda: encoded(quarters().convert("CMYK"), "JPEG", quality=95),
    "cmyk tiff": lambda: encoded(quarters().convert("CMYK"), "TIFF"),
    "jpeg tiff": lambda: encoded(quarters(), "TIFF", compression="jpeg", quality=95),
    "opaque rgba png": lambda: encoded(quarters().convert("RGBA"), "PNG"),
    "lab tiff": lambda: encoded(_lab(quarters()), "TIFF"),
    "avif": lambda: encoded(quarters(), "AVIF", quality=95),
    "jpeg 2000": lambda: encoded(quarters(), "JPEG2000"),
    "jpeg 2000 codestream": lambda: encoded(quarters(), "JPEG2000", no_jp2=True),
    "bmp": lambda: encoded(quarters(), "BMP"),
    "palette bmp": lambda: encoded(quarters().quantize(8), "BMP"),
    "dib": lambda: encoded(quarters(), "DIB"),
    "ppm": lambda: encoded(quarters(), "PPM"),
    "plain ppm with a comment": lambda: _plain_ppm(quarters()),
    "sgi": lambda: encoded(quarters(), "SGI"),
    "pcx": lambda: encoded(quarters(), "PCX"),
    "tga": lambda: encoded(quarters(), "TGA"),
    "rle tga": lambda: encoded(quarters(), "TGA", compression="tga_rle"),
    "qoi": lambda: encoded(quarters(), "QOI"),
    "dds": lambda: encoded(quarters(), "DDS"),
    "psd": lambda: _psd(quarters()),
}


def _plain_ppm(image: Image.Image) -> bytes:
    values = " ".join(str(value) for value in image.tobytes())
    return f"P3 # plain\n# {'a' * 70}\n{image.width} {image.height}\n255\n{values}\n".encode()


def _psd(image: Image.Image) -> bytes:
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, image.height, image.width, 8, 3)
    planes = b"".join(band.tobytes() for band in image.split())
    return header + b"\0" * 12 + b"\0\0" + planes


def _lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    return ImageCms.applyTransform(image, transform)
