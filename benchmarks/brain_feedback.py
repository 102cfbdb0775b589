"""Teaching a site: ages of a new scanner, and of the old one, after some labelled scans.

    python benchmarks/brain_feedback.py --measure        # what the networks make of every brain
    python benchmarks/brain_feedback.py --young          # networks that never saw the oldest third
    python benchmarks/brain_feedback.py --finetune       # the dear baseline, on part of it
    python benchmarks/brain_feedback.py --summary        # CSV and plot from what is there

Networks are those of `brain_age.py` (local-enn, seed 0); each outer fold is judged on the people
that none of its five networks has seen. New sites are their brains through `brain_sites.py`; the
old site are the same people as they are. Of a fold's people, 20 can be labelled and 10 others are
judged, in `--draws` draws. `--young` trains on four fifths of the younger two thirds: the new site
are the older people, the old site the last fifth of the younger.

Ages are of the networks without mirroring. Constants of the rule were chosen on folds 0 and 1 at
the strengths called "development"; what is reported has others.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brain_age import METHODS, cached_inputs
from brain_sites import SITES, seen_at
from ixi import find_ixi, outer_splits
from record import RESULTS, write_rows
from torch.nn import functional as F

from neuro.age.model import BrainAgeModel, Member
from neuro.age.population import GRID, Population, summarise
from neuro.dataset import BrainDataset, folds
from neuro.metrics import paired_difference
from neuro.scans.grid import as_input
from neuro.site_rule import Correction, Taught
from neuro.train import refit_heads_, train_network

COUNTS = (0, 1, 3, 5, 10, 20)
JUDGED = 10
YOUNG = "oldest third"
TUNED = "full fine-tuning"
_BOOTSTRAP = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--young", action="store_true")
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--summary", action="store_true", help="write CSV and plot")
    parser.add_argument("--folds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--sites", nargs="*", default=list(SITES), help="of --finetune")
    parser.add_argument("--counts", type=int, nargs="*", default=[10], help="of --finetune")
    parser.add_argument("--tunes", type=int, default=3, help="draws of --finetune, at least 2")
    parser.add_argument("--networks", type=int, default=5, help="of --young")
    parser.add_argument("--strength", choices=("reported", "development"), default="reported")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/brain_age"))
    parser.add_argument("--kept", type=Path, default=Path("runs/brain_feedback"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.kept.mkdir(parents=True, exist_ok=True)
    data = BrainDataset.read(find_ixi() / "brains_mni_2mm")
    if args.measure:
        for fold in args.folds:
            measure_fold(data, fold, args)
    if args.young:
        measure_young(data, args)
    if args.finetune:
        finetune(data, args)
    if args.speed:
        write_rows("brain_feedback_speed", [speed(data, args)])
    if args.summary:
        summarise_all(data, args)


# --- what the networks make of brains ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Looked:
    """Brains after the forward pass: positions, raw ages (n,), features (n, d)."""

    rows: np.ndarray
    raw: np.ndarray
    features: np.ndarray


@torch.no_grad()
def look(model: BrainAgeModel, volumes: list[np.ndarray], rows: np.ndarray, path: Path) -> None:
    """Keep the raw ages and features of brains in a file, unless it is there."""
    if path.exists():
        return
    started = time.process_time()
    raw, features = [], []
    for volume in volumes:
        stem = model.members[0].net.stem(torch.from_numpy(as_input(volume[None])))
        ages, parts = [], []
        for member in model.members:
            h = stem
            for unit in member.net.blocks:
                # As the journal keeps it: the last block reads half precision.
                h = h.half().float() if unit is member.net.blocks[-1] else h
                h = unit.block(h)  # type: ignore[operator]
                ages.append(float(member.target.ages(unit.head(h))))  # type: ignore[operator]
            parts.append(F.adaptive_avg_pool3d(h, GRID).flatten())
        raw.append(np.mean(ages))
        features.append(torch.cat(parts).numpy())
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, rows=rows, raw=np.array(raw), features=np.stack(features))
    temporary.rename(path)
    print(f"{path.name}: {time.process_time() - started:.0f} s of CPU", flush=True)


def read(path: Path) -> Looked:
    stored = np.load(path)
    return Looked(stored["rows"], stored["raw"], stored["features"])


def measure_fold(data: BrainDataset, fold: int, args: argparse.Namespace) -> None:
    """The training people, the test people, and these at every site."""
    split = next(s for s in outer_splits(data, [0]) if s.fold == fold)
    model = networks([args.runs / f"local-enn-seed0-fold{fold}-net{m}" for m in range(5)])
    for part, rows in (("train", split.train), ("plain", split.test)):
        look(model, list(data.volumes[rows]), rows, args.kept / f"fold{fold}-{part}.npz")
    for site, strengths in SITES.items():
        settings = strengths[args.strength]
        brains = [seen_at(data.volumes[row], data.ids[row], settings) for row in split.test]
        path = args.kept / f"fold{fold}-{site}-{args.strength}.npz"
        look(model, brains, split.test, path)


def networks(paths: list[Path]) -> BrainAgeModel:
    members = [BrainAgeModel.load(path.with_suffix(".safetensors")).members[0] for path in paths]
    return BrainAgeModel(members)


def measure_young(data: BrainDataset, args: argparse.Namespace) -> None:
    """Train without the oldest third, then look at everybody."""
    by_age = np.argsort(data.ages, kind="stable")
    old, young = np.sort(by_age[-(len(data) // 3) :]), np.sort(by_age[: -(len(data) // 3)])
    test = young[folds([data.ids[i] for i in young], data.ages[young], 5, "young")[0]]
    train = np.setdiff1d(young, test)
    inner = folds([data.ids[i] for i in train], data.ages[train], 5, "young.inner")
    inputs = cached_inputs(data, METHODS["local-enn"], args.runs)
    for number, out in list(enumerate(inner))[: args.networks]:
        path = args.kept / f"young-net{number}.safetensors"
        if path.exists():
            continue
        rows = np.setdiff1d(train, train[out])
        config = dataclasses.replace(METHODS["local-enn"], seed=900 + number)
        state = path.with_suffix(".state")
        net, target, _ = train_network(config, inputs[rows], data.ages[rows], state=state)
        refit_heads_(net, target, inputs[rows, 0], data.ages[rows])
        BrainAgeModel([Member(net, target)]).save(path)
        state.unlink()
    model = networks([args.kept / f"young-net{number}" for number in range(args.networks)])
    for part, rows in (("train", train), ("plain", test), ("old", old)):
        look(model, list(data.volumes[rows]), rows, args.kept / f"young-{part}.npz")


# --- methods -------------------------------------------------------------------------------------


def none(taught: Taught, population: Population) -> Any:
    return lambda looked: np.zeros(len(looked.raw))


def offset(taught: Taught, population: Population) -> Any:
    moved = float(np.mean(taught.ages - taught.raw))
    return lambda looked: np.full(len(looked.raw), moved)


def line(taught: Taught, population: Population) -> Any:
    """Slope and offset; the offset alone for fewer than two scans."""
    if len(taught.raw) < 2:
        return offset(taught, population)
    slope, moved = np.polyfit(taught.raw, taught.ages, 1)
    return lambda looked: slope * looked.raw + moved - looked.raw


def ours(taught: Taught, population: Population) -> Any:
    correction = Correction.fit(population, taught)
    return lambda looked: correction(looked.features, looked.raw)


RULES = {"no update": none, "offset only": offset, "slope + offset": line, "ours": ours}


@dataclasses.dataclass
class Errors:
    """Absolute errors by method, labelled scans and person, at the new and at the old site."""

    new: dict[tuple[str, int], dict[int, list[float]]]
    old: dict[tuple[str, int], dict[int, list[float]]]

    def put(self, part: str, key: tuple[str, int], rows: np.ndarray, errors: np.ndarray) -> None:
        kept = (self.new if part == "new" else self.old).setdefault(key, {})
        for row, error in zip(rows, errors, strict=True):
            kept.setdefault(int(row), []).append(float(error))

    def of(self, part: str, key: tuple[str, int]) -> np.ndarray:
        """(people,) mean error of each person over the draws."""
        kept = (self.new if part == "new" else self.old)[key]
        return np.array([np.mean(kept[row]) for row in sorted(kept)])


def judge(
    errors: Errors,
    data: BrainDataset,
    train: Looked,
    new: Looked,
    old: Looked,
    args: argparse.Namespace,
    same_people: bool,
) -> None:
    """Label, correct and judge in every draw."""
    population = summarise(train.features)
    for draw in range(args.draws):
        order = np.random.default_rng([7, draw]).permutation(len(new.rows))
        labelled, judged = order[: -JUDGED if same_people else COUNTS[-1]], order[-JUDGED:]
        if not same_people:
            judged = order[COUNTS[-1] :]
        there = part_of(new, judged)
        here = part_of(old, judged) if same_people else old
        for count in COUNTS:
            rows = labelled[:count]
            taught = Taught(new.features[rows], new.raw[rows], data.ages[new.rows[rows]])
            for name, rule in RULES.items():
                correct = (rule if count else none)(taught, population)
                for part, looked in (("new", there), ("old", here)):
                    said = looked.raw + correct(looked)
                    gaps = np.abs(said - data.ages[looked.rows])
                    errors.put(part, (name, count), looked.rows, gaps)


def part_of(looked: Looked, rows: np.ndarray) -> Looked:
    return Looked(looked.rows[rows], looked.raw[rows], looked.features[rows])


# --- fine-tuning ---------------------------------------------------------------------------------


def finetune(data: BrainDataset, args: argparse.Namespace) -> None:
    """All weights of one network by backpropagation, beside the other methods on that network.

    Twenty steps of AdamW on all labelled scans at once, at 1/10 of the training's highest rate:
    what a user without validation data would run.
    """
    fold = args.folds[0]
    split = next(s for s in outer_splits(data, [0]) if s.fold == fold)
    path = args.runs / f"local-enn-seed0-fold{fold}-net0.safetensors"
    rows_out: list[dict[str, Any]] = []
    member = BrainAgeModel.load(path).members[0]
    stem = member.net.stem
    plain = stems(stem, list(data.volumes[split.test]))
    single = BrainAgeModel([member])
    look(single, list(data.volumes[split.train]), split.train, args.kept / f"one{fold}-train.npz")
    look(single, list(data.volumes[split.test]), split.test, args.kept / f"one{fold}-plain.npz")
    population = summarise(read(args.kept / f"one{fold}-train.npz").features)
    for site in args.sites:
        settings = SITES[site][args.strength]
        brains = [seen_at(data.volumes[row], data.ids[row], settings) for row in split.test]
        kept = args.kept / f"one{fold}-{site}-{args.strength}.npz"
        look(single, brains, split.test, kept)
        new, old = read(kept), read(args.kept / f"one{fold}-plain.npz")
        there = stems(stem, brains)
        for count in args.counts:
            gaps: dict[str, list[list[float]]] = {}
            seconds = 0.0
            for draw in range(args.tunes):
                order = np.random.default_rng([7, draw]).permutation(len(split.test))
                judged, rows = order[-JUDGED:], order[:count]
                known = data.ages[split.test[judged]]
                ages = data.ages[split.test[rows]]
                taught = Taught(new.features[rows], new.raw[rows], ages)
                looks = part_of(new, judged), part_of(old, judged)
                for name, rule in RULES.items():
                    correct = rule(taught, population)
                    said = [looked.raw + correct(looked) for looked in looks]
                    gaps.setdefault(name, []).append([_mae(each, known) for each in said])
                started = time.process_time()
                tuned = tune(path, there[rows], ages)
                seconds += time.process_time() - started
                said = [ages_of(tuned, inputs[judged]) for inputs in (there, plain)]
                gaps.setdefault(TUNED, []).append([_mae(each, known) for each in said])
            for name, pairs in gaps.items():
                (new_mean, old_mean), sd = np.mean(pairs, 0), np.std(pairs, 0, ddof=1)
                row = {"site": site, "labelled": count, "method": name, "draws": args.tunes}
                row |= {"new": round(new_mean, 3), "old": round(old_mean, 3)}
                row |= {"new_sd": round(sd[0], 3), "old_sd": round(sd[1], 3)}
                if name == TUNED:
                    row["cpu_seconds"] = round(seconds / args.tunes, 1)
                rows_out.append(row)
            print(site, count, {k: np.mean(v, 0).round(2).tolist() for k, v in gaps.items()})
            write_rows("brain_feedback_finetune", rows_out)


def _mae(said: np.ndarray, known: np.ndarray) -> float:
    return float(np.abs(said - known).mean())


@torch.no_grad()
def stems(stem: torch.nn.Module, volumes: list[np.ndarray]) -> torch.Tensor:
    return torch.cat([stem(torch.from_numpy(as_input(volume[None]))) for volume in volumes])


def tune(path: Path, inputs: torch.Tensor, ages: np.ndarray, steps: int = 20) -> Member:
    member = BrainAgeModel.load(path).members[0]
    net, target = member.net, member.target
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=1e-3)
    wanted = torch.from_numpy(ages).float()
    for _ in range(steps):
        optimizer.zero_grad()
        said = torch.stack([target.ages(head) for head in net.heads_say(inputs)]).mean(0)
        ((said - wanted) / target.sd).square().mean().backward()  # type: ignore[attr-defined]
        optimizer.step()
    return member


@torch.no_grad()
def ages_of(member: Member, inputs: torch.Tensor) -> np.ndarray:
    said = [member.target.ages(head) for head in member.net.heads_say(inputs)]
    return torch.stack(said).mean(0).double().numpy()


# --- speed ---------------------------------------------------------------------------------------


def speed(data: BrainDataset, args: argparse.Namespace) -> dict[str, Any]:
    """From the click to refreshed predictions of 500 earlier scans, ten scans taught before."""
    import tempfile

    from neuro.age.model import features_of
    from neuro.age.predict import BrainAge, Seen
    from neuro.teach import Site, ready

    model = networks([args.runs / f"local-enn-seed0-fold0-net{m}" for m in range(5)])
    inputs = []
    with torch.no_grad():
        for volume in data.volumes[:40]:
            stem = model.members[0].net.stem(torch.from_numpy(as_input(volume[None])))
            inputs.append(np.stack([_before_last(member, stem) for member in model.members]))
    model.population = summarise([features_of(model, each) for each in inputs])
    brain = BrainAge(model, None, "00" * 32)
    rng = np.random.default_rng(0)
    said = np.full((5, 4), 50.0)
    earlier = [
        Seen(f"{i}", float(rng.uniform(20, 80)), said, inputs[i % 40], [], 0.5) for i in range(500)
    ]
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, Site.open(brain, path=f"{folder}/s") as site:
        started = time.perf_counter()
        for seen in earlier:
            ready(brain, seen)  # once, when a scan is looked at
        looking = (time.perf_counter() - started) / len(earlier)
        started = time.perf_counter()
        site.teach(Seen("a", 40.0, said, inputs[0], [], 0.5), 50.0, earlier=earlier, force=True)
        first = time.perf_counter() - started
        for i in range(1, 10):
            site.teach(Seen(f"t{i}", 40.0, said, inputs[i], [], 0.5), 50.0, force=True)
        times = []
        for i in range(10, 20):
            new = Seen(f"t{i}", 40.0, said, inputs[i], [], 0.5)
            started = time.perf_counter()
            site.teach(new, 50.0, force=True)
            site.corrections(earlier)
            times.append(time.perf_counter() - started)
    row = {"earlier": 500, "labelled": "10 to 19", "median_s": round(float(np.median(times)), 4)}
    row |= {
        "worst_s": round(max(times), 4),
        "first_s": round(first, 2),
        "per_scan_before_s": round(looking, 3),
    }
    print(row)
    return row


def _before_last(member: Member, stem: torch.Tensor) -> np.ndarray:
    h = stem
    for unit in list(member.net.blocks)[:-1]:
        h = unit.block(h)  # type: ignore[operator]
    return h[0].half().numpy()


# --- summary -------------------------------------------------------------------------------------


def summarise_all(data: BrainDataset, args: argparse.Namespace) -> None:
    shifts: dict[str, Errors] = {}
    for fold in args.folds:
        for site in SITES:
            path = args.kept / f"fold{fold}-{site}-{args.strength}.npz"
            if path.exists():
                train, plain = (read(args.kept / f"fold{fold}-{p}.npz") for p in ("train", "plain"))
                errors = shifts.setdefault(site, Errors({}, {}))
                judge(errors, data, train, read(path), plain, args, same_people=True)
    if (args.kept / "young-old.npz").exists():
        train, plain, old = (
            read(args.kept / f"young-{part}.npz") for part in ("train", "plain", "old")
        )
        shifts[YOUNG] = Errors({}, {})
        judge(shifts[YOUNG], data, train, old, plain, args, same_people=False)
    rows = [row for shift, errors in shifts.items() for row in scored(shift, errors)]
    synthetic = [errors for shift, errors in shifts.items() if shift != YOUNG]
    rows += scored("all synthetic sites", pooled(synthetic))
    suffix = "" if args.strength == "reported" else "_development"
    write_rows(f"brain_feedback{suffix}", rows)
    plot(rows, RESULTS / f"brain_feedback{suffix}.png")
    for row in rows:
        if row["method"] in ("ours", "offset only") and row["labelled"] in (1, 10, 20):
            print({k: v for k, v in row.items() if k != "people"})


def pooled(parts: list[Errors]) -> Errors:
    """Every person's errors at all sites."""
    made = Errors({}, {})
    for part in parts:
        for mine, theirs in ((made.new, part.new), (made.old, part.old)):
            for key, people in theirs.items():
                for row, errors in people.items():
                    mine.setdefault(key, {}).setdefault(row, []).append(float(np.mean(errors)))
    return made


