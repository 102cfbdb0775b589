"""Brain age by rule, in nested cross-validation on the folds of `neuro.dataset`.

For each of 5 outer folds x 3 seeds, five networks are trained, each without one inner fold of the
training part. Their out-of-fold predictions choose which heads answer, and give the interval and
the bias correction; the outer test part is only predicted, by all five and by each alone.

    python benchmarks/brain_age.py --method local-enn            # one method, all 15 outer folds
    python benchmarks/brain_age.py --method local-enn --seeds 0  # a third of it
    python benchmarks/brain_age.py --summary                     # CSV and plots from what is there

A run is continued where it stopped: each network and its predictions are files in `--runs`.
Methods: local-enn (ENN-l), backprop-enn (exact ENN end to end), backprop-plain (its plain twin),
and as controls local-plain (the local rule without eigen layers), local-enn-bins (soft age bins)
and local-enn-absolute (absolute instead of squared error). One thread and about 2 GB each.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ixi import SEEDS, Split, find_ixi, inner_folds, outer_splits
from record import RESULTS, write_rows

from neuro.age.calibrate import BiasCorrection, Conformal, coverage
from neuro.age.model import BrainAgeModel, Member, by_head
from neuro.dataset import BrainDataset
from neuro.metrics import by_decade, evaluate, paired_difference, plot_agreement
from neuro.train import TrainConfig, make_inputs, refit_heads_, train_network

METHODS: dict[str, TrainConfig] = {
    "local-enn": TrainConfig(rule="local", layers="enn"),
    "backprop-enn": TrainConfig(rule="backprop", layers="enn"),
    "backprop-plain": TrainConfig(rule="backprop", layers="plain"),
    "local-plain": TrainConfig(rule="local", layers="plain"),
    "local-enn-bins": TrainConfig(rule="local", layers="enn", target="bins", refit=False),
    "local-enn-absolute": TrainConfig(rule="local", layers="enn", target="absolute"),
}
# Short name -> method of brain_baselines.py. The second is what our network is without its blocks.
BASELINES = {
    "PCA + ridge": "PCA(100) + ridge, voxels at 4 mm",
    "bins + ridge": "ridge, intensity bins at 8 mm",
}
CONFIDENCE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", choices=sorted(METHODS), nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--folds", type=int, nargs="*", default=None, help="outer folds; all")
    parser.add_argument("--runs", type=Path, default=Path("runs/brain_age"))
    parser.add_argument("--device", default="cpu", help="where the steps are computed")
    parser.add_argument("--summary", action="store_true", help="write CSV and plots")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = BrainDataset.read(find_ixi() / "brains_mni_2mm")
    if args.method:
        inputs = cached_inputs(data, METHODS[args.method[0]], args.runs)
        for split in outer_splits(data, args.seeds):
            if args.folds is None or split.fold in args.folds:
                for method in args.method:
                    run_split(method, data, inputs, split, args.runs, args.device)
    if args.summary:
        summarise(data, args.runs)


def cached_inputs(data: BrainDataset, config: TrainConfig, runs: Path) -> torch.Tensor:
    """All views of all scans as the first block reads them; the same for every method."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"inputs-{config.architecture}-{config.views}.pt"
    if not path.exists():
        inputs = make_inputs(data, config, lambda line: print(line, flush=True))
        temporary = path.with_suffix(".part")
        torch.save(inputs, temporary)
        temporary.rename(path)
    return torch.load(path, weights_only=True, mmap=True)


def run_split(
    method: str,
    data: BrainDataset,
    inputs: torch.Tensor,
    split: Split,
    runs: Path,
    device: str = "cpu",
) -> None:
    """Train what is missing of the five networks of an outer fold and keep their predictions."""
    for member, out in enumerate(inner_folds(data, split)):
        name = f"{method}-seed{split.seed}-fold{split.fold}-net{member}"
        path = runs / f"{name}.npz"
        if path.exists():
            continue
        started = time.process_time()
        rows = np.setdiff1d(split.train, out)
        config = dataclasses.replace(
            METHODS[method], seed=100 * split.seed + 10 * split.fold + member
        )
        net, target, losses = train_network(
            config, inputs[rows], data.ages[rows], state=runs / f"{name}.state", device=device
        )
        said: dict[str, np.ndarray] = {}
        for heads in heads_of(method):
            if heads == "refit":
                refit_heads_(net, target, inputs[rows, 0], data.ages[rows])
            for part, subjects in (("inner", out), ("outer", split.test)):
                for view, mirror in (("", True), ("_unmirrored", False)):
                    said[f"{heads}_{part}{view}"] = by_head(
                        net, target, inputs[subjects, 0], mirror
                    )
        seconds = time.process_time() - started
        temporary = path.with_suffix(".part.npz")
        np.savez(
            temporary, inner=out, outer=split.test, losses=losses.numpy(), seconds=seconds, **said
        )
        BrainAgeModel([Member(net, target)]).save(runs / f"{name}.safetensors")
        temporary.rename(path)
        (runs / f"{name}.state").unlink(missing_ok=True)
        errors = " ".join(
            f"{heads}, {answer} "
            f"{np.abs(answered(said[f'{heads}_inner'], answer) - data.ages[out]).mean():.2f}"
            for heads, answer in candidates(method)
        )
        print(f"{name}: {seconds:.0f} s of CPU, MAE of the inner fold: {errors}", flush=True)


