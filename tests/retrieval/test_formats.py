"""What kind of file it is, by its first bytes and by its name."""

from __future__ import annotations

import io

import pytest
from picture_files import FORMATS as FILES
from PIL import Image

from retrieval.formats import (
    FORMATS,
    OTHER_ENDINGS,
    SUFFIXES,
    ending,
    left_out_text,
    looks_like_picture,
    what_else,
)
from retrieval.images import ImageError, decode, is_picture


@pytest.mark.parametrize("name", FILES)
def test_pictures_are_known_by_their_first_bytes(name: str) -> None:
    head = FILES[name]()[:64]
    assert looks_like_picture(head)
    assert sum(bool(form.begins.match(head)) for form in FORMATS) + (name == "heic") == 1


OTHERS = {
    "": "",
    "text": "What the BMW is about\n",
    "starts as a bitmap": "BM and other letters, and more of them than a header has",
    "notes": "P1 fix the roof\nP2 paint the door\n",
    "priorities": "P1 2026-01-01 report\n",
    "code": "#define WIDTH 8\n#include <stdio.h>\n",
    "page": "<!DOCTYPE html><html><body>",
    "drawing": "<?xml version='1.0'?><svg xmlns='x'/>",
    "pdf": "%PDF-1.7\n",
    "postscript": "%!PS-Adobe-3.0 EPSF-3.0\n",
    "film": "\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "quicktime": "\0\0\0\x14ftypqt  \0\0\0\0qt  ",
    "cr3": "\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
    "matroska": "\x1aE\xdf\xa3\x01\0\0\0",
    "avi": "RIFF\0\0\0\0AVI LIST",
    "sound": "RIFF\0\0\0\0WAVEfmt ",
    "jpeg xl": "\0\0\0\x0cJXL \r\n\x87\n",
    "zip": "PK\x03\x04",
    "zeros": "\0" * 64,
    "font": "\0\x01\0\0\0\x0c\0\x80\0\x03\0\x40",
    "mpeg": "\0\0\x01\xba\x44\0\x04\0",
    "worksheet": "\0\0\x02\0\x06\x04\x06\0\x08\0",
    "cursor": "\0\0\x02\0\x01\0\x20\x20\0\0\0\0",
    "elf": "\x7fELF\x02\x01\x01",
    "wmf": "\xd7\xcd\xc6\x9a\0\0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_not_taken_for_pictures(name: str) -> None:
    assert not looks_like_picture(OTHERS[name].encode("latin-1")[:64])


@pytest.mark.parametrize("name", ["page", "drawing", "pdf", "postscript", "film", "cr3", "jpeg xl"])
def test_the_reason_says_what_it_is(name: str) -> None:
    head = OTHERS[name].encode("latin-1")
    with pytest.raises(ImageError, match=r"not a JPEG, PNG, .* but an? ") as caught:
        decode(head)
    assert what_else(head) in str(caught.value)


def test_nothing_is_run_or_written_for_a_drawing(monkeypatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "EPS")
    for data in (out.getvalue(), b"\xd7\xcd\xc6\x9a" + b"\0" * 60):
        with pytest.raises(ImageError):
            decode(data)


def test_endings() -> None:
    assert [ending(name) for name in ("a.JPG", "a", ".a", "a.", "a.b.Mp4")] == [
        ".jpg", "", "", "", ".mp4",
    ]  # fmt: skip
    assert ending("a." + "x" * 40) == ""
    assert not SUFFIXES & OTHER_ENDINGS.keys()


def test_what_is_left_out_is_told_with_what_is_missed_first() -> None:
    counts = {".txt": 9, ".mp4": 12, "": 3, ".nef": 1, ".xmp": 4000}
    assert left_out_text(counts) == (
        "12 .mp4 (video), 1 .nef (RAW), 4,000 .xmp, 9 .txt, 3 without an ending"
    )
    many = {f".{number}": 1 for number in range(40)}
    assert left_out_text(many).endswith(", 28 of 28 other kinds")


def test_what_cannot_be_opened_is_no_picture(tmp_path) -> None:
    assert not is_picture(tmp_path)
    assert not is_picture(tmp_path / "gone")
