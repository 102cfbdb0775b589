"""The open teachers of a server: one per person, profile and model, and not without bound."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("faiss")
from apps.web.search import teachers as module
from apps.web.search.teachers import PROFILES_EACH, Teachers
from retrieval.eigen_coordinates import EigenBasis
from retrieval.teach.profiles import ProfileError, profile_path


class _Model:
    dim = 3
    basis = EigenBasis.identity(3)

    def __init__(self, weights: str = "0") -> None:
        self.weights = weights * 64

    def fingerprint(self):
        return {"model": "m", "weights": self.weights, "preprocess": "p", "dim": 3}

    def text_vectors(self, texts):
        return np.ones((len(texts), 3), np.float32)


@pytest.fixture(autouse=True)
def profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def test_the_same_asker_gets_the_same_teacher_and_nobody_else_does():
    teachers, model = Teachers(), _Model()
    first = teachers.get(model, "local", "me")
    assert teachers.get(_Model(), "local", "me") is first
    others = [
        teachers.get(model, "local", "you"),
        teachers.get(model, "user-1", "me"),
        teachers.get(_Model("1"), "local", "me"),
    ]
    assert len({first.path, *(other.path for other in others)}) == 4


def test_asking_writes_nothing(profiles):
    Teachers().get(_Model(), "local", "me")
    assert not profiles.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "x" * 65, "ä", None, 5, ["x"], "a\n"])
def test_odd_names_are_refused(name):
    with pytest.raises(ProfileError):
        Teachers().get(_Model(), "local", name)


def test_few_stay_open(monkeypatch):
    monkeypatch.setattr(module, "OPEN", 3)
    teachers, model = Teachers(), _Model()
    first = teachers.get(model, "local", "p0")
    for number in range(1, 5):
        teachers.get(model, "local", f"p{number}")
    assert teachers.get(model, "local", "p0") is not first
    assert len(teachers._open) == 3


def test_visitors_cannot_fill_the_disk_with_profiles(profiles):
    teachers, model = Teachers(), _Model()
    for number in range(PROFILES_EACH):
        path = profile_path(f"p{number}", model, "visitor-1")
        path.parent.mkdir(parents=True)
        path.touch()
    assert len(teachers.names(model, "visitor-1")) == PROFILES_EACH
    with pytest.raises(ProfileError, match=f"{PROFILES_EACH} profiles already"):
        teachers.get(model, "visitor-1", "one-more")
    teachers.get(model, "visitor-2", "one-more")
    assert teachers.names(model, None) == []
