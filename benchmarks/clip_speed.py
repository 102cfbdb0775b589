"""Speed of ViT-B/16 with 248 tokens on a CPU, beside open_clip and transformers, in one process.

    python benchmarks/clip_speed.py            # about 8 minutes on two idle cores
    python benchmarks/clip_speed.py --quick    # does it run?

All have the same weights: random ones, as published ones cannot be had everywhere; `export` writes
them for the others. Everything goes from JPEG files, or strings, to vectors. The others run as
their users run them: open_clip's transform in a loop or in a DataLoader, its tokenizer to 248
tokens; transformers' processor, which pads texts to the longest of a batch; batches under
`no_grad`, in float32. Systems take turns; best and median of the rounds count, and the CPU time of
all threads and worker processes stands beside, for busy machines.

What bf16 costs in vectors: cosines and neighbours among Flickr8k's photos with the same random
weights, whose vectors lie closer together than a trained model's (harder), and the recall of the
shipped model. Writes `benchmarks/results/clip_speed.csv`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from record import write_rows

import retrieval.model.loading
from retrieval.datasets.protocols import open_dataset
from retrieval.eval.recall import embed_images, evaluate
from retrieval.images import decode
from retrieval.model import runtime
from retrieval.model.architecture import find_architecture
from retrieval.model.export import export

Embed = Callable[[Sequence[Any]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=data, help="folder with flickr8k in it")
    parser.add_argument("--quick", action="store_true", help="few photos, one round, no file")
    parser.add_argument("--architecture", default="long-eclip-b16", help="name or .json")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    quick, batch = arguments.quick, arguments.batch_size
    rounds, photos, nearby, few = (1, 8, 16, 4) if quick else (3, 16, 16, 16)

    dataset = open_dataset("flickr8k", data=arguments.data, split="val")
    paths = list(dataset.images)
    captions = list(dict.fromkeys(dataset.captions))
    rows = []
    with tempfile.TemporaryDirectory() as folder, own_cache(Path(folder)):
        say("making the models")
        models, systems = make(arguments.architecture, Path(folder), batch)
        rows += measure(
            "images", {name: s[0] for name, s in systems.items()}, rounds, lambda _: paths[:photos]
        )
        texts = {name: s[1] for name, s in systems.items() if s[1] is not None}
        rows += measure("short texts", texts, rounds, lambda i: captions[i * few : (i + 1) * few])
        rows += measure(
            "one query",
            {name: one_by_one(embed) for name, embed in texts.items()},
            rounds,
            lambda i: captions[-8 * (i + 2) : -8 * (i + 1)],
        )
        towers = {
            f"{name}, tower alone": tower for name, tower in image_towers(models, folder).items()
        }
        pixels = np.stack([models["f32"].preprocess(decode(path)) for path in paths[:16]])
        rows += measure("pixels", towers, min(rounds, 3), lambda _: pixels)
        rows += [neighbours(models, paths[:nearby], batch)]
    rows += mini_recall(arguments.data, 20 if quick else None)
    for row in rows:
        row.setdefault("architecture", arguments.architecture)
        row["threads"] = torch.get_num_threads()
    if not quick:
        print(write_rows("clip_speed", rows))


@contextlib.contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Compiled towers of random weights are of no use to anybody else."""
    before = runtime.cache_dir
    runtime.cache_dir = lambda: folder / "cache"
    try:
        yield
    finally:
        runtime.cache_dir = before


def make(
    architecture: str, folder: Path, batch: int
) -> tuple[dict[str, Any], dict[str, tuple[Embed, Embed | None]]]:
    """Our models by precision, and (images, texts) of every system."""
    torch.manual_seed(0)
    state = open_clip.CLIP(**find_architecture(architecture).model).state_dict()
    torch.save(state, folder / "random.pt")
    models = {
        precision: retrieval.load(
            architecture, checkpoint=folder / "random.pt", precision=precision
        )
        for precision in runtime.PRECISIONS
    }
    systems: dict[str, tuple[Embed, Embed | None]] = {}
    for precision, model in models.items():

        def images(paths: Sequence[Path], model: Any = model) -> np.ndarray:
            return embed_images(model, paths, batch_size=batch) @ model.basis.Q.T

        def texts(strings: Sequence[str], model: Any = model) -> np.ndarray:
            return model.text_vectors(strings) @ model.basis.Q.T

        # Texts are in f32 whatever the precision.
        systems[f"ours {precision}"] = images, texts if precision == "f32" else None
    for form in ("open_clip", "transformers"):
        export(models["f32"], folder / form, form)
    systems |= open_clip_systems(folder / "open_clip", batch)
    systems |= transformers_systems(folder / "transformers", batch)
    return models, systems


