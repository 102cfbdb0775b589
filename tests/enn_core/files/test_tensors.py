"""The one reader and writer of tensor files: whole, private to nobody, and refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import random
from functools import partial
from pathlib import Path

import migration_cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from enn_core.files.tensors import (
    DIGEST,
    DamagedFileError,
    TensorFileError,
    read_metadata,
    read_state,
    read_stored,
    read_tensors,
    read_weights,
    write_state,
    write_tensors,
)

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3).mT,  # not contiguous
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "number": torch.tensor(7),
    "learnt": torch.nn.Parameter(torch.ones(2)),
}


def test_what_is_written_is_read_here_and_by_others(tmp_path):
    file = tmp_path / "ü.safetensors"
    write_tensors(file, TENSORS, {"about": "Größe"})
    for state in (read_tensors(file), read_weights(file), load_file(file)):
        assert set(state) == set(TENSORS)
        for name, value in TENSORS.items():
            assert torch.equal(state[name], value)
            assert state[name].dtype == value.dtype
    assert read_metadata(file) == {"format": "pt", "about": "Größe"}
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"format", "about", DIGEST}
    kind, shape, content = read_stored(file)["matrix"]
    assert (kind, shape) == ("F32", [3, 2])
    assert bytes(content) == TENSORS["matrix"].contiguous().numpy().tobytes()
    assert os.listdir(tmp_path) == [file.name]


def test_tied_tensors_and_parts_of_one_are_written_each(tmp_path):
    whole = torch.arange(12.0)
    given = {"a": whole, "b": whole, "c": whole[3:5], "d": whole[4:8], "e": whole[::2]}
    write_tensors(tmp_path / "a.safetensors", given)
    read = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], value) for name, value in given.items())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whoever_may_read_other_new_files_may_read_these(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", TENSORS)
        write_state({"step": 3}, tmp_path / "a.pt")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


def test_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.ones(1)})
    with pytest.raises(TypeError):
        write_tensors(file, {"a": torch.zeros(1)}, {"number": 3})  # type: ignore[dict-item]
    assert read_tensors(file)["a"] == 1
    assert os.listdir(tmp_path) == [file.name]


def test_names_that_are_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"n\xef.safetensors")
    try:
        write_tensors(file, TENSORS, {"a": "b"})
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    assert torch.equal(read_tensors(file)["matrix"], TENSORS["matrix"])
    assert read_metadata(file)["a"] == "b"


@pytest.mark.parametrize("content", ["cut", "short", "empty", "text", "huge", "list"])
def test_damaged_files_are_named_in_one_line(tmp_path, content):
    save_file({"a": torch.ones(100)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    file = tmp_path / "w.safetensors"
    file.write_bytes(
        {
            "cut": whole[:-5],
            "short": whole[:20],
            "empty": b"",
            "text": b"not a header\nat all",
            "huge": (2**62).to_bytes(8, "little") + whole[8:],
            "list": (2).to_bytes(8, "little") + b"[]",
        }[content]
    )
    for read in (read_tensors, read_weights):
        with pytest.raises(TensorFileError, match=r"w\.safetensors: no intact") as caught:
            read(file)
        assert "\n" not in str(caught.value)
    for read in (read_stored, read_metadata):
        if content == "cut" and read is read_metadata:  # the header is whole
            continue
        with pytest.raises(TensorFileError, match=r"w\.safetensors: no intact"):
            read(file)


@pytest.mark.parametrize("metadata", [[1], {"model": 3}])
def test_metadata_is_texts_by_name(tmp_path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TensorFileError, match=r"w\.safetensors: no intact"):
        read_metadata(file)


@pytest.mark.skipif(os.name == "nt", reason="limits the POSIX way")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    assert migration_cases.run(_fill, tmp_path) == 0
    assert os.listdir(tmp_path) == []


def _fill(folder: Path) -> None:
    big = {"a": torch.ones(500, 500)}
    for write in (partial(write_state, big), lambda path: write_tensors(path, big)):
        migration_cases.within(100_000, "File too large", write, folder / "a")


def test_a_state_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_state({"step": 3}, tmp_path / "none" / "a.pt")


def _flipped(file: Path, seed: int, count: int):
    """Copies of a file, each with one bit flipped, at seeded places."""
    whole = file.read_bytes()
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        copy = file.with_name(f"damaged{file.suffix}")
        copy.write_bytes(damaged)
        yield copy


def test_no_flipped_bit_of_a_tensor_file_goes_unnoticed(tmp_path):
    tensors = {"w": torch.arange(40.0).reshape(8, 5), "b": torch.arange(5)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"model": '{"slope": 0.25}'})
    refused = []
    for file in _flipped(tmp_path / "a.safetensors", 1, 400):
        try:
            read = read_tensors(file)
        except TensorFileError as error:
            refused.append(str(error))
            with pytest.raises(TensorFileError):
                read_stored(file)
            continue
        assert set(read) == set(tensors)
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        assert read_metadata(file)["model"] == '{"slope": 0.25}'
    assert len(refused) > 350  # the others hit the digest's name
    assert all("damaged.safetensors" in line and "\n" not in line for line in refused)


def test_no_flipped_bit_of_a_state_goes_unnoticed(tmp_path):
    state = {"step": 3, "log": [{"loss": 1.5}], "w": torch.arange(40.0)}
    write_state(state, tmp_path / "a.pt")
    refused = []
    for file in _flipped(tmp_path / "a.pt", 2, 400):
        try:
            read = read_state(file)
        except TensorFileError as error:
            refused.append(str(error))
            continue
        assert torch.equal(read["w"], state["w"])
        assert (read["step"], read["log"]) == (3, [{"loss": 1.5}])
    assert len(refused) > 200  # the others hit what nobody reads, as padding
    assert all("damaged.pt" in line and "\n" not in line for line in refused)


def test_a_record_marked_as_a_folder_is_damage(tmp_path):
    # torch then leaves the tensor's memory as it is, without a word.
    write_state({"w": torch.arange(40.0)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.rindex(
        b"PK\x01\x02", 0, content.index(b"archive/data/0", content.index(b"PK\x01\x02"))
    )
    content[at + 38] ^= 0x10
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(DamagedFileError, match="archive/data/0"):
        read_state(tmp_path / "a.pt")


def test_files_without_checksums_are_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["w"], torch.ones(3))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"w": torch.ones(3)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("without.pt", "legacy.pt"):
        assert torch.equal(read_state(tmp_path / name)["w"], torch.ones(3))


class _Payload:
    def __reduce__(self):
        return print, ("code in weights was run",)


def test_states_come_back_and_no_code_is_run(tmp_path, capfd):
    state = {"step": 3, "inner": [{"a": TENSORS["matrix"]}]}
    write_state(state, tmp_path / "a.pt")
    again = read_state(tmp_path / "a.pt")
    assert again["step"] == 3
    assert torch.equal(again["inner"][0]["a"], TENSORS["matrix"])
    for content in (pickle.dumps(_Payload()), b"PK\x03\x04 cut", b"", b"text"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(
            TensorFileError, match=r"is damaged( or holds pickled code|: )"
        ) as caught:
            read_state(tmp_path / "bad.pt")
        assert "\n" not in str(caught.value)
    assert "code in weights was run" not in capfd.readouterr().out


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers_of_training_programs_are_taken_off(tmp_path, wrapper):
    write_state({"epoch": 3, wrapper: {"a": torch.ones(1)}}, tmp_path / "a.pt")
    assert list(read_weights(tmp_path / "a.pt")) == ["a"]
    write_state([1], tmp_path / "b.pt")  # type: ignore[arg-type]
    with pytest.raises(TensorFileError, match=r"b\.pt holds no state dict; .*got list"):
        read_weights(tmp_path / "b.pt")


@pytest.mark.parametrize("read", [read_tensors, read_metadata, read_stored, read_state])
def test_a_missing_file_is_missing(tmp_path: Path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")
