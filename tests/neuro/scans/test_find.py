"""Which files are taken, what they are called, and whose age they get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neuro.scans.find import ScanError, find_scans, parse_age


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(*inputs: Path) -> list[tuple[str, str, float | None]]:
    return [(scan.name, scan.participant_id, scan.age) for scan in find_scans(inputs)]


def test_folder(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.nii", "c/d.mgz", "c/e.img", "c/e.hdr", "notes.txt", ".x.nii")
    touch(tmp_path, ".hidden/f.nii", "c/dwi.bvec", "c/dwi.json")
    assert [name for name, _, _ in found(tmp_path)] == ["a", "b", "d", "e"]


def test_the_same_file_counts_once(tmp_path):
    touch(tmp_path, "a.nii")
    assert len(found(tmp_path, tmp_path / "a.nii", tmp_path)) == 1


def test_bids(tmp_path):
    touch(tmp_path, "dataset_description.json", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz")
    touch(tmp_path, "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/func/sub-01_task-rest_bold.nii.gz")
    touch(tmp_path, "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz", "sub-01/dwi/sub-01_dwi.nii.gz")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t71.25\tF\nsub-02\tn/a\tM\n"
    )
    assert found(tmp_path) == [
        ("sub-01", "sub-01", 71.25),
        ("sub-02_ses-1", "sub-02", None),
        ("sub-02_ses-2", "sub-02", None),
    ]
    # A subject's folder, and a file, find the table above them.
    assert found(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")[0][2] == 71.25


def test_people_are_found_by_the_beginning_of_the_name(tmp_path):
    touch(tmp_path, "IXI013-HH-1212_T1w.nii.gz", "IXI013-HH-12_T1w.nii.gz", "IXI01.nii")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\nIXI013-HH-12\t20\nIXI013-HH-1212\t46.71\nIXI01\t3\n"
    )
    assert found(tmp_path) == [
        ("IXI01", "IXI01", 3.0),
        ("IXI013-HH-1212", "IXI013-HH-1212", 46.71),
        ("IXI013-HH-12", "IXI013-HH-12", 20.0),
    ]


def test_equal_names_get_what_is_above_them(tmp_path):
    touch(tmp_path, "s1/mri/T1.mgz", "s2/mri/T1.mgz", "s3/mri/other.mgz")
    assert [name for name, _, _ in found(tmp_path)] == ["s1_mri_T1", "s2_mri_T1", "other"]


def test_names_are_safe_for_files(tmp_path):
    touch(tmp_path, "a b/Ünï;$(x) .nii", "a b/-rf.nii.gz", "a b/__.nii")
    names = [name for name, _, _ in found(tmp_path)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in names)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_list(tmp_path, delimiter):
    touch(tmp_path, "x/a.nii", "b.nii")
    rows = [("ID", "File_Name", "Age"), ("p1", "x/a.nii", "63.4"), ("p2", "b.nii", "abc")]
    rows += [("p1", str(tmp_path / "x" / "c.nii"), "64"), ("", "", "")]
    path = tmp_path / "list.csv"
    path.write_text("\ufeff" + "\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    scans = find_scans([path])
    assert [(s.participant_id, s.age) for s in scans] == [("p1", 63.4), ("p2", None), ("p1", 64.0)]
    assert len({s.name for s in scans}) == 3
    assert scans[0].path == tmp_path / "x" / "a.nii"
    assert "'abc'" in scans[1].note


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"participant_id,age\np,3\n", "no column 'file'"),
        (b"", "no column"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_list_that_is_none(tmp_path, content, words):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ScanError, match=words):
        find_scans([tmp_path / "list.csv"])


def listed(root: Path, *rows: str) -> list[tuple[str, str, float | None]]:
    touch(root, "a.nii", "b.nii")
    (root / "list.csv").write_text("\n".join(("file,participant_id,age", *rows)))
    return found(root / "list.csv")


def test_one_file_listed_for_two_people(tmp_path):
    assert listed(tmp_path, "a.nii,A,30", "./a.nii,B,60", "b.nii,C,40") == [
        *(("A", "A", 30.0), ("B", "B", 60.0), ("C", "C", 40.0)),
    ]
    first, second, third = (scan.note for scan in find_scans([tmp_path / "list.csv"]))
    assert first == second == "this file is listed for A, B"
    assert third == ""


def test_one_file_listed_twice_for_one_person(tmp_path):
    assert listed(tmp_path, "a.nii,A,30", "a.nii,A,30.0", "b.nii,B,n/a", "b.nii,B,40") == [
        *(("A", "A", 30.0), ("B", "B", 40.0)),
    ]
    assert listed(tmp_path, "a.nii,A,30", "a.nii,A,60") == [("A", "A", None)]
    assert "A the ages 30, 60" in find_scans([tmp_path / "list.csv"])[0].note


def freesurfer(root: Path, *subjects: str, without: str = "") -> Path:
    for subject in subjects:
        touch(root / subject, "surf/lh.thickness.mgh", "label/lh.mgh", "mri/orig/001.mgz")
        for name in ("orig", "T1", "brain", "brainmask", "aseg", "norm", "nu", "rawavg"):
            if name not in without.split():
                touch(root / subject, f"mri/{name}.mgz")
    return root


def test_a_freesurfer_subject_is_one_scan(tmp_path):
    freesurfer(tmp_path, "bert", "fsaverage", "sub-02_ses-1")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nbert\t33\nsub-02\t44\n")
    both = [("bert", "bert", 33.0), ("sub-02_ses-1", "sub-02", 44.0)]
    assert found(tmp_path) == both
    for given in (tmp_path / "bert", tmp_path / "bert" / "mri"):
        (scan,) = find_scans([given])
        assert scan.path == tmp_path / "bert" / "mri" / "orig.mgz"
        assert (scan.name, scan.participant_id, scan.age) == ("bert", "bert", 33)


def test_a_freesurfer_subject_without_the_head_as_scanned(tmp_path):
    freesurfer(tmp_path, "a", without="orig")
    freesurfer(tmp_path, "b", without="orig T1")
    a, b = find_scans([tmp_path])
    assert a.path.name == "T1.mgz"
    # Its row says that there is no such file; the others are read.
    assert b.path == tmp_path / "b" / "mri" / "orig.mgz"


@pytest.mark.parametrize("name", ["IM0000.dcm", "1.2.840.113619", "series/X.IMA", "DICOMDIR"])
def test_a_folder_of_dicom_files_is_told_what_to_do(tmp_path, name):
    touch(tmp_path, name)
    (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(60))
    with pytest.raises(ScanError, match=r"DICOM files; .*dcm2niix"):
        find_scans([tmp_path])
    touch(tmp_path, "sub-01/dicom.txt")
    with pytest.raises(ScanError, match=r"DICOM files; .*dcm2niix"):
        find_scans([tmp_path])
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii")
    assert len(found(tmp_path)) == 1


def test_nothing_there(tmp_path):
    with pytest.raises(ScanError, match="no file or folder"):
        find_scans([tmp_path / "missing.nii"])
    with pytest.raises(ScanError, match=r"holds no \.nii"):
        find_scans([tmp_path])
    touch(tmp_path, "sub-01/func/bold.nii")
    with pytest.raises(ScanError, match="T1w"):
        find_scans([tmp_path])


@pytest.mark.parametrize(
    ("text", "age"),
    [("63.4", 63.4), (" 7 ", 7.0), ("63,4", 63.4), ("n/a", None), ("", None), (None, None)],
)
def test_age(text, age):
    assert parse_age(text) == (age, "")


@pytest.mark.parametrize("text", ["743", "-3", "abc", "89+", "1e400", "nan years"])
def test_no_age(text):
    age, note = parse_age(text)
    assert age is None
    assert repr(text) in note


def test_what_a_list_says_counts_in_any_order(tmp_path):
    touch(tmp_path, "a.nii")
    (tmp_path / "list.csv").write_text("file,age\na.nii,30\n")
    for given in (("a.nii", "list.csv"), ("list.csv", "a.nii"), (".", "list.csv")):
        assert found(*(tmp_path / name for name in given)) == [("a", "a", 30.0)]
        assert find_scans([tmp_path / name for name in given])[0].note == ""


@pytest.mark.parametrize("content", ["file,age\n", "file\n", "file,age\n,30\n"])
def test_a_list_that_names_no_file(tmp_path, content):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ScanError, match="names no file"):
        find_scans([tmp_path / "list.csv"])
