"""Do marks make search better, and what do they do to everything else? Simulated users.

    python benchmarks/feedback.py               # about an hour on two cores
    python benchmarks/feedback.py --quick       # a minute, training pictures; writes nothing

Users look for concepts (`feedback_protocol`) in Flickr8k `val` and CIFAR-10 `test`. A seed draws 80
% of the pictures, a quarter of the concepts that is never taught, the order in which the others
are, and captions. Every method gets the same marks: thirty pictures per query in three rounds, of
which the second and third are ranked by Rocchio. What counts is average precision (AP) among the
pictures that were never shown for the query, beside that of the untaught model among the same ones.

* same query: alone (nothing else taught) and after all concepts are taught;
* paraphrases: of `paraphrases.json`; captions: five of each concept's relevant pictures, of those
  that are not among the ranked ones, with any words, and without the concept's own word;
* held-out concepts: queries nobody taught;
* unrelated captions: recall of each picture by one of its captions, and by one that holds no taught
  word (for CIFAR-10: those of Flickr8k's pictures). Protected queries are the shipped ones.

Intervals (95 %) resample concepts, each with all its seeds, or pictures. Fine-tuning runs last, on
fewer seeds, and alone for a few concepts only: see the columns `seeds` and `count`. Writes
`results/feedback.csv` and `results/feedback_concepts.csv`, again after every run of fine-tuning;
vectors are kept in the system's temporary folder.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from feedback_data import Gallery, Texts, cifar10, flickr8k, words
from feedback_finetune import block_inputs
from feedback_methods import (
    METHODS,
    Answers,
    Method,
    Scene,
    Task,
    finetuned,
    finetuned_jointly,
    rocchio,
    unit,
)
from feedback_protocol import average_precision, marks
from record import RESULTS, write_rows

import retrieval
from retrieval.eval.recall import bootstrap_interval
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.teach.guard import protected_queries

KEPT = 0.8  # of the pictures, per seed
HELD_OUT = 4  # one concept in so many
CAPTIONS = 5  # per concept
SAMPLES = 2000  # of the bootstrap
KS = (1, 5, 10)
PHRASES = ("paraphrases", "captions", "captions without the word")
NAN = float("nan")
# Less than this is rounding: no two pictures changed places.
_EQUAL = 1e-9


@dataclass(frozen=True, eq=False)
class Draw:
    """One seed's part of a gallery.

    Attributes:
        rows: (n,) positions of its pictures.
        vectors: (n, r) float64.
        taught, held: positions of concepts, the taught ones in their order.
        tasks: one per taught concept.
        phrases: of each taught concept, query rows (m, r) by the name of their column.
        unrelated: query rows (m, r) and the picture (m,) of each, by the kind of captions.
    """

    seed: int
    rows: np.ndarray
    vectors: np.ndarray
    taught: list[int]
    held: list[int]
    tasks: list[Task]
    phrases: list[dict[str, np.ndarray]]
    unrelated: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Results:
    """What was measured so far: per concept, and hits of unrelated captions."""

    concepts: list[dict[str, Any]] = field(default_factory=list)
    recalls: list[dict[str, Any]] = field(default_factory=list)
    totals: list[dict[str, Any]] = field(default_factory=list)


def draw(gallery: Gallery, others: Gallery, seed: int) -> Draw:
    """Draw what one seed works with; `others` has the unrelated captions."""
    rng = np.random.default_rng([seed, len(gallery.pictures)])
    total = len(gallery.pictures)
    rows = np.sort(rng.permutation(total)[: round(KEPT * total)])
    here = np.isin(np.arange(total), rows)
    vectors = gallery.vectors[rows].astype(np.float64)
    order = rng.permutation(len(gallery.concepts)).tolist()
    held = order[: len(order) // HELD_OUT]
    queries = gallery.texts(concept.query for concept in gallery.concepts)
    tasks, phrases, taught = [], [], []
    for number in order[len(held) :]:
        concept = gallery.concepts[number]
        relevant = concept.relevant[rows]
        c = unit(queries[number])
        shown = np.concatenate(marks(c, vectors, relevant, rocchio))
        if relevant.sum() == relevant[shown].sum():
            continue  # all were shown: nothing is left to measure
        taught.append(number)
        tasks.append(Task(concept.query, c, shown[relevant[shown]], shown[~relevant[shown]]))
        # Captions of relevant pictures that are not ranked: left out by the seed, or shown.
        ranked = here.copy()
        ranked[rows[shown]] = False
        free = concept.relevant & ~ranked
        texts = [
            caption
            for caption, owner in zip(gallery.captions, gallery.owners, strict=True)
            if free[owner]
        ]
        without = [text for text in texts if concept.word not in words(text)]
        phrases.append(
            {
                "paraphrases": gallery.texts(gallery.paraphrases.get(concept.word, ())),
                "captions": gallery.texts(_some(texts, rng)),
                "captions without the word": gallery.texts(_some(without, rng)),
            }
        )
    known = set().union(*(words(gallery.concepts[i].word) for i in taught)) - {"a", "an"}
    owners = rows if gallery is others else np.arange(len(others.pictures))
    unrelated = _unrelated(others, owners, known, rng)
    return Draw(seed, rows, vectors, taught, held, tasks, phrases, unrelated)


def _some(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))[:CAPTIONS]]


def _unrelated(
    gallery: Gallery, pictures: np.ndarray, known: set[str], rng: np.random.Generator
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(query rows, picture of each) of one caption per picture, and of one without known words."""
    protected = {query.lower() for query in protected_queries()}
    own: list[list[str]] = [[] for _ in gallery.pictures]
    for caption, owner in zip(gallery.captions, gallery.owners, strict=True):
        if caption.lower() not in protected:
            own[owner].append(caption)
    chosen: dict[str, list[tuple[str, int]]] = {"any caption": [], "no taught word": []}
    for owner in pictures.tolist():
        shuffled = [own[owner][i] for i in rng.permutation(len(own[owner]))]
        clear = [text for text in shuffled if not words(text) & known]
        for name, texts in (("any caption", shuffled), ("no taught word", clear)):
            chosen[name] += [(text, owner) for text in texts[:1]]
    return {
        name: (gallery.texts(text for text, _ in pairs), np.array([owner for _, owner in pairs]))
        for name, pairs in chosen.items()
    }


