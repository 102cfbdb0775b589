"""Image files of every kind, whole and broken."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import FORMATS, assert_upright, encoded, heic, quarters
from PIL import Image, ImageFile

from retrieval import images
from retrieval.images import (
    ImageError,
    decode,
    decode_with_size,
    find_images,
    is_picture,
    read_stable,
    scan,
    thumbnail,
)

# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_picture(name: str) -> None:
    decoded = decode_with_size(FORMATS[name]())
    assert_upright(decoded.image)
    assert (decoded.width, decoded.height) == decoded.image.size == (64, 48)
    assert decoded.image.info == {}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_first_frame_counts(kind: str) -> None:
    other = Image.new("RGB", (64, 48), (255, 255, 0))
    data = encoded(quarters(), kind, save_all=True, append_images=[other])
    assert_upright(decode(data))


def test_multi_picture_jpeg_of_phones() -> None:
    data = encoded(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert_upright(decode(data))


def _heic_turned_by_exif(image: Image.Image, exif: bytes) -> bytes:
    pytest.importorskip("pillow_heif")
    code = (
        "import io, sys, pillow_heif; from PIL import Image; pillow_heif.register_heif_opener();"
        "size, exif = eval(sys.argv[1]); out = io.BytesIO();"
        "image = Image.frombytes('RGB', size, sys.stdin.buffer.read());"
        "image.save(out, 'HEIF', exif=exif, quality=95); sys.stdout.buffer.write(out.getvalue())"
    )
    command = [sys.executable, "-c", code, repr((image.size, exif))]
    return subprocess.run(command, input=image.tobytes(), capture_output=True, check=True).stdout


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIC", "AVIF"])
def test_exif_rotation(kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters()
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "HEIC":
        # In a process of its own, because saving needs the plugin registered: the encoder then
        # turns the EXIF tag into HEIC's own rotation, as cameras do.
        data = _heic_turned_by_exif(stored, exif.tobytes())
    elif kind == "TIFF":
        data = encoded(stored, "TIFF", tiffinfo={0x0112: orientation})
    else:
        data = encoded(stored, kind, exif=exif, **({"quality": 95} if kind != "PNG" else {}))
    decoded = decode_with_size(data, draft_size=(16, 16))
    assert_upright(decoded.image, 30)
    assert (decoded.width, decoded.height) == (64, 48)


def test_damaged_exif_is_no_reason_to_skip() -> None:
    data = encoded(quarters(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert_upright(decode(data))


def test_draft_keeps_at_least_the_size_asked_for() -> None:
    big = quarters((1600, 1200))
    decoded = decode_with_size(encoded(big, "JPEG", quality=95), draft_size=(300, 300))
    assert decoded.image.size == (400, 300)
    assert (decoded.width, decoded.height) == (1600, 1200)
    assert_upright(decoded.image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.paste(0, (0, 0, 4, 8))
        data = encoded(palette, "PNG", transparency=1)
    else:
        data = encoded(image.convert(mode), "PNG")
    result = decode(data)
    assert result.getpixel((1, 1)) == (0, 0, 0)
    assert result.getpixel((6, 6)) == (255, 255, 255)


def test_half_transparency_blends() -> None:
    data = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "WEBP", lossless=True)
    assert abs(decode(data).getpixel((1, 1))[0] - 127) <= 1


def _grey(values: np.ndarray, kind: str) -> bytes:
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_cut(kind: str) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    result = np.asarray(decode(_grey(values, kind)))[..., 0]
    np.testing.assert_array_equal(result, np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_float_tiff_is_scaled(scale: float) -> None:
    values = (np.linspace(0, 1, 64, dtype=np.float32) * scale).reshape(8, 8)
    result = np.asarray(decode(_grey(values, "TIFF")))[..., 0]
    np.testing.assert_allclose(result, values / scale * 255, atol=0.51)


def test_float_tiff_with_nan() -> None:
    values = np.full((8, 8), np.nan, np.float32)
    assert decode(_grey(values, "TIFF")).size == (8, 8)


def test_one_bit_image() -> None:
    data = encoded(Image.new("1", (8, 8), 1), "PNG")
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)


# --- damage ------------------------------------------------------------------------------------


# Pillow 11 takes half a DDS for a whole one.
@pytest.mark.parametrize("name", [name for name in FORMATS if "png" not in name and name != "dds"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_is_an_error(name: str, share: float) -> None:
    # Noise, so that the pixels fill the file.
    data = FORMATS[name]()
    if name in ("jpeg", "progressive jpeg", "webp", "gif", "heic"):
        noise = Image.effect_noise((200, 200), 90).convert("RGB")
        data = heic(noise) if name == "heic" else encoded(noise, name.split()[-1].upper())
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_png_is_an_error(share: float) -> None:
    data = encoded(Image.effect_noise((200, 200), 90), "PNG")
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "kind",
    ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "HEIC", "AVIF", "JPEG2000", "BMP", "PPM", "PCX", "TGA"],
)
def test_truncated_is_an_error_even_if_other_code_relaxed_pil(kind, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    data = heic(noise) if kind == "HEIC" else encoded(noise, kind)
    decode(data)
    with pytest.raises(ImageError):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", b"hello", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBP", b"II*\0",
     b"....ftypheic", b"....ftypjunk" * 9, b"<svg xmlns='x'/>", b"%PDF-1.4", b"BM" + b"\0" * 60],
)  # fmt: skip
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(
    st.sampled_from(
        ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "BMP", "PPM", "QOI"]
    ),
    st.data(),
)
def test_any_damage_gives_an_image_or_an_image_error(kind: str, data) -> None:
    raw = bytearray(encoded(quarters(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = ""
        try:
            assert decode(bytes(raw), max_pixels=10**6).mode == "RGB"
        except ImageError as error:
            reason = str(error)
    assert "\n" not in reason


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )


def test_decompression_bomb_is_refused_on_its_header(monkeypatch) -> None:
    def forbidden(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", forbidden)
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(Image.ID))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="60000 x 60000 pixels are more than the limit"):
            decode(_png_header(60_000, 60_000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(Image.ID))


def test_own_cap_is_independent_of_pils(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert_upright(decode(encoded(quarters(), "PNG")))
    with pytest.raises(ImageError, match="megapixels"):
        decode(encoded(quarters(), "PNG"), max_pixels=100)


@pytest.mark.parametrize("side", [2**31, 10**9, 2**24])
@pytest.mark.parametrize("limit", [images.MAX_PIXELS, 2**63])
def test_a_claim_that_no_memory_holds_gets_no_advice(side: int, limit: int) -> None:
    with pytest.raises(images.TooManyPixels, match="memory") as caught:
        decode(b"P5 %d %d 255\n" % (side, side), max_pixels=limit)
    assert caught.value.needed is None


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n\0", b"RIFF\0\0\0\0WEBP", b"BM\0", b"II*\0"]
)
def test_a_file_cut_behind_its_first_bytes_speaks_to_people(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"damaged|not a JPEG") as caught:
        decode(data)
    assert not any(word in str(caught.value) for word in ("buffer", "unpack", "index", "0x"))


def test_no_plugin_is_registered() -> None:
    pytest.importorskip("pillow_heif")
    heic(quarters())
    known = dict(Image.OPEN)
    decode(heic(quarters()))
    assert known.keys() == Image.OPEN.keys()


# --- finding -----------------------------------------------------------------------------------


def found(root: Path) -> tuple[list[str], dict[str, str]]:
    problems: dict[str, str] = {}
    files = scan(root, problems.__setitem__)
    paths = [file.path for file in files if file.named or is_picture(root / file.path)]
    return sorted(paths), problems


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jpg", "B.JPEG", "c.heic", "sub dir/ü é.png", "sub dir/日本.webp", "x.tiff"):
        touch(tmp_path / name)
    for name in (".a.jpg", "._a.jpg", ".cache/b.jpg", "note.txt", "jpg", "a.jpg.part"):
        touch(tmp_path / name)
    paths, problems = found(tmp_path)
    assert paths == ["B.JPEG", "a.jpg", "c.heic", "sub dir/ü é.png", "sub dir/日本.webp", "x.tiff"]
    assert problems == {}


def test_hidden_root_is_searched(tmp_path: Path) -> None:
    touch(tmp_path / ".photos" / "a.jpg")
    assert found(tmp_path / ".photos")[0] == ["a.jpg"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        touch(tmp_path / name)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert found(tmp_path)[0] == [name]
    assert read_stable(tmp_path / name).data == b"x"


def test_links_loops_and_special_files(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "1.jpg")
    touch(tmp_path / "other" / "2.jpg")
    root = tmp_path / "a"
    (root / "up").symlink_to(root)
    (root / "self.jpg").symlink_to(root / "self.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "gone album").symlink_to("/nowhere/album")
    (root / "copy.jpg").symlink_to("1.jpg")
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    touch(root / "folder.jpg" / "3.jpg")
    paths, problems = found(root)
    assert paths == ["1.jpg", "again/2.jpg", "copy.jpg", "folder.jpg/3.jpg"]
    assert problems == {
        "self.jpg": "link that points to itself",
        "gone.jpg": "dangling link",
        "gone album": "dangling link",
        "pipe.jpg": "not a regular file",
    }


def test_real_folders_win_over_links_to_them(tmp_path: Path) -> None:
    touch(tmp_path / "z" / "1.jpg")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert found(tmp_path)[0] == ["z/1.jpg"]


def test_many_folders_that_link_to_each_other(tmp_path: Path) -> None:
    names = [f"d{number}" for number in range(12)]
    for name in names:
        touch(tmp_path / name / "1.jpg")
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    assert len(found(tmp_path)[0]) == 12


def test_unreadable_folder(tmp_path: Path, monkeypatch) -> None:
    touch(tmp_path / "open" / "1.jpg")
    touch(tmp_path / "private" / "2.jpg")
    real = os.scandir

    def scandir(path):
        # chmod does not stop root, who runs many a test.
        if str(path).rstrip("/").endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(images.os, "scandir", scandir)
    paths, problems = found(tmp_path)
    assert paths == ["open/1.jpg"]
    assert problems == {"private/": "folder cannot be read: permission denied"}


def test_find_images_is_sorted_and_reports(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "a.jpg", "b.jpg", "c.png"):
        touch(tmp_path / name)
    (tmp_path / "x.jpg").symlink_to("nowhere")
    problems = []
    result = list(find_images(tmp_path, on_error=lambda *problem: problems.append(problem)))
    assert result == [tmp_path / name for name in ("a.jpg", "b.jpg", "b/1.jpg", "c.png")]
    assert problems == [(tmp_path / "x.jpg", "dangling link")]
    with pytest.raises(NotADirectoryError, match="not a folder that can be read"):
        find_images(tmp_path / "a.jpg")


# --- reading -----------------------------------------------------------------------------------


def test_read_stable(tmp_path: Path) -> None:
    path = touch(tmp_path / "a.jpg")
    read = read_stable(path)
    assert (read.data, read.size, read.mtime_ns) == (b"x", 1, path.stat().st_mtime_ns)
    assert read.sha256 == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), r"empty file \(0 bytes\)"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.write_bytes(b"x" * 100), "larger than the limit"),
    ],
)
def test_unusable_files(tmp_path: Path, make, reason: str) -> None:
    make(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match=reason):
        read_stable(tmp_path / "x.jpg", max_bytes=50)


def test_deleted_file_is_not_called_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_stable(tmp_path / "none.jpg")


def test_file_that_keeps_changing(tmp_path: Path, monkeypatch) -> None:
    path = touch(tmp_path / "x.jpg")
    real = images._read_all
    monkeypatch.setattr(images, "_SETTLE_SECONDS", 0)

    def grow(file, limit):
        data = real(file, limit)
        with open(path, "ab") as other:
            other.write(b"more")
        return data

    monkeypatch.setattr(images, "_read_all", grow)
    with pytest.raises(ImageError, match="changed while it was read"):
        read_stable(path)


def test_file_that_changes_once_is_read_again(tmp_path: Path, monkeypatch) -> None:
    path = touch(tmp_path / "x.jpg")
    real, calls = images._read_all, []

    def once(file, limit):
        data = real(file, limit)
        if not calls:
            path.write_bytes(b"new content")
        calls.append(1)
        return data

    monkeypatch.setattr(images, "_read_all", once)
    assert read_stable(path).data == b"new content"


def test_real_concurrent_writer_never_gives_mixed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    size = 200_000
    path.write_bytes(b"\0" * size)
    stop = threading.Event()

    def rewrite() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 250
            path.write_bytes(bytes([value]) * size)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(15):
            try:
                data = read_stable(path).data
            except ImageError:
                continue
            assert len(data) == size
    finally:
        stop.set()
        thread.join()


# --- thumbnails --------------------------------------------------------------------------------


def test_thumbnail_is_small_upright_and_carries_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "secret place"
    stored = quarters((480, 640)).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "JPEG", quality=95, exif=exif, comment=b"secret comment")
    for source in (data, Image.open(io.BytesIO(data))):
        small = thumbnail(source, 96)
        assert b"secret" not in small
        with Image.open(io.BytesIO(small)) as opened:
            assert opened.format == "JPEG"
            assert opened.size == (72, 96)
            assert not opened.getexif()
            assert_upright(opened, 30)


def test_small_images_are_not_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(quarters((20, 10)), "PNG"))
    with Image.open(io.BytesIO(thumbnail(path, 96))) as opened:
        assert opened.size == (20, 10)
    assert stat.S_ISREG(path.stat().st_mode)
