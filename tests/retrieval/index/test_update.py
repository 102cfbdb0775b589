"""Building an index, and bringing it up to date with its folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from index_cases import (
    TinyTestModel,
    age,
    assert_like_fresh,
    assert_sound,
    photo,
    queries,
    ranking,
)
from PIL import Image

from retrieval.images import ImageError, decode
from retrieval.index import update as update_module
from retrieval.index.eigen_index import EigenIndex, PicturesGone
from retrieval.index.update import Progress


def paths(index: EigenIndex) -> set[str]:
    return {index.entry(int(id_)).path for id_ in index.ids()}


def test_first_build(index: EigenIndex, root: Path, tmp_path: Path) -> None:
    assert len(index) == 9
    assert "Ordner mit Leerzeichen/x.png" in paths(index)
    entry = next(entry for entry in index.entries() if entry.path == "3.png")
    file = root / "3.png"
    assert (entry.width, entry.height, entry.state) == (11, 9, "indexed")
    assert (entry.size, entry.mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
    assert index.file(entry.id) == file
    assert index.root == root
    assert_sound(index, root)
    assert_like_fresh(index, root, tmp_path / "fresh")
    names = sorted(os.listdir(index.path))
    assert "vectors-1.faiss" in names
    assert "manifest.json" in names


def test_scores_equal_those_of_the_model(index, root, model) -> None:
    q = queries(1)[0]
    expected = {}
    for file in root.rglob("*.png"):
        vector = model.image_vectors(model.preprocess(decode(file))[None])[0]
        expected[file.relative_to(root).as_posix()] = float(vector @ q)
    for path, score in ranking(index, q):
        assert score == pytest.approx(expected[path], abs=1e-6)


def test_nothing_changed_reads_nothing(index, root, model, monkeypatch) -> None:
    def forbidden(*_, **__):
        raise AssertionError("an unchanged file was read")

    monkeypatch.setattr("retrieval.index.update.read_stable", forbidden)
    before = sorted(os.listdir(index.path))
    report = index.update(root, model)
    assert (report.unchanged, report.added, report.changed, report.embedded) == (9, 0, 0, 0)
    assert sorted(os.listdir(index.path)) == before


def test_added_changed_deleted_moved(index, root, model, tmp_path) -> None:
    ids = {entry.path: entry.id for entry in index.entries()}
    photo(root / "new.png", 50)
    photo(root / "1.png", 51)
    (root / "2.png").unlink()
    (root / "sub").mkdir()
    (root / "3.png").rename(root / "sub" / "moved.png")
    report = index.update(root, model)
    assert (report.added, report.changed, report.deleted, report.moved) == (1, 1, 1, 1)
    assert (report.unchanged, report.embedded, report.total) == (6, 2, 9)
    now = {entry.path: entry.id for entry in index.entries()}
    assert now["1.png"] == ids["1.png"]
    assert now["sub/moved.png"] == ids["3.png"]
    assert "2.png" not in now
    assert now["new.png"] not in ids.values()
    assert index.entry(ids["2.png"]).state == "deleted"
    assert_sound(index, root)
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_touched_file_is_not_embedded_again(index, root, model) -> None:
    os.utime(root / "1.png")
    report = index.update(root, model)
    assert (report.unchanged, report.embedded) == (9, 0)


def test_same_size_and_time_right_after_reading_is_not_trusted(
    root, model, tmp_path, monkeypatch
) -> None:
    # Written, read and written again within one tick of the file system's clock (a slow one here).
    monkeypatch.setattr("retrieval.index.update._RACY_NS", 30_000_000_000)
    image, pixels = root / "plain.tif", np.zeros((4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    stamp = image.stat().st_mtime_ns
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    Image.fromarray(pixels + 200).save(image)
    os.utime(image, ns=(stamp, stamp))
    assert index.update(root, model).changed == 1
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_copies_are_embedded_once(index, root, model) -> None:
    for number in range(3):
        shutil.copy(root / "1.png", root / f"copy {number}.png")
    before = model.images
    report = index.update(root, model)
    assert (report.added, report.embedded, model.images - before) == (3, 0, 0)
    assert_sound(index, root)


def test_two_files_swap_their_names(index, root, model, tmp_path) -> None:
    (root / "1.png").rename(root / "t")
    (root / "2.png").rename(root / "1.png")
    (root / "t").rename(root / "2.png")
    os.utime(root / "1.png")
    os.utime(root / "2.png")
    index.update(root, model)
    assert_sound(index, root)
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_copy_of_a_file_that_is_damaged_in_the_same_update(index, root, model, tmp_path) -> None:
    # The copy finds the old row by its hash; the old row is dropped in the same batch.
    shutil.copy(root / "0.png", root / "z.png")
    (root / "0.png").write_bytes(b"damaged")
    index.update(root, model)
    assert_sound(index, root)
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_returning_file_has_its_old_id(index, root, model) -> None:
    old = {entry.path: entry.id for entry in index.entries()}["4.png"]
    data = (root / "4.png").read_bytes()
    (root / "4.png").unlink()
    index.update(root, model)
    (root / "back.png").write_bytes(data)
    index.update(root, model)
    assert {entry.path: entry.id for entry in index.entries()}["back.png"] == old
    assert_sound(index, root)


def test_bad_files_are_skipped_with_a_reason_and_retried_on_change(root, model, tmp_path) -> None:
    (root / "zero.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("no image")
    (root / "cut.png").write_bytes((root / "1.png").read_bytes()[:100])
    (root / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    index = EigenIndex.create(tmp_path / "i", model)
    seen = []
    report = index.update(root, model, on_skip=lambda *skip: seen.append(skip))
    assert (report.added, report.skipped, report.skipped_total) == (9, 5, 5)
    reasons = {entry.path: entry.error for entry in index.skipped()}
    assert reasons == dict(seen)
    assert reasons["zero.jpg"] == "empty file (0 bytes)"
    assert reasons["text.jpg"].startswith("not a JPEG, PNG")
    assert reasons["link.jpg"] == "dangling link"
    assert reasons["pipe.jpg"] == "not a regular file"
    assert "damaged image" in reasons["cut.png"]
    age(root)
    index.update(root, model)
    report = index.update(root, model)
    assert (report.skipped, report.skipped_total) == (0, 5)
    photo(root / "cut.png", 77)
    (root / "link.jpg").unlink()
    (root / "zero.jpg").unlink()
    report = index.update(root, model)
    assert (report.added, report.skipped_total) == (1, 2)
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_file_that_could_not_be_read_is_tried_again(root, model, tmp_path, monkeypatch) -> None:
    real = update_module.read_stable

    def refuse(path, **options):
        if path.endswith("1.png"):
            raise ImageError("cannot be read: permission denied")
        return real(path, **options)

    index = EigenIndex.create(tmp_path / "i", model)
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "read_stable", refuse)
        assert index.update(root, model).skipped == 1
        # Known already, so it is no news.
        report = index.update(root, model)
        assert (report.skipped, report.skipped_total) == (0, 1)
    report = index.update(root, model)
    assert (report.added, report.skipped_total) == (1, 0)


def test_file_that_becomes_bad_loses_its_vector(index, root, model) -> None:
    (root / "1.png").write_bytes(b"damaged")
    report = index.update(root, model)
    assert (report.skipped, report.total) == (1, 8)
    assert "1.png" not in paths(index)


def test_file_that_vanishes_during_the_update(index, root, model, monkeypatch) -> None:
    photo(root / "fleeting.png", 60)
    os.utime(root / "1.png")
    real = update_module.read_stable

    def vanish(path, **options):
        os.unlink(path)
        return real(path, **options)

    monkeypatch.setattr(update_module, "read_stable", vanish)
    report = index.update(root, model)
    assert (report.added, report.deleted, report.skipped) == (0, 1, 0)
    assert paths(index) == {f"{n}.png" for n in (0, 2, 3, 4, 5, 6, 7)} | {
        "Ordner mit Leerzeichen/x.png"
    }


def test_folder_that_cannot_be_read_keeps_its_images(index, root, model, monkeypatch) -> None:
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("Leerzeichen"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr("retrieval.images.os.scandir", scandir)
        report = index.update(root, model)
    assert (report.deleted, report.skipped_total, len(index)) == (0, 1, 9)
    assert [entry.path for entry in index.skipped()] == ["Ordner mit Leerzeichen/"]
    report = index.update(root, model)
    assert (report.deleted, report.skipped_total, len(index)) == (0, 0, 9)


def test_names_that_are_not_utf8(root, model, tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    try:
        photo(root / name, 5)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    folder = tmp_path / os.fsdecode(b"index \xff")
    index = EigenIndex.create(folder, model)
    index.update(root, model)
    assert name in paths(index)
    index.remove([1])
    assert index.update(root, model).added == 1
    reopened = EigenIndex.open(folder)
    assert ranking(reopened, queries(1)[0]) == ranking(index, queries(1)[0])


def test_progress_and_batches(root, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("retrieval.index.update._TELL_SECONDS", 0)
    told: list[Progress] = []
    index = EigenIndex.create(tmp_path / "i", model)
    report = index.update(root, model, progress=told.append, batch_size=2, workers=3)
    assert [step.stage for step in told] == sorted(
        (step.stage for step in told), key=("scan", "index", "save").index
    )
    indexing = [step for step in told if step.stage == "index"]
    assert [step.done for step in indexing] == list(range(1, 10))
    assert all(step.total == 9 for step in indexing)
    assert indexing[-1].rate > 0
    assert indexing[-1].eta == 0
    assert model.calls == 5
    assert report.rate > 0
    assert report.seconds > 0


def test_an_exception_from_progress_keeps_what_is_done(root, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("retrieval.index.update._TELL_SECONDS", 0)

    def stop(step: Progress) -> None:
        if step.stage == "index" and step.done == 6:
            raise KeyboardInterrupt

    index = EigenIndex.create(tmp_path / "i", model)
    with pytest.raises(KeyboardInterrupt):
        index.update(root, model, progress=stop, batch_size=2)
    assert len(index) in (4, 6)
    assert_sound(index, root)
    done = len(index)
    assert index.update(root, model).embedded == 9 - done


def test_batch_size_does_not_matter(root, tmp_path) -> None:
    results = []
    for size in (1, 4, 64):
        model = TinyTestModel()
        index = EigenIndex.create(tmp_path / str(size), model)
        index.update(root, model, batch_size=size)
        results.append(ranking(index, queries(1)[0]))
    assert [[path for path, _ in result] for result in results[1:]] == [
        [path for path, _ in results[0]]
    ] * 2


def test_image_without_direction_is_skipped(root, tmp_path) -> None:
    class Blind(TinyTestModel):
        def image_vectors(self, pixels: np.ndarray) -> np.ndarray:
            vectors = super().image_vectors(pixels)
            vectors[0] = 0
            vectors[1] = np.nan
            return vectors

    model = Blind()
    index = EigenIndex.create(tmp_path / "i", model)
    report = index.update(root, model)
    assert (report.added, report.skipped) == (7, 2)
    assert {entry.error for entry in index.skipped()} == {
        "the model sees no direction in this image"
    }


# --- a disk that is not there ------------------------------------------------------------------


@pytest.fixture
def kept(root: Path, model: TinyTestModel, tmp_path: Path) -> EigenIndex:
    """An index outside its folder, as of a mounted disk."""
    index = EigenIndex.create(tmp_path / "kept index", model)
    index.update(root, model)
    return index


def empty(root: Path) -> Path:
    """Take a folder's content away, as when its disk is not mounted; returns where it is."""
    away = root.rename(root.with_name("away"))
    root.mkdir()
    return away


