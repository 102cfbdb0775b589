"""What the catalog keeps about skipped pictures is understood by the next update."""

from __future__ import annotations

import sys

import pytest

from retrieval import images
from retrieval.images import ImageError, TooManyPixels, decode
from retrieval.index import reasons
from retrieval.index.reasons import may_be_over, of_bytes, of_pixels


def test_a_limit_is_over_once_it_is_raised_as_advised() -> None:
    reason = of_pixels(TooManyPixels(100, 80, 4000, cost=4))
    assert "--max-pixels 32000`" in reason
    assert not may_be_over(reason, 31_999)
    assert may_be_over(reason, 32_000)
    assert of_bytes(ImageError("large"), 10**10).endswith("--max-pixels 2500000000` reads it")


@pytest.mark.parametrize("limit", [images.MAX_PIXELS, 2**63])
def test_what_no_memory_holds_is_left_until_one_does(limit: int, monkeypatch) -> None:
    reason = of_pixels(TooManyPixels(2**24, 2**24, limit))
    assert "--max-pixels" not in reason
    assert not may_be_over(reason, 2**63)
    monkeypatch.setattr(reasons, "pixels_in_memory", lambda: 2**48)
    assert may_be_over(reason, images.MAX_PIXELS)


def test_a_missing_package_may_be_there_now(monkeypatch) -> None:
    pytest.importorskip("pillow_heif")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ImageError) as caught:
            decode(b"\0\0\0\x18ftypheic" + bytes(100))
        assert not may_be_over(str(caught.value), images.MAX_PIXELS)
    assert may_be_over(str(caught.value), images.MAX_PIXELS)


def test_a_memory_that_was_short_may_be_free_now(monkeypatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_decode", short)
    with pytest.raises(ImageError) as caught:
        decode(b"\xff\xd8\xff\xe0" + bytes(100))
    assert may_be_over(str(caught.value), images.MAX_PIXELS)


@pytest.mark.parametrize(
    ("reason", "over"),
    [
        ("not a JPEG, PNG, WebP, TIFF, GIF or HEIC image", True),
        ("100 x 80 pixels are more than the limit of 201 megapixels", True),
        ("damaged image: it is cut off, or its header is garbled", False),
        ("the model sees no direction in this image", False),
    ],
)
def test_words_of_other_versions_and_lasting_ones(reason: str, over: bool) -> None:
    assert may_be_over(reason, images.MAX_PIXELS) is over
