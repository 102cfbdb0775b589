"""Runs of the classifiers: what they learn and write, exact resume, errors that help."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import cifar10_folder, cifar100_folder, image_folder, tiny_imagenet
from places import ROOT
from safetensors.torch import load_file
from torch.nn import functional as F

from enn_core import LocalBlock, LocalTrainer
from enn_core.lab.classify.config import ClassifyConfig, ClassifyError, list_configs
from enn_core.lab.classify.datasets import load_data
from enn_core.lab.classify.networks import build_network
from enn_core.lab.classify.run import learning_rate, rule_name, train
from enn_core.lab.classify.weights import load_classifier
from enn_core.rules import RULES
from enn_core.rules.base import decay

TINY: dict[str, Any] = {"arch": "mlp-relu:4x32", "train": 128, "batch_size": 32, "epochs": 2}


def config(**changes: Any) -> ClassifyConfig:
    return ClassifyConfig.load("small", {**TINY, **changes})


def state_of(output: Path) -> Any:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "images_per_s")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check_same_run(a: Path, b: Path) -> None:
    one, two = state_of(a), state_of(b)
    for key in ("rule", "step", "log", "losses", "images"):
        assert same(one[key], two[key]), key
    weights = [load_file(folder / "model.safetensors") for folder in (a, b)]
    assert same(*weights)


# --- what a run writes -------------------------------------------------------------------------

KINDS = [
    ("backprop", "plain", "backprop-adamw"),
    ("backprop", "enn", "enn"),
    ("backprop", "enn-penalty", "enn-penalty"),
    ("local", "plain", "dgl"),
    ("local", "enn", "local-enn"),
    ("local", "enn-penalty", "local-enn"),
]


@pytest.mark.parametrize(("rule", "layers", "name"), KINDS)
def test_a_run_leaves_log_curves_and_models(tmp_path, rule, layers, name):
    shown: list[tuple[str, int, int, str]] = []
    result = train(
        config(rule=rule, layers=layers),
        output=tmp_path,
        progress=lambda *args: shown.append(args),
    )
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["rule"], result["epochs"], result["steps"]) == (name, 2, 8)
    with (tmp_path / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2"]
    blocks = [key for key in log[0] if key.startswith("loss_")]
    assert len(blocks) == (4 if rule == "local" else 0)
    assert float(log[-1]["valid_accuracy"]) == result["valid_accuracy"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The plain network, under the names of its architecture, gives the reported accuracy.
    network, about = load_classifier(result["model"])
    data = load_data("digits", train=128)
    assert about["classes"] == list("0123456789")
    assert about["mean"] == pytest.approx(data.mean)
    answers = network(data.normalized(data.test_x)).argmax(1)
    assert float((answers == data.test_y).double().mean()) == result["test_accuracy"]
    counts = result["parameters"]
    plain = sum(p.numel() for p in build_network(TINY["arch"], (1, 8, 8), 10).parameters())
    assert counts["fused"] == plain == sum(p.numel() for p in network.parameters())
    assert counts["trainable"] == counts["stored"] + counts["heads"]
    assert (counts["heads"] > 0) == (rule == "local")
    assert (counts["stored"] > plain) == (layers != "plain") == (result["eigen"] is not None)
    if layers == "enn":
        assert result["orthogonality"] < 1e-3
    assert any(stage == "training" and done == total == 8 for stage, done, total, _ in shown)


def test_it_learns(tmp_path):
    result = train(
        ClassifyConfig.load("small", {"arch": "mlp-relu", "epochs": 6, "lr": 5e-3}),
        output=tmp_path,
    )
    assert result["test_accuracy"] > 0.85
    assert abs(result["valid_accuracy"] - result["test_accuracy"]) < 0.1


def test_the_steps_are_those_of_a_local_trainer(tmp_path, one_thread):
    """The same by hand: order, normalisation, schedule, optimizer."""
    made = config(weight_decay=0.0, epochs=1)
    train(made, output=tmp_path)
    data = load_data("digits", train=128)
    model = build_network(TINY["arch"], data.shape, 10, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.lr, weight_decay=0.0)
    order = np.random.default_rng([0, 0]).permutation(128)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = learning_rate(made, step, 4)
        rows = order[32 * step : 32 * step + 32]
        optimizer.zero_grad()
        F.cross_entropy(model(data.normalized(data.train_x[rows])), data.train_y[rows]).backward()
        optimizer.step()
    trained = load_file(tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)


def test_loco_starts_from_calibrated_weights_and_learns(tmp_path):
    changes = {"arch": "mlp:6x64", "rule": "loco-mean", "epochs": 20, "batch_size": 128}
    result = train(ClassifyConfig.load("small", changes), output=tmp_path)
    assert result["test_accuracy"] > 0.6
    network, _ = load_classifier(result["model"])
    assert sum(p.numel() for p in network.parameters()) == result["parameters"]["trainable"]


def test_rules_by_name():
    for rule, layers, name in KINDS:
        assert rule_name(config(rule=rule, layers=layers)) == name
        assert name in RULES
    assert rule_name(config(rule="backprop-sgd")) == "backprop-sgd"
    with pytest.raises(ClassifyError, match="give backprop, local, or one of backprop-adamw"):
        rule_name(config(rule="magic"))
    with pytest.raises(ClassifyError, match="trains plain layers"):
        rule_name(config(rule="backprop-sgd", layers="enn"))


@pytest.mark.parametrize("rule", ["backprop", "local"])
def test_learning_without_validation_from_given_weights(tmp_path, rule):
    source = build_network("resnet-small", (1, 8, 8), 10, seed=8)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    result = train(
        config(
            arch="resnet-small", weights=str(tmp_path / "w.pt"), valid=0.0, lr=1e-12, epochs=1,
            rule=rule, weight_decay=0.0, layers="enn",
        ),
        output=tmp_path,
    )  # fmt: skip
    assert result["valid_accuracy"] is None
    trained = load_file(result["model"])
    for name, value in source.state_dict().items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)


def test_images_are_resized_and_precision_is_mixed(tmp_path):
    result = train(
        config(image_size=16, amp="bf16", clip_norm=1.0, label_smoothing=0.1, pad=1, flip=True),
        output=tmp_path,
    )
    assert load_classifier(result["model"])[1]["shape"] == [1, 16, 16]
    if not torch.cuda.is_available():
        with pytest.raises(ClassifyError, match="needs a CUDA device; give amp bf16 or none"):
            train(config(amp="fp16"), output=tmp_path / "half")


def test_float16_learns_with_scaled_losses():
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.arange(64) % 4
    block = LocalBlock(build_network("mlp-relu:3x32", (1, 4, 4), 4), torch.nn.Identity())
    trainer = LocalTrainer([block], F.cross_entropy, autocast=torch.float16, clip=1.0)
    images = x.view(64, 1, 4, 4)
    # Losses so small that their gradients are zero in float16.
    tiny = LocalTrainer(
        [LocalBlock(build_network("mlp-relu:3x32", (1, 4, 4), 4), torch.nn.Identity())],
        lambda scores, wanted: 1e-7 * F.cross_entropy(scores, wanted),
        autocast=torch.float16,
    )
    losses = [trainer.step(images, y)[0] for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    before = [p.detach().clone() for p in tiny.blocks[0].parameters()]
    tiny.step(images, y)
    moved = [
        not torch.equal(a, b) for a, b in zip(before, tiny.blocks[0].parameters(), strict=True)
    ]
    assert all(moved)
    state = trainer.state_dict()
    other = LocalTrainer(
        [LocalBlock(build_network("mlp-relu:3x32", (1, 4, 4), 4, seed=3), torch.nn.Identity())],
        F.cross_entropy, autocast=torch.float16, clip=1.0,
    )  # fmt: skip
    other.load_state_dict(state)
    assert other.step(images, y) == trainer.step(images, y)


# --- settings ----------------------------------------------------------------------------------


def test_the_usual_schedule_is_that_of_the_rules():
    for steps in (3, 40, 997):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=0.02)
        theirs = decay(optimizer, steps)
        for step in range(steps):
            mine = learning_rate(config(lr=0.02), step, steps)
            assert mine == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
            optimizer.step()
            theirs.step()


def test_published_schedules():
    def rates(name: str, at: list[float], **changes: Any) -> list[float]:
        made = ClassifyConfig.load(name, changes)
        return [learning_rate(made, round(part * 10_000), 10_000) for part in at]

    ends = [0.0, 0.9999]
    assert rates("tiny-imagenet", ends) == pytest.approx([1e-3, 1e-5], rel=1e-3)
    assert rates("cifar", [0.0, 0.5]) == pytest.approx([1e-3, 5e-4], rel=1e-3)
    assert rates("imagenet", ends) == pytest.approx([1e-3, 1e-4])
    assert rates("imagenet-resnet152", [0, 0.4, 0.99]) == pytest.approx([5e-3, 5e-4, 1e-4])
    values = {name: ClassifyConfig.load(name) for name in list_configs()}
    assert {n: (c.epochs, c.batch_size) for n, c in values.items() if "small" not in n} == {
        "cifar": (500, 128),
        "cifar-resnet152": (500, 128),
        "imagenet": (1500, 256),
        "imagenet-resnet152": (1500, 256),
        "tiny-imagenet": (800, 256),
        "tiny-imagenet-resnet152": (800, 256),
    }
    decays = {c.weight_decay for n, c in values.items() if n.endswith("152")}
    assert decays == {2e-4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "eigen"}, "layers must be one of plain, enn, enn-penalty"),
        ({"amp": "int8"}, "amp must be one of none, bf16, fp16"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"valid": 1.0}, "valid must be from 0 to below 1"),
        ({"drops": [2]}, "drops must be shares"),
        ({"crop": [0.5]}, "crop must be"),
        ({"randaugment": [0, 9]}, "randaugment must be"),
        ({"speed": 3}, "unknown setting speed; valid: data"),
        ({"epochs": "ten"}, "epochs must be like 30, got 'ten'"),
        ({"flip": 1}, "flip must be like False"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ClassifyError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 200}, "128 training images are fewer than one batch of 200"),
        ({"lr": 1e30}, "the loss is not finite at step"),
        ({"weights": "no.pt"}, "there is no weights file"),
        ({"options": {"speed": 1}}, "has no option 'speed'"),
        ({"rule": "local", "blocks": 40}, "can be cut into"),
    ],
)
def test_runs_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(config(**changes), output=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("model*"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A data directory with a little of everything that the configurations name."""
    root = tmp_path_factory.mktemp("data")
    cifar10_folder(root)
    cifar100_folder(root)
    tiny_imagenet(root, per_class=8)
    image_folder(root / "imagenet", {"train": 8, "val": 1}, ("blue", "red"))
    return root