def test_an_empty_mount_keeps_the_index(kept, root, model) -> None:
    away, before = empty(root), ranking(kept, queries(1)[0])
    with pytest.raises(PicturesGone, match=r"^9 of the index's 9 pictures are gone.*--prune`$"):
        kept.update(root, model)
    assert ranking(kept, queries(1)[0]) == before
    root.rmdir()
    away.rename(root)
    report = kept.update(root, model)
    assert (report.unchanged, report.embedded, report.deleted) == (9, 0, 0)


def test_prune_insists(kept, root, model) -> None:
    empty(root)
    assert kept.update(root, model, prune=True).deleted == 9
    assert len(kept) == 0
    assert kept.update(root, model).total == 0  # nothing is gone of nothing


def test_another_disk_at_the_same_place_is_not_read(kept, root, model, monkeypatch) -> None:
    empty(root)
    for number in range(20):
        photo(root / f"other {number}.png", 500 + number).open("ab").write(bytes(number + 1))
    monkeypatch.setattr(update_module, "read_stable", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(PicturesGone, match="9 of the index's 9"):
        kept.update(root, model)
    assert len(kept) == 9


def test_others_of_the_same_sizes_do_not_count_as_moved(root, model, tmp_path) -> None:
    def plain(path: Path, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(path)  # no compression: all have one size

    folder = tmp_path / "plain"
    folder.mkdir()
    plain(folder / "a.tif", 1)
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(folder, model)
    (folder / "a.tif").unlink()
    plain(folder / "b.tif", 2)
    with pytest.raises(PicturesGone, match="1 of the index's 1"):
        index.update(folder, model)
    assert "a.tif" in paths(index)
    (folder / "b.tif").unlink()
    plain(folder / "a.tif", 1)
    assert index.update(folder, model).embedded == 0


def test_a_folder_that_is_sorted_anew_is_not_gone(kept, root, model, tmp_path) -> None:
    for file in sorted(root.rglob("*.png")):
        (root / "2026" / file.stem).mkdir(parents=True)
        file.rename(root / "2026" / file.stem / file.name)
    report = kept.update(root, model)
    assert (report.moved, report.deleted, report.embedded) == (9, 0, 0)
    assert_like_fresh(kept, root, tmp_path / "fresh")


def test_the_root_stays_when_an_update_from_elsewhere_is_refused(
    kept, root, model, tmp_path
) -> None:
    root.rename(tmp_path / "away")
    (tmp_path / "mount").mkdir()
    with pytest.raises(PicturesGone):
        kept.update(tmp_path / "mount", model)
    assert kept.root == root


@pytest.mark.parametrize(
    ("gone", "of", "refused"),
    [(100, 300, False), (101, 300, True), (101, 404, False), (102, 404, True), (8, 9, False)],
)
def test_many_gone_are_refused(gone: int, of: int, refused: bool, model, tmp_path) -> None:
    folder = tmp_path / "photos"
    for number in range(of):
        photo(folder / f"{number % 7}" / f"{number}.png", number)
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(folder, model)
    for file in sorted(folder.rglob("*.png"))[:gone]:
        file.unlink()
    photo(folder / "new.png", 9999).open("ab").write(b"another size")
    if refused:
        with pytest.raises(PicturesGone, match=f"{gone} of the index's {of} pictures"):
            index.update(folder, model)
        assert len(index) == of
    assert index.update(folder, model, prune=refused).deleted == gone


# --- what is left out --------------------------------------------------------------------------


def test_what_is_ignored_later_leaves_the_index(kept, root, model) -> None:
    report = kept.update(root, model, exclude=["*.png", "!/3.png"])
    assert (report.deleted, report.total) == (8, 1)
    report = kept.update(root, model, exclude=["3.png"])  # the others are here again
    assert (report.added, report.deleted, report.total) == (8, 1, 8)
    (root / ".ennignore").write_text("*.png\n")
    assert kept.update(root, model).total == 0


def test_ignored_files_do_not_hide_that_the_others_are_gone(kept, root, model) -> None:
    empty(root)
    with pytest.raises(PicturesGone, match="8 of the index's 8"):
        kept.update(root, model, exclude=["Ordner mit Leerzeichen"])


# --- formats -----------------------------------------------------------------------------------


def save(path: Path, kind: str, seed: int = 5, **options) -> None:
    """A photo in a format, whatever its name is."""
    with Image.open(photo(path.with_suffix(".tmp.png"), seed)) as image:
        image.resize((66, 54)).save(path, kind, **options)
    path.with_suffix(".tmp.png").unlink()


def vector_of(index: EigenIndex, path: str) -> np.ndarray:
    id_ = next(entry.id for entry in index.entries() if entry.path == path)
    return index.vectors([id_])[0]


def test_pictures_are_found_by_content_and_others_counted(model, tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    names = {
        "reference.png": "PNG",
        "house.avif": "AVIF",
        "house.bmp": "BMP",
        "house.ppm": "PPM",
        "house.jp2": "JPEG2000",
        "really avif.jpg": "AVIF",
        "really bmp.png": "BMP",
        "without an ending": "JPEG",
        "saved.html_files": "PNG",
        "IMG_1.dat": "TIFF",
        "photo.txt": "WEBP",
    }
    for name, kind in names.items():
        save(root / name, kind)
    for name in ("a.mp4", "B.MP4", "c.NEF", "d.xmp", "e.txt", "f", "sub/g.pdf", ".hidden"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"other")
    index = EigenIndex.create(tmp_path / "i", model)
    report = index.update(root, model)
    assert (report.added, report.skipped_total) == (len(names), 0)
    assert report.left_out == {".mp4": 2, ".nef": 1, ".xmp": 1, ".txt": 1, "": 1, ".pdf": 1}
    reference = vector_of(index, "reference.png")
    assert all(vector_of(index, name) @ reference > 0.95 for name in names)
    assert index.update(root, model).left_out == report.left_out


def test_what_is_known_is_not_opened_again(model, tmp_path, monkeypatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save(root / "picture", "JPEG")
    for number in range(20):
        (root / f"note{number}").write_bytes(b"other")
        (root / f"film{number}.mp4").write_bytes(b"other")
    age(root)
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    opened = []
    real = os.open
    monkeypatch.setattr(
        "retrieval.images.os.open",
        lambda path, *rest: opened.append(str(path)) or real(path, *rest),
    )
    report = index.update(root, model)
    assert report.left_out == {"": 20, ".mp4": 20}
    assert not [path for path in opened if path.startswith(str(root))]
    save(root / "note3", "PNG", 6)  # now a picture
    (root / "note4").write_bytes(b"more")
    report = index.update(root, model)
    assert (report.added, report.left_out[""]) == (1, 19)
    names = {Path(path).name for path in opened if path.startswith(str(root))}
    assert names == {"note3", "note4"}
    # A damaged cache is none.
    (tmp_path / "i" / "others.bin").write_bytes(b"nonsense")
    assert index.update(root, model).left_out[""] == 19


def test_picture_of_no_name_that_becomes_something_else_is_deleted(model, tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save(root / "a", "JPEG")
    photo(root / "b.png", 2)
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    (root / "a").write_bytes(b"no picture any more")
    report = index.update(root, model)
    assert (report.deleted, report.left_out) == (1, {"": 1})
    assert_like_fresh(index, root, tmp_path / "fresh")


def test_limit_of_pixels(model, tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (100, 80), (200, 30, 30)).save(root / "a.png")
    Image.new("RGB", (100, 80), (30, 30, 200)).save(root / "b.jpg")
    age(root)
    index = EigenIndex.create(tmp_path / "i", model)
    report = index.update(root, model, max_pixels=4000)
    assert (report.added, report.skipped) == (1, 1)  # the JPEG at half its size
    (skipped,) = index.skipped()
    assert (skipped.path, skipped.width, skipped.height) == ("a.png", 100, 80)
    assert "`enn search index --max-pixels 8000` reads it" in str(skipped.error)
    assert index.update(root, model, max_pixels=7999).skipped_total == 1
    assert index.update(root, model, max_pixels=8000).added == 1
    # What was read stays, under the usual limit and under a smaller one.
    assert index.update(root, model, max_pixels=4000).unchanged == 2
    with pytest.raises(ValueError, match="max_pixels"):
        index.update(root, model, max_pixels=0)


def test_limit_of_bytes(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(update_module, "MAX_BYTES", 1000)
    root = tmp_path / "root"
    root.mkdir()
    photo(root / "small.png", 1)
    Image.effect_noise((60, 60), 90).save(root / "large.bmp")
    index = EigenIndex.create(tmp_path / "i", model)
    assert index.update(root, model).skipped == 1
    (skipped,) = index.skipped()
    assert skipped.error is not None
    assert skipped.error.endswith("; `enn search index --max-pixels 201000001` reads it")
    assert index.update(root, model, max_pixels=201_000_001).added == 1


def test_what_an_earlier_release_could_not_read_is_tried_again(model, tmp_path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save(root / "a.jpg", "AVIF")
    Image.new("RGB", (100, 80)).save(root / "b.jpg")
    age(root)
    index = EigenIndex.create(tmp_path / "i", model)
    index.update(root, model)
    words = {
        "a.jpg": "not a JPEG, PNG, WebP, TIFF, GIF or HEIC image",
        "b.jpg": "100 x 80 pixels are more than the limit of 201 megapixels",
    }
    with index._writer() as writer, writer.catalog.writing():
        for entry in list(index.entries()):
            writer.catalog.put(replace(entry, state="skipped", error=words[entry.path]))
            writer.catalog.drop_vector(entry.id)
    index.refresh()
    assert index.stats()["skipped"] == 2
    assert index.update(root, model).added == 2