def open_clip_systems(folder: Path, batch: int) -> dict[str, tuple[Embed, Embed | None]]:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    class Files(torch.utils.data.Dataset):
        def __init__(self, paths: Sequence[Path]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, i: int) -> torch.Tensor:
            return transform(Image.open(self.paths[i]))

    def loop(paths: Sequence[Path]) -> np.ndarray:
        rows = []
        for part in parts(paths, batch):
            pixels = torch.stack([transform(Image.open(path)) for path in part])
            with torch.no_grad():
                rows.append(model.encode_image(pixels, normalize=True))
        return torch.cat(rows).numpy()

    def loader(paths: Sequence[Path]) -> np.ndarray:
        batches = torch.utils.data.DataLoader(
            Files(paths), batch_size=batch, num_workers=os.cpu_count() or 1
        )
        with torch.no_grad():
            return torch.cat([model.encode_image(b, normalize=True) for b in batches]).numpy()

    def texts(strings: Sequence[str]) -> np.ndarray:
        rows = []
        for part in parts(strings, batch):
            with torch.no_grad():
                rows.append(model.encode_text(tokenizer(list(part)), normalize=True))
        return torch.cat(rows).numpy()

    return {"open_clip": (loop, texts), "open_clip, DataLoader": (loader, None)}


def transformers_systems(folder: Path, batch: int) -> dict[str, tuple[Embed, Embed | None]]:
    transformers.logging.set_verbosity_error()
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)

    def images(paths: Sequence[Path]) -> np.ndarray:
        rows = []
        for part in parts(paths, batch):
            given = processor(images=[Image.open(path) for path in part], return_tensors="pt")
            with torch.no_grad():
                rows.append(model.get_image_features(**given).pooler_output)
        return unit(torch.cat(rows).numpy())

    def texts(strings: Sequence[str]) -> np.ndarray:
        rows = []
        for part in parts(strings, batch):
            given = processor(text=list(part), return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                rows.append(model.get_text_features(**given).pooler_output)
        return unit(torch.cat(rows).numpy())

    return {"transformers": (images, texts)}


def image_towers(models: dict[str, Any], folder: str) -> dict[str, Embed]:
    """What a runtime alone takes, on pixels that lie ready; why OpenVINO is the one taken."""
    towers: dict[str, Embed] = {}
    for name in runtime.available_runtimes():
        for precision, model in models.items():
            if name != model.runtime:
                model = retrieval.load(model.name, precision=precision, runtime=name)
            towers[f"{name} {precision}"] = model.image_vectors
    with contextlib.suppress(ImportError):
        import onnxruntime

        export(models["f32"], Path(folder) / "onnx", "onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "onnx" / "image.onnx")

        def onnx(pixels: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [session.run(None, {"pixels": part})[0] for part in parts(pixels, 8)]
            )

        towers["onnxruntime f32"] = onnx
    return towers


def measure(
    what: str, systems: dict[str, Embed], rounds: int, items: Callable[[int], Sequence[Any]]
) -> list[dict[str, Any]]:
    """Rounds in which the systems take turns; `items(round)` is what each gets."""
    wall: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    vectors: dict[str, np.ndarray] = {}
    for i in range(-1, rounds):  # round -1 warms up
        for name, embed in systems.items():
            given = items(max(i, 0))
            # Texts of a round are new to whoever remembers them.
            given = given[:2] if i < 0 else given
            if i < 0 and isinstance(given[0], str):
                given = [f"{text} once" for text in given]
            started, used = time.perf_counter(), used_cpu()
            got = embed(given)
            if i >= 0:
                wall[name].append((time.perf_counter() - started) / len(given))
                cpu[name].append((used_cpu() - used) / len(given))
                vectors.setdefault(name, got)
    rows = []
    peers = [name for name in systems if name.startswith(("open_clip", "transformers"))]
    for name in systems:
        row = {
            "measured": what,
            "system": name,
            "wall_ms_best": round(1000 * min(wall[name]), 2),
            "wall_ms_median": round(1000 * float(np.median(wall[name])), 2),
            "cpu_ms_best": round(1000 * min(cpu[name]), 2),
            "cpu_ms_median": round(1000 * float(np.median(cpu[name])), 2),
            "per_second_best": round(1 / min(wall[name]), 2),
            "items": len(items(0)),
            "rounds": rounds,
        }
        if peers and name not in peers:
            row["times_the_better_peer_wall"] = ratio(wall, peers, name)
            row["times_the_better_peer_cpu"] = ratio(cpu, peers, name)
            row["times_open_clip_wall"] = ratio(wall, ["open_clip"], name)
            row["times_open_clip_cpu"] = ratio(cpu, ["open_clip"], name)
            if vectors[name].shape == vectors["open_clip"].shape:
                cosines = (vectors[name] * vectors["open_clip"]).sum(1)
                row["least_cosine"] = f"{cosines.min():.6f}"
        rows.append(row)
        say({key: row[key] for key in row if key not in ("items", "rounds")})
    return rows


def ratio(times: dict[str, list[float]], peers: list[str], name: str) -> float:
    return round(min(min(times[peer]) for peer in peers) / min(times[name]), 2)


def neighbours(models: dict[str, Any], paths: Sequence[Path], batch: int) -> dict[str, Any]:
    """How far bf16 moves the vectors of photos, and whose neighbours change."""
    exact, rounded = (embed_images(m, paths, batch_size=batch) for m in models.values())
    cosines = (exact * rounded).sum(1)
    near = [np.argsort(-without_self(v @ v.T), axis=1, kind="stable") for v in (exact, rounded)]
    overlap = [len(set(a[:10]) & set(b[:10])) / 10 for a, b in zip(*near, strict=True)]
    between = without_self(exact @ exact.T)
    row = {
        "measured": "bf16 beside f32",
        "system": "ours bf16, random weights",
        "items": len(paths),
        "least_cosine": f"{cosines.min():.6f}",
        "median_cosine": f"{np.median(cosines):.6f}",
        "median_cosine_of_two_photos": f"{np.median(between[np.isfinite(between)]):.6f}",
        "same_nearest_photo": round(float((near[0][:, 0] == near[1][:, 0]).mean()), 4),
        "same_among_nearest_10": round(float(np.mean(overlap)), 4),
    }
    say(row)
    return row


def mini_recall(data: Path, limit: int | None) -> list[dict[str, Any]]:
    """Recall of the shipped (convolutional) model in both precisions, by the evaluation command."""
    dataset = open_dataset("flickr8k", data=data, split="val", limit=limit)
    rows = []
    for precision in runtime.PRECISIONS:
        result = evaluate(retrieval.load(precision=precision), dataset, bootstrap=100)
        row = {
            "measured": "recall, flickr8k val",
            "system": f"ours {precision}, the shipped model",
            "architecture": retrieval.model.loading.MINI,
            "items": result["n_images"],
        }
        for k in (1, 5, 10):
            for direction in ("image", "text"):
                value = result["metrics"][f"{direction}_retrieval_recall@{k}"]
                row[f"{direction}_recall@{k}"] = round(value, 4)
        row["image_mean_rank"] = round(result["metrics"]["image_retrieval_mean_rank"], 3)
        rows.append(row)
        say(row)
    return rows


def one_by_one(embed: Embed) -> Embed:
    return lambda texts: np.concatenate([embed([text]) for text in texts])


def parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def without_self(scores: np.ndarray) -> np.ndarray:
    np.fill_diagonal(scores, -np.inf)
    return scores


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def used_cpu() -> float:
    """CPU seconds of this process and of the workers that it has waited for."""
    workers = os.times()
    return time.process_time() + workers.children_user + workers.children_system


def say(what: Any) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
