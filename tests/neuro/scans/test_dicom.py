"""DICOM is told by content, however it is called, packed or begun, and what to do is said."""

from __future__ import annotations

import gzip

import pytest
from dicom_cases import DICOMS, NO_DICOM, part10
from volume_cases import blob, write

from neuro.scans.dicom import holds_dicom, is_dicom
from neuro.scans.find import ScanError, find_scans
from neuro.scans.read import VolumeError, read_volume

NAMES = ("a.dcm", "a.dcm.gz", "A.IMA", "a.ima.gz", "a.img", "a.img.gz", "a.hdr", "a.nii", "I0001")


def refused(path) -> str:
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    return text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", DICOMS)
def test_a_file(tmp_path, name, kind):
    path = tmp_path / name
    path.write_bytes(DICOMS[kind])
    text = refused(path)
    assert "DICOM" in text
    assert "dcm2niix" in text
    # dcm2niix does not unpack.
    assert ("gunzip" in text) == ("gzip" in kind)
    assert is_dicom(path)


@pytest.mark.parametrize("kind", DICOMS)
@pytest.mark.parametrize(
    "name", ["1.2.840.113619", "series/IM0001.gz", "X.img", "deep/er/a.nii.gz"]
)
def test_a_folder(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DICOMS[kind])
    (tmp_path / "readme.txt").write_text("of the series")
    assert holds_dicom(tmp_path)
    with pytest.raises(ScanError, match=r"DICOM files; .*dcm2niix"):
        find_scans([tmp_path])
    assert "dcm2niix" in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.dcm", "a.dcm.gz", "a.dcm.bz2", "A.IMA", "a.ima.gz", "a.dicom.xz", "b/DICOMDIR"]
)
def test_a_folder_by_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"nothing that is known")
    assert holds_dicom(tmp_path)
    assert "dcm2niix" in refused(tmp_path / name)


@pytest.mark.parametrize("kind", NO_DICOM)
def test_no_dicom(tmp_path, kind):
    (tmp_path / "a").write_bytes(NO_DICOM[kind])
    assert not is_dicom(tmp_path / "a")
    assert not holds_dicom(tmp_path)
    assert "DICOM" not in refused(tmp_path / "a")


def test_damaged_gzip_is_no_dicom(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(99))[:-20] + b"\xff" * 9)
    assert not holds_dicom(tmp_path)


def test_dicom_among_volumes_has_its_row(tmp_path):
    write(tmp_path / "a.nii.gz", blob())
    (tmp_path / "b.img").write_bytes(part10())
    one, other = find_scans([tmp_path])
    assert read_volume(one.path).voxels.any()
    assert "dcm2niix" in refused(other.path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.img", "analyze.img"])
def test_volumes_are_none(tmp_path, name):
    path = write(tmp_path / name, blob())
    assert not holds_dicom(tmp_path)
    assert read_volume(path).voxels.any()
