"""Teaching a site: what it learns, takes back, protects and refuses."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enn_core.lessons.errors import AlreadyTaught, JournalCorrupt, JournalError, JournalMismatch
from neuro import site_rule
from neuro import teach as teaching
from neuro.age.model import BrainAgeModel, Member, features_of
from neuro.age.networks import build
from neuro.age.population import Population, summarise
from neuro.age.predict import BrainAge, Seen
from neuro.age.targets import AgeValue
from neuro.scans.quality import Flag
from neuro.site_rule import Correction, Taught
from neuro.teach import Site, SiteError, list_sites, ready

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


def test_scans_made_ready_are_not_read_again_for_a_lesson(site, brain, monkeypatch):
    earlier = [seen(seed) for seed in range(101, 104)]
    for each in earlier:
        ready(brain, each)
    read = []
    monkeypatch.setattr(
        teaching, "features_of", lambda *given: read.append(1) or features_of(*given)
    )
    lesson = site.preview(seen(100), 60.0, earlier=earlier)
    assert len(lesson.earlier_after) == 3
    assert len(read) == 1  # of the new scan


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


def test_a_lesson_that_arrives_twice_is_learnt_once(site, brain, tmp_path):
    uid = "0a" * 16
    site.teach(seen(100), 60.0, force=True, uid=uid)
    for change in (lambda: None, site.undo, site.forget):
        change()
        with pytest.raises(AlreadyTaught, match="twice"):
            site.teach(seen(100), 60.0, force=True, uid=uid)
    assert (len(site), site.history()) == (0, [])
    site.teach(seen(101), 61.0, force=True)
    assert site.export(tmp_path / "one.json") == 1
    with Site.open(brain, path=tmp_path / "other.sqlite") as other:
        # As an earlier version writes it, that knows of no erased lessons.
        content = json.loads((tmp_path / "one.json").read_text())
        del content["sha256"]
        left = {**content["events"][0], "kind": "erased", "seq": 1, "uid": uid, "active": False}
        content["events"].insert(0, {**left, "details": {}, "arrays": {}, "covers": []})
        (tmp_path / "two.json").write_text(json.dumps(content))
        assert other.import_(tmp_path / "two.json") == 1


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


@pytest.mark.parametrize(
    ("scan", "age", "why"),
    [
        (seen(1, raw=22.0), 19.9, "lessons from outside 20 to 90 years"),
        (seen(1, raw=88.0), 90.1, "lessons from outside 20 to 90 years"),
        (seen(1), 0, "more than 40 years apart"),
        (
            dataclasses.replace(seen(1), flags=[Flag("coarse", "its slices are 5 mm thick")]),
            51,
            "flagged: its slices are 5 mm thick",
        ),
    ],
)
def test_an_odd_lesson_needs_insistence(site, scan, age, why):
    for lesson in (site.preview(scan, age), site.teach(scan, age)):
        assert lesson.entry is None
        assert why in lesson.refused
        assert "\n" not in lesson.refused
    assert not site.path.exists()
    assert site.teach(scan, age, force=True).entry == 1
    site.refresh()
    assert len(site) == 1  # what was insisted on, or taught by an earlier release, counts


@pytest.mark.parametrize("age", [85.0, 90.0, 20.0])
def test_an_ordinary_scan_is_taught_any_age_from_20_to_90(brain, tmp_path, age):
    """That the model has learnt from fewer ages is said of the age, not of the scan."""
    narrow = dataclasses.replace(brain, trained_ages=(40.0, 70.0))
    flag = Flag("age", "the model has learnt from ages 40 to 70, this person is another")
    scan = dataclasses.replace(seen(1, raw=55.0), flags=[flag])
    with Site.open(narrow, path=tmp_path / "narrow.sqlite") as site:
        assert "flagged" not in (site.preview(scan, age).refused or "")


def test_a_predicted_age_beyond_the_trained_ones_flags_the_scan(brain, tmp_path):
    narrow = dataclasses.replace(brain, trained_ages=(40.0, 70.0))
    with Site.open(narrow, path=tmp_path / "narrow.sqlite") as site:
        refused = site.preview(seen(1, raw=30.0), 41.0).refused
        assert "the scan is flagged: the model has learnt from ages 40 to 70, 30 lies" in refused


def test_an_age_that_lessons_may_have_needs_no_insistence(site):
    """The shipped model has learnt from ages 20 to 82."""
    flags = [Flag("age", "the model has learnt from ages 20 to 82, this person is 90")]
    assert site.teach(dataclasses.replace(seen(1, raw=80.0), flags=flags), 90).entry == 1


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


# --- the rule ------------------------------------------------------------------------------------


def people(count: int, seed: int = 0, site: float = 0.0) -> np.ndarray:
    """Features that vary much in four of forty directions; a site shifts another one."""
    rows = np.random.default_rng(seed).normal(size=(count, 40)) * np.repeat([4.0, 0.3], [4, 36])
    rows[:, -1] += site
    return rows


@settings(max_examples=30)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True), st.randoms())
def test_in_any_order_the_rule_is_the_same(chosen, random):
    population = summarise(people(60), rank=4)
    rows, ages = people(100, 1, site=2.0), np.linspace(20, 80, 100)
    raw = ages[::-1] / 2 + 25
    mixed = list(chosen)
    random.shuffle(mixed)
    said = [
        Correction.fit(population, Taught(rows[order], raw[order], ages[order]))
        for order in (chosen, mixed)
    ]
    others = people(20, 2, site=2.0)
    assert np.abs(said[0](others, raw[:20]) - said[1](others, raw[:20])).max() < 1e-9
    assert abs(said[0].protected() - said[1].protected()) < 1e-9


def test_an_offset_is_learnt_for_the_site_alone():
    population = summarise(people(60), rank=4)
    rows = people(10, 1, site=5.0)
    correction = Correction.fit(population, Taught(rows, np.full(10, 50.0), np.full(10, 60.0)))
    there = correction(people(50, 2, site=5.0), np.full(50, 50.0))
    assert there.mean() == pytest.approx(10, abs=1)
    elsewhere = correction(people(500, 3), np.full(500, 50.0))
    assert np.abs(elsewhere).mean() < 1
    assert correction.protected() == pytest.approx(np.sqrt((elsewhere**2).mean()), rel=0.3)


def test_the_dual_form_equals_the_primal_one():
    population = summarise(people(60), rank=4)
    rows, ages, raw = people(6, 1, site=2.0), np.linspace(40, 70, 6), np.linspace(30, 80, 6)
    mine = Correction.fit(population, Taught(rows, raw, ages)).weights
    total = population.variances.sum() + population.rest
    seen = population.count * population.variances / (site_rule._ALPHA * total)
    basis = population.basis.astype(np.float64)
    projector = np.eye(40) - (basis.T * (seen / (1 + seen))) @ basis
    unit = (population.variances / (1 + seen)).sum() + population.rest
    x = rows - population.mean
    x = np.concatenate([x, x * ((raw - 50) / 15)[:, None]], axis=1)
    prior = np.kron(np.diag([1, 1 / site_rule._WITH_AGE]), np.linalg.inv(projector / unit))
    ridge = site_rule._RIDGE
    wanted = np.linalg.solve(x.T @ x / ridge + prior, x.T @ (ages - raw) / ridge)
    assert np.abs(mine.ravel() - wanted).max() < 1e-8


def test_examples_in_the_docstring():
    assert doctest.testmod(site_rule).failed == 0


# --- guards and files ----------------------------------------------------------------------------


def test_a_far_age_is_refused_unless_forced(site):
    lesson = site.teach(seen(100, 50.0), 95.0)
    assert (lesson.entry, len(site)) == (None, 0)
    assert "years apart" in lesson.refused
    assert not site.path.exists()
    assert site.teach(seen(100, 50.0), 95.0, force=True).entry == 1


def test_what_moves_the_training_population_is_refused(site, monkeypatch):
    monkeypatch.setattr("neuro.teach.MOST_MOVED", 1e-3)
    lesson = site.teach(seen(100, 50.0), 60.0)
    assert lesson.refused is not None
    assert "root mean square" in lesson.refused
    assert len(site) == 0


def test_a_refused_scan_teaches_nothing(site):
    flagged = dataclasses.replace(seen(1), flags=[Flag("registration", "it overlaps badly", True)])
    with pytest.raises(SiteError, match="overlaps badly"):
        site.teach(flagged, 60.0)


def test_what_is_kept_is_never_the_scan(site):
    lesson = site.teach(seen(100, 50.0), 60.0, force=True)
    (kept,) = site.taught()
    assert lesson.stored_bytes == kept.block_inputs.nbytes == 2 * np.prod(SHAPE)
    assert (kept.block_inputs == seen(100).block_inputs).all()
    assert (kept.name, kept.age, kept.raw_age) == ("scan-100", 60.0, 50.0)


def test_two_open_sites_see_each_other(brain, tmp_path):
    with Site.open(brain, path=tmp_path / "s") as one, Site.open(brain, path=tmp_path / "s") as two:
        one.teach(seen(100), 60.0, force=True)
        two.teach(seen(101), 61.0, force=True)
        scans = [seen(1), seen(2)]
        assert (one.corrections(scans) == two.corrections(scans)).all()
        one.forget()
        assert two.corrections(scans).tolist() == [0, 0]


def edited(lessons: dict, change) -> dict:
    lessons = json.loads(json.dumps(lessons))
    change(lessons["events"][0])
    return lessons


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["details"].update(age=1e9),
        lambda e: e["details"].update(age="60"),
        lambda e: e["details"].update(raw_age=None),
        lambda e: e["details"].update(name=["x"]),
        lambda e: e["details"].update(name="x" * 201),
        lambda e: e["details"].update(replaces=5),
        lambda e: e.update(kind="other"),
        lambda e: e.update(arrays={}),
        lambda e: e["arrays"]["block_inputs"].update(shape=[1, 1, 1, 1]),
        lambda e: e["arrays"]["block_inputs"].update(
            shape=[3, 1, 1, 1], data=base64.b64encode(bytes(6)).decode()
        ),
        lambda e: e["arrays"]["block_inputs"].update(
            shape=[2, 1, 1, 1], data=base64.b64encode(bytes(4)).decode()
        ),
    ],
)
def test_a_hostile_file_is_refused_whole(site, brain, tmp_path, change):
    site.teach(seen(100), 60.0, force=True)
    site.export(tmp_path / "good.json")
    lessons = json.loads((tmp_path / "good.json").read_text())
    del lessons["sha256"]
    (tmp_path / "bad.json").write_text(json.dumps(edited(lessons, change)))
    with Site.open(brain, path=tmp_path / "other.sqlite") as other:
        with pytest.raises(JournalCorrupt) as caught:
            other.import_(tmp_path / "bad.json")
        assert "\n" not in str(caught.value)
        assert not other.path.exists()


def test_lessons_of_another_model_are_refused(site, brain, tmp_path):
    site.teach(seen(100), 60.0, force=True)
    site.export(tmp_path / "lessons.json")
    strange = dataclasses.replace(brain, sha256="cd" * 32)
    other = Site.open(strange, path=tmp_path / "other.sqlite")
    with pytest.raises(JournalMismatch):
        other.import_(tmp_path / "lessons.json")
    with pytest.raises(JournalError):
        Site.open(strange, path=site.path)


def test_a_file_without_sound_statistics_is_no_model():
    tensors = summarise(people(10), rank=3).to_tensors()
    for name in tensors:
        with pytest.raises(ValueError, match="statistics"):
            Population.from_tensors({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match="fit"):
        Population.from_tensors({**tensors, "mean": tensors["mean"][1:]})
    with pytest.raises(ValueError, match="3 scans"):
        summarise(people(2))
