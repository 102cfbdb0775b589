"""Streams, measures and protection of continual learning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core import to_enn
from enn_core.lab.continual import (
    Protection,
    Task,
    accuracy,
    accuracy_matrix_summary,
    learn_stream,
    permuted_stream,
    split_stream,
)
from enn_core.loco import LOCO, UnsupportedModel, calibrate_, to_stages
from enn_core.loco.node_perturbation import LOSSES, restricted
from enn_core.loco.protected_inputs import HardProjector, SoftProjector
from enn_core.spiking import ClampedReLU, spiking_twin

GROUPS = [(0, 1), (3, 2)]


def part(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 2, 3, generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_split_streams(scenario: str) -> None:
    x, y = part()
    stream = split_stream((x, y), part(20, 1), part(10, 2), GROUPS, scenario)  # type: ignore[arg-type]
    assert [task.outputs for task in stream] == (GROUPS if scenario == "task" else [None, None])
    for task, group in zip(stream, GROUPS, strict=True):
        assert len(task.valid[0]) == 8
        assert len(task.test[0]) == 4
        for image, label in zip(*task.train, strict=True):
            source = int((x == image).flatten(1).all(1).nonzero())
            place = int(y[source])
            assert int(label) == (group.index(place) if scenario == "domain" else place)


def test_permuted_streams_keep_images_but_for_the_order() -> None:
    x, y = part()
    stream = permuted_stream((x, y), part(20, 1), part(10, 2), tasks=3)
    assert torch.equal(stream[0].train[0], x)
    for task in stream[1:]:
        assert not torch.equal(task.train[0], x)
        assert torch.equal(task.train[0].flatten(1).sort(1).values, x.flatten(1).sort(1).values)
        assert torch.equal(task.train[1], y)
    a, b = stream[1].train[0].flatten(1), x.flatten(1)
    order = [int((b == a[:, [column]]).all(0).nonzero()) for column in range(6)]
    valid = part(20, 1)[0].flatten(1)
    assert torch.equal(stream[1].valid[0].flatten(1), valid[:, order])  # the same in all parts


@pytest.mark.parametrize(
    ("groups", "scenario", "word"),
    [
        ([(0, 1), (1, 2)], "class", "name a class twice"),
        ([(0, 1), (2,)], "domain", "differ in size"),
        ([(0, 1), (2, 3)], "online", "class, task or domain"),
    ],
)
def test_bad_streams(groups: list[tuple[int, ...]], scenario: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        split_stream(part(), part(), part(), groups, scenario)  # type: ignore[arg-type]


def test_summary_of_a_matrix() -> None:
    matrix = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.0], [0.6, 0.35, 0.9]]
    assert accuracy_matrix_summary(matrix) == {
        "average": round((0.6 + 0.35 + 0.9) / 3, 4),
        "kept": 0.5,
        "learnt": 0.7,
        "forgetting": round((0.3 + 0.35) / 2, 4),
    }
    assert accuracy_matrix_summary([[0.5]]) == {
        "average": 0.5,
        "kept": 1.0,
        "learnt": 0.5,
        "forgetting": 0.0,
    }


def test_restricted_losses_and_accuracies_see_their_outputs_alone() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 3.0, 2.0, 0.0]])
    y = torch.tensor([2, 2])
    wanted = F.cross_entropy(scores[:, [3, 2]], torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(restricted(LOSSES["ce"], (3, 2))(scores, y), wanted)
    assert accuracy(nn.Identity(), (scores, y)) == 0.0
    assert accuracy(nn.Identity(), (scores, y), (1, 2)) == 0.5


def networks() -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    rate = nn.Sequential(
        nn.Conv2d(1, 6, 2), ClampedReLU(), nn.Flatten(), nn.Linear(12, 30), ClampedReLU()
    ).append(nn.Linear(30, 5))
    return {"rate": rate, "spiking": spiking_twin(rate, 4), "eigen": to_enn(rate)}


@pytest.mark.parametrize(
    ("rule", "kind"),
    [("loco", "rate"), ("loco", "spiking"), ("loco", "eigen"), ("adam", "rate"), ("sgd", "rate")],
)
def test_protected_inputs_keep_their_answers(rule: str, kind: str) -> None:
    """Held inputs: whatever is learnt afterwards, the network says the same to them."""
    model = networks()[kind]
    old, new = part(4)[0], part(20, 1)
    calibrate_(model, new[0])
    protection = Protection(model, lambda columns, place: SoftProjector(columns, 1e-9))
    protection.add(old)
    with torch.no_grad():
        said, other = model(old), model(new[0])
    if rule == "loco":
        learner = LOCO(model, lr=1e-2, steps=0, projection="none", protection=protection)
        for _ in range(20):
            learner.step(*new)
    else:
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        optimizer = kinds[rule](model.parameters(), lr=1e-2)
        end = protection.attach(optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(new[0]), new[1]).backward()
            optimizer.step()
        end()
    with torch.no_grad():
        assert float((model(old) - said).abs().max()) < 1e-4
        assert float((model(new[0]) - other).abs().max()) > 1e-2
    assert all(0 < used < 1 for used in protection.used())


def test_detached_protection_is_gone_and_the_gradient_is_needed() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    protection = Protection(model, lambda columns, place: HardProjector(columns, 1.0))
    protection.add(torch.rand(20, 3))  # everything
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    end = protection.attach(optimizer)
    with pytest.raises(ValueError, match="no gradient"):
        optimizer.step()
    before = to_stages(model)[1][0].matrix()
    for moved in (False, True):
        model(torch.rand(4, 3)).sum().backward()
        optimizer.step()
        after = to_stages(model)[1][0].matrix()
        assert bool((after - before).abs().max() > 1e-4) == moved
        end()


def test_steps_of_factors_are_not_projected() -> None:
    model = networks()["eigen"]
    protection = Protection(model, lambda columns, place: HardProjector(columns, 0.9))
    with pytest.raises(UnsupportedModel, match=r"is an eigen layer.*fuse the model first"):
        protection.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def digits() -> list[Task]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
    cuts = (x[:1200], y[:1200]), (x[1200:1400], y[1200:1400]), (x[1400:], y[1400:])
    return split_stream(*cuts, (range(5), range(5, 10)), "class")


def test_outputs_of_other_tasks_do_not_learn_noise() -> None:
    model = networks()["rate"]
    x, y = part(20)
    x, y = x[y < 2], y[y < 2]
    before = to_stages(model)[1][-1].matrix()
    rule = LOCO(model, lr=1e-2, steps=0, projection="none", outputs=(0, 1))
    for _ in range(5):
        rule.step(x, y)
    moved = (to_stages(model)[1][-1].matrix() - before).abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("rule", ["backprop", "loco"])
def test_second_task_is_learnt_and_the_first_kept(rule: str) -> None:
    """Class-incremental, one head, no replay: at least 95 % kept, at least 70 % learnt."""
    stream = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), ClampedReLU(), nn.Linear(300, 10))
    calibrate_(model, stream[0].train[0], spread=0.5)
    protection = Protection(model, lambda columns, place: SoftProjector(columns, 1e-2))

    def learn(index: int, task: Task) -> None:
        x, y = task.train
        steps, end = (150, None) if rule == "backprop" else (250, None)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        step: Callable[[Tensor, Tensor], object]
        if rule == "loco":
            step = LOCO(model, lr=3e-3, steps=steps, projection="none", protection=protection).step
        else:
            end = protection.attach(optimizer)

            def step(x: Tensor, y: Tensor) -> None:
                optimizer.zero_grad()
                LOSSES["mse"](model(x), y).mean().backward()
                optimizer.step()

        generator = torch.Generator().manual_seed(index)
        for _ in range(steps):
            chosen = torch.randint(len(x), (64,), generator=generator)
            step(x[chosen], y[chosen])
        if end:
            end()

    matrices = learn_stream(model, stream, learn, lambda index, task: protection.add(task.train[0]))
    summary = accuracy_matrix_summary(matrices["test"])
    assert summary["kept"] >= 0.95
    assert summary["learnt"] >= 0.70
    assert matrices["test"][0][1] < 0.2  # before its turn nobody knew the second task


@pytest.mark.parametrize(
    "make", [lambda c, _: SoftProjector(c, 1e-2), lambda c, _: HardProjector(c, 0.9)]
)
def test_protection_goes_on_from_its_state(make, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), ClampedReLU(), nn.Linear(5, 3))
    known, other = Protection(model, make), Protection(model, make)
    known.add(torch.rand(30, 6))
    torch.save(known.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for protection in (known, other):
        protection.add(torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))
    for index, columns in enumerate((7, 6)):  # a bias is a column
        change = torch.rand(2, columns)
        assert torch.equal(known.project(index, change), other.project(index, change))
        assert not torch.allclose(known.project(index, change), change, atol=1e-3)
