"""Colours by the profile that a picture carries."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from icc_profiles import (
    DISPLAY_P3,
    SRGB,
    of_greys,
    of_inks,
    of_primaries,
    profile,
)
from index_cases import TinyTestModel
from PIL import Image, ImageCms

from retrieval import colour
from retrieval.images import decode, thumbnail
from retrieval.queries import image_vectors

SWAPPED = of_primaries((DISPLAY_P3[2], DISPLAY_P3[1], DISPLAY_P3[0]))
ORANGE = (230, 120, 30)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixel(data: bytes) -> np.ndarray:
    return np.array(decode(data).getpixel((8, 8)), int)


def plain(color=ORANGE, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (16, 16), color)


KINDS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "JPEG2000": {"irreversible": False},
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_wide_gamut_becomes_srgb(kind: str) -> None:
    data = encoded(plain(), kind, icc_profile=of_primaries(DISPLAY_P3), **KINDS[kind])
    # Display P3's orange is more saturated than sRGB's of the same numbers.
    found = pixel(data)
    assert np.abs(found - (242, 116, 0)).max() <= 12, found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_swapped_channels_are_swapped_back(kind: str) -> None:
    found = pixel(encoded(plain(), kind, icc_profile=SWAPPED, **KINDS[kind]))
    assert found[2] > 200 > found[1] > found[0]


def test_heic_has_profiles_too() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 64), ORANGE)
    out = io.BytesIO()
    image.info["icc_profile"] = SWAPPED
    pillow_heif.from_pillow(image).save(out, quality=95, icc_profile=SWAPPED)
    found = pixel(out.getvalue())
    assert found[2] > 200 > found[0]


def test_srgb_changes_no_bit() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for options in ({}, {"icc_profile": SRGB}):
        np.testing.assert_array_equal(decode(encoded(noise, **options)), noise)
    assert colour.to_srgb(noise, SRGB) is noise


def test_transparency_stays() -> None:
    image = plain((*ORANGE, 255), "RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    result = decode(encoded(image, icc_profile=SWAPPED))
    assert result.getpixel((2, 2)) == (255, 255, 255)
    assert result.getpixel((12, 2))[2] > 200


def test_palette() -> None:
    found = pixel(encoded(plain().quantize(4), icc_profile=SWAPPED))
    assert found[2] > 200 > found[0]


def test_greys_by_their_curve() -> None:
    dark = pixel(encoded(plain(128, "L"), icc_profile=of_greys(3.0)))
    assert dark.max() - dark.min() <= 1
    assert abs(dark[0] - 99) <= 4  # (128/255)**3, seen through sRGB's curve
    # 16 bits go the same way.
    deep = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16))
    assert abs(pixel(encoded(deep, icc_profile=of_greys(3.0)))[0] - dark[0]) <= 1
    # With transparency, and with a profile of colours.
    both = encoded(plain((128, 255), "LA"), icc_profile=of_greys(3.0))
    assert abs(pixel(both)[0] - dark[0]) <= 1
    coloured = of_primaries(DISPLAY_P3, gamma=3.0)
    assert abs(pixel(encoded(plain(128, "L"), icc_profile=coloured))[0] - dark[0]) <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks(kind: str) -> None:
    cyan = plain((255, 0, 0, 0), "CMYK")
    options = {**KINDS[kind], "icc_profile": of_inks()}
    red, green, blue = pixel(encoded(cyan, kind, **options))
    assert min(red, green) > 200 > 80 > blue  # this profile's "cyan" prints yellow


BAD = {
    "text": b"not a profile" * 40,
    "short": SWAPPED[:100],
    "cut": SWAPPED[:300],
    "zeros": b"\0" * 1000,
    "of inks, in a picture of lights": of_inks(),
    "of greys, in a coloured picture": of_greys(2.2),
    "all black": of_primaries(((0.0, 0.0, 0.0),) * 3),
    "of unknown colours": profile(b"HLS ", {}),
    "Lab": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    "without tags": profile(b"RGB ", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_profile_is_passed_over(name: str) -> None:
    assert tuple(pixel(encoded(plain(), icc_profile=BAD[name]))) == ORANGE


def test_random_damage_never_costs_the_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(SWAPPED)
        for at in rng.integers(0, len(damaged), 6):
            damaged[at] = rng.integers(0, 256)
        assert decode(encoded(plain(), icc_profile=bytes(damaged))).size == (16, 16)


def test_profile_and_rotation_and_draft_go_together() -> None:
    big = Image.new("RGB", (800, 400), ORANGE)
    big.paste((20, 20, 20), (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(big, "JPEG", quality=95, icc_profile=SWAPPED, exif=exif)
    result = decode(data, draft_size=(100, 100))
    assert result.size == (100, 200) or result.size == (200, 400)
    assert max(result.getpixel((result.width // 2, 10))) < 60
    red, _, blue = result.getpixel((result.width // 2, result.height - 10))
    assert blue > 200 > red


def test_thumbnails_show_the_same_colours_and_carry_no_profile() -> None:
    small = Image.open(io.BytesIO(thumbnail(encoded(plain(), icc_profile=SWAPPED), 8)))
    assert "icc_profile" not in small.info
    assert small.getpixel((4, 4))[2] > 200


def test_a_profile_is_made_ready_once() -> None:
    data = encoded(plain(), icc_profile=SWAPPED)
    colour._transform.cache_clear()
    threads = [threading.Thread(target=decode, args=(data,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decode(data)
    assert colour._transform.cache_info().hits >= 1
    assert colour._transform.cache_info().currsize == 1


def test_an_opened_picture_is_searched_as_its_file_is() -> None:
    model = TinyTestModel()
    for image, kind in ((plain(), "PNG"), (plain((255, 0, 0, 0), "CMYK"), "TIFF")):
        profiled = of_inks() if image.mode == "CMYK" else SWAPPED
        data = encoded(image, kind, icc_profile=profiled)
        opened = Image.open(io.BytesIO(data))
        np.testing.assert_allclose(
            image_vectors(model, data), image_vectors(model, opened), atol=1e-6
        )
