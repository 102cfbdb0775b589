"""What can be done with a user's marks, side by side: every method gets the same ones.

A method answers with rankings, alone (after one query was taught) and together (after all were);
those that only turn one query's direction keep nothing, and have no second answer.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from feedback_data import make_index
from feedback_finetune import Finetuning, Marked
from sklearn.svm import LinearSVC

from enn_core.lessons.adapter import RidgeAdapter
from retrieval.eigen_coordinates import scores
from retrieval.index.eigen_index import EigenIndex
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.teach import fitting
from retrieval.teach.fitting import ALPHA, fit_direction
from retrieval.teach.knowledge import Adapted
from retrieval.teach.teacher import Teacher

LINEAR_ALPHA = 0.1
"""Ridge of the linear map, as the prototype chose it."""

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(c, good vectors, bad vectors) -> direction."""


@dataclass(frozen=True, eq=False)
class Task:
    """One query with its marks.

    Attributes:
        query: the words.
        c: (r,) unit coordinates.
        good, bad: positions of the marked pictures.
    """

    query: str
    c: np.ndarray
    good: np.ndarray
    bad: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """What a method works on.

    Attributes:
        model: the shipped model.
        vectors: (N, r) float64 stored vectors of the gallery.
        inputs: (N, C, H, W) block inputs of the gallery, where the tower is to be trained.
    """

    model: RetrievalModel
    vectors: np.ndarray
    inputs: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """How texts rank pictures.

    Attributes:
        map: what becomes of query rows (n, r).
        delta: changed spectrum over base spectrum.
        vectors: (N, r) of the gallery's pictures where they were embedded again.
    """

    map: Callable[[np.ndarray], np.ndarray] = np.asarray
    delta: np.ndarray | None = None
    vectors: np.ndarray | None = None

    def scores(self, rows: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """(n, N) of query rows (n, r) with the gallery as it is stored."""
        pictures = vectors if self.vectors is None else self.vectors
        return scores(np.asarray(self.map(rows), np.float64), pictures, self.delta)


@dataclass
class Answers:
    """What a method made of a user's marks.

    Attributes:
        alone: after each task alone, in their order; None where it was left out.
        together: after all of them; None if nothing is kept.
        seconds: of each task's update.
        kept_text: by task, whether the query was left to its words.
        refused: by task, whether it was refused when it came after the others.
        bytes: kept in all; for a trained tower its changed weights, NaN if unknown.
    """

    alone: list[Ranking | None]
    together: Ranking | None
    seconds: list[float]
    kept_text: list[bool] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)
    bytes: float = float("nan")


Method = Callable[[Scene, Sequence[Task]], Answers]


# --- directions of one query ----------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rocchio(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Steps of the prototype: .5 towards the good mean, .15 away from the bad mean."""
    towards = 0.5 * good.mean(0) if len(good) else 0
    return unit(unit(c) + towards - (0.15 * bad.mean(0) if len(bad) else 0))