def measure(
    results: Results, gallery: Gallery, others: Gallery, drawn: Draw, name: str, answers: Answers
) -> None:
    """Add one method's numbers on one seed."""
    base = {"data": gallery.name, "seed": drawn.seed, "method": name}
    together = answers.together
    relevant = {i: gallery.concepts[i].relevant[drawn.rows] for i in (*drawn.taught, *drawn.held)}
    unknown = [None] * len(drawn.tasks)
    refused, kept = answers.refused or unknown, answers.kept_text or unknown
    for place, (number, task) in enumerate(zip(drawn.taught, drawn.tasks, strict=True)):
        unseen = np.ones(len(drawn.rows), bool)
        unseen[task.good] = unseen[task.bad] = False
        wanted = relevant[number][unseen]

        def precision(ranked: np.ndarray, unseen=unseen, wanted=wanted) -> float:
            return float(np.mean([average_precision(row[unseen], wanted) for row in ranked]))

        row: dict[str, Any] = {
            **base,
            "concept": gallery.concepts[number].word,
            "held_out": False,
            "place": place + 1,
            "good": len(task.good),
            "unseen_relevant": int(wanted.sum()),
            "control": precision(task.c[None] @ drawn.vectors.T),
        }
        alone = answers.alone[place]
        if alone is not None:
            row["alone"] = precision(alone.scores(task.c[None], drawn.vectors))
        if together is not None:
            row["after_all"] = precision(together.scores(task.c[None], drawn.vectors))
        for column in PHRASES:
            rows = drawn.phrases[place][column]
            if len(rows):
                row[f"{column} control"] = precision(rows @ drawn.vectors.T)
                if together is not None:
                    row[f"{column} after_all"] = precision(together.scores(rows, drawn.vectors))
        row["ms"] = 1000 * answers.seconds[place]
        row["kept_text"], row["refused"] = kept[place], refused[place]
        results.concepts.append(row)
    if together is None:
        return
    for number in drawn.held:
        concept = gallery.concepts[number]
        c = unit(gallery.texts([concept.query]))
        wanted = relevant[number]
        results.concepts.append(
            {
                **base,
                "concept": concept.word,
                "held_out": True,
                "unseen_relevant": int(wanted.sum()),
                "control": average_precision((c @ drawn.vectors.T)[0], wanted),
                "after_all": average_precision(together.scores(c, drawn.vectors)[0], wanted),
            }
        )
    results.totals.append({**base, "bytes": answers.bytes / len(drawn.tasks)})
    if gallery is not others and together.vectors is not None:
        return  # these pictures would have to be embedded again as well
    pictures = drawn.vectors if gallery is others else others.vectors.astype(np.float64)
    places = np.full(len(others.pictures), -1)
    places[drawn.rows if gallery is others else slice(None)] = np.arange(len(pictures))
    for name, (rows, owners) in drawn.unrelated.items():
        if not len(owners):
            continue
        found = together.scores(rows, pictures)
        ranks = [_ranks(each, places[owners]) for each in (rows @ pictures.T, found)]
        results.recalls.append({**base, "captions": name, "owners": owners, "ranks": ranks})


