"""Teaching a site: what it learns, takes back, protects and refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from neuro.model import BrainAgeModel, Member
from neuro.networks import build
from neuro.population import Population, features_of, summarise
from neuro.predict import BrainAge, Seen
from neuro.targets import AgeValue
from neuro.teaching import Site, SiteError, list_sites

SHAPE = (2, 8, 4, 5, 4)  # members, channels, i, j, k of a tiny network's last block


@pytest.fixture(scope="module")
def brain() -> BrainAge:
    members = [
        Member(build("bins4", widths=(8, 8, 8, 8)).eval(), AgeValue(50.0, 15.0)) for _ in range(2)
    ]
    model = BrainAgeModel(members)
    model.population = summarise([features_of(model, block_inputs(i)) for i in range(12)], rank=6)
    return BrainAge(model, None, "ab" * 32, (20.0, 80.0))


def block_inputs(seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.abs(rng.normal(size=SHAPE)) + shift).astype(np.float16)


def seen(seed: int, raw: float = 50.0, shift: float = 0.0) -> Seen:
    return Seen(f"scan-{seed}", raw, np.full((2, 4), raw), block_inputs(seed, shift), [], 0.5)


@pytest.fixture
def site(brain, tmp_path):
    with Site.open(brain, path=tmp_path / "site.sqlite") as opened:
        yield opened


def test_a_lesson_moves_its_own_scan_towards_the_age(site):
    scan = seen(100, 50.0)
    preview = site.preview(scan, 60.0)
    assert preview.entry is None
    assert not site.path.exists()
    lesson = site.teach(scan, 60.0, force=True)
    assert (lesson.entry, lesson.after) == (1, preview.after)
    assert 50.0 == lesson.before < lesson.after <= 61
    assert len(site) == 1
    assert site.corrections([scan])[0] == pytest.approx(lesson.after - lesson.before, abs=1e-9)


def test_nothing_taught_corrects_nothing(site):
    assert site.corrections([seen(1), seen(2)]).tolist() == [0, 0]
    assert site.history() == []
    assert not site.path.exists()


def test_undo_gives_the_earlier_bits(site):
    others = [seen(i) for i in range(200, 205)]
    site.teach(seen(100), 60.0, force=True)
    before = site.corrections(others)
    site.teach(seen(101), 30.0, force=True)
    assert (site.corrections(others) != before).any()
    undone = site.undo()
    assert (undone.entry, undone.active) == (2, False)
    assert (site.corrections(others) == before).all()
    assert [entry.active for entry in site.history()] == [True, False]


def test_the_same_scan_again_replaces_its_age(site):
    site.teach(seen(100), 60.0, force=True)
    first = site.corrections([seen(100)])
    site.teach(seen(100), 40.0, force=True)
    assert len(site) == 1
    assert site.corrections([seen(100)])[0] < 0
    site.undo()
    assert (site.corrections([seen(100)]) == first).all()


def test_the_order_of_teaching_does_not_matter(brain, tmp_path):
    scans = [(seen(i), 40.0 + i) for i in range(6)]
    said = []
    for number, order in enumerate(([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0])):
        with Site.open(brain, path=tmp_path / f"{number}.sqlite") as opened:
            for i in order:
                opened.teach(*scans[i], force=True)
            said.append(opened.corrections([seen(i) for i in range(50, 60)]))
    assert (said[0] == said[1]).all()


def test_forget_erases(site):
    site.teach(seen(100), 60.0, force=True)
    site.teach(seen(101), 61.0, force=True)
    assert site.forget(1) == 1
    assert [entry.entry for entry in site.history()] == [2]
    assert site.forget() == 1
    assert site.corrections([seen(100)])[0] == 0
    with pytest.raises(SiteError, match="no lesson 7"):
        site.forget(7)


def test_export_and_import(site, brain, tmp_path):
    site.teach(seen(100), 60.0, force=True)
    assert site.export(tmp_path / "lessons.json") == 1
    with Site.open(brain, path=tmp_path / "other.sqlite") as other:
        assert other.import_(tmp_path / "lessons.json") == 1
        assert other.import_(tmp_path / "lessons.json") == 0
        scans = [seen(i) for i in range(3)]
        assert (other.corrections(scans) == site.corrections(scans)).all()


@pytest.mark.parametrize("age", [-1, 121, float("nan"), "63", None, True])
def test_an_impossible_age_is_refused(site, age):
    with pytest.raises(SiteError) as caught:
        site.teach(seen(1), age)
    assert "\n" not in str(caught.value)


def test_a_model_without_statistics_is_not_taught(brain, tmp_path):
    bare = dataclasses.replace(brain, model=BrainAgeModel(brain.model.members))
    with pytest.raises(SiteError, match="no statistics"):
        Site.open(bare, path=tmp_path / "x.sqlite")


def test_profiles_are_listed(brain, tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path))
    assert list_sites(brain) == []
    with Site.open(brain, "site-a") as opened:
        opened.teach(seen(1), 55.0, force=True)
    assert list_sites(brain) == ["site-a"]


def test_statistics_survive_the_file(brain, tmp_path):
    brain.model.save(tmp_path / "m.safetensors")
    loaded = BrainAge.load(tmp_path / "m.safetensors").model.population
    mine = brain.model.population
    assert loaded is not None
    assert (loaded.count, loaded.rest) == (mine.count, mine.rest)
    assert np.abs(loaded.basis - mine.basis).max() < 1e-3
    assert isinstance(loaded, Population)