@pytest.mark.parametrize("name", list_configs())
def test_a_real_step_of_every_configuration(tmp_path, published, name):
    """With a small network; the configuration's own data, schedule and augmentation."""
    made = ClassifyConfig.load(
        name,
        {
            **{"epochs": 1, "batch_size": 12, "workers": 0, "train": 12, "arch": "resnet-small"},
            **({"image_size": 32} if name.startswith("imagenet") else {}),
        },
    )
    assert train(made, data=published, output=tmp_path)["steps"] == 1


FULL = [(name, ClassifyConfig.load(name).arch) for name in list_configs() if "small" not in name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "arch"), [*FULL, ("cifar", "resnet101"), ("imagenet", "vit-b16")])
def test_a_real_step_of_every_configuration_with_its_network(tmp_path, published, name, arch):
    changes = {"epochs": 1, "batch_size": 8, "workers": 2, "train": 8, "arch": arch}
    result = train(ClassifyConfig.load(name, changes), data=published, output=tmp_path)
    assert result["steps"] == 1
    assert result["parameters"]["stored"] > result["parameters"]["fused"] > 2e7


# --- stopping and going on ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "layers", "amp"),
    [("backprop", "enn", "bf16"), ("local", "plain", "none"), ("loco", "plain", "none")],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, one_thread, rule, layers, amp):
    made = config(rule=rule, layers=layers, save_every=1, pad=1, amp=amp)
    train(made, output=tmp_path / "a")

    class Stop(Exception):
        pass

    for stop in (1, 4, 6):

        def interrupt(stage: str, done: int, total: int, note: str, stop: int = stop) -> None:
            if stage == "training" and done > stop:
                raise Stop

        with pytest.raises(Stop):
            train(made, output=tmp_path / "b", progress=interrupt)
    train(made, output=tmp_path / "b")
    check_same_run(tmp_path / "a", tmp_path / "b")
    # It is complete: nothing is learnt any more.
    again = train(made, output=tmp_path / "b")
    assert again["steps"] == 8
    check_same_run(tmp_path / "a", tmp_path / "b")


