"""Training of the shipped model: its pieces against slow oracles, and one real, resumable run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from retrieval.mini.block_inputs import imagenet_backbone, random_view
from retrieval.mini.learner import Learner, depthwise
from retrieval.mini.refine import class_directions
from retrieval.mini.train import TrainConfig, TrainError, train
from retrieval.model.mini_tower import MiniTower, fold_batchnorm

DATA = Path(os.environ.get("ENN_DATA", "../shared/data"))
needs_data = pytest.mark.skipif(
    not (DATA / "flickr8k").is_dir(), reason=f"no Flickr8k under {DATA} (set ENN_DATA)"
)


def test_the_place_of_the_data_is_asked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("ENN_DATA", raising=False)
    with pytest.raises(TrainError, match=r"--data or \$ENN_DATA") as caught:
        train(TrainConfig(), output=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 7), (5, 1, 8), (3, 2, 9), (5, 2, 8)])
def test_depthwise_gradient_equals_torch(kernel: int, stride: int, size: int) -> None:
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    for cls, padding in ((nn.Conv2d, kernel // 2), (Conv2dSame, 0)):
        conv = cls(4, 4, kernel, stride=stride, padding=padding, groups=4).double()
        conv.requires_grad_(False)
        x = torch.randn(2, 4, size, size, dtype=torch.double, requires_grad=True)
        expected = conv(x)
        got = depthwise(conv, x)
        torch.testing.assert_close(got, expected)
        weight = torch.randn_like(expected)
        (a,) = torch.autograd.grad((expected * weight).sum(), x)
        (b,) = torch.autograd.grad((got * weight).sum(), x)
        torch.testing.assert_close(b, a)


def test_folding_batchnorm_keeps_the_function() -> None:
    backbone = imagenet_backbone()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = backbone(x)
        fold_batchnorm(backbone)
        after = backbone(x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_learner_continues_where_the_frozen_blocks_end() -> None:
    torch.manual_seed(0)
    tower = MiniTower().eval()
    pixels = torch.rand(2, 3, 224, 224) * 255
    b = tower.backbone
    with torch.no_grad():
        x = b.bn1(b.conv_stem(pixels / 127.5 - 1))
        for block in b.blocks[:4]:
            x = block(x)
        got = Learner(tower, 4).eval().images(x)
        expected = tower(pixels)
    # bfloat16 against float32
    assert F.cosine_similarity(got, expected).min() > 0.999


def test_views_keep_the_size_and_follow_the_stream() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    assert (random_view(photo, 0, rng) == np.asarray(photo)).all()
    assert (random_view(photo, 1, rng) == np.asarray(photo)[:, ::-1]).all()
    one = random_view(photo, 2, np.random.default_rng(5))
    two = random_view(photo, 2, np.random.default_rng(5))
    assert one.shape == (40, 60, 3)
    assert (one == two).all()
    assert (one != random_view(photo, 2, np.random.default_rng(6))).any()


def test_class_directions_raise_their_own_logit() -> None:
    torch.manual_seed(0)
    features = torch.randn(500, 8) @ torch.randn(8, 8) + 1
    readout = torch.randn(8, 5)
    logits = features @ readout
    directions = class_directions(features, logits)
    gains = directions @ (readout - readout.mean(1, keepdim=True))
    torch.testing.assert_close(gains.diagonal(), torch.ones(5), rtol=1e-2, atol=1e-2)
    # Linear discriminant analysis: the direction is the covariance times the read-out.
    covariance = torch.cov(features.T)
    for direction, column in zip(
        directions, (readout - readout.mean(1, keepdim=True)).T, strict=True
    ):
        expected = covariance @ column
        assert F.cosine_similarity(direction, expected, dim=0) > 0.999


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"epoch": 3}', "unknown setting epoch"),
        ('{"epochs": "three"}', "epochs must be like"),
        ('{"epochs": 0}', "at least 1"),
        ('{"rule": "loco"}', "rule must be"),
        ("[]", "JSON object"),
        ("{", "cannot read"),
    ],
)
def test_bad_configurations_are_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(TrainError, match=says):
        TrainConfig.load(path)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TrainError, match="long-eclip-mini"):
        TrainConfig.load("nonesuch")
    assert TrainConfig.load("long-eclip-mini").rule == "enn"


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Twelve real captioned photos, as a data set of their own."""
    source = json.loads((DATA / "flickr8k/dataset_flickr8k.json").read_text())
    rows = [row for row in source["images"] if row["split"] == "train"][:12]
    root = tmp_path / "data"
    (root / "flickr8k").mkdir(parents=True)
    (root / "flickr8k/images").symlink_to((DATA / "flickr8k/images").resolve())
    (root / "flickr8k/dataset_flickr8k.json").write_text(
        json.dumps({"dataset": "flickr8k", "images": rows})
    )
    return root


@needs_data
@pytest.mark.parametrize("rule", ["enn", "plain"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    small_data: Path, tmp_path: Path, rule: str
) -> None:
    import retrieval

    config = TrainConfig(
        splits="train", views=2, batch_size=4, epochs=2, hidden=32, holdout=4, rule=rule,
        first_block=6, distill=0.1, refine_epochs=2, refine_views=1,
    )  # fmt: skip
    whole = train(config, data=small_data, output=tmp_path / "whole")
    # The frozen half is shared: a compiled tower may round otherwise than its cached copy.
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/cache").symlink_to(tmp_path / "whole/cache")
    train(replace(config, stop_after=1), data=small_data, output=tmp_path / "parts")
    resumed = train(config, data=small_data, output=tmp_path / "parts")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole["holdout"] == resumed["holdout"]
    assert whole["orthogonality"] < 0.05  # between retractions
    assert len((tmp_path / "parts/log.csv").read_text().splitlines()) == 3
    with pytest.raises(TrainError, match="other options \\(seed\\)"):
        train(replace(config, seed=1), data=small_data, output=tmp_path / "whole")
    model = retrieval.load(str(tmp_path / "whole/model"), runtime="torch")
    assert model.text_vectors(["a dog"]).shape == (1, model.dim)


@needs_data
def test_loss_falls_on_real_photos(small_data: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        splits="train", views=1, batch_size=12, epochs=12, hidden=64, first_block=6, dropout=0.0,
    )  # fmt: skip
    train(config, data=small_data, output=tmp_path / "run")
    losses = [
        float(line.split(",")[2])
        for line in (tmp_path / "run/log.csv").read_text().splitlines()[1:]
    ]
    assert losses[-1] < 0.7 * losses[0]
