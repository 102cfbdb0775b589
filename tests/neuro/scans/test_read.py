"""What a file may hold and be called, and what is refused in one line."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from volume_cases import OBLIQUE, blob, rearranged, write

from neuro.scans.read import MAX_VOXELS, VolumeError, content_hash, is_volume_name, read_volume

ORDERS = list(itertools.permutations(range(3)))
FLIPS = list(itertools.product((1, -1), repeat=3))


def refused(path) -> str:
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    return text


# --- formats -----------------------------------------------------------------------------------

NAMES = (
    *("a.nii", "a.nii.gz", "nifti2.nii", "nifti2.nii.gz", "a.mgz", "a.mgh"),
    *("a.img", "a.img.gz", "analyze.img"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_voxels(tmp_path, name):
    values = blob()
    volume = read_volume(write(tmp_path / name, values))
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.flags.c_contiguous
    # Analyze turns left and right, which its own reader undoes.
    seen = volume.voxels[::-1] if "analyze" in name else volume.voxels
    assert np.array_equal(seen, values) or np.array_equal(volume.voxels, values)
    assert volume.spacing == pytest.approx((4, 5, 6), abs=1e-3)
    assert volume.file_shape == values.shape
    assert volume.sha256 == content_hash(tmp_path / name)


@pytest.mark.parametrize("name", ["a.img", "analyze.img"])
def test_pair_is_found_from_either_file(tmp_path, name):
    write(tmp_path / name, blob())
    one, other = (read_volume((tmp_path / name).with_suffix(s)) for s in (".img", ".hdr"))
    assert np.array_equal(one.voxels, other.voxels)
    assert one.sha256 == other.sha256


def test_the_content_decides_not_the_name(tmp_path):
    plain = write(tmp_path / "a.nii", blob()).rename(tmp_path / "b.nii.gz")
    packed = write(tmp_path / "a.nii.gz", blob()).rename(tmp_path / "c.nii")
    assert np.array_equal(read_volume(plain).voxels, read_volume(packed).voxels)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "float32", "float64", ">i2"])
def test_types(tmp_path, dtype):
    values = (blob() // 4).astype(dtype)
    assert np.array_equal(read_volume(write(tmp_path / "a.nii", values)).voxels, values)


def test_scale_factors_are_applied(tmp_path):
    image = nib.Nifti1Image(blob(), OBLIQUE)
    image.header.set_slope_inter(0.5, 10)
    path = tmp_path / "a.nii.gz"
    image.to_filename(path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    # As a scanner writes it: the integers as they are, the factors in the header.
    raw[112:120] = struct.pack("<ff", 0.5, 10)
    raw[352:] = blob().tobytes(order="F")
    path.write_bytes(gzip.compress(bytes(raw)))
    assert np.allclose(read_volume(path).voxels, blob() * 0.5 + 10)


def test_trailing_axis_of_one_volume(tmp_path):
    volume = read_volume(write(tmp_path / "a.nii", blob()[..., None, None]))
    assert np.array_equal(volume.voxels, blob())


def test_names():
    names = ("a.nii", "A.NII.GZ", "a.mgz", "a.img", "a.img.gz")
    assert all(is_volume_name(name) for name in names)
    assert not any(is_volume_name(name) for name in ("a.hdr", "a.json", "nii", "a.bvec", "a.gz"))


# --- orientation -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.sampled_from(ORDERS), flips=st.sampled_from(FLIPS), degrees=st.integers(0, 25))
def test_flips_and_permutations_give_the_same_bits(tmp_path, suffix, order, flips, degrees):
    a, b = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[a, -b, 0, 0], [b, a, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(blob(), turn @ OBLIQUE)
    for name, copy in (("one", image), ("other", rearranged(image, order, flips))):
        write(tmp_path / f"{name}{suffix}", np.asarray(copy.dataobj), copy.affine)
    one, other = (read_volume(tmp_path / f"{name}{suffix}") for name in ("one", "other"))
    assert one.voxels.tobytes() == other.voxels.tobytes()
    assert one.voxels.shape == other.voxels.shape
    assert one.affine.tobytes() == other.affine.tobytes()
    # Both lead back to the same place of the file they come from.
    for volume in (one, other):
        index = np.array([3, 5, 7, 1])
        value = volume.voxels[tuple(np.rint(volume.to_canonical @ index).astype(int)[:3])]
        file = nib.load(tmp_path / f"{'one' if volume is one else 'other'}{suffix}")
        assert value == file.get_fdata()[3, 5, 7]


def test_qform_alone_gives_the_same_bits(tmp_path):
    image = nib.Nifti1Image(blob(), OBLIQUE)
    read = []
    for number, copy in enumerate((image, rearranged(image, (2, 0, 1), (-1, 1, -1)))):
        copy.set_qform(copy.affine, 1)
        copy.set_sform(None, 0)
        copy.to_filename(tmp_path / f"{number}.nii")
        read.append(read_volume(tmp_path / f"{number}.nii"))
    assert read[0].voxels.tobytes() == read[1].voxels.tobytes()
    assert read[0].affine.tobytes() == read[1].affine.tobytes()
    assert read[0].notes == ()


def test_axes_are_to_the_right_front_and_up(tmp_path):
    image = rearranged(nib.Nifti1Image(blob(), OBLIQUE), (1, 2, 0), (-1, 1, -1))
    image.to_filename(tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.orientation == "".join(nib.aff2axcodes(image.affine)) != "RAS"
    middle = (np.array(volume.voxels.shape) - 1) / 2
    assert np.allclose(volume.affine @ [*middle, 1], [0, 0, 0, 1])


def forms(path, sform=None, qform=None, codes=(1, 1)):
    image = nib.Nifti1Image(blob(), None)
    image.header.set_zooms((4, 5, 6))
    image.header.set_qform(qform, codes[1] if qform is not None else 0)
    image.header.set_sform(sform, codes[0] if sform is not None else 0)
    nib.Nifti1Image(blob(), None, image.header).to_filename(path)
    return path


def test_sform_wins_and_the_difference_is_noted(tmp_path):
    flipped = OBLIQUE @ np.diag([-1.0, 1, 1, 1])
    volume = read_volume(forms(tmp_path / "a.nii", flipped, OBLIQUE))
    assert np.array_equal(volume.voxels, blob()[::-1])
    assert "sform and qform differ" in volume.notes[0]


@pytest.mark.parametrize(
    "sform",
    [
        np.diag([4.0, 5, 0, 1]),
        np.diag([np.nan, 5, 6, 1]),
        np.diag([0.004, 0.005, 0.006, 1]),
        np.diag([400.0, 500, 600, 1]),
        np.array([[4.0, 4, 0, 0], [0, 0.1, 0, 0], [0, 0, 6, 0], [0, 0, 0, 1]]),
    ],
)
def test_sform_that_cannot_be_true(tmp_path, sform):
    volume = read_volume(forms(tmp_path / "a.nii", sform, OBLIQUE))
    assert volume.spacing == pytest.approx((4, 5, 6), abs=1e-3)
    assert volume.notes == ("The sform cannot be true; the qform is used.",)


def test_no_orientation_at_all(tmp_path):
    volume = read_volume(forms(tmp_path / "a.nii"))
    assert volume.spacing == pytest.approx((4, 5, 6))
    assert "no orientation" in volume.notes[0]


def test_lengths_in_metres(tmp_path):
    path = forms(tmp_path / "a.nii", OBLIQUE * np.array([[1e-3], [1e-3], [1e-3], [1]]))
    raw = bytearray(path.read_bytes())
    raw[76:92] = struct.pack("<ffff", 1, 0.004, 0.005, 0.006)
    raw[123] = 1
    path.write_bytes(raw)
    volume = read_volume(path)
    assert volume.spacing == pytest.approx((4, 5, 6), abs=1e-3)
    assert any("units of 1000 mm" in note for note in volume.notes)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (blob((64, 64)), "single slice"),
        (blob((64, 64, 1)), "single slice"),
        (blob((1, 64, 64)), "single slice"),
        (blob((40, 36, 9)), "only 9 slices"),
        (np.stack([blob()] * 7, -1), "series of 7 volumes"),
        (np.full((40, 36, 30), np.nan, "float32"), "NaN"),
        (np.zeros((40, 36, 30), "int16"), "every voxel is 0"),
        (np.full((40, 36, 30), 7, "int16"), "every voxel is 7"),
        (np.pad(np.ones((3, 3, 3), "uint8"), 15), "nearly empty"),
        (blob(dtype="complex64"), "complex"),
        (blob() - np.int16(1000), "CT"),
        (np.zeros((40, 36, 30), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
    ],
)
def test_no_head(tmp_path, values, words):
    path = tmp_path / "a.nii.gz"
    nib.Nifti1Image(values, np.diag([4.0, 5, 6, 1])).to_filename(path)
    assert words in refused(path)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([0.5, 0.5, 0.5, 1]), "covers 20 x 18 x 15 mm"),
        (np.diag([4.0, 5, 60, 1]), "covers"),
    ],
)
def test_no_size_of_a_head(tmp_path, affine, words):
    assert words in refused(write(tmp_path / "a.nii", blob(), affine))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\0" * 100, "zeros"),
        (b"no volume at all, just a text", "no known format"),
        (bytes(128) + b"DICM" + bytes(2000), "dcm2niix"),
        (b"\x89PNG" + bytes(2000), "picture"),
        (b"PK\x03\x04" + bytes(2000), "unpack"),
        (b"\x1f\x8b\x08 nothing behind it", "damaged"),
        (gzip.compress(b"text", mtime=0), "no known format"),
        (gzip.compress(bytes(4000), mtime=0)[:-9], "zeros|ends in|no known"),
    ],
)
def test_no_volume(tmp_path, content, words):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    text = refused(path)
    assert any(word in text for word in words.split("|")), text


def test_no_file(tmp_path):
    assert "no such file" in refused(tmp_path / "a.nii")
    assert "folder" in refused(tmp_path)
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1").write_bytes(bytes(128) + b"DICM")
    assert "dcm2niix" in refused(tmp_path / "series")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "no regular file" in refused(tmp_path / "pipe.nii")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.img"])
def test_truncated(tmp_path, name):
    path = write(tmp_path / name, blob())
    content = path.read_bytes()
    for keep in (0.99, 0.5, 0.01):
        path.write_bytes(content[: int(len(content) * keep)])
        text = refused(path)
        assert any(word in text for word in ("truncated", "ends in", "format", "damaged")), text


def test_damaged_inside_the_compressed_data(tmp_path):
    path = write(tmp_path / "a.nii.gz", blob())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in refused(path)


GARBAGE = (b"garbage!!", b"\0" * 700 + b"x", b"\x1f\x8b", b"\x1f\x8b\x08 and so on" * 9)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz", "a.img.gz", "nifti2.nii.gz"])
@pytest.mark.parametrize("garbage", [*GARBAGE, gzip.compress(bytes(999), mtime=0)[:-9]])
def test_bytes_behind_the_compressed_data_are_noted(tmp_path, name, garbage):
    path = write(tmp_path / name, blob())
    clean = read_volume(path)
    with path.open("ab") as file:
        file.write(garbage)
    volume = read_volume(path)
    assert np.array_equal(volume.voxels, clean.voxels)
    count = len(garbage.lstrip(b"\0"))
    assert volume.notes == (
        f"What follows the compressed data is left out ({count:,} bytes).",
        *clean.notes,
    )


def test_compressed_in_parts_and_filled_with_zeros(tmp_path):
    path = write(tmp_path / "a.nii.gz", blob())
    raw = gzip.decompress(path.read_bytes())
    parts = [gzip.compress(raw[at : at + 9000]) for at in range(0, len(raw), 9000)]
    path.write_bytes(b"".join(parts) + bytes(1000))
    volume = read_volume(path)
    assert np.array_equal(volume.voxels, blob())
    assert volume.notes == ()
    path.write_bytes(b"".join(parts[:2]) + b"garbage" + b"".join(parts[2:]))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("low", [-1000, -1024, -2000, -32768])
def test_padding_is_no_ct(tmp_path, low):
    values = blob().astype(np.float32)
    values[:6] = values[:, :, -4:] = low
    # As a resampled image has it.
    values[6, ::2] = low / 2
    volume = read_volume(write(tmp_path / "a.nii.gz", values))
    assert np.array_equal(volume.voxels, np.maximum(values, 0))
    assert volume.notes == (f"The background of {low} is padding, set to 0.",)


def test_a_ct_with_air_of_one_value_is_a_ct(tmp_path):
    rng = np.random.default_rng(0)
    tissue = rng.choice([-90, 5, 35, 900], blob().shape, p=[0.15, 0.15, 0.5, 0.2])
    values = np.where(blob() > 100, tissue, -1000).astype(np.int16)
    assert "CT" in refused(write(tmp_path / "a.nii.gz", values))
    assert "every voxel" in refused(
        write(tmp_path / "b.nii.gz", np.where(blob() > 100, 0, -1000).astype(np.int16))
    )


@pytest.mark.parametrize("suffix", [".img", ".hdr"])
def test_half_of_a_pair(tmp_path, suffix):
    path = write(tmp_path / "a.img", blob())
    path.with_suffix({".img": ".hdr", ".hdr": ".img"}[suffix]).unlink()
    assert "missing" in refused(path.with_suffix(suffix))


def test_declared_size_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "a.nii", blob())
    raw = bytearray(path.read_bytes())
    raw[40:48] = struct.pack("<hhhh", 3, 20000, 20000, 20000)
    path.write_bytes(raw)
    assert f"at most {MAX_VOXELS:,}" in refused(path)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_bomb_is_not_unpacked(tmp_path, name):
    path = write(tmp_path / name, blob())
    raw = gzip.decompress(path.read_bytes())
    member = gzip.compress(bytes(16 * 2**20))
    # 1.6 GB behind the voxels.
    path.write_bytes(gzip.compress(raw) + member * 100)
    tracemalloc.start()
    try:
        volume = read_volume(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(volume.voxels, blob())
    assert peak < 32 * 2**20


def test_extensions_without_end(tmp_path):
    path = write(tmp_path / "a.nii", blob())
    raw = bytearray(path.read_bytes())
    raw[108:112] = struct.pack("<f", 2e9)
    raw[348:352] = b"\1\0\0\0"
    path.write_bytes(raw)
    assert "header is damaged" in refused(path)


def test_some_nan_are_noted(tmp_path):
    values = blob(dtype="float32")
    values[:5] = np.nan
    values[6, 6, 6] = np.inf
    volume = read_volume(write(tmp_path / "a.nii", values))
    assert np.isfinite(volume.voxels).all()
    assert "no finite numbers" in volume.notes[0]


def test_values_beyond_single_precision(tmp_path):
    values = blob(dtype="float64")
    volume = read_volume(write(tmp_path / "a.nii", values * 1e300))
    assert np.allclose(volume.voxels, values / values.max(), atol=1e-6)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.nii", "nifti2.nii", "a.mgh", "analyze.img"]),
    changes=st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_damage_of_the_header_is_one_line(tmp_path, name, changes):
    path = tmp_path / name
    if not path.exists():
        write(path, blob())
    header = path.with_suffix(".hdr") if name.endswith(".img") else path
    content = header.read_bytes()
    raw = bytearray(content)
    for place, value in changes:
        raw[place % len(raw)] = value
    header.write_bytes(raw)
    try:
        volume = read_volume(path)
    except VolumeError as error:
        said = str(error)
    else:
        said = ""
        assert np.isfinite(volume.voxels).all()
        assert np.isfinite(volume.affine).all()
    finally:
        header.write_bytes(content)
    assert "\n" not in said