def test_a_run_stopped_early_does_not_look_at_the_test_images(tmp_path):
    early = train(config(stop_after=1), output=tmp_path)
    assert (early["epochs"], early["test_accuracy"]) == (1, None)
    whole = train(config(), output=tmp_path)
    assert whole["epochs"] == 2
    assert whole["test_accuracy"] is not None


def command(output: Path, *more: str) -> list[str]:
    return [
        *("-m", "apps.cli", "train", "classifier", str(output), "--arch", TINY["arch"]),
        *("--set", "train=128", "--set", "batch_size=32", "--epochs", "2", *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, one_thread):
    made = config(layers="enn", save_every=1, epochs=500)
    child = subprocess.Popen(
        [
            sys.executable, *command(tmp_path / "a", "--layers", "enn", "--set", "save_every=1"),
            "--epochs", "500",
        ],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "a" / "checkpoint.pt").exists() and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    steps = state_of(tmp_path / "a")["step"]
    assert 0 < steps < 2000
    last = replace(made, stop_after=steps // 4 + 2)
    for folder in ("a", "b"):
        train(last, output=tmp_path / folder)
    check_same_run(tmp_path / "a", tmp_path / "b")


def test_a_row_that_a_kill_kept_from_the_log_is_written(tmp_path):
    train(config(stop_after=2), output=tmp_path)
    log = tmp_path / "log.csv"
    rows = log.read_bytes()
    log.write_bytes(b"".join(rows.splitlines(keepends=True)[:-1]))  # the checkpoint came first
    train(config(stop_after=2), output=tmp_path)
    assert log.read_bytes() == rows


def test_another_run_is_not_continued(tmp_path):
    train(config(stop_after=1), output=tmp_path)
    with pytest.raises(ClassifyError) as caught:
        train(config(lr=1e-2, layers="enn"), output=tmp_path)
    text = str(caught.value)
    assert "layers 'plain' there, 'enn' now; lr 0.002 there, 0.01 now" in text
    assert "give another output" in text
    # These do not decide what is learnt.
    train(config(workers=0, save_every=3), output=tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(ClassifyError, match="is no checkpoint of a classifier"):
        train(config(), output=tmp_path)


def test_other_images_are_noticed(tmp_path):
    image_folder(tmp_path / "set", {"train": 8, "test": 1}, ("blue", "red"))
    made = config(
        data=f"imagefolder:{tmp_path / 'set'}", train=0, batch_size=4, image_size=16,
        arch="mlp-relu", stop_after=1,
    )  # fmt: skip
    train(made, output=tmp_path / "out")
    image_folder(tmp_path / "set", {"train": 9}, ("blue", "red"))
    with pytest.raises(ClassifyError, match="holds a run on other images"):
        train(made, output=tmp_path / "out")


# --- several processes -------------------------------------------------------------------------


def torchrun(output: Path, *more: str) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *command(output, *more),
        ],
        env=environment(), check=True, capture_output=True, timeout=500,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path, one_thread):
    more = ["--rule", "local", "--layers", "enn"]
    torchrun(tmp_path / "two", *more, "--set", "stop_after=1")
    with pytest.raises(ClassifyError, match="a run of 2 processes, these are 1"):
        train(config(rule="local", layers="enn"), output=tmp_path / "two")
    torchrun(tmp_path / "two", "--resume", "--set", "stop_after=0")
    one = train(config(rule="local", layers="enn"), output=tmp_path / "one")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["steps"] == one["steps"] == 8
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.02)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-2, atol=2e-3)
