"""Learning tasks one after the other without forgetting, and without keeping their data.

A stream is a list of `Task`s. After a task, `Protection` takes up the inputs of every layer; later
updates are projected on what these inputs do not use, in `LOCO` (argument `protection`) or in any
torch optimizer (`Protection.attach`).

The three scenarios of van de Ven & Tolias (arXiv 1904.07734) for a split of the classes:

* class-incremental: one head of all classes, at test time nobody says which task it is;
* task-incremental: one head of all classes, of which only the task's are compared;
* domain-incremental: one head as wide as a task; class k of every task has the same label.

>>> import torch
>>> from enn_core.lab.continual import accuracy_matrix_summary, split_stream
>>> part = (torch.rand(40, 3), torch.arange(40) % 4)
>>> stream = split_stream(part, part, part, [(0, 1), (2, 3)], "class")
>>> [task.name for task in stream], stream[1].train[1].unique().tolist()
(['classes 0 1', 'classes 2 3'], [2, 3])
>>> accuracy_matrix_summary([[0.9, 0.1], [0.8, 0.7]])["forgetting"]
0.1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from enn_core.layers import Factored
from enn_core.loco.protected_inputs import HardProjector, SoftProjector
from enn_core.loco.stages import UnsupportedModel, layer_rows, to_stages

__all__ = [
    "Protection",
    "Task",
    "accuracy",
    "accuracy_matrix_summary",
    "learn_stream",
    "permuted_stream",
    "split_stream",
]

Part = tuple[Tensor, Tensor]  # inputs (N, ...), labels (N,)
Scenario = Literal["class", "task", "domain"]
Projector = SoftProjector | HardProjector


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: for people.
        train, valid, test: inputs and labels, as the head counts them.
        outputs: of the head that are compared, at training and test time; None for all.
    """

    name: str
    train: Part
    valid: Part
    test: Part
    outputs: tuple[int, ...] | None = None


def split_stream(
    train: Part,
    valid: Part,
    test: Part,
    groups: Sequence[Sequence[int]],
    scenario: Scenario,
) -> list[Task]:
    """One task per group of classes.

    Args:
        train, valid, test: inputs (N, ...) and labels (N,).
        groups: classes of each task, no class twice; of equal size if `scenario` is "domain".
        scenario: "class", "task" or "domain": see the module.
    """
    classes = [label for group in groups for label in group]
    if len(set(classes)) != len(classes):
        raise ValueError(f"groups {groups} name a class twice; give each class to one task")
    if scenario not in ("class", "task", "domain"):
        raise ValueError(f"scenario must be class, task or domain, got {scenario!r}")
    if scenario == "domain" and len({len(group) for group in groups}) > 1:
        raise ValueError(f"groups {groups} differ in size; domain-incremental tasks share a head")

    def of(part: Part, group: Sequence[int]) -> Part:
        x, y = part
        chosen = torch.isin(y, torch.tensor(group))
        x, y = x[chosen], y[chosen]
        if scenario == "domain":
            y = (y[:, None] == torch.tensor(group)).long().argmax(1)
        return x, y

    return [
        Task(
            "classes " + " ".join(map(str, group)),
            of(train, group),
            of(valid, group),
            of(test, group),
            tuple(group) if scenario == "task" else None,
        )
        for group in groups
    ]