def _ranks(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    reached = np.take_along_axis(found, own[:, None], axis=1)
    return 1 + (found > reached).sum(1)


# --- tables ---------------------------------------------------------------------------------------


def summary(results: Results) -> list[dict[str, Any]]:
    """The table: one row per data, method and measure."""
    rows = []
    for data, method in dict.fromkeys((row["data"], row["method"]) for row in results.concepts):
        taught = _of(results.concepts, data, method, held_out=False)
        held = _of(results.concepts, data, method, held_out=True)
        seeds = len({row["seed"] for row in taught})
        base = {"data": data, "method": method, "seeds": seeds}

        def add(name: str, values: dict[str, Any], base=base) -> None:
            if values:
                rows.append({**base, "measure": name, **values})

        add("AP same query, alone", _compared(taught, "alone", "control"))
        add("AP same query, after all", _compared(taught, "after_all", "control"))
        add("AP after all, against alone", _compared(taught, "after_all", "alone"))
        for name in PHRASES:
            compared = _compared(taught, f"{name} after_all", f"{name} control")
            add(f"AP {name}, after all", compared)
        add("AP held-out concepts, after all", _compared(held, "after_all", "control"))
        for name in ("any caption", "no taught word"):
            for k in KS:
                add(f"R@{k} unrelated, {name}", _recall(results.recalls, data, method, name, k))
        for column, name in (("alone", "alone"), ("after_all", "after all")):
            add(f"share hurt, {name}", _hurt(taught, column))
        for column, name in (("kept_text", "left to its words"), ("refused", "refused")):
            add(f"share {name}", _plain(row[column] for row in taught if row[column] is not None))
        add("ms per update", _plain(row["ms"] for row in taught))
        totals = _of(results.totals, data, method)
        add("bytes per concept, all files", _plain(row["bytes"] for row in totals))
    rows += [row for data in _datas(results) for row in _against(results, data)]
    return [{key: _short(value) for key, value in row.items()} for row in rows]


def _against(results: Results, data: str) -> Iterable[dict[str, Any]]:
    """The package's methods, paired with each of the others."""
    methods = [m for d, m in dict.fromkeys((r["data"], r["method"]) for r in results.concepts)
               if d == data]  # fmt: skip
    for ours in ("adapter", "local"):
        for other in methods:
            if ours not in methods or other in (ours, "none"):
                continue
            first = _of(results.concepts, data, ours, held_out=False)
            second = _of(results.concepts, data, other, held_out=False)
            theirs = {(row["seed"], row["concept"]): row for row in second}
            for column, name in (("alone", "alone"), ("after_all", "after all")):
                pairs = [
                    {**row, "ours": row[column], "theirs": match[column]}
                    for row in first
                    if (match := theirs.get((row["seed"], row["concept"]), {})).get(column)
                    is not None
                ]
                base = {"data": data, "method": ours, "against": other}
                if pairs:
                    compared = _compared(pairs, "ours", "theirs")
                    yield {**base, "measure": f"AP same query, {name}", **compared}
                    compared = _hurt(pairs, "ours", "theirs")
                    yield {**base, "measure": f"share hurt, {name}", **compared}


def _datas(results: Results) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in results.concepts))


