"""Kill -9 at any instant, full disks, read-only places: the last good state stays.

Every scenario runs in a process of its own; see `index_crash_cases`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from index_cases import (
    TinyTestModel,
    age,
    assert_like_fresh,
    assert_same_ranking,
    assert_sound,
    photo,
    queries,
    ranking,
)
from index_crash_cases import Server

from retrieval.index.eigen_index import EigenIndex
from retrieval.index.manifest import NoIndex

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and limits processes the POSIX way")


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


# --- kill -9 at every step that touches the disk ------------------------------------------------


def change_folder(root: Path) -> None:
    """One of everything: new, changed, deleted, moved, damaged, copied."""
    photo(root / "new 1.png", 101)
    photo(root / "new 2.png", 102)
    photo(root / "1.png", 103)
    (root / "2.png").unlink()
    (root / "3.png").rename(root / "moved.png")
    (root / "4.png").write_bytes(b"damaged")
    shutil.copy(root / "5.png", root / "copy.png")
    age(root)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_of_an_update(server, tmp_path, stride: int) -> None:
    root = tmp_path / "photos"
    for number in range(7):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel()
    with EigenIndex.create(tmp_path / "good", model) as index:
        index.update(root, model)
        before = ranking(index, queries(1)[0])
    change_folder(root)
    step, killed = 0, -signal.SIGKILL
    while killed == -signal.SIGKILL:
        step += stride
        folder = tmp_path / f"step {step}"
        shutil.copytree(tmp_path / "good", folder)
        killed = server.run("update_until", step, root, folder)
        with EigenIndex.open(folder, model=model) as index:
            assert_sound(index, root)
            assert abs(len(index) - len(before)) <= 3
            # Read-only work on what is left, by two readers, needs no repair.
            with EigenIndex.open(folder) as second:
                q = queries(1)[0]
                assert index.search(q, 20) == second.search(q, 20)
            index.update(root, model, batch_size=3)
            assert_sound(index, root)
            if step % 10 < stride or killed == 0:
                assert_like_fresh(index, root, tmp_path / f"fresh {step}")
            files = [name for name in os.listdir(folder) if name.startswith(("vectors", "ann"))]
            assert len(files) == 1
        shutil.rmtree(folder)
    assert killed == 0
    assert step > 30


def test_killed_at_every_step_of_creation(server, tmp_path) -> None:
    root = photo(tmp_path / "photos" / "1.png", 1).parent
    step, killed = 0, -signal.SIGKILL
    while killed == -signal.SIGKILL:
        step += 1
        folder = tmp_path / f"index {step}"
        killed = server.run("create_until", step, root, folder)
        try:
            index = EigenIndex.open(folder)
        except NoIndex:
            index = EigenIndex.create(folder, TinyTestModel(), root=root)
        with index:
            assert index.update(None, TinyTestModel()).added == 1
    assert killed == 0
    assert step > 5


def test_killed_at_every_step_of_compaction(server, tmp_path) -> None:
    root = tmp_path / "photos"
    for number in range(6):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel()
    with EigenIndex.create(tmp_path / "good", model) as index:
        index.update(root, model)
        (root / "3.png").unlink()
        index.update(root, model)
        expected = ranking(index, queries(1)[0])
    step, killed = 0, -signal.SIGKILL
    while killed == -signal.SIGKILL:
        step += 1
        folder = tmp_path / f"step {step}"
        shutil.copytree(tmp_path / "good", folder)
        killed = server.run("compact_until", step, folder)
        with EigenIndex.open(folder) as index:
            assert_same_ranking(ranking(index, queries(1)[0]), expected)
            index.compact()
            assert_same_ranking(ranking(index, queries(1)[0]), expected)
    assert killed == 0


@contextlib.contextmanager
def unmounted(root: Path):
    """The folder is empty meanwhile."""
    away = root.rename(root.with_name("away"))
    root.mkdir()
    yield
    root.rmdir()
    away.rename(root)


@pytest.mark.parametrize("scenario", ["delete", "compact", "return"])
def test_killed_while_vectors_are_kept(server, tmp_path, scenario: str) -> None:
    """Whatever is killed when, a picture that comes back needs no model."""
    root, good = tmp_path / "photos", tmp_path / "good"
    for number in range(4):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel()
    with EigenIndex.create(good, model) as index:
        index.update(root, model)
        expected, ids = ranking(index, queries(1)[0]), index.ids().tolist()
        if scenario != "delete":
            with unmounted(root):
                assert index.update(root, model, prune=True).deleted == 4
    step, killed = 0, -signal.SIGKILL
    while killed == -signal.SIGKILL:
        step += 2
        folder = tmp_path / f"step {step}"
        shutil.copytree(good, folder)
        if scenario == "compact":
            killed = server.run("compact_until", step, folder)
        elif scenario == "return":
            killed = server.run("update_until", step, root, folder)
        else:
            with unmounted(root):
                killed = server.run("update_until", step, root, folder)
        with EigenIndex.open(folder, model=model) as index:
            assert index.update(root, model).embedded == 0
            assert ranking(index, queries(1)[0]) == expected
            assert index.ids().tolist() == ids
        shutil.rmtree(folder)
    assert killed == 0
    assert step > 5


def test_killed_at_random_times_and_resumed(server, tmp_path) -> None:
    root, folder = tmp_path / "photos", tmp_path / "index"
    for number in range(120):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel()
    EigenIndex.create(folder, model).close()
    choice = random.Random(7)
    sizes = [0]
    for _ in range(8):
        pid = server.start("update_slowly", root, folder)
        time.sleep(choice.uniform(0.03, 0.25))
        with contextlib.suppress(ProcessLookupError):  # a quick machine is done by then
            os.kill(pid, signal.SIGKILL)
        server.ended()
        with EigenIndex.open(folder, model=model) as index:
            sizes.append(len(index))
            assert_sound(index, root)
    assert sizes == sorted(sizes), "a committed image was lost"
    with EigenIndex.open(folder) as index:
        report = index.update(root, model)
        assert report.embedded == 120 - sizes[-1]
        assert_like_fresh(index, root, tmp_path / "fresh")


# --- full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2_000, 20_000, 45_000, 70_000, 100_000])
def test_no_file_may_grow(server, tmp_path, limit: int) -> None:
    root, folder = tmp_path / "photos", tmp_path / "index"
    for number in range(40):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel(dim=150)
    with EigenIndex.create(folder, model) as index:
        index.update(photo(tmp_path / "photos" / "first.png", 999).parent, model, batch_size=4)
        before = len(index)
    for number in range(40, 80):
        photo(root / f"{number}.png", number)
    age(root)
    assert server.run("update_within", limit, root, folder) == 3
    with EigenIndex.open(folder, model=model) as index:
        assert before <= len(index) <= 81
        assert_sound(index, root, model)
        index.update(root, model)
        assert_like_fresh_150(index, root, tmp_path)


def assert_like_fresh_150(index: EigenIndex, root: Path, tmp_path: Path) -> None:
    model = TinyTestModel(dim=150)
    with EigenIndex.create(tmp_path / "fresh", model) as fresh:
        fresh.update(root, model)
        q = queries(1, 150)[0]
        ours, theirs = ranking(index, q), ranking(fresh, q)
    assert [path for path, _ in ours] == [path for path, _ in theirs]


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_really_full(small_disk: Path, tmp_path: Path) -> None:
    root, folder = tmp_path / "photos", small_disk / "index"
    for number in range(30):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel(dim=150)
    index = EigenIndex.create(folder, model)
    index.update(root, model)
    good = ranking(index, queries(1, 150)[0])
    for number in range(30, 300):
        photo(root / f"{number}.png", number)
    age(root)
    with pytest.raises(OSError, match="make room and run again") as caught:
        index.update(root, model, batch_size=8)
    assert caught.value.errno == errno.ENOSPC
    first = dict(ranking(index, queries(1, 150)[0]))
    assert all(first[path] == pytest.approx(score, abs=1e-6) for path, score in good)
    index.close()
    # Not a byte left: a new reader still opens what there is.
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    with EigenIndex.open(folder, model=model) as reader:
        assert len(reader) >= 30
        assert_sound(reader, root, model)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with EigenIndex.open(folder) as index:
        index.update(root, model)
        assert len(index) == 300
        assert_like_fresh_150(index, root, tmp_path)


# --- read-only places --------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path):
    """A function that shows a folder at another, read-only place."""
    mounted = []

    def mount(folder: Path) -> Path:
        place = tmp_path / f"read-only {len(mounted)}"
        place.mkdir()
        for command in (
            ["mount", "--bind", str(folder), str(place)],
            ["mount", "-o", "remount,ro,bind", str(place)],
        ):
            if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("needs the right to mount")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def build(tmp_path: Path) -> tuple[Path, Path, list]:
    root, folder = tmp_path / "photos", tmp_path / "index"
    for number in range(9):
        photo(root / f"{number}.png", number)
    age(root)
    model = TinyTestModel()
    with EigenIndex.create(folder, model) as index:
        index.update(root, model)
        return root, folder, ranking(index, queries(1)[0])


def test_read_only_mount(server, tmp_path, read_only) -> None:
    root, folder, expected = build(tmp_path)
    place = read_only(folder)
    with EigenIndex.open(place, model=TinyTestModel()) as reader:
        assert_same_ranking(ranking(reader, queries(1)[0]), expected)
        assert reader.refresh() is False
        with pytest.raises(OSError, match=r"cannot be written .*--index"):
            reader.update(root, TinyTestModel())
        # Changed from its writable side, by another process.
        photo(root / "more.png", 88)
        assert server.run("update_until", 10**6, root, folder) == 0
        assert reader.refresh() is True
        assert len(reader) == 10


def test_read_only_mount_of_an_index_whose_writer_was_killed(server, tmp_path, read_only) -> None:
    root, folder, _ = build(tmp_path)
    for number in range(20, 30):
        photo(root / f"{number}.png", number)
    # Dies before the write-ahead log is folded in.
    assert server.run("update_until", 40, root, folder) == -signal.SIGKILL
    assert (folder / "catalog.sqlite-wal").stat().st_size > 0
    (folder / "catalog.sqlite-shm").unlink()
    with EigenIndex.open(read_only(folder)) as reader:
        assert len(reader) > 9
        assert_sound(reader, root)


def test_folder_without_the_right_to_write(server, tmp_path) -> None:
    _, folder, expected = build(tmp_path)
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        if parent.owner() == tmp_path.owner() and parent != Path("/tmp"):
            parent.chmod(0o755)
    assert server.run("read_as_nobody", folder, expected) == 0
    folder.chmod(0o755)
