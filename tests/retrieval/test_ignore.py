"""What of a photo folder is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrieval.ignore import FILE_NAME, Ignored
from retrieval.images import find_images


def found(root: Path, *files: str) -> list[str]:
    """Those of the files that a walk comes to; nothing is read of them."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [path.relative_to(root).as_posix() for path in find_images(root)]


@pytest.mark.parametrize(
    "folder",
    [
        *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb"),
        *(".Trash", ".Trash-1000", ".thumbnails", "Thumbs", "lost+found"),
        *("$RECYCLE.BIN", "System Volume Information"),
    ],
)
def test_folders_of_systems_are_left_out(tmp_path: Path, folder: str) -> None:
    there = ("a.jpg", "b/c.jpg", "b/Thumbs.jpg", "b/eaDir/d.jpg", "recycle/e.jpg")
    thumbnails = (f"{folder}/a.jpg/SYNOPHOTO_THUMB_M.jpg", f"b/{folder}/c.jpg", f"{folder}/x.jpg")
    assert found(tmp_path, *there, *thumbnails) == sorted(there)


def test_what_is_left_out_by_default_can_be_taken_back(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("!Thumbs/")
    assert found(tmp_path, "Thumbs/a.jpg", "@eaDir/a.jpg") == ["Thumbs/a.jpg"]


def test_a_links_name_counts(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").touch()
    root = tmp_path / "photos"
    root.mkdir()
    (root / "@eaDir").symlink_to(tmp_path / "elsewhere")
    (root / "album").symlink_to(tmp_path / "elsewhere")
    (root / "broken.gif").symlink_to("nowhere")
    (root / FILE_NAME).write_text("*.gif")
    problems: list[str] = []
    paths = find_images(root, on_error=lambda path, _: problems.append(path.name))
    assert [path.parent.name for path in paths] == ["album"]
    assert problems == []


def test_the_last_pattern_decides(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(
        b"\xef\xbb\xbf# a comment\r\nraw/\r\n\r\n*.gif\r\n!keep.gif\r\n/top.jpg\r\ncaf\xe9.jpg\r\n"
    )
    ignored = Ignored(tmp_path, ["[0-9]*.jpg", "!raw/", "a/**/z.jpg"])
    for path in ("x.gif", "b/x.gif", "top.jpg", "b/7.jpg", "a/b/c/z.jpg", "caf\udce9.jpg"):
        assert ignored.hides(path), path
    for path in ("raw/x.jpg", "keep.gif", "b/top.jpg", "z.jpg", "@eaDir.jpg"):
        assert not ignored.hides(path), path


def test_a_file_of_a_folder_that_is_left_out_cannot_be_taken_back(tmp_path: Path) -> None:
    # As in git: nobody looks into the folder.
    ignored = Ignored(tmp_path, ["raw/", "!raw/keep.jpg"])
    assert ignored.hides("b/raw/keep.jpg")
    (tmp_path / FILE_NAME).write_text("raw/\n!raw/keep.jpg")
    assert found(tmp_path, "raw/keep.jpg", "a.jpg") == ["a.jpg"]


def test_errors_say_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'!'; --exclude and \.ennignore take"):
        Ignored(tmp_path, ["!"])
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(OSError, match=os.fspath(tmp_path)):
        Ignored(tmp_path)
