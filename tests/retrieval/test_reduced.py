"""Pictures above the limit of pixels: at a part of their size, or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from picture_files import assert_upright, encoded, quarters
from PIL import Image, ImageFile

from retrieval.images import TooManyPixels, decode_with_size

SIZE = (1600, 1200)


def tiff(overviews: list[tuple[int, int]], flag: int = 1) -> bytes:
    out = io.BytesIO()
    big = quarters(SIZE)
    pages = []
    for size in overviews:
        page = quarters(size)
        page.encoderinfo = {"tiffinfo": {0x00FE: flag}}
        pages.append(page)
    big.save(out, "TIFF", save_all=True, append_images=pages, compression="tiff_lzw")
    return out.getvalue()


FILES = {
    "jpeg": lambda: encoded(quarters(SIZE), "JPEG", quality=90),
    "grey jpeg": lambda: encoded(quarters(SIZE).convert("L"), "JPEG"),
    "cmyk jpeg": lambda: encoded(quarters(SIZE).convert("CMYK"), "JPEG"),
    "jpeg 2000": lambda: encoded(quarters(SIZE), "JPEG2000"),
    "tiff": lambda: tiff([(800, 600), (400, 300), (200, 150)]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("draft", [None, (64, 64)])
def test_what_can_be_is_read_at_a_part_of_its_size(name: str, draft) -> None:
    data = FILES[name]()
    decoded = decode_with_size(data, max_pixels=250_000, reduce=True, draft_size=draft)
    assert (decoded.width, decoded.height) == SIZE
    assert 64 * 64 <= decoded.image.width * decoded.image.height <= 250_000
    if "grey" not in name:
        assert_upright(decoded.image, 40)
    with pytest.raises(TooManyPixels, match="1600 x 1200 pixels are more than the limit"):
        decode_with_size(data, max_pixels=250_000)


def test_rotation_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quarters(SIZE).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "JPEG", exif=exif)
    decoded = decode_with_size(data, max_pixels=250_000, reduce=True)
    assert (decoded.width, decoded.height) == SIZE
    assert_upright(decoded.image, 30)


@pytest.mark.parametrize(
    "data",
    [
        encoded(quarters(SIZE), "PNG"),
        encoded(quarters(SIZE), "WEBP"),
        encoded(quarters(SIZE), "JPEG", progressive=True),  # would be held whole
        encoded(quarters(SIZE), "JPEG2000", num_resolutions=1),
        encoded(quarters(SIZE), "JPEG2000", codeblock_size=(4, 4)),  # its books would be larger
        tiff([]),
        tiff([(400, 300)], flag=0),  # another page, not a smaller copy
        tiff([(300, 400)]),
        tiff([(1500, 1125)]),
    ],
    ids=["png", "webp", "progressive", "j2k", "blocks", "tiff", "page", "shape", "large"],
)
def test_what_cannot_be_is_refused_unread(data: bytes, monkeypatch) -> None:
    def forbidden(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
    with pytest.raises(TooManyPixels) as caught:
        decode_with_size(data, max_pixels=250_000, reduce=True)
    assert caught.value.needed in (1600 * 1200, 4 * 1600 * 1200)


def test_small_file_that_claims_a_huge_size_is_refused_unread(monkeypatch) -> None:
    whole = bytearray(encoded(quarters((64, 48)), "JPEG"))
    at = whole.find(b"\xff\xc0")
    whole[at + 5 : at + 9] = bytes((0xEA, 0x60, 0xEA, 0x60))  # 60000 x 60000

    def forbidden(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
    with pytest.raises(TooManyPixels):
        decode_with_size(bytes(whole), reduce=True)


def test_jpeg_in_several_scans_is_held_and_so_refused() -> None:
    data = bytearray(encoded(quarters(SIZE), "JPEG"))
    at = data.find(b"\xff\xda")
    assert data[at + 4] == 3
    data[at + 2 : at + 14] = bytes((0, 8, 1, 1, 0, 0, 63, 0, 0, 0, 0, 0))
    with pytest.raises(TooManyPixels):
        decode_with_size(bytes(data), max_pixels=250_000, reduce=True)


def test_formats_that_are_decoded_slowly_end_earlier() -> None:
    data = encoded(Image.fromarray(np.zeros((400, 500, 3), np.uint8)), "QOI")
    assert decode_with_size(data, max_pixels=3_200_000).width == 500
    with pytest.raises(TooManyPixels) as caught:
        decode_with_size(data, max_pixels=3_199_999)
    assert caught.value.needed == 3_200_000
