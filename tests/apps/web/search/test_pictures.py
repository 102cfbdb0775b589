"""Opaque tokens, views without metadata, uploads in memory."""

from __future__ import annotations

import io

import numpy as np
import pytest

pytest.importorskip("fastapi")
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apps.web.search.pictures import ImageRef, Pictures, Uploads, _ByteCache
from retrieval.images import ImageError

versions = st.text("0123456789abcdef", min_size=14, max_size=14)
refs = st.builds(ImageRef, st.integers(0, 255), st.integers(0, 2**63 - 1), versions)


def _jpeg(size: tuple[int, int] = (3000, 2000), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, "JPEG", **options)
    return out.getvalue()


def _pictures(data: bytes = b"", same: bool = True) -> Pictures:
    return Pictures(lambda ref: (data, same))


@given(refs)
def test_a_token_comes_back_as_its_reference(ref):
    pictures = _pictures()
    token = pictures.token(ref)
    assert len(token) == 43
    assert pictures.resolve(token) == ref


@given(refs, st.integers(0, 42), st.sampled_from("ABCxyz019-_"))
def test_a_changed_token_is_unknown(ref, at, letter):
    pictures = _pictures()
    token = pictures.token(ref)
    changed = token[:at] + letter + token[at + 1 :]
    if changed != token:
        with pytest.raises(LookupError):
            pictures.resolve(changed)


@given(st.text() | st.none() | st.integers() | st.lists(st.text()))
def test_anything_else_is_unknown(value):
    with pytest.raises(LookupError):
        _pictures().resolve(value)


def test_another_server_process_does_not_know_it():
    token = _pictures().token(ImageRef(0, 7, "0" * 14))
    with pytest.raises(LookupError):
        _pictures().resolve(token)


def test_views_are_small_jpegs_without_metadata():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    pictures = _pictures(_jpeg(exif=exif, comment=b"secret comment"))
    view, keep = pictures.view(pictures.token(ImageRef(0, 1, "0" * 14)), 448)
    assert keep
    assert Image.open(io.BytesIO(view)).size == (448, 299)
    assert b"secret" not in view


def test_a_changed_file_is_shown_but_not_kept():
    calls = []

    def load(ref):
        calls.append(ref)
        return _jpeg((30, 20)), False

    pictures = Pictures(load)
    token = pictures.token(ImageRef(0, 1, "0" * 14))
    assert pictures.view(token, 448)[1] is False
    pictures.view(token, 448)
    assert len(calls) == 2


def test_views_are_made_once():
    calls = []

    def load(ref):
        calls.append(ref)
        return _jpeg((30, 20)), True

    pictures = Pictures(load)
    token = pictures.token(ImageRef(0, 1, "0" * 14))
    assert pictures.view(token, 448) == pictures.view(token, 448)
    assert len(calls) == 1


def test_uploads_are_decoded_shrunk_and_kept_for_a_while():
    uploads = Uploads()
    token = uploads.add(_jpeg())
    assert max(Image.open(io.BytesIO(uploads.get(token))).size) == 1024
    assert uploads.add(_jpeg()) != token
    short = Uploads(max_age=-1)
    with pytest.raises(LookupError):
        short.get(short.add(_jpeg()))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"\xff\xd8\xff" * 9, b"\0" * 1000])
def test_uploads_that_are_no_pictures(data):
    with pytest.raises(ImageError) as error:
        Uploads().add(data)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_on_its_header():
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    with pytest.raises(ImageError, match="megapixels"):
        Uploads().add(out.getvalue())


def test_uploads_above_the_limit_are_not_decoded_at_a_part_of_their_size(monkeypatch):
    monkeypatch.setattr("apps.web.search.pictures.PICTURE_PIXELS", 2999)
    with pytest.raises(ImageError, match="megapixels") as error:
        Uploads().add(_jpeg((60, 50)))
    assert "--max-pixels" not in str(error.value)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "BMP", "PPM"])
def test_uploads_of_other_formats(kind):
    out = io.BytesIO()
    Image.new("RGB", (60, 50), (200, 30, 30)).save(out, kind)
    uploads = Uploads()
    assert uploads.get(uploads.add(out.getvalue())).startswith(b"\xff\xd8")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=60))
def test_the_cache_never_exceeds_its_size(items):
    cache = _ByteCache(100)
    for key, size in items:
        cache.put(key, b"x" * size)
        assert cache._size == sum(len(v) for _, v in cache._items.values()) <= 100
        assert cache.get(key) == b"x" * size


def test_who_uploads_many_makes_nobody_elses_picture_go():
    uploads = Uploads(max_bytes=20_000)
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    first = uploads.add(stream.getvalue(), "ann")
    many = [uploads.add(stream.getvalue(), "bob") for _ in range(50)]
    assert uploads.get(first)
    assert uploads.get(many[-1])
    with pytest.raises(LookupError):
        uploads.get(many[0])
