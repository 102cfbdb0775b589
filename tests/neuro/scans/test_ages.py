"""Whose age a scan gets: by session, by unit, and none where tables contradict themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuro.scans.find import ScanError, find_scans


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def visits(root: Path, *labels: str) -> Path:
    """One person with an empty scan for each session."""
    touch(root, *(f"sub-01/ses-{n}/anat/sub-01_ses-{n}_T1w.nii.gz" for n in labels))
    return root


def ages(*inputs: Path) -> list[float | None]:
    return [scan.age for scan in find_scans(inputs)]


def notes(*inputs: Path) -> str:
    return "; ".join(scan.note for scan in find_scans(inputs))


# --- sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("participant_id\tsession_id\tage", "sub-01\tses-1\t23\nsub-01\tses-2\t73\n"),
        ("participant_id\tsession_id\tage", "01\t2\t73\n01\t1\t23\n02\t1\t50\n"),
        ("age\tSession_ID\tParticipant_ID", "23\tses-01\tsub-1\n73\tses-02\tsub-1\n"),
        ("participant_id,session,age", "sub-01,ses-1,23\nsub-01,ses-2,73\n"),
    ],
)
@pytest.mark.parametrize("name", ["participants.tsv", "participants.csv"])
def test_one_row_for_each_session(tmp_path, name, header, rows):
    (visits(tmp_path, "1", "2") / name).write_text(f"{header}\n{rows}")
    assert ages(tmp_path) == [23, 73]
    assert notes(tmp_path) == "; "
    assert ages(tmp_path / "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz") == [73]


def test_a_session_without_a_row_has_no_age(tmp_path):
    (visits(tmp_path, "1", "2") / "participants.tsv").write_text(
        "participant_id\tsession_id\tage\nsub-01\tses-1\t23\n"
    )
    assert ages(tmp_path) == [23, None]
    assert "no row of sub-01 for ses-2" in notes(tmp_path)


def test_an_age_for_all_sessions(tmp_path):
    table = visits(tmp_path, "1", "2") / "participants.tsv"
    table.write_text("participant_id\tsession_id\tage\nsub-01\tn/a\t23\n")
    assert ages(tmp_path) == [23, 23]
    table.write_text("participant_id\tage\nsub-01\t23\n")
    assert ages(tmp_path) == [23, 23]


def test_a_scan_without_session_of_somebody_with_several(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tsession_id\tage\nsub-01\tses-1\t23\nsub-01\tses-2\t73\n")
    assert ages(tmp_path) == [None]
    assert "sub-01 the ages 23, 73" in notes(tmp_path)


@pytest.mark.parametrize("ending", [".tsv", ".csv"])
def test_the_table_of_a_persons_sessions(tmp_path, ending):
    visits(tmp_path, "1", "2")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t63\n")
    (tmp_path / "sub-01" / f"sub-01_sessions{ending}").write_text(
        "session_id\tage\nses-1\t63.1\nses-2\t68.4\n"
    )
    assert ages(tmp_path) == [63.1, 68.4]
    (tmp_path / "participants.tsv").unlink()
    assert ages(tmp_path) == [63.1, 68.4]


def test_a_table_of_sessions_without_ages_leaves_those_of_the_person(tmp_path):
    visits(tmp_path, "1")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t63\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tacq_time\nses-1\tn/a\n")
    assert ages(tmp_path) == [63]


# --- units -------------------------------------------------------------------------------------


def with_unit(root: Path, age: str, sidecar: object) -> Path:
    touch(root, "sub-01/anat/sub-01_T1w.nii.gz")
    (root / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{age}\n")
    text = sidecar if isinstance(sidecar, str) else json.dumps(sidecar)
    (root / "participants.json").write_text(text)
    return root


@pytest.mark.parametrize(
    ("age", "unit", "years"),
    [
        *(("96", "months", 8.0), ("900", "Month", 75.0), ("300", "mo", 25.0)),
        *(("1461", "days", 4.0), ("104", "weeks", 1.9932), ("8", "years", 8.0), ("8", "a", 8.0)),
        *(("8", "", 8.0), ("8", "n/a", 8.0)),
    ],
)
def test_units(tmp_path, age, unit, years):
    assert ages(with_unit(tmp_path, age, {"age": {"Units": unit}})) == [years]


@pytest.mark.parametrize(
    "sidecar",
    [
        {},
        {"sex": {"Units": "months"}},
        {"age": {"Description": "age in years, to the month"}},
        {"age": "of the person"},
        [1],
    ],
)
def test_years_where_no_unit_is_told(tmp_path, sidecar):
    assert ages(with_unit(tmp_path, "33", sidecar)) == [33]
    assert notes(tmp_path) == ""


@pytest.mark.parametrize(
    ("sidecar", "words"),
    [
        ({"age": {"Units": "decades"}}, "'decades'"),
        ({"Age": {"units": ["months"]}}, "valid Units"),
        ({"age": {"Description": "Age in months at the scan"}}, "say so in Units"),
        ("{no json", "participants.json cannot be read"),
        ("{}x", "participants.json cannot be read"),
    ],
)
def test_a_unit_that_is_not_known_gives_no_age(tmp_path, sidecar, words):
    assert ages(with_unit(tmp_path, "33", sidecar)) == [None]
    assert words in notes(tmp_path)


@pytest.mark.parametrize("place", ["sub-01/sub-01_sessions.json", "sub-01/sessions.json"])
def test_units_of_sessions(tmp_path, place):
    visits(tmp_path, "1")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t96\n")
    (tmp_path / place).write_text('{"age": {"Units": "months"}}')
    assert ages(tmp_path) == [8]


# --- people ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "age"), [("01", 20), ("1", 20), ("SUB-01", 20), ("11", None)])
def test_ids_are_found_without_their_prefix(tmp_path, name, age):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\n{name}\t20\n")
    assert ages(tmp_path) == [age]
    assert find_scans([tmp_path])[0].participant_id == "sub-01"


def test_the_id_as_it_is_written_comes_first(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-001/anat/sub-001_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\n01\t20\n001\t30\n")
    assert ages(tmp_path) == [30, 20]


def test_rows_that_agree_and_rows_that_do_not(tmp_path):
    touch(tmp_path, *(f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for n in (1, 2, 3)))
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\nsub-01\t40\nsub-01\t40.0\nsub-02\t23\nsub-02\t73\nsub-03\tn/a\n"
        "sub-03\t50\n"
    )
    assert ages(tmp_path) == [40, None, 50]
    first, second, third = (scan.note for scan in find_scans([tmp_path]))
    assert (first, third) == ("", "")
    assert "sub-02 the ages 23, 73" in second


# --- text --------------------------------------------------------------------------------------


def test_latin_1(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "Müller.nii")
    (tmp_path / "participants.tsv").write_bytes(
        "participant_id\tage\tname\nsub-01\t44\tMüller\x85 \n".encode("latin-1")
    )
    assert ages(tmp_path) == [44]
    (tmp_path / "list.csv").write_bytes("file;age\nMüller.nii;50\n".encode("latin-1"))
    (scan,) = find_scans([tmp_path / "list.csv"])
    assert (scan.path.name, scan.age) == ("Müller.nii", 50)


@pytest.mark.parametrize(
    "content", ["participant_id\tage\nsub-01\t4\n".encode("utf-16"), b"\xff\0"]
)
def test_a_table_that_is_no_text_costs_its_ages_alone(tmp_path, content):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_bytes(content)
    assert ages(tmp_path) == [None]
    assert "UTF-8" in notes(tmp_path)
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ScanError, match="UTF-8"):
        find_scans([tmp_path / "list.csv"])


def test_rows_longer_than_the_header(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t44\tF\tG\nsub-02\n")
    assert ages(tmp_path) == [44]


# --- columns -----------------------------------------------------------------------------------


def one(root: Path, text: str, name: str = "participants.tsv") -> Path:
    touch(root, "sub-01/anat/sub-01_T1w.nii.gz")
    (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "text",
    [
        *(f"participant_id{mark}age{mark}sex\nsub-01{mark}44{mark}F\n" for mark in "\t,;| "),
        "participant_id   age  sex\nsub-01         44  F\n",
        "sep=;\nparticipant_id;age\nsub-01;44\n",
        "\nparticipant_id\tage\rsub-01\t44\r",
        "participant_id\tage\tgroup (MDD, BP, SCZ, HC)\nsub-01\t44\tHC\n",
        *("participant_id\tage_years\nsub-01\t44\n", "Participant ID\tAge at scan\nsub-01\t44\n"),
        *("participant_id\tAge (months)\nsub-01\t528\n", "id,age_months\n01,528\n"),
        *("id\tageMonths\nsub-01\t528\n", "id\tage\tage_months\nsub-01\tn/a\t528\n"),
        "id\tage_days\tonset_age\nsub-01\t16071\t20\n",
    ],
)
def test_columns_and_what_separates_them(tmp_path, text):
    assert ages(one(tmp_path, text)) == [44]
    assert notes(tmp_path) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("participant_id age group\nsub-01 44 a control\n", "separated by spaces"),
        ("participant_id\tage\nsub-01 44\n", "not separated as its header is"),
        ("participant_id\tage_group\nsub-01\t40-45\n", "age_group"),
        ("participant_id\tage_at_birth_weeks\nsub-01\t38\n", "age_at_birth_weeks"),
        ("id\tage\tage_months\nsub-01\t96\t96\n", "that differ"),
        ("name:age\nsub-01:44\n", "no column participant_id"),
    ],
)
def test_what_may_be_an_age_is_named(tmp_path, text, words):
    assert ages(one(tmp_path, text)) == [None]
    assert words in notes(tmp_path)


def test_a_name_and_a_sidecar_of_other_units(tmp_path):
    one(tmp_path, "participant_id\tage_months\nsub-01\t528\n")
    sidecar = tmp_path / "participants.json"
    sidecar.write_text('{"age_months": {"Units": "months", "Description": "age in months"}}')
    assert ages(tmp_path) == [44]
    sidecar.write_text('{"age_months": {"Units": "years"}}')
    assert ages(tmp_path) == [None]
    assert "another unit than its name" in notes(tmp_path)


@pytest.mark.parametrize(
    "without", ["participant_id\tsex\nsub-01\tF\n", "participant_id\tage\nsub-01\tn/a\n"]
)
def test_of_two_tables_the_one_that_has_ages(tmp_path, without):
    one(tmp_path, without)
    one(tmp_path, "participant_id,age\nsub-01,44\n", "participants.csv")
    assert ages(tmp_path) == [44]