def _of(rows: list[dict[str, Any]], data: str, method: str, **equal: Any) -> list[dict[str, Any]]:
    wanted = {"data": data, "method": method, **equal}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _compared(rows: list[dict[str, Any]], column: str, control: str) -> dict[str, Any]:
    both = [row for row in rows if not math.isnan(row.get(column, NAN) + row.get(control, NAN))]
    if not both:
        return {}
    values = np.array([[row[column], row[control]] for row in both], np.float64)
    names = [row["concept"] for row in both]
    return _interval(values[:, 0], values[:, 1], names)


def _hurt(rows: list[dict[str, Any]], column: str, other: str | None = None) -> dict[str, Any]:
    """Share of queries that are worse than untaught; beside that of another method."""
    known = [row for row in rows if not math.isnan(row.get(column, NAN))]
    if not known:
        return {}
    ours, theirs = (
        np.array([row[name] < row["control"] - _EQUAL for row in known], np.float64)
        for name in (column, other or "control")
    )
    return _interval(ours, theirs, [row["concept"] for row in known])


def _recall(
    rows: list[dict[str, Any]], data: str, method: str, captions: str, k: int
) -> dict[str, Any]:
    chosen = _of(rows, data, method, captions=captions)
    if not chosen:
        return {}
    before, after = (
        100.0 * np.concatenate([row["ranks"][i] <= k for row in chosen]) for i in (0, 1)
    )
    return _interval(after, before, np.concatenate([row["owners"] for row in chosen]).tolist())


def _interval(values: np.ndarray, control: np.ndarray, names: Sequence[Any]) -> dict[str, Any]:
    """Means, and the interval of the difference when whole groups of equal names are drawn."""
    _, owners = np.unique(np.array(names), return_inverse=True)
    low, high = bootstrap_interval(values - control, owners, samples=SAMPLES)
    return {
        "value": values.mean(),
        "control": control.mean(),
        "difference": (values - control).mean(),
        "low": low,
        "high": high,
        "groups": int(owners.max()) + 1,
        "count": len(values),
    }


def _plain(values: Iterable[float]) -> dict[str, Any]:
    known = [value for value in values if not math.isnan(value)]
    return {"value": float(np.mean(known)), "count": len(known)} if known else {}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value