def scored(shift: str, errors: Errors) -> list[dict[str, Any]]:
    """A row for each method and number of labelled scans; intervals over people, 95 %."""
    rows = []
    before, known = errors.of("new", ("no update", 0)), errors.of("old", ("no update", 0))
    added = before.mean() - known.mean()
    for name in RULES:
        for count in COUNTS:
            new, old = (errors.of(part, (name, count)) for part in ("new", "old"))
            rivals = errors.of("new", ("offset only", count))
            gain, low, high = paired_difference(new, before, _BOOTSTRAP)
            against, against_low, against_high = paired_difference(new, rivals, _BOOTSTRAP)
            moved, moved_low, moved_high = paired_difference(old, known, _BOOTSTRAP)
            rows.append(
                {
                    "shift": shift,
                    "method": name,
                    "labelled": count,
                    "people": len(new),
                    "mae_new": round(float(new.mean()), 3),
                    "added_error": round(float(added), 3),
                    "removed": round(float(-gain / added), 4),
                    "removed_low": round(float(-high / added), 4),
                    "removed_high": round(float(-low / added), 4),
                    "minus_offset": round(against, 3),
                    "minus_offset_low": round(against_low, 3),
                    "minus_offset_high": round(against_high, 3),
                    "mae_old": round(float(old.mean()), 3),
                    "old_change": round(moved, 3),
                    "old_change_low": round(moved_low, 3),
                    "old_change_high": round(moved_high, 3),
                }
            )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors over labelled scans: the new site above, the old one below."""
    from matplotlib.figure import Figure

    shifts = list(dict.fromkeys(row["shift"] for row in rows))
    figure = Figure(figsize=(2.6 * len(shifts), 5.2), layout="constrained")
    axes = figure.subplots(2, len(shifts), sharex=True, squeeze=False)
    for column, shift in enumerate(shifts):
        for name in RULES:
            mine = [row for row in rows if row["shift"] == shift and row["method"] == name]
            counts = range(len(mine))
            for axis, key in ((axes[0, column], "mae_new"), (axes[1, column], "mae_old")):
                axis.plot(counts, [row[key] for row in mine], marker="o", ms=3, label=name)
                axis.set_xticks(list(counts), [str(row["labelled"]) for row in mine])
        axes[0, column].set_title(shift, fontsize=10)
        axes[1, column].set_xlabel("labelled scans")
        for axis in axes[:, column]:
            axis.set_ylim(0, 20)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("MAE at the new site, years")
    axes[1, 0].set_ylabel("MAE at the old site, years")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