def logistic(temperature: float, pull: float, bias: float) -> Fit:
    """Logistic regression pulled towards the query; Rocchio where one kind of marks is missing."""

    def fit(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
        if not (len(good) and len(bad)):
            return rocchio(c, good, bad)
        with mock.patch.multiple(fitting, _TEMPERATURE=temperature, _PULL=pull, _BIAS=bias):
            return fitting._logistic(unit(c), good, bad)

    return fit


def svm(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Direction of a linear support vector machine; the query where one kind is missing."""
    if not (len(good) and len(bad)):
        return unit(c)
    is_good = np.arange(len(good) + len(bad)) < len(good)
    machine = LinearSVC().fit(np.concatenate([good, bad]), is_good)
    return unit(machine.coef_[0])


def ours(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    return fit_direction(c, good, bad).target


def ours_unguarded(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """The fit whatever held-out marks say."""
    with mock.patch.multiple(fitting, _MARGIN=-np.inf):
        return fit_direction(c, good, bad).target


# --- methods --------------------------------------------------------------------------------------


def nothing(scene: Scene, tasks: Sequence[Task]) -> Answers:
    return Answers([Ranking() for _ in tasks], Ranking(), [0.0] * len(tasks), bytes=0)


def query_side(fit: Fit, *, remember: bool = False) -> Method:
    """The direction of the query itself; `remember` keeps it for exactly these words."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        targets, seconds = _fitted(fit, scene, tasks)
        alone: list[Ranking | None] = [Ranking(_known({t.c.tobytes(): b}))
                                       for t, b in zip(tasks, targets, strict=True)]  # fmt: skip
        if not remember:
            return Answers(alone, None, seconds, bytes=0)
        table = {task.c.tobytes(): b for task, b in zip(tasks, targets, strict=True)}
        return Answers(alone, Ranking(_known(table)), seconds, bytes=4 * targets.size)

    return method


def absorbed(fit: Fit) -> Method:
    """The package's adapter with other targets."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        targets, seconds = _fitted(fit, scene, tasks)
        a = np.stack([task.c for task in tasks])

        def ranking(rows: slice) -> Ranking:
            pairs = a[rows], targets[rows]
            adapter = RidgeAdapter.of_pairs(a.shape[1], *pairs, alpha=ALPHA)
            return Ranking(Adapted(adapter, *pairs).map)

        alone: list[Ranking | None] = [ranking(slice(i, i + 1)) for i in range(len(a))]
        return Answers(alone, ranking(slice(None)), seconds, bytes=4 * targets.size)

    return method


def linear(fit: Fit, *, rotation: bool = False) -> Method:
    """The linear joint ridge map of the prototype, or the rotation nearest to it."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        targets, seconds = _fitted(fit, scene, tasks)
        a = np.stack([task.c for task in tasks])

        def ranking(rows: slice) -> Ranking:
            adapter = RidgeAdapter.of_pairs(
                a.shape[1], a[rows], targets[rows], alpha=LINEAR_ALPHA, power=1
            )
            if not rotation:
                return Ranking(adapter.apply)
            left, _, right = np.linalg.svd(adapter.matrix())
            return Ranking(_linear(left @ right))

        alone: list[Ranking | None] = [ranking(slice(i, i + 1)) for i in range(len(a))]
        return Answers(alone, ranking(slice(None)), seconds, bytes=4 * targets.size)

    return method


def planes(fit: Fit) -> Method:
    """Rotations in the plane of each query and its target, one after another."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        targets, seconds = _fitted(fit, scene, tasks)
        whole = np.eye(scene.vectors.shape[1])
        alone: list[Ranking | None] = []
        for task, b in zip(tasks, targets, strict=True):
            alone.append(Ranking(_linear(_turn(task.c, b))))
            whole = _turn(unit(whole @ task.c), b) @ whole
        return Answers(alone, Ranking(_linear(whole)), seconds, bytes=8 * whole.size)

    return method


def taught(rule: str, *, force: bool) -> Method:
    """The package itself: lessons of a profile, on disk."""

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        with (
            tempfile.TemporaryDirectory() as place,
            _index(Path(place) / "index", scene) as index,
        ):
            alone: list[Ranking | None] = []
            seconds, kept = [], []
            with Teacher.open(scene.model, path=Path(place) / "alone.sqlite") as teacher:
                for task in tasks:
                    lesson = teacher.teach(
                        index, task.query, task.good + 1, task.bad + 1, rule=rule, force=force
                    )
                    alone.append(_taught(teacher))
                    seconds.append(lesson.seconds)
                    kept.append(lesson.kept_text)
                    if lesson.entry is not None:
                        teacher.undo(index=index)
            file, refused = Path(place) / "together.sqlite", []
            with Teacher.open(scene.model, path=file) as teacher:
                for task in tasks:
                    lesson = teacher.teach(
                        index, task.query, task.good + 1, task.bad + 1, rule=rule, force=force
                    )
                    refused.append(lesson.refused is not None)
                together = _taught(teacher)
            size = file.stat().st_size if file.exists() else 0
            return Answers(alone, together, seconds, kept, refused, size)

    return method


def finetuned(most: int) -> Method:
    """Backprop through the trained half of the tower: one query after another.

    Alone for the first `most` tasks only.
    """

    def method(scene: Scene, tasks: Sequence[Task]) -> Answers:
        tuning, inputs, lessons = _finetuning(scene, tasks)
        alone: list[Ranking | None] = []
        seconds = []
        for lesson in lessons[:most]:
            tuning.reset()
            learning = tuning.learn(inputs, [lesson])
            vectors, embedding = tuning.vectors(inputs)
            alone.append(Ranking(vectors=vectors))
            seconds.append(learning + embedding)
        tuning.reset()
        for lesson in lessons:
            tuning.learn(inputs, [lesson])
        missing = len(tasks) - len(alone)
        return Answers(
            alone + [None] * missing,
            Ranking(vectors=tuning.vectors(inputs)[0]),
            seconds + [float("nan")] * missing,
            bytes=tuning.bytes,
        )

    return method


def finetuned_jointly(scene: Scene, tasks: Sequence[Task]) -> Answers:
    """Backprop again from the start, on the marks of all queries in turns."""
    tuning, inputs, lessons = _finetuning(scene, tasks)
    learning = tuning.learn(inputs, lessons)
    vectors, embedding = tuning.vectors(inputs)
    # An update would repeat all of it.
    seconds = [learning + embedding] + [float("nan")] * (len(tasks) - 1)
    return Answers([None] * len(tasks), Ranking(vectors=vectors), seconds, bytes=tuning.bytes)


METHODS: dict[str, Method] = {
    "none": nothing,
    "Rocchio": query_side(rocchio),
    "logistic": query_side(logistic(0.5, 10.0, 0.2)),
    "logistic, t .05, pull 1, no bias": query_side(logistic(0.05, 1.0, 0.0)),
    "linear SVM": query_side(svm),
    "our fit, unguarded": query_side(ours_unguarded),
    "our fit": query_side(ours),
    "our fit, kept per query": query_side(ours, remember=True),
    "adapter": taught("adapter", force=True),
    "adapter, guarded": taught("adapter", force=False),
    "adapter of Rocchio": absorbed(rocchio),
    "adapter of logistic": absorbed(logistic(0.5, 10.0, 0.2)),
    "linear adapter": linear(ours),
    "linear adapter as a rotation": linear(ours, rotation=True),
    "plane rotations": planes(ours),
    "local": taught("local", force=True),
}
"""All but fine-tuning, by the names of the tables."""


# --- inside ---------------------------------------------------------------------------------------


def _finetuning(scene: Scene, tasks: Sequence[Task]) -> tuple[Finetuning, np.ndarray, list[Marked]]:
    if scene.inputs is None:
        raise ValueError("fine-tuning needs the gallery's block inputs")
    Q = scene.model.basis.Q
    lessons = [Marked(unit(Q @ t.c).astype(np.float32), t.good, t.bad) for t in tasks]
    return Finetuning(Q), scene.inputs, lessons


def _fitted(fit: Fit, scene: Scene, tasks: Sequence[Task]) -> tuple[np.ndarray, list[float]]:
    targets, seconds = [], []
    for task in tasks:
        started = time.perf_counter()
        targets.append(fit(task.c, scene.vectors[task.good], scene.vectors[task.bad]))
        seconds.append(time.perf_counter() - started)
    return np.stack(targets), seconds


def _known(table: dict[bytes, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: np.stack([table.get(row.tobytes(), row) for row in rows])


def _linear(matrix: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: rows @ matrix.T


def _turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation of unit a into unit b within their plane."""
    total = a + b
    return np.eye(len(a)) + 2 * np.outer(b, a) - np.outer(total, total) / (1 + a @ b)


def _taught(teacher: Teacher) -> Ranking:
    mapping = teacher.mapping
    return Ranking(mapping.map, mapping.delta)


@contextlib.contextmanager
def _index(folder: Path, scene: Scene) -> Iterator[EigenIndex]:
    """The gallery as an index; the ids are the positions from 1."""
    make_index(folder, scene.model, len(scene.vectors), [scene.vectors.astype(np.float32)])
    with EigenIndex.open(folder) as index:
        yield index
