"""Recall of `long-eclip-mini` on Flickr8k `val` beside the frozen-feature probe.

    python benchmarks/mini_recall.py            # about five minutes on two cores

The probe is the baseline to beat: the same ImageNet backbone, frozen, its pooled features through
an MLP of 1,024 and a linear map, trained on the same images against the same frozen text tower.
Differences are paired: per caption (or image), with intervals from resampling whole images.
Writes `benchmarks/results/mini_recall.csv`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_rows
from torch import nn
from torch.nn import functional as F

import retrieval
from retrieval.datasets.captioned import CaptionDataset, load_karpathy
from retrieval.eval.recall import bootstrap_interval, embed_images, retrieval_ranks
from retrieval.images import decode
from retrieval.mini.block_inputs import imagenet_backbone
from retrieval.model.text_towers import MiniLM

KS = (1, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--model", default="long-eclip-mini")
    parser.add_argument("--seeds", type=int, default=3, help="of the probe")
    arguments = parser.parse_args()
    folder = Path(arguments.data) / "flickr8k"
    file = folder / "dataset_flickr8k.json"
    val = load_karpathy(file, folder / "images", "val")
    train = load_karpathy(file, folder / "images", "train+restval")

    rows: list[dict[str, Any]] = []
    ranks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for runtime in ("openvino", "torch"):
        model = retrieval.load(arguments.model, runtime=runtime)
        texts = model.text_vectors(val.captions)
        images = embed_images(model, val.images, batch_size=32)
        name = f"{arguments.model} ({runtime})"
        ranks[name] = retrieval_ranks(texts, images, val.image_of_caption)
        rows += table(name, ranks[name], val)
    ours = f"{arguments.model} (openvino)"

    pooled = {"train": features(train), "val": features(val)}
    text = {"train": embed(train), "val": embed(val)}
    for seed in range(arguments.seeds):
        image_map, text_map = probe(pooled["train"], text["train"], train.image_of_caption, seed)
        with torch.no_grad():
            z, t = image_map(pooled["val"]).numpy(), text_map(text["val"]).numpy()
        name = f"frozen-feature probe, seed {seed}"
        ranks[name] = retrieval_ranks(t, z, val.image_of_caption)
        rows += table(name, ranks[name], val)
        rows += difference(f"{ours} minus {name}", ranks[ours], ranks[name], val)
    for row in rows:
        print(f"{row['what']:62} {row['direction']}  R@{row['k']:<2} {row['recall']:6.2f}"
              f"  [{row['low']:.2f}, {row['high']:.2f}]")  # fmt: skip
    print(write_rows("mini_recall", rows))


def table(
    what: str, ranks: tuple[np.ndarray, np.ndarray], data: CaptionDataset
) -> list[dict[str, Any]]:
    """Recalls in percent with 95 % intervals."""
    return _rows(what, data, lambda side, k: ranks[side] <= k)


def difference(
    what: str,
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    data: CaptionDataset,
) -> list[dict[str, Any]]:
    """Paired differences of recalls in points with 95 % intervals."""
    return _rows(what, data, lambda side, k: (ours[side] <= k).astype(float) - (theirs[side] <= k))


def _rows(
    what: str, data: CaptionDataset, hits: Callable[[int, int], np.ndarray]
) -> list[dict[str, Any]]:
    owners = (data.image_of_caption, np.arange(len(data.images)))
    rows = []
    for side, direction in enumerate(("text->image", "image->text")):
        for k in KS:
            values = hits(side, k)
            low, high = bootstrap_interval(values, owners[side], samples=2000)
            rows.append(
                {
                    "what": what,
                    "data": f"{data.name} {data.split}",
                    "direction": direction,
                    "k": k,
                    "recall": round(100 * float(values.mean()), 2),
                    "low": round(100 * low, 2),
                    "high": round(100 * high, 2),
                }
            )
    return rows


def features(data: CaptionDataset) -> torch.Tensor:
    """(N, 1280) pooled features of the frozen backbone."""
    backbone: Any = imagenet_backbone()
    backbone.reset_classifier(0)
    backbone = backbone.to(memory_format=torch.channels_last)
    rows = []
    with torch.no_grad():
        for start in range(0, len(data.images), 8):
            part = data.images[start : start + 8]
            pixels = np.stack([np.asarray(decode(path).resize((224, 224))) for path in part])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            rows.append(backbone(batch))
    return torch.cat(rows)


def embed(data: CaptionDataset) -> torch.Tensor:
    """(M, 384) unit MiniLM vectors of the captions."""
    return torch.from_numpy(MiniLM().embed(data.captions))


def probe(
    x: torch.Tensor, t: torch.Tensor, owners: np.ndarray, seed: int, epochs: int = 20
) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Train the probe: InfoNCE, batches of 512, AdamW 1e-3 with OneCycle, as long as it helps."""
    torch.manual_seed(seed)
    mean = t.mean(0)
    net = nn.Sequential(nn.LayerNorm(1280), nn.Linear(1280, 1024), nn.GELU(), nn.Linear(1024, 384))
    scale = nn.Parameter(torch.tensor(20.0).log())
    steps = epochs * (len(x) // 512)
    optimizer = torch.optim.AdamW([*net.parameters(), scale], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    captions = [np.flatnonzero(owners == i) for i in range(len(x))]
    rng = np.random.default_rng(seed)

    def text_map(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows - mean, dim=-1)

    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(order) - 511, 512):
            chosen = order[start : start + 512]
            own = torch.tensor([rng.choice(captions[i]) for i in chosen])
            z = F.normalize(net(x[chosen]), dim=-1)
            scores = scale.exp() * z @ text_map(t[own]).T
            target = torch.arange(len(chosen))
            loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return nn.Sequential(net, _Unit()).eval(), text_map


class _Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


if __name__ == "__main__":
    main()
