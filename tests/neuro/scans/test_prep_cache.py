"""What is found is what was kept; damage and full disks are misses."""

from __future__ import annotations

import os
import random
import threading
import warnings
import zlib

import numpy as np
import pytest
from volume_cases import write

import neuro.scans.preprocess
from neuro.scans.batch import prepare_scan
from neuro.scans.prep_cache import PrepCache
from neuro.scans.preprocess import Preprocessor
from neuro.scans.read import content_hash, read_volume
from neuro.scans.template import MNI_AFFINE, load_template


@pytest.fixture
def path(tmp_path):
    values = (load_template()[0] * 200).astype(np.uint8)
    return write(tmp_path / "a.nii.gz", values, MNI_AFFINE)


@pytest.fixture
def prepared(path):
    return Preprocessor()(read_volume(path), "mni")


def test_kept_and_found(tmp_path, path, prepared):
    cache = PrepCache(tmp_path / "cache")
    sha256 = content_hash(path)
    assert cache.find(sha256, "mni") is None
    assert not cache.folder.exists()
    cache.add(prepared)
    found = cache.find(sha256, "mni")
    assert np.array_equal(found.image, prepared.image)
    assert np.array_equal(found.to_mni, prepared.to_mni)
    assert (found.quality, found.record) == (prepared.quality, prepared.record)
    assert cache.find(sha256, "brain") is None
    assert cache.find("0" * 64, "mni") is None
    assert [p.suffix for p in cache.folder.iterdir()] == [".npz"]


def test_damaged_entries_are_prepared_again_and_replaced(tmp_path, path, prepared):
    cache = PrepCache(tmp_path / "cache")
    cache.add(prepared)
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    draw = random.Random(3)
    noticed = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = cache.find(content_hash(path), "mni")
        if found is None:
            noticed += 1
            assert str(file) in str(told[0].message)
        else:  # what nobody reads of a zip file
            assert np.array_equal(found.image, prepared.image)
            assert np.array_equal(found.to_mni, prepared.to_mni)
            assert found.record == prepared.record
    assert noticed > 40
    again, cached = prepare_scan(path, "mni", cache=cache.folder)
    assert (cached, np.array_equal(again.image, prepared.image)) == (found is not None, True)
    with pytest.MonkeyPatch.context() as patch:
        # A compressed part that is no such thing: an error of zlib, and no ValueError.
        patch.setattr(np, "load", lambda *_, **__: zlib.decompress(b"no stream"))
        with pytest.warns(UserWarning, match="prepared again"):
            assert cache.find(content_hash(path), "mni") is None
    prepare_scan(path, "mni", cache=cache.folder)
    assert cache.find(content_hash(path), "mni") is not None


def test_other_steps_are_other_brains(tmp_path, path, prepared, monkeypatch):
    cache = PrepCache(tmp_path / "cache")
    cache.add(prepared)
    monkeypatch.setattr(neuro.scans.preprocess, "VERSION", 0)
    neuro.scans.preprocess.parameters.cache_clear()
    try:
        assert cache.find(content_hash(path), "mni") is None
    finally:
        monkeypatch.undo()
        neuro.scans.preprocess.parameters.cache_clear()
    assert cache.find(content_hash(path), "mni") is not None


def test_name_of_the_file_does_not_matter(tmp_path, path):
    first, cached = prepare_scan(path, "mni", cache=tmp_path / "cache")
    other = path.rename(tmp_path / "b.nii.gz")
    second, cached_too = prepare_scan(other, "mni", cache=tmp_path / "cache")
    assert (cached, cached_too) == (False, True)
    assert np.array_equal(first.image, second.image)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: b"", lambda raw: b"x" * 99])
def test_damage_is_a_miss(tmp_path, path, prepared, damage):
    cache = PrepCache(tmp_path / "cache")
    cache.add(prepared)
    (file,) = cache.folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert cache.find(content_hash(path), "mni") is None
    cache.add(prepared)
    assert cache.find(content_hash(path), "mni") is not None


def test_no_place_is_no_error(tmp_path, path, prepared):
    (tmp_path / "cache").write_text("a file")
    cache = PrepCache(tmp_path / "cache")
    cache.add(prepared)
    assert cache.find(content_hash(path), "mni") is None
    assert cache.prune() == 0


def test_many_writers(tmp_path, path, prepared):
    cache = PrepCache(tmp_path / "cache")
    threads = [threading.Thread(target=cache.add, args=(prepared,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.find(content_hash(path), "mni") is not None
    assert len(list(cache.folder.iterdir())) == 1


def test_prune_deletes_what_was_not_used_for_longest(tmp_path):
    cache = PrepCache(tmp_path / "cache", max_bytes=250)
    cache.folder.mkdir()
    for age, name in enumerate(["new", "older", "oldest"]):
        file = cache.folder / f"{name}.npz"
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    left = cache.folder / "x.tmp"
    left.touch()
    os.utime(left, (1e9, 1e9))
    assert cache.prune() == 1
    assert sorted(file.name for file in cache.folder.iterdir()) == ["new.npz", "older.npz"]
