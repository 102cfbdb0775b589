"""The shipped sample gallery: real photos, small, each with its author and a free licence."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from places import GALLERY

from enn_core.files.digests import file_sha256

PHOTOS = sorted(p for p in GALLERY.iterdir() if p.suffix in {".jpg", ".webp"})
MAX_BYTES = 6_000_000
MAX_SIDE = 400
TEXTS = {"CREDITS.md", "credits.csv", "queries.txt"}
COLUMNS = {
    "file",
    "title",
    "author",
    "licence",
    "licence_url",
    "source_package",
    "source_path",
    "source_url",
    "changes",
    "sha256",
}

# Everything else (NC, ND, GPL, unknown) may not be shipped here.
LICENCES = {
    "Public domain": "/publicdomain/mark/1.0/",
    "CC0 1.0": "/publicdomain/zero/1.0/",
    "CC BY 2.0": "/licenses/by/2.0/",
    "CC BY 2.5": "/licenses/by/2.5/",
    "CC BY 3.0": "/licenses/by/3.0/",
    "CC BY 4.0": "/licenses/by/4.0/",
    "CC BY-SA 2.5": "/licenses/by-sa/2.5/",
    "CC BY-SA 3.0": "/licenses/by-sa/3.0/",
    "CC BY-SA 4.0": "/licenses/by-sa/4.0/",
}


@pytest.fixture(scope="module")
def credits() -> list[dict[str, str]]:
    with (GALLERY / "credits.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def table_rows() -> dict[str, list[str]]:
    """Cells of the photo tables of CREDITS.md by file name."""
    rows: dict[str, list[str]] = {}
    for line in (GALLERY / "CREDITS.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            plain = line.replace("\\|", "\0").replace("\\[", "[").replace("\\]", "]")
            cells = [cell.strip().replace("\0", "|") for cell in plain.strip("| ").split(" | ")]
            name = cells[0].strip("`")
            assert name not in rows, f"{name} is credited twice"
            rows[name] = cells
    return rows


def test_enough_photos_in_few_bytes_and_nothing_else() -> None:
    assert len(PHOTOS) >= 150
    assert sum(p.stat().st_size for p in PHOTOS) <= MAX_BYTES
    others = {p.name for p in GALLERY.iterdir() if not p.name.startswith((".", "_"))}
    assert others - {p.name for p in PHOTOS} == TEXTS


@pytest.mark.parametrize("path", PHOTOS, ids=lambda p: p.name)
def test_each_file_is_a_photo(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == {".jpg": "JPEG", ".webp": "WEBP"}[path.suffix]
        assert max(image.size) <= MAX_SIDE
        assert min(image.size) >= 100
        assert not image.getexif()
        assert getattr(image, "n_frames", 1) == 1
        pixels = np.asarray(image.convert("RGB"))
        if "A" in image.getbands():
            assert np.asarray(image.getchannel("A")).min() == 255
    assert pixels.shape[2] == 3
    # A photo has many distinct tones; a drawing, a mask or a broken decode has few.
    assert len(np.unique(pixels // 8 @ np.array([1024, 32, 1]))) > 12


def test_no_two_files_show_the_same_picture() -> None:
    def signature(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            small = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), float)
        flat = small.ravel() - small.mean()
        return flat / np.linalg.norm(flat)

    matrix = np.stack([signature(p) for p in PHOTOS])
    similar = np.triu(matrix @ matrix.T, k=1)
    row, column = np.unravel_index(similar.argmax(), similar.shape)
    assert similar.max() < 0.98, (PHOTOS[row].name, PHOTOS[column].name)


def test_each_photo_has_exactly_one_credit(credits: list[dict[str, str]]) -> None:
    counts = Counter(row["file"] for row in credits)
    assert set(counts) == {p.name for p in PHOTOS}
    assert set(counts.values()) == {1}


def test_digests_are_those_of_the_photos(credits: list[dict[str, str]]) -> None:
    """With these the demo tells a damaged photo; a changed one needs its line changed, too."""
    assert {row["file"]: row["sha256"] for row in credits} == {
        p.name: file_sha256(p) for p in PHOTOS
    }


def test_credits_are_complete_and_licences_free(credits: list[dict[str, str]]) -> None:
    assert set(credits[0]) == COLUMNS
    for row in credits:
        assert all(row[c].strip() for c in COLUMNS - {"source_url"}), row["file"]
        assert row["licence"] in LICENCES, row["file"]
        address = urlsplit(row["licence_url"])
        assert (address.scheme, address.netloc) == ("https", "creativecommons.org")
        assert address.path == LICENCES[row["licence"]]
    origins = [(row["source_package"], row["source_path"]) for row in credits]
    assert len(set(origins)) == len(origins)


def test_the_readable_credits_name_author_and_licence(credits: list[dict[str, str]]) -> None:
    rows = table_rows()
    assert set(rows) == {row["file"] for row in credits}
    for row in credits:
        _, title, author, licence, path, changes = rows[row["file"]]
        assert row["title"] in title
        assert row["source_url"] in title
        assert author == row["author"]
        assert licence == f"[{row['licence']}]({row['licence_url']})"
        assert path == f"`{row['source_path']}`"
        assert changes == row["changes"]


def test_the_readable_credits_state_their_terms(credits: list[dict[str, str]]) -> None:
    text = (GALLERY / "CREDITS.md").read_text(encoding="utf-8")
    assert f"{len(credits)} photographs" in text
    for licence, count in Counter(row["licence"] for row in credits).items():
        assert f"]({'https://creativecommons.org' + LICENCES[licence]}) | {count} |" in text
    for package, count in Counter(row["source_package"] for row in credits).items():
        assert f"## {package}: {count} photos" in text


def test_example_queries_are_plain_phrases() -> None:
    queries = (GALLERY / "queries.txt").read_text(encoding="utf-8").splitlines()
    assert 15 <= len(queries) <= 20
    assert len(set(queries)) == len(queries)
    for query in queries:
        assert query == query.strip()
        assert 2 <= len(query.split()) <= 12
