"""An index is not discarded for a disk that may not be there."""

from __future__ import annotations

from pathlib import Path

import pytest
from index_cases import photo

from retrieval.ignore import Ignored
from retrieval.index.absence import refuse_to_discard
from retrieval.index.eigen_index import EigenIndex, PicturesGone


@pytest.fixture
def kept(root, model, tmp_path) -> EigenIndex:
    index = EigenIndex.create(tmp_path / "index", model)
    index.update(root, model)
    return index


def check(index: EigenIndex, root: Path, *patterns: str) -> None:
    refuse_to_discard(index.entries("indexed"), index.root, root, Ignored(root, patterns))


def test_what_is_there_may_be_indexed_anew(kept, root) -> None:
    check(kept, root)
    for file in sorted(root.rglob("*.png"))[:8]:
        file.unlink()
    check(kept, root)  # one of nine is left
    check(kept, root, "*.png")


def test_moved_files_are_not_gone(kept, root) -> None:
    for file in sorted(root.rglob("*.png")):
        (root / "2026").mkdir(exist_ok=True)
        file.rename(root / "2026" / file.name)
    check(kept, root)


@pytest.mark.parametrize("others", [0, 3])
def test_an_empty_mount_and_another_disk_there(kept, root, others: int) -> None:
    root.rename(root.with_name("away"))
    root.mkdir()
    for number in range(others):
        photo(root / f"other {number}.png", 500 + number).open("ab").write(bytes(number + 1))
    with pytest.raises(
        PicturesGone, match=r"^9 of the index's 9 .*`enn search index --rebuild --p"
    ):
        check(kept, root)
    with pytest.raises(PicturesGone, match="8 of the index's 8"):
        check(kept, root, "Ordner mit Leerzeichen")


def test_a_root_that_is_gone(kept, root) -> None:
    root.rename(root.with_name("away"))
    with pytest.raises(NotADirectoryError):
        check(kept, root)


def test_the_same_pictures_at_another_place(kept, root) -> None:
    check(kept, root.rename(root.with_name("new mount")))


def test_another_folder_is_meant_unless_it_is_empty(kept, root, tmp_path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "README").write_text("no picture, though its name may be one's")
    with pytest.raises(PicturesGone):
        check(kept, tmp_path / "others")
    photo(tmp_path / "others" / "a.png", 300).open("ab").write(b"another size")
    check(kept, tmp_path / "others")
    root.rename(root.with_name("away"))
    with pytest.raises(PicturesGone):
        check(kept, tmp_path / "others")
