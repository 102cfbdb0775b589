"""Every form of input and every shipped configuration trains: real photos, real steps.

What comes out loads like any model and is evaluated. The networks are tiny except in the slow
tests, which take the configurations as they are, on generated checkpoints of Long-CLIP's layout.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_cases import long_clip, network, plain_state, save, tiny, write_architecture
from PIL import Image
from places import GALLERY

import retrieval
from retrieval.datasets.captioned import CaptionDataset
from retrieval.datasets.protocols import open_dataset
from retrieval.eval.recall import evaluate
from retrieval.model.architecture import find_architecture
from retrieval.training.config import TrainConfig
from retrieval.training.run import train
from retrieval.training.settings import list_configs, read_config

PHOTOS = sorted(GALLERY.glob("*.webp"))[:12]
SMALL = {
    "epochs": 1, "batch_size": 4, "micro_batch": 0, "workers": 0, "warmup": 1,
    "vision": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "preprocess": {"size": [32, 32], "mode": "squash"},
}  # fmt: skip
CONTRASTIVE = [name for name in list_configs() if read_config(name)["recipe"] == "contrastive"]


@pytest.fixture(autouse=True)
def _no_data_of_the_developer(monkeypatch) -> None:
    monkeypatch.delenv("ENN_DATA", raising=False)


def captions_of(photo: Path) -> list[str]:
    what = photo.stem[3:].replace("_", " ")
    return [f"a photo of a {what}", f"{what}. It is in the middle of the picture."]


def split_of(number: int) -> str:
    return ["train", "train", "restval", "test"][number % 4]


def jpeg(photo: Path) -> bytes:
    out = io.BytesIO()
    with Image.open(photo) as image:
        image.convert("RGB").resize((64, 48)).save(out, "jpeg")
    return out.getvalue()


def write_photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    for photo in PHOTOS:
        (folder / f"{photo.stem}.jpg").write_bytes(jpeg(photo))


def karpathy(root: Path, name: str = "dataset_own.json") -> Path:
    """ROOT/NAME with ROOT/images; 6 photos of train, 3 of restval, 3 of test."""
    write_photos(root / "images")
    rows = [
        {
            "filename": f"{photo.stem}.jpg",
            "split": split_of(number),
            "sentences": [{"raw": caption} for caption in captions_of(photo)],
        }
        for number, photo in enumerate(PHOTOS)
    ]
    (root / name).write_text(json.dumps({"images": rows}))
    return root / name


def table(root: Path, splits: bool) -> Path:
    write_photos(root)
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"][: 3 if splits else 2])
        for number, photo in enumerate(PHOTOS):
            for caption in captions_of(photo):
                row = [f"{photo.stem}.jpg", caption, split_of(number)]
                writer.writerow(row[: 3 if splits else 2])
    return root


def tars(root: Path) -> Path:
    for number, photo in enumerate(PHOTOS):
        folder = root / ("test" if split_of(number) == "test" else "train")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"{number % 2}.tar", "a") as tar:
            text = "\n".join(captions_of(photo)).encode()
            for suffix, content in (("jpg", jpeg(photo)), ("txt", text)):
                member = tarfile.TarInfo(f"{photo.stem}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root


def check(result: dict[str, Any], data: CaptionDataset) -> dict[str, Any]:
    """The result is a model, which is measured as any other."""
    assert np.isfinite(result["loss"])
    model = retrieval.load(result["model"], runtime="torch")
    measured = evaluate(model, data, (1, 5))
    assert 0 <= measured["metrics"]["image_retrieval_recall@5"] <= 1
    return measured


def own_settings(root: Path, form: str) -> tuple[dict[str, Any], int, Callable[..., Any]]:
    """Settings that name a data set, its training images, and a function that opens it."""
    if form == "karpathy":
        spec = karpathy(root)
        return {"dataset": str(spec), "split": "train+restval"}, 9, open_dataset
    if form == "karpathy, train":
        return {"dataset": str(karpathy(root))}, 6, open_dataset
    if form == "table":
        return {"dataset": str(table(root / "own", splits=False))}, 12, open_dataset
    if form == "table with splits":
        return {"dataset": str(table(root / "own", splits=True))}, 6, open_dataset
    return {"dataset": f"wds:{tars(root / 'tars')}"}, 9, open_dataset


@pytest.mark.parametrize(
    "form", ["karpathy", "karpathy, train", "table", "table with splits", "tars"]
)
def test_every_form_of_input_trains(tmp_path, form):
    named, count, reopen = own_settings(tmp_path, form)
    config = TrainConfig.load("flickr8k", {**SMALL, "split": "", "batch_size": 3, **named})
    steps: list[int] = []
    result = train(
        config,
        output=tmp_path / "run",
        progress=lambda stage, done, total, note: steps.append(total),
    )
    assert result["steps"] == steps[-1] == count // config.batch_size
    check(result, reopen(named["dataset"], split=None, data=None))


def recipe(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """Settings that make a shipped configuration run one step on a few photos, and its data."""
    data = folder / "data"
    dataset = read_config(name)["dataset"]
    karpathy(data / dataset, f"dataset_{dataset}.json")
    count = 9 if "restval" in read_config(name)["split"] else 6
    return {"epochs": 1, "batch_size": count, "workers": 0, "warmup": 1}, data


def held_back(name: str, data: Path) -> CaptionDataset:
    dataset = read_config(name)["dataset"]
    file = data / dataset / f"dataset_{dataset}.json"
    return open_dataset(str(file), images=data / dataset / "images", split="test")


def checkpoint(folder: Path, config: dict) -> Path:
    """As Long-CLIP publishes them."""
    return save(long_clip(plain_state(network(config))), folder / "longclip.pt")


@pytest.mark.parametrize("rule", ["backprop", "local"])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_every_shipped_configuration_takes_a_step(tmp_path, name, rule):
    changes, data = recipe(name, tmp_path)
    if read_config(name).get("text") == "clip":
        file = write_architecture(tmp_path / "tiny.json", tiny())
        changes["architecture"] = str(file)
        changes["weights"] = str(checkpoint(tmp_path, tiny()))
        changes["micro_batch"] = 4
    else:
        changes |= {key: SMALL[key] for key in ("vision", "preprocess")}
    config = TrainConfig.load(name, {**changes, "rule": rule, "blocks": 2})
    result = train(config, data=data, output=tmp_path / "run")
    assert (result["epochs"], result["steps"]) == (1, 1)
    check(result, held_back(name, data))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_every_shipped_configuration_takes_a_step_as_it_is(tmp_path, name):
    """On the architecture that it names: a ViT-B/16 with Long-CLIP's text tower."""
    changes, data = recipe(name, tmp_path)
    if read_config(name).get("text") == "clip":
        architecture = find_architecture(read_config(name)["architecture"])
        assert architecture is not None
        changes["weights"] = str(checkpoint(tmp_path, dict(architecture.model)))
        changes["micro_batch"] = 2
        changes["batch_size"] = 4
    config = TrainConfig.load(name, changes)
    result = train(config, data=data, output=tmp_path / "run")
    assert result["steps"] >= 1
    check(result, held_back(name, data))
