"""Which fit, guard and map? The choices behind `retrieval.teach.fitting`, on training images.

    python benchmarks/feedback_choices.py [--features POOLED.npy]      # about twenty minutes

Six folds of 1,000 training images: a probe (`mini_recall`) is trained on the others, so that its
pictures are as unseen as a user's. Concepts and users as in `feedback_protocol`; besides all thirty
marks, the first ten and "five clicks" (three good, two bad) are fitted. Nothing of `val` is read.
Writes `results/feedback_choices.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from feedback_methods import logistic, ours, ours_unguarded, rocchio, unit
from feedback_protocol import average_precision, concepts, marks
from mini_recall import embed, features, probe
from record import write_rows

from enn_core.lessons.adapter import RidgeAdapter
from retrieval.datasets.captioned import load_karpathy
from retrieval.model.text_towers import MiniLM
from retrieval.teach import fitting
from retrieval.teach.fitting import ALPHA
from retrieval.teach.guard import protected_queries
from retrieval.teach.knowledge import Adapted

FOLDS = 6
HELD = 1000

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Map = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Task:
    """A concept of one fold with its marks: (n,) positions, good ones, and what was not shown."""

    fold: Fold
    word: str
    c: np.ndarray
    relevant: np.ndarray
    marked: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True, eq=False)
class Fold:
    """Vectors of its pictures (N, r), captions (5 N, r), protected queries and paraphrases."""

    images: np.ndarray
    captions: np.ndarray
    protected: np.ndarray
    paraphrases: dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--features", type=Path, help="pooled features, kept from an earlier run")
    arguments = parser.parse_args()
    tasks = prepare(Path(arguments.data), arguments.features)
    rows = fits(tasks) + maps(tasks)
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()))
    print(write_rows("feedback_choices", rows))


def prepare(data: Path, kept: Path | None) -> list[Task]:
    folder = data / "flickr8k"
    train = load_karpathy(folder / "dataset_flickr8k.json", folder / "images", "train+restval")
    if kept is not None and kept.exists():
        pooled = torch.from_numpy(np.load(kept))
    else:
        pooled = features(train)
        if kept is not None:
            np.save(kept, pooled.numpy())
    text, owners = embed(train), train.image_of_caption
    others = json.loads((data / "feedback" / "paraphrases.json").read_text(encoding="utf-8"))
    minilm, order, tasks = MiniLM(), np.random.default_rng(7).permutation(len(pooled)), []
    for number in range(FOLDS):
        held = np.sort(order[number * HELD : (number + 1) * HELD])
        fit = np.setdiff1d(np.arange(len(pooled)), held)
        of_fit, of_held = np.isin(owners, fit), np.isin(owners, held)
        image_map, text_map = probe(
            pooled[fit], text[of_fit], np.searchsorted(fit, owners[of_fit]), number
        )

        def encode(texts: list[str], to: Any = text_map) -> np.ndarray:
            return to(torch.from_numpy(minilm.embed(texts))).numpy().astype(np.float64)

        with torch.no_grad():
            fold = Fold(
                image_map(pooled[held]).numpy().astype(np.float64),
                text_map(text[of_held]).numpy().astype(np.float64),
                encode(list(protected_queries())),
                {word: encode(phrases) for word, phrases in others.items()},
            )
        captions = [train.captions[i] for i in np.flatnonzero(of_held)]
        found = concepts(captions, np.searchsorted(held, owners[of_held]), HELD)
        queries = encode([concept.query for concept in found])
        for concept, c in zip(found, queries, strict=True):
            marked = np.concatenate(marks(c, fold.images, concept.relevant, rocchio))
            rest = np.setdiff1d(np.arange(HELD), marked)
            if concept.relevant[rest].any():
                tasks.append(Task(fold, concept.word, c, concept.relevant, marked, rest))
        print(f"fold {number}: {len(found)} concepts", flush=True)
    return tasks


def fits(tasks: list[Task]) -> list[dict[str, Any]]:
    """AP of one query, taught alone, by fits on more and fewer marks."""

    def shrunk(c: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
        return fitting._rocchio(unit(c), good, bad)

    def held_out(margin: float) -> Fit:
        def fit(*values: np.ndarray) -> np.ndarray:
            with mock.patch.multiple(fitting, _MARGIN=margin, _MARGIN_OF_FEW=margin):
                return ours(*values)

        return fit

    methods: dict[str, Fit] = {
        "Rocchio .5/.15": rocchio,
        "Rocchio 2/.6, shrunk": shrunk,
        "logistic, t .05, pull 1, no bias": logistic(0.05, 1.0, 0.0),
        "logistic, t .05, pull 10": logistic(0.05, 10.0, 0.2),
        "logistic, t .2, pull 30": logistic(0.2, 30.0, 0.2),
        "logistic, t .5, pull 10": logistic(0.5, 10.0, 0.2),
        "both, unguarded": ours_unguarded,
        "both, margin -.05": held_out(-0.05),
        "both, margin 0": held_out(0.0),
        "both, margin .03": held_out(0.03),
        "both, as shipped": ours,
    }
    rows = []
    for what, choose in (("30 marks", all_marks), ("10 marks", first_ten), ("5 clicks", clicks)):
        for name, fit in methods.items():
            gains = []
            for task in tasks:
                z, relevant = task.fold.images, task.relevant
                chosen = choose(task)
                good, bad = chosen[relevant[chosen]], chosen[~relevant[chosen]]
                direction = fit(task.c, z[good], z[bad]) if len(chosen) else task.c
                gains.append(ap(task, direction) - ap(task, task.c))
            rows.append({"what": f"fit, {what}", "method": name, **summary(np.array(gains))})
    return rows


def all_marks(task: Task) -> np.ndarray:
    return task.marked


def first_ten(task: Task) -> np.ndarray:
    return task.marked[:10]


def clicks(task: Task) -> np.ndarray:
    good = task.relevant[task.marked]
    return np.concatenate([task.marked[good][:3], task.marked[~good][:2]])


def maps(tasks: list[Task]) -> list[dict[str, Any]]:
    """All concepts of a fold taught: the same query, other queries, and captions."""

    def linear(alpha: float, weight: float = 0.0) -> Callable[..., Map]:
        def make(a: np.ndarray, b: np.ndarray, protected: np.ndarray) -> Map:
            anchors = np.sqrt(weight) * protected
            # An anchor of weight w is a pair (p, p) whose rows are scaled by sqrt(w).
            pairs = np.concatenate([anchors, a]), np.concatenate([anchors, b])
            return RidgeAdapter.of_pairs(a.shape[1], *pairs, alpha=alpha, power=1).apply

        return make

    def squares(alpha: float, *, recall: bool = True) -> Callable[..., Map]:
        def make(a: np.ndarray, b: np.ndarray, protected: np.ndarray) -> Map:
            adapter = RidgeAdapter.of_pairs(a.shape[1], a, b, alpha=alpha)
            return Adapted(adapter, a, b).map if recall else adapter.apply

        return make

    methods = {
        **{f"linear, alpha {alpha}": linear(alpha) for alpha in (0.01, 0.1, 0.5, 1.0)},
        "linear, alpha 0.1, protected anchors of weight .1": linear(0.1, 0.1),
        "linear, alpha 0.3, protected anchors of weight .3": linear(0.3, 0.3),
        **{f"squares, alpha {a}": squares(a, recall=False) for a in (0.003, 0.01, 0.1)},
        f"squares, alpha {ALPHA}, taught queries recalled (as shipped)": squares(ALPHA),
    }
    folds = list(dict.fromkeys(task.fold for task in tasks))
    rows = []
    for name, make in methods.items():
        same, paraphrases, held, ranks = [], [], [], []
        for number, fold in enumerate(folds):
            here = [task for task in tasks if task.fold is fold]
            a = np.stack([task.c for task in here])
            b = np.stack([target(task) for task in here])
            mapped = make(a, b, fold.protected)
            for task in here:
                same.append(ap(task, mapped(task.c[None])[0]) - ap(task, task.c))
                for phrase in fold.paraphrases.get(task.word, ()):
                    paraphrases.append(ap(task, mapped(phrase[None])[0]) - ap(task, phrase))
            order = np.random.default_rng(number).permutation(len(here))
            out, taught = order[: len(here) // 4], order[len(here) // 4 :]
            without = make(a[taught], b[taught], fold.protected)
            for i in out:
                z, c, relevant = fold.images, here[i].c, here[i].relevant
                after = average_precision(z @ without(c[None])[0], relevant)
                held.append(after - average_precision(z @ c, relevant))
            kinds = fold.captions, mapped(fold.captions)
            ranks.append([places(each, fold.images) for each in kinds])
        before, after = (np.concatenate([pair[i] for pair in ranks]) for i in (0, 1))
        rows += [
            {"what": "map, same query", "method": name, **summary(np.array(same))},
            {"what": "map, paraphrases.json", "method": name, **summary(np.array(paraphrases))},
            {"what": "map, held-out concepts", "method": name, **summary(np.array(held))},
            *(
                {
                    "what": f"map, R@{k} of all captions, points",
                    "method": name,
                    "gain": round(100 * float((after < k).mean() - (before < k).mean()), 3),
                    "n": len(after),
                }
                for k in (1, 5, 10)
            ),
        ]
    return rows


def target(task: Task) -> np.ndarray:
    good = task.relevant[task.marked]
    z = task.fold.images
    return ours(task.c, z[task.marked[good]], z[task.marked[~good]])


def ap(task: Task, direction: np.ndarray) -> float:
    return average_precision(task.fold.images[task.rest] @ direction, task.relevant[task.rest])


def places(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(5 N,) place, from 0, of each caption's own picture."""
    scores = texts @ images.T
    own = scores[
        np.arange(len(texts)), np.repeat(np.arange(len(images)), len(texts) // len(images))
    ]
    return (scores > own[:, None]).sum(1)


def summary(gains: np.ndarray) -> dict[str, Any]:
    """Mean gain of AP, its standard error, and the share of queries that lost."""
    return {
        "gain": round(float(gains.mean()), 5),
        "standard_error": round(float(gains.std() / np.sqrt(len(gains))), 5),
        "hurt": round(float((gains < -1e-9).mean()), 4),
        "hurt_by_a_point": round(float((gains < -0.01).mean()), 4),
        "unchanged": round(float((np.abs(gains) <= 1e-9).mean()), 4),
        "n": len(gains),
    }


if __name__ == "__main__":
    main()
