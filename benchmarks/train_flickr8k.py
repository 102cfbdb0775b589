"""A small ViT from scratch on Flickr8k: backprop, eigen layers, and ENN-l, each at its best rate.

    python benchmarks/train_flickr8k.py --work DIR             # everything: rates, then runs
    python benchmarks/train_flickr8k.py --work DIR --jobs 2    # two trainings at a time

Same network, captions, augmentation, budget and random streams; only how the network learns
differs. The peak learning rate of each is chosen from one grid by recall among 1,000 held-out
images of the training split; the official val split is looked at once, after all runs. Photos are
first reduced to 144 pixels, so that decoding does not dominate. A stopped run of this script goes
on where it was. Numbers go to results/train_flickr8k.csv, curves to docs/images/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from record import write_rows

METHODS: dict[str, dict[str, Any]] = {
    "backprop, plain layers": {"rule": "backprop", "layers": "plain"},
    "backprop, eigen layers, exact": {"rule": "backprop", "layers": "exact"},
    "ENN-l, exact, 4 blocks": {"rule": "local", "layers": "exact", "blocks": 4},
    "local losses, plain layers, 4 blocks": {"rule": "local", "layers": "plain", "blocks": 4},
}
RATES = (1e-3, 2e-3, 4e-3)  # wider where the best of them is at an end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--rate-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", type=int, nargs="+", default=list(range(len(METHODS))))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one training, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.work, json.loads(arguments.one))
        return
    names = [list(METHODS)[i] for i in arguments.methods]
    arguments.work.mkdir(parents=True, exist_ok=True)
    reduce_photos(arguments.work / "photos")
    tune = {"epochs": arguments.rate_epochs, "holdout": 1000, "seed": 0, "warmup": 40}
    wanted = [(name, rate) for rate in RATES for name in names]
    tuned: list[dict[str, Any]] = []
    while wanted:
        jobs = [{**METHODS[name], **tune, "lr": rate, "method": name} for name, rate in wanted]
        tuned += run_all(arguments, jobs)
        best = {name: best_rate(tuned, name) for name in names}
        wanted = [(name, rate) for name in names for rate in beyond(tuned, name, best[name])]
    full = {"epochs": arguments.epochs, "warmup": 80}
    jobs = [
        {**METHODS[name], **full, "lr": best[name], "seed": seed, "method": name}
        for seed in range(arguments.seeds)
        for name in names
    ]
    done = run_all(arguments, jobs)
    write_rows("train_flickr8k", table(tuned, done))
    plot(done, Path(__file__).parents[1] / "docs" / "images" / "train_flickr8k.png")


def best_rate(tuned: list[dict[str, Any]], name: str) -> float:
    own = [row for row in tuned if row["method"] == name]
    return max(own, key=lambda row: row["holdout"]["t2i_R@10"])["lr"]


def beyond(tuned: list[dict[str, Any]], name: str, best: float) -> list[float]:
    """The next rate, if the best one so far is the smallest or largest tried."""
    rates = [row["lr"] for row in tuned if row["method"] == name]
    return [2 * best] * (best == max(rates)) + [best / 2] * (best == min(rates))


def run_all(arguments: argparse.Namespace, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of jobs, those that are missing computed in processes of one thread each."""

    def work(job: dict[str, Any]) -> dict[str, Any]:
        file = folder_of(arguments.work, job) / "result.json"
        if not file.exists():
            command = [sys.executable, __file__, "--work", str(arguments.work)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--one", json.dumps(job)], check=True, env=environment)
        result = json.loads(file.read_text(encoding="utf-8"))
        print(job["method"], job["lr"], job["seed"], result.get("holdout") or result["val"])
        return {**job, **result}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return list(pool.map(work, jobs))


def folder_of(work: Path, job: dict[str, Any]) -> Path:
    parts = (job["rule"], job["layers"], job["epochs"], f"{job['lr']:g}", job["seed"])
    return work / "-".join(map(str, parts))


def run_one(work: Path, job: dict[str, Any]) -> None:
    from retrieval.training.config import TrainConfig
    from retrieval.training.run import train

    settings = {key: value for key, value in job.items() if key != "method"}
    folder = folder_of(work, job)
    fixed = {"workers": 0, "images": str(work / "photos"), "save_every": 10**6}
    config = TrainConfig.load("flickr8k", {**settings, **fixed})
    shared = work / "texts"
    shared.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "texts").exists():
        (folder / "texts").symlink_to(shared.resolve(), target_is_directory=True)
    cpu = time.process_time()
    result = train(config, output=folder)
    result["cpu_s"] = time.process_time() - cpu
    if not config.holdout:
        result["val"] = recalls_on_val(folder / "model", work / "photos")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def recalls_on_val(model: Path, photos: Path) -> dict[str, float]:
    import retrieval
    from retrieval.datasets.protocols import open_dataset
    from retrieval.eval.recall import evaluate

    dataset = open_dataset("flickr8k", images=photos, split="val")
    metrics = evaluate(retrieval.load(f"local-dir:{model}", runtime="torch"), dataset)["metrics"]
    return {key: value for key, value in metrics.items() if "recall" in key}


