"""What kind of file it is: pictures that are read, by their first bytes, and what else there is.

A name's ending says what a file was meant to be; what it is, its first bytes say. Only formats that
decode from their own bytes are here. Of those that Pillow knows, left out are EPS, WMF and EMF
(they are programs, run by Ghostscript or the system), BUFR, GRIB, HDF5 and FITS (measurements),
MPEG (no pixels), FLI (an animation), ICO, ICNS and CUR (icons; PIL decodes pictures in them before
their size can be checked), and what no camera, scanner or editor of today writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "FORMATS",
    "HEAD_BYTES",
    "HEIC",
    "OTHER_ENDINGS",
    "SUFFIXES",
    "Format",
    "ending",
    "left_out_text",
    "looks_like_picture",
    "what_else",
]

HEAD_BYTES = 64
"""As many of the first bytes tell the format."""


@dataclass(frozen=True)
class Format:
    """A format and how it is opened.

    Attributes:
        name: PIL's.
        begins: pattern of the first bytes.
        reader: module below PIL, and what in it makes an image of a stream, reading no pixels.
    """

    name: str
    begins: re.Pattern[bytes]
    reader: tuple[str, str]


def _format(name: str, begins: bytes, module: str, reader: str) -> Format:
    return Format(name, re.compile(begins, re.DOTALL), (f"{module}ImagePlugin", reader))


# Where the mark of a format is short, more of its header is asked for, so that no text ("BMW …",
# "P1 …") and no other file is taken for a picture.
FORMATS = (
    _format("JPEG", rb"\xff\xd8\xff", "Jpeg", "jpeg_factory"),
    _format("PNG", rb"\x89PNG\r\n\x1a\n", "Png", "PngImageFile"),
    _format("WEBP", rb"RIFF....WEBP", "WebP", "WebPImageFile"),
    _format("GIF", rb"GIF8[79]a", "Gif", "GifImageFile"),
    _format("TIFF", rb"II[*+]\0|MM\0[*+]", "Tiff", "TiffImageFile"),
    _format("AVIF", rb"....ftyp(?:avi[fs]|m[is]f1.{4,40}avi[fs])", "Avif", "AvifImageFile"),
    _format("JPEG2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", "Jpeg2K", "Jpeg2KImageFile"),
    _format("BMP", rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "Bmp", "BmpImageFile"),
    _format("DIB", rb"\x28\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0", "Bmp", "DibImageFile"),
    _format("PPM", rb"P(?:[1-6]|0CMYK|f)\s\s*(?:#|\d+\s+(?:#|\d))", "Ppm", "PpmImageFile"),
    _format("PSD", rb"8BPS\0\x01", "Psd", "PsdImageFile"),
    _format("QOI", rb"qoif", "Qoi", "QoiImageFile"),
    _format("DDS", rb"DDS \x7c\0\0\0", "Dds", "DdsImageFile"),
    _format("SUN", rb"\x59\xa6\x6a\x95", "Sun", "SunImageFile"),
    _format("SGI", rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]", "Sgi", "SgiImageFile"),
    _format("PCX", rb"\x0a[\0\x02\x03\x05]\x01[\x01\x02\x04\x08]", "Pcx", "PcxImageFile"),
    _format(
        "TGA",
        rb".(?:\0[\x02\x03\x0a\x0b]\0{5}|\x01[\x01\x09].{4}[\x0f\x10\x18\x20])"
        rb".{8}[\x08\x0f\x10\x18\x20][\0-\x3f]",
        "Tga",
        "TgaImageFile",
    ),
    _format("XPM", rb"/\* XPM \*/", "Xpm", "XpmImageFile"),
    _format("XBM", rb"#define[ \t]+\S*_width[ \t]+\d", "Xbm", "XbmImageFile"),
)
"""The formats that Pillow reads for us, the likeliest first."""

HEIC = re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|m[is]f1|miaf|.{4,40}hei[cx])", re.DOTALL)
"""First bytes of what pillow-heif reads."""

_PICTURES = """
    jpg jpeg jpe jfif jif mpo png apng webp gif tif tiff heic heif heics heifs hif avif avifs jp2
    j2k j2c jpc jpf jpx bmp dib ppm pgm pbm pnm pfm psd qoi dds sgi pcx tga xpm xbm
