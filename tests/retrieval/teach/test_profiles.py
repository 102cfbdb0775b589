"""Profiles: names, places, and who sees whose."""

from __future__ import annotations

import doctest
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_cases import TinyTestModel
from teaching_cases import QUERY, open_profile

from enn_core.lessons import places as profiles_module
from retrieval.search import open_index
from retrieval.teach.profiles import (
    ProfileError,
    check_name,
    list_profiles,
    profile_path,
    profiles_dir,
)
from retrieval.teach.teacher import Teacher


@pytest.mark.parametrize("name", ["me", "A", "default", "a.b-c_d", "_x", "-", "x" * 64, "0"])
def test_good_names_pass(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "../x", "x" * 65, "ä", "a b", "a\n", "a.", None, 5,
     "\x00", "a\x00", "١"],
)  # fmt: skip
def test_bad_names_are_refused_in_one_line(name, tmp_path):
    for call in (
        lambda: check_name(name),
        lambda: profile_path(name, TinyTestModel()),
        lambda: list_profiles(TinyTestModel(), scope=name),
        lambda: Teacher.open(TinyTestModel(), name),
        lambda: open_index(tmp_path, TinyTestModel(), profile=name if name is not None else ""),
    ):
        with pytest.raises(ProfileError, match="1 to 64") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


@given(st.text(max_size=70), st.text(max_size=70))
def test_no_name_leads_out_of_the_folder(name, scope):
    try:
        path = profile_path(name, TinyTestModel(), scope)
    except ProfileError:
        return
    assert path.parent.parent.parent == profiles_dir()
    assert path.resolve().is_relative_to(profiles_dir().resolve())


def test_profiles_lie_in_the_user_s_data_directory(monkeypatch):
    monkeypatch.delenv("ENN_PROFILES", raising=False)
    assert profiles_dir().name == "profiles"
    assert "eigen-suite" in profiles_dir().parts


def test_profiles_are_listed_by_model_and_scope(searcher, gallery, profiles):
    model = TinyTestModel()
    assert list_profiles(model) == []
    for name in ("zoe", "Adam"):
        with open_profile(gallery, name) as opened:
            opened.teach(QUERY, [1], force=True)
    (profiles / "local" / "empty").mkdir()
    (profiles / "local" / ".odd").mkdir()
    (profiles / "local" / "file").write_text("")
    assert list_profiles(model) == ["Adam", "zoe"]
    assert list_profiles(TinyTestModel(seed=1)) == []
    assert list_profiles(model, "user-1") == []
    with Teacher.open(model, "zoe", scope="user-1") as other:
        assert len(other) == 0
        other.teach(searcher.index, QUERY, [2], force=True)
    assert list_profiles(model, "user-1") == ["zoe"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such rights there")
def test_only_their_owner_can_read_profiles(searcher, profiles):
    searcher.teach(QUERY, [1], force=True)
    path = searcher.teacher.path
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(profiles_module).failed == 0