def reduce_photos(folder: Path) -> None:
    """Copies of the photos, 144 x 144, without loss."""
    from PIL import Image

    source = Path(os.environ.get("ENN_DATA", "../shared/data")) / "flickr8k" / "images"
    folder.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.jpg")):
        target = folder / path.name
        if not target.exists():
            with Image.open(path) as photo:
                small = photo.convert("RGB").resize((144, 144), Image.Resampling.BICUBIC)
                small.save(target, quality=95, subsampling=0)


def table(tuned: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [
        {
            "stage": "rate",
            "method": row["method"],
            "lr": row["lr"],
            "seeds": 1,
            "epochs": row["epochs"],
            "heldout_t2i_R@10": row["holdout"]["t2i_R@10"],
            "heldout_i2t_R@10": row["holdout"]["i2t_R@10"],
            "loss": row["loss"],
        }
        for row in tuned
    ]
    for name in dict.fromkeys(row["method"] for row in done):
        own = [row for row in done if row["method"] == name]
        row = {"stage": "val", "method": name, "lr": own[0]["lr"], "seeds": len(own)}
        row["epochs"] = own[0]["epochs"]
        for key in sorted(key for key in own[0]["val"] if "@" in key and key[-1].isdigit()):
            values = 100 * np.array([one["val"][key] for one in own])
            row[f"{key}_mean"] = round(float(values.mean()), 2)
            row[f"{key}_sd"] = round(float(values.std(ddof=1)), 2) if len(own) > 1 else ""
        row["loss"] = round(float(np.mean([one["loss"] for one in own])), 4)
        row["orthogonality"] = max(one["orthogonality"] for one in own)
        row["cpu_s_mean"] = round(float(np.mean([one["cpu_s"] for one in own])))
        rows.append(row)
    return rows


def plot(done: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["method"] for row in done):
        own = [row for row in done if row["method"] == name]
        logs = [read_log(Path(row["model"]).parent / "log.csv") for row in own]
        epochs = [row["epoch"] for row in logs[0]]
        loss = np.array([[row["loss"] for row in log] for log in logs])
        (line,) = left.plot(epochs, loss.mean(0), label=name)
        left.fill_between(epochs, loss.min(0), loss.max(0), alpha=0.2, color=line.get_color())
        recall = [100 * row["val"]["image_retrieval_recall@10"] for row in own]
        right.scatter(recall, [name] * len(recall), color=line.get_color())
    left.set(xlabel="epoch", ylabel="training loss of the last head")
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="text to image R@10 on val, %, each seed")
    right.tick_params(axis="y", labelsize=7)
    right.invert_yaxis()
    figure.savefig(file, dpi=120)


def read_log(file: Path) -> list[dict[str, float]]:
    with file.open(encoding="utf-8") as lines:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


if __name__ == "__main__":
    main()
