"""The open profiles of a server: one per person, profile and model, and not without bound."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("faiss")
from apps.web import visitors as module
from apps.web.limits import PROFILES_EACH
from apps.web.visitors import Shelf
from enn_core.lessons.places import ProfileError, journal_path
from neuro.teach import Site
from neuro.teach import journal_of as site_journal
from retrieval.eigen_coordinates import EigenBasis
from retrieval.teach.profiles import journal_of as search_journal
from retrieval.teach.teacher import Teacher


class _SearchModel:
    dim = 3
    basis = EigenBasis.identity(3)

    def __init__(self, weights: str = "0") -> None:
        self.weights = weights * 64

    def fingerprint(self):
        return {"model": "m", "weights": self.weights, "preprocess": "p", "dim": 3}

    def text_vectors(self, texts):
        return np.ones((len(texts), 3), np.float32)


def _brain(weights: str = "0"):
    return SimpleNamespace(sha256=weights * 64, model=SimpleNamespace(population=object()))


@pytest.fixture(params=["search", "brain"])
def kind(request):
    """What opens models and profiles of one app, and names their journals."""
    if request.param == "search":
        return _SearchModel, search_journal, Teacher.open
    return _brain, site_journal, Site.open


@pytest.fixture(autouse=True)
def profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def test_the_same_asker_gets_the_same_profile_and_nobody_else_does(kind):
    load, *opening = kind
    shelf, model = Shelf(*opening), load()
    first = shelf.get(model, "local", "me")
    assert shelf.get(load(), "local", "me") is first
    others = [
        shelf.get(model, "local", "you"),
        shelf.get(model, "user-1", "me"),
        shelf.get(load("1"), "local", "me"),
    ]
    assert len({first.path, *(other.path for other in others)}) == 4


def test_asking_writes_nothing(kind, profiles):
    load, *opening = kind
    Shelf(*opening).get(load(), "local", "me")
    assert not profiles.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "x" * 65, "ä", None, 5, ["x"], "a\n"])
def test_odd_names_are_refused(kind, name):
    load, *opening = kind
    with pytest.raises(ProfileError):
        Shelf(*opening).get(load(), "local", name)


def test_few_stay_open_those_used_last(kind, monkeypatch):
    monkeypatch.setattr(module, "OPEN_PROFILES", 3)
    load, *opening = kind
    shelf, model = Shelf(*opening), load()
    first, second, _ = (shelf.get(model, "local", f"p{number}") for number in range(3))
    assert shelf.get(model, "local", "p0") is first
    shelf.get(model, "local", "p3")
    assert shelf.get(model, "local", "p0") is first
    assert shelf.get(model, "local", "p1") is not second
    assert len(shelf._open) == 3


def test_visitors_cannot_fill_the_disk_with_profiles(kind):
    load, journal_of, open_profile = kind
    shelf, model = Shelf(journal_of, open_profile), load()
    for number in range(PROFILES_EACH):
        path = journal_path(f"p{number}", journal_of(model), "visitor-1")
        path.parent.mkdir(parents=True)
        path.touch()
    assert len(shelf.names(model, "visitor-1")) == PROFILES_EACH
    with pytest.raises(ProfileError, match=f"{PROFILES_EACH} profiles already"):
        shelf.get(model, "visitor-1", "one-more")
    shelf.get(model, "visitor-2", "one-more")
    assert shelf.names(model, None) == []


def test_a_demo_teaches_a_profile_of_its_own_and_none_by_the_usual_name(kind, profiles):
    load, journal_of, open_profile = kind
    model = load()
    usual = journal_path("default", journal_of(model))
    usual.parent.mkdir(parents=True)
    usual.touch()
    shelf = Shelf(journal_of, open_profile, default="demo")
    own = shelf.get(model, "local", "demo")
    assert shelf.get(model, "local", "default") is own
    assert own.path == journal_path("demo", journal_of(model))
    assert shelf.get(model, "local", "mine").path == journal_path("mine", journal_of(model))
    assert shelf.names(model, "local") == []
    assert Shelf(journal_of, open_profile).names(model, "local") == ["default"]