@dataclasses.dataclass(frozen=True)
class Outer:
    """Five networks of one outer fold.

    Attributes:
        test: positions of the test part.
        inner: heads -> (n train, heads) out-of-fold ages; in the order of `train`.
        outer: heads -> (members, n test, heads) ages; `unmirrored` likewise.
    """

    seed: int
    train: np.ndarray
    test: np.ndarray
    inner: dict[str, np.ndarray]
    outer: dict[str, np.ndarray]
    unmirrored: dict[str, np.ndarray]
    seconds: float


def read_split(method: str, data: BrainDataset, split: Split, runs: Path) -> Outer | None:
    """What `run_split` kept; None if a network is missing."""
    parts = []
    for member in range(len(inner_folds(data, split))):
        path = runs / f"{method}-seed{split.seed}-fold{split.fold}-net{member}.npz"
        if not path.exists():
            return None
        parts.append(np.load(path))
    train = np.concatenate([part["inner"] for part in parts])
    if sorted(train) != sorted(split.train) or any((p["outer"] != split.test).any() for p in parts):
        raise ValueError(f"{runs} holds runs on other folds; give another folder")
    return Outer(
        split.seed,
        train,
        split.test,
        {h: np.concatenate([p[f"{h}_inner"] for p in parts]) for h in heads_of(method)},
        {h: np.stack([p[f"{h}_outer"] for p in parts]) for h in heads_of(method)},
        {h: np.stack([p[f"{h}_outer_unmirrored"] for p in parts]) for h in heads_of(method)},
        float(sum(p["seconds"] for p in parts)),
    )


def heads_of(method: str) -> tuple[str, ...]:
    """The heads as trained, and refitted in closed form where they predict one number."""
    return ("trained", "refit") if METHODS[method].refit else ("trained",)


def candidates(method: str) -> list[tuple[str, str]]:
    """(heads, answer) that the inner folds choose from.

    By backpropagation the earlier heads are not trained, so they answer only when refitted.
    """
    every = [(heads, answer) for heads in heads_of(method) for answer in ("mean", "last")]
    return [c for c in every if method.startswith("local") or c != ("trained", "mean")]


def answered(ages: np.ndarray, answer: str) -> np.ndarray:
    return ages.mean(-1) if answer == "mean" else ages[..., -1]


def summarise(data: BrainDataset, runs: Path) -> None:
    """Write `brain_age.csv`, predictions and a plot for every method with whole seeds."""
    rows: list[dict[str, Any]] = []
    columns: dict[str, np.ndarray] = {}
    references = {short: read_baseline(data, name) for short, name in BASELINES.items()}
    chosen: dict[str, np.ndarray] = {}
    for method in METHODS:
        seeds = {seed: whole for seed in SEEDS if (whole := read_seed(method, data, seed, runs))}
        if not seeds:
            continue
        variants: dict[str, dict[int, np.ndarray]] = {}
        intervals: dict[int, np.ndarray] = {}
        for seed, outers in seeds.items():
            for name, predicted in predict_all(method, data, outers).items():
                variants.setdefault(name, {})[seed] = predicted
            intervals[seed] = np.full((len(data), 2), np.nan)
            for outer in outers:
                intervals[seed][outer.test] = interval_of(method, data, outer)
        cost = sum(outer.seconds for outers in seeds.values() for outer in outers)
        for name, by_seed in variants.items():
            row = scored(data, by_seed)
            for short, reference in references.items():
                row |= compared(data, by_seed, reference, f" from {short}")
            if name == "chosen by inner folds":
                row["coverage"] = round(
                    float(np.mean([coverage(intervals[s], data.ages) for s in seeds])), 4
                )
                row["width"] = round(
                    float(np.mean([np.ptp(intervals[s], axis=1).mean() for s in seeds])), 2
                )
                row["cpu_seconds_per_network"] = round(cost / (25 * len(seeds)), 1)
                chosen[method] = np.stack(list(by_seed.values()), axis=1)
                for seed, predicted in by_seed.items():
                    columns[f"{method}, seed {seed}"] = predicted
                first = min(by_seed)
                plot_agreement(
                    by_seed[first], data.ages, RESULTS / f"brain_age_{method}.png",
                    intervals[first], f"{method}, seed {first}: outer folds",
                )  # fmt: skip
            rows.append({"method": method, "variant": name, "seeds": len(seeds), **row})
            print(f"{method}, {name}: MAE {row['mae']:.2f} ± {row['mae_sd']:.2f}, r {row['r']:.3f}")
    for method, mine in chosen.items():
        if method != "local-enn" and "local-enn" in chosen:
            ours = chosen["local-enn"][:, : mine.shape[1]]
            errors = [np.abs(p - data.ages[:, None]) for p in (ours, mine)]
            rows.append(
                {"method": "local-enn", "variant": f"minus {method}", **difference(*errors)}
            )
    write_rows("brain_age", rows)
    write_rows(
        "brain_age_predictions",
        [
            {"participant_id": data.ids[i]}
            | {name: round(float(column[i]), 2) for name, column in columns.items()}
            for i in range(len(data))
        ],
    )