def permuted_stream(train: Part, valid: Part, test: Part, tasks: int, seed: int = 0) -> list[Task]:
    """Domain-incremental: the same images, their pixels in another order in every task.

    Args:
        train, valid, test: inputs (N, ...) and labels (N,).
        tasks: how many; the first keeps the order of the pixels.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    size = train[0][0].numel()
    stream = []
    for index in range(tasks):
        order = torch.randperm(size, generator=generator) if index else torch.arange(size)
        stream.append(
            Task(
                f"order {index}",
                _reordered(train, order),
                _reordered(valid, order),
                _reordered(test, order),
            )
        )
    return stream


def _reordered(part: Part, order: Tensor) -> Part:
    x, y = part
    return x.flatten(1)[:, order].reshape(x.shape), y


class Protection:
    """One projector per layer on what the inputs of earlier tasks do not use.

    Args:
        model: as `LOCO` takes it.
        make: makes the projector of a layer from the length of its input rows and its place from
            the end (0 is the last layer): `lambda columns, place: HardProjector(columns, 0.95)`.
    """

    def __init__(self, model: nn.Module, make: Callable[[int, int], Projector]) -> None:
        self.first, self.stages = to_stages(model)
        last = len(self.stages) - 1
        self.projectors = [
            make(stage.columns, last - index) for index, stage in enumerate(self.stages)
        ]

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Protect what the network answers to inputs (B, ...) as it is now, in every time step."""
        every = layer_rows(self.first, self.stages, x)
        for projector, rows in zip(self.projectors, every, strict=True):
            flat = rows.flatten(0, 1)
            # By their number, so that alpha does not depend on it.
            projector.add(flat, weight=1 / len(flat))

    def project(self, index: int, change: Tensor) -> Tensor:
        """The part of a layer's change (out, columns) that earlier tasks allow."""
        return self.projectors[index].project(change)

    def used(self) -> list[float]:
        """Share of each layer's input dimensions that is taken, first layer first."""
        return [projector.used() for projector in self.projectors]

    def state_dict(self) -> dict[str, Any]:
        """What is protected, to go on with the next task in another process."""
        return {"projectors": [projector.state_dict() for projector in self.projectors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Protect what was protected where the state was taken, by projectors of the same kind."""
        for projector, stored in zip(self.projectors, state["projectors"], strict=True):
            projector.load_state_dict(stored)

    def attach(self, optimizer: Optimizer) -> Callable[[], None]:
        """Project every step of a torch optimizer over the model; returns what ends that.

        The gradient is projected too, before the optimizer sees it: Adam then scales its steps to
        what may be learnt, not to the gradients that earlier tasks forbid.

        Raises:
            UnsupportedModel: a layer is an eigen layer, whose weight has no gradient of its own.
        """
        for stage in self.stages:
            if isinstance(stage.layer, Factored):
                raise UnsupportedModel(
                    f"layer {stage.name} is an eigen layer, Protection.attach projects steps of "
                    "plain weights; fuse the model first, or train it by LOCO with protection"
                )
        before: list[Tensor] = []

        @torch.no_grad()
        def remember(*_: Any) -> None:
            before[:] = [stage.matrix() for stage in self.stages]
            for index, stage in enumerate(self.stages):
                stage.set_gradient(self.project(index, stage.gradient()))

        @torch.no_grad()
        def project(*_: Any) -> None:
            for index, (stage, old) in enumerate(zip(self.stages, before, strict=True)):
                change = stage.matrix() - old
                stage.add(self.project(index, change) - change)

        hooks = [
            optimizer.register_step_pre_hook(remember),
            optimizer.register_step_post_hook(project),
        ]

        def end() -> None:
            for hook in hooks:
                hook.remove()

        return end


@torch.no_grad()
def accuracy(model: nn.Module, part: Part, outputs: Sequence[int] | None = None) -> float:
    """Share of a part that is answered rightly, 0 to 1, by the given outputs alone."""
    x, y = part
    scores = model(x)
    if outputs is not None:
        others = torch.ones(scores.shape[1], dtype=torch.bool)
        others[list(outputs)] = False
        scores = scores.masked_fill(others.to(scores.device), -torch.inf)
    return float((scores.argmax(1) == y).float().mean())


def learn_stream(
    model: nn.Module,
    stream: Sequence[Task],
    learn: Callable[[int, Task], None],
    after: Callable[[int, Task], None] | None = None,
) -> dict[str, list[list[float]]]:
    """Learn the tasks in order and measure all of them after each.

    Args:
        model: what learns.
        stream: the tasks.
        learn: trains the model on task i.
        after: called once task i is learnt and measured, e.g. to protect it.

    Returns:
        `valid` and `test`: accuracy matrices; row i after task i, column j on task j.
    """
    matrices: dict[str, list[list[float]]] = {"valid": [], "test": []}
    for index, task in enumerate(stream):
        learn(index, task)
        for part, matrix in matrices.items():
            matrix.append(
                [accuracy(model, getattr(other, part), other.outputs) for other in stream]
            )
        if after is not None:
            after(index, task)
    return matrices


def accuracy_matrix_summary(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """What an accuracy matrix says (row i after task i, column j on task j).

    Returns:
        `average`: accuracy over all tasks at the end. `kept`: smallest share of a task's accuracy
        right after learning it that is left at the end. `learnt`: smallest accuracy right after
        learning, of the tasks after the first. `forgetting`: mean fall from the best to the end of
        all tasks but the last (Chaudhry et al., arXiv 1801.10112, eq. 3).
    """
    A = torch.tensor(matrix, dtype=torch.float64)
    tasks = len(A)
    own, end = A.diagonal(), A[-1]
    earlier = range(tasks - 1)
    falls = [float(A[:-1, j].max() - end[j]) for j in earlier]
    summary = {
        "average": float(end.mean()),
        "kept": min((float(end[j] / own[j].clamp(min=1e-12)) for j in earlier), default=1.0),
        "learnt": min((float(own[j]) for j in range(1, tasks)), default=float(own[0])),
        "forgetting": sum(falls) / max(1, len(falls)),
    }
    return {name: round(value, 4) for name, value in summary.items()}