"""
SUFFIXES = frozenset(f".{name}" for name in _PICTURES.split())
"""Endings, in lower case, of files that are taken for pictures: if one is none, that is told."""

_OTHERS = {
    "RAW": """
        3fr arw cr2 cr3 crw dcr dng erf fff iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl
        sr2 srf srw x3f
    """,
    "JPEG XL": "jxl",
    "video": """
        3g2 3gp asf avi f4v flv insv lrv m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm
        wmv
    """,
    "sound": "aac aif aiff amr ape flac m4a mid midi mp3 oga ogg opus wav wma",
    "drawing": "ai cdr dwg dxf emf eps ps svg svgz wmf",
    "icon": "cur icns ico",
    # Settings, catalogs and small copies that cameras and programs put beside pictures and videos.
    "sidecar": """
        aae cos db dop exif ini ithmb json lnk modd moff on1 pp3 sqlite thm url vrd xmp
    """,
    "document": """
        csv doc docx epub htm html key md numbers odp ods odt pages pdf pps ppt pptx rtf tex xls
        xlsx xml
    """,
    "archive": "7z bz2 cab dmg exe gz iso jar msi rar tar tgz xz zip zst",
}
OTHER_ENDINGS: Mapping[str, str] = {
    f".{name}": kind for kind, names in _OTHERS.items() for name in names.split()
}
"""Endings, in lower case, of files that are something else, and what. They are not opened: on a
network disk that takes time, and a cloud's folder would fetch every film for it."""

# What pictures are confused with, for the reason why a file cannot be read.
_CONFUSED = (
    (rb"\s*<(?:!doctype\s+html|html|head)", "a web page"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?<(?:svg|!doctype\s+svg|!--)", "a drawing (SVG)"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a drawing (EPS or PostScript)"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture, which Pillow does not read"),
    (rb"....ftypcrx|FUJIFILMCCD-RAW|IIRO|IIU\0|FOVb", "a RAW photo of a camera"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b", "an archive"),
)
_CONFUSED_PATTERNS = tuple(
    (re.compile(begins, re.DOTALL | re.IGNORECASE), what) for begins, what in _CONFUSED
)

# Kinds of files in a folder that are told one by one, and the longest ending that is one.
_SHOWN_KINDS = 12
_LONGEST_ENDING = 12


def looks_like_picture(head: bytes) -> bool:
    """Whether a file's first `HEAD_BYTES` bytes are those of a format that is read."""
    return HEIC.match(head) is not None or any(form.begins.match(head) for form in FORMATS)


def what_else(head: bytes) -> str:
    """What a file is that is no picture, by its first bytes; empty if that is not known."""
    return next((what for begins, what in _CONFUSED_PATTERNS if begins.match(head)), "")


def ending(name: str) -> str:
    """A name's ending, in lower case with its dot, by which files are counted; "" for none."""
    stem, dot, last = name.rpartition(".")
    return f".{last.lower()}" if stem and dot and 0 < len(last) <= _LONGEST_ENDING else ""


def left_out_text(left_out: Mapping[str, int]) -> str:
    """ "12 .mp4 (video), 3 .nef (RAW), 1 .txt": files that are no pictures, by ending.

    RAW photos and videos come first: they are what somebody may miss.
    """
    missed = ("RAW", "JPEG XL", "video")

    def order(item: tuple[str, int]) -> tuple[bool, int, str]:
        return OTHER_ENDINGS.get(item[0]) not in missed, -item[1], item[0] or "~"

    kinds = sorted(left_out.items(), key=order)
    parts = []
    for name, count in kinds[:_SHOWN_KINDS]:
        kind = OTHER_ENDINGS.get(name, "")
        parts.append(
            f"{count:,} {name or 'without an ending'}" + (f" ({kind})" if kind in missed else "")
        )
    if rest := kinds[_SHOWN_KINDS:]:
        parts.append(f"{sum(count for _, count in rest):,} of {len(rest):,} other kinds")
    return ", ".join(parts)