def read_seed(method: str, data: BrainDataset, seed: int, runs: Path) -> list[Outer]:
    """All outer folds of a seed, or nothing."""
    outers = [read_split(method, data, split, runs) for split in outer_splits(data, [seed])]
    return [] if any(o is None for o in outers) else [o for o in outers if o is not None]


def predict_all(method: str, data: BrainDataset, outers: list[Outer]) -> dict[str, np.ndarray]:
    """Name of the variant -> outer-fold ages (n,); (n, networks) where each answers alone."""
    made: dict[str, np.ndarray] = {}

    def put(name: str, outer: Outer, ages: np.ndarray) -> None:
        shape = (len(data), *ages.shape[1:])
        made.setdefault(name, np.full(shape, np.nan))[outer.test] = ages

    for outer in outers:
        heads, answer = choose(method, data, outer)
        put("chosen by inner folds", outer, answered(outer.outer[heads], answer).mean(0))
        put("one network", outer, answered(outer.outer[heads], answer).T)
        put("not mirrored", outer, answered(outer.unmirrored[heads], answer).mean(0))
        bias = BiasCorrection.fit(answered(outer.inner[heads], answer), data.ages[outer.train])
        corrected = bias.apply(answered(outer.outer[heads], answer).mean(0))
        put("bias-corrected (Cole)", outer, corrected)
        for heads, answer in candidates(method):
            put(f"{heads} heads, {answer}", outer, answered(outer.outer[heads], answer).mean(0))
        for heads in heads_of(method) if method.startswith("local") else ("refit",):
            for block in range(outer.outer[heads].shape[-1]):
                put(f"{heads} head {block + 1}", outer, outer.outer[heads][..., block].mean(0))
    return made


def choose(method: str, data: BrainDataset, outer: Outer) -> tuple[str, str]:
    """Heads and answer of the smallest out-of-fold error within the training part."""
    ages = data.ages[outer.train]

    def error(candidate: tuple[str, str]) -> float:
        heads, answer = candidate
        return float(np.abs(answered(outer.inner[heads], answer) - ages).mean())

    return min(candidates(method), key=error)


def interval_of(method: str, data: BrainDataset, outer: Outer) -> np.ndarray:
    """(n test, 2) intervals from residuals within the training part."""
    heads, answer = choose(method, data, outer)
    conformal = Conformal.fit(answered(outer.inner[heads], answer), data.ages[outer.train])
    return conformal.interval(answered(outer.outer[heads], answer).mean(0), CONFIDENCE)


def scored(data: BrainDataset, by_seed: dict[int, np.ndarray]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; networks that answer alone are averaged first."""
    scores = [
        [evaluate(column, data.ages) for column in np.atleast_2d(predicted.T)]
        for predicted in by_seed.values()
    ]
    row: dict[str, Any] = {}
    for key in ("mae", "rmse", "r", "r2", "bias_slope"):
        values = [np.mean([score[key] for score in each]) for each in scores]
        row[key] = round(float(np.mean(values)), 4)
        row[f"{key}_sd"] = round(float(np.std(values)), 4)
    mean = np.mean([p if p.ndim == 1 else p.mean(1) for p in by_seed.values()], axis=0)
    for part in by_decade(mean, data.ages):
        row[f"mae_{part['decade']}"] = round(part["mae"], 2)
    return row


def compared(
    data: BrainDataset,
    by_seed: dict[int, np.ndarray],
    reference: dict[int, np.ndarray],
    of: str,
) -> dict[str, Any]:
    """Difference of absolute errors from a baseline's on the same folds."""
    ours = [np.abs(p.T - data.ages).reshape(-1, len(data)).mean(0) for p in by_seed.values()]
    theirs = [np.abs(reference[seed] - data.ages) for seed in by_seed]
    return difference(np.stack(ours, axis=1), np.stack(theirs, axis=1), of)


def difference(errors: np.ndarray, reference: np.ndarray, of: str = "") -> dict[str, Any]:
    mean, low, high = paired_difference(errors, reference)
    return {
        f"difference{of}": round(mean, 3),
        f"low{of}": round(low, 3),
        f"high{of}": round(high, 3),
    }


def read_baseline(data: BrainDataset, name: str) -> dict[int, np.ndarray]:
    """Predictions of a baseline, seed -> (n,), as `brain_baselines.py` wrote them."""
    import csv

    path = RESULTS / "brain_baselines_predictions.csv"
    if not path.exists():
        raise FileNotFoundError(f"no {path}; run benchmarks/brain_baselines.py first")
    with path.open(newline="", encoding="utf-8") as file:
        table = {row["participant_id"]: row for row in csv.DictReader(file)}
    return {
        seed: np.array([float(table[i][f"{name}, seed {seed}"]) for i in data.ids])
        for seed in SEEDS
    }


if __name__ == "__main__":
    main()