def write(results: Results) -> None:
    """Write both files; where the numbers come from stands in the first."""
    print(write_rows("feedback", summary(results)), flush=True)
    with (RESULTS / "feedback_concepts.csv").open("w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(key for row in results.concepts for key in row))
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        for row in results.concepts:
            writer.writerow({key: _short(value) for key, value in row.items()})


def show(rows: list[dict[str, Any]]) -> None:
    """Print a short table, and the targets."""
    short = {
        "AP same query, alone": "alone",
        "AP same query, after all": "after all",
        "AP paraphrases, after all": "paraphrase",
        "AP captions, after all": "captions",
        "AP held-out concepts, after all": "held out",
        "R@10 unrelated, any caption": "R@10",
        "share hurt, alone": "hurt",
        "share hurt, after all": "hurt, all",
        "ms per update": "ms",
    }
    plain = ("share hurt, alone", "share hurt, after all", "ms per update")
    for data in dict.fromkeys(row["data"] for row in rows):
        print(f"\n{data}: difference from the untaught model (hurt and ms: the value itself)")
        print(f"{'':27}" + "".join(f"{name:>22}" for name in short.values()))
        for method in dict.fromkeys(row["method"] for row in rows if row["data"] == data):
            cells = []
            for measure in short:
                row = _find(rows, data, method, measure)
                if row is None:
                    cells.append(f"{'-':>22}")
                elif measure in plain:
                    cells.append(f"{row['value']:>22.3g}")
                else:
                    digits = 1 if measure.startswith("R@") else 3
                    text = f"{row['difference']:+.{digits}f} [{row['low']:+.{digits}f}, "
                    cells.append(f"{text + format(row['high'], f'+.{digits}f') + ']':>22}")
            print(f"{method:27}" + "".join(cells))
        _targets(rows, data)


def _targets(rows: list[dict[str, Any]], data: str) -> None:
    def value(method: str, measure: str, key: str = "value") -> float:
        row = _find(rows, data, method, measure)
        return NAN if row is None else row.get(key, NAN)

    for ours in ("adapter", "adapter, guarded", "local"):
        after = value(ours, "AP same query, after all")
        alone = value(ours, "AP same query, alone")
        gain = value(ours, "AP paraphrases, after all", "low")
        recall = value(ours, "R@10 unrelated, any caption", "difference")
        hurt = [value(ours, f"share hurt, {name}") for name in ("alone", "after all")]
        half = value("logistic", "share hurt, alone") / 2
        print(
            f"{ours}: after all / alone {after / alone:.3f} (target .95); paraphrase gain from "
            f"{gain:+.4f} (above 0); unrelated R@10 {recall:+.2f} (-0.5); hurt {hurt[0]:.1%} "
            f"alone, {hurt[1]:.1%} after all (half of logistic's: {half:.1%})"
        )


def _find(
    rows: list[dict[str, Any]], data: str, method: str, measure: str
) -> dict[str, Any] | None:
    for row in rows:
        key = row["data"], row["method"], row["measure"]
        if key == (data, method, measure) and "against" not in row:
            return row
    return None


# --- running --------------------------------------------------------------------------------------


def galleries(model: RetrievalModel, data: Path, quick: bool) -> list[Gallery]:
    texts = Texts(model)
    if quick:
        return [flickr8k(texts, data, "train", 500), cifar10(texts, data, "train", 40)]
    return [flickr8k(texts, data, "val"), cifar10(texts, data, "test")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--backprop-seeds", type=int, default=3)
    parser.add_argument("--backprop-alone", type=int, default=6, help="concepts, per seed")
    parser.add_argument("--backprop-minutes", type=float, default=25, help="start none after that")
    parser.add_argument("--quick", action="store_true", help="one seed, training pictures")
    arguments = parser.parse_args()
    model = retrieval.load()
    both = galleries(model, Path(arguments.data), arguments.quick)
    others = both[0]
    results = Results()

    @functools.cache
    def drawn(place: int, seed: int) -> Draw:
        return draw(both[place], others, seed)

    def run(place: int, seed: int, name: str, method: Method, inputs: Any = None) -> None:
        started = time.perf_counter()
        part = drawn(place, seed)
        scene = Scene(model, part.vectors, inputs)
        measure(results, both[place], others, part, name, method(scene, part.tasks))
        seconds = time.perf_counter() - started
        print(f"{both[place].name}, seed {seed}, {name}: {seconds:.1f} s", flush=True)

    seeds = 1 if arguments.quick else arguments.seeds
    for place in range(len(both)):
        for seed in range(seeds):
            for name, method in METHODS.items():
                run(place, seed, name, method)
    if not arguments.quick:
        write(results)
        end = time.monotonic() + 60 * arguments.backprop_minutes
        for seed, place in product(range(min(seeds, arguments.backprop_seeds)), range(len(both))):
            inputs = block_inputs(model, both[place])[drawn(place, seed).rows]
            for name, method in (
                ("backprop", finetuned(arguments.backprop_alone)),
                ("backprop, all marks at once", finetuned_jointly),
            ):
                if time.monotonic() < end:
                    run(place, seed, name, method, inputs)
                    write(results)
    show(summary(results))


if __name__ == "__main__":
    main()
