"""Contrastive runs: exact micro-batches, exact resume, several processes, no gradient between
blocks, and that they learn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_cases
from safetensors.torch import load_file
from torch import Tensor
from training_cases import TINY, gradients, write_photos

import retrieval
from retrieval.training.config import TrainConfig, TrainError
from retrieval.training.run import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def start(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return train(TrainConfig(**{**TINY, "dataset": str(data), **changes}), output=output)


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name, **tolerance)


@pytest.mark.parametrize("rule", ["backprop", "local"])
def test_learns_and_is_loaded_again(photos: Path, tmp_path: Path, rule: str) -> None:
    easy = {"randaugment": [], "label_smoothing": 0.0, "mixup": 0.0}
    result = start(photos, tmp_path, rule=rule, epochs=12, **easy)
    model = retrieval.load(str(tmp_path / "model"), runtime="torch")
    from retrieval.images import decode

    squares = [model.preprocess(decode(photos / f"{i:02}.png")) for i in range(3)]
    scores = model.text_vectors(["a red square", "a green square", "a blue square"])
    scores = scores @ model.image_vectors(np.stack(squares)).T
    assert scores.argmax(0).tolist() == [0, 1, 2]
    assert result["orthogonality"] < 1e-2
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert len(log) == 13
    assert ("loss_4" in log[0]) == (rule == "local")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert tmp_path / "model" / "model.safetensors" in written
    assert {file.stat().st_mode & 0o777 for file in written} == {0o644}


ONE_STEP = {"amp": False, "rule": "local", "blocks": 2, "clip_norm": 0.0, "short_weight": 0.3}


@pytest.mark.parametrize("layers", ["exact", "penalty", "plain"])
def test_micro_batches_change_nothing(photos: Path, tmp_path: Path, layers: str) -> None:
    settings = {**TINY, **ONE_STEP, "dataset": str(photos), "layers": layers}
    gradients(tmp_path / "whole", settings)
    gradients(tmp_path / "parts", {**settings, "micro_batch": 3})
    assert_same(read(tmp_path / "whole"), read(tmp_path / "parts"), atol=1e-6, rtol=1e-3)


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "gradients.safetensors")


@pytest.mark.parametrize("changes", [{"rule": "backprop"}, {"rule": "local", "blocks": 2}])
def test_a_killed_run_goes_on_bit_for_bit(
    photos: Path, tmp_path: Path, changes: dict[str, Any], one_thread: None
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(photos, whole, **changes)
    given = json.dumps({"dataset": str(photos), **changes})
    command = [sys.executable, training_cases.__file__, "run", str(killed), given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("training 4 "):  # in the middle of the second epoch
                process.send_signal(signal.SIGKILL)
                break
    assert not (killed / "model").exists()
    start(photos, killed, **changes)
    assert_same(weights(whole), weights(killed), atol=0, rtol=0)
    log = [(path / "log.csv").read_text().splitlines() for path in (whole, killed)]
    speed = log[0][0].split(",").index("images_per_s")
    rows = [[[v for i, v in enumerate(x.split(",")) if i != speed] for x in own] for own in log]
    assert rows[0] == rows[1]


def test_two_processes_have_the_gradient_of_the_whole_batch(photos: Path, tmp_path: Path) -> None:
    settings = {**TINY, **ONE_STEP, "dataset": str(photos), "mixup": 0.0}
    for name, extra in (("two", {}), ("bank", {"text_bank": True})):
        torchrun("gradients", tmp_path / name, {**settings, **extra})
        gradients(tmp_path / "one", {**settings, **extra})
        assert_same(read(tmp_path / "one"), read(tmp_path / name), atol=1e-6, rtol=1e-3)


def test_two_processes_train_one_model(photos: Path, tmp_path: Path) -> None:
    printed = torchrun("run", tmp_path, {"dataset": str(photos), "rule": "local"})
    assert printed.count("training 6 6 ") == 2  # a step and an epoch, by the first process alone
    assert retrieval.load(str(tmp_path / "model")).dim == 32  # of the ViT's width
    assert printed.count("threads at the end:") == 2
    assert "gloo" not in printed  # such a thread would abort the process at the interpreter's end


def torchrun(what: str, output: Path, settings: dict[str, Any]) -> str:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(training_cases.__file__, what, str(output), json.dumps(settings)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_gradient_passes_from_block_to_block(photos: Path, tmp_path: Path) -> None:
    from retrieval.training.run import _dataset, _Run, _silent

    config = TrainConfig(**{**TINY, "dataset": str(photos), "rule": "local"})
    run = _Run(config, _dataset(config, None), None, tmp_path, (0, 1, "cpu"), _silent)
    blocks: list[Any] = list(run.student.blocks)
    x = torch.rand(4, 3, 32, 32) * 255
    for i, block in enumerate(blocks):
        x, (z, _) = block(x)
        assert not x.requires_grad
        z.sum().backward()
        for j, other in enumerate(blocks):
            touched = any(p.grad is not None for p in other.parameters())
            assert touched == (j <= i)
        block.zero_grad(set_to_none=False)
    own = [{id(p) for p in block.parameters()} for block in blocks]
    assert sum(map(len, own)) == len(set().union(*own))  # every parameter has one optimizer


def test_a_holdout_is_not_trained_on(photos: Path, tmp_path: Path) -> None:
    result = start(photos, tmp_path, holdout=6, epochs=1)
    assert result["holdout"].keys() >= {"t2i_R@1", "i2t_R@10"}
    from retrieval.training.pairs import Batches
    from retrieval.training.run import _hold_out

    fit, held = _hold_out(24, 6)
    seen = {i for batch in Batches(fit, 8, epochs=3, seed=0) for _, i in batch}
    assert not seen & set(held.tolist())


def test_another_configuration_is_refused(photos: Path, tmp_path: Path) -> None:
    start(photos, tmp_path, epochs=1)
    with pytest.raises(TrainError, match=r"other options \(lr\)"):
        start(photos, tmp_path, epochs=1, lr=1e-4)
    captions = photos / "captions.csv"
    before = captions.read_text()
    captions.write_text(before.replace("red", "crimson"))
    with pytest.raises(TrainError, match="other images or captions"):
        start(photos, tmp_path, epochs=1)
    captions.write_text(before)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 no such thing")
    with pytest.raises(TrainError, match="damaged"):
        start(photos, tmp_path, epochs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 25}, "24 training images are fewer than one batch of 25"),
        ({"rule": "feedback"}, "rule must be one of backprop, local"),
        ({"text": "clip"}, "needs --weights FILE"),
        ({"text": "clip", "weights": "gone.pt"}, "there is no weights file"),
        ({"text": "clip", "architecture": "nothing", "weights": "x"}, "no architecture 'nothing'"),
        ({"rule": "local", "blocks": 9}, "stages must be 1 to 4"),
        ({"vision": {"image_size": 30}}, "must be a multiple"),
        ({"randaugment": [2]}, "randaugment must be"),
        ({"randaugment": [2, "9"]}, "randaugment must be"),
        ({"randaugment": [2.5, 9]}, "randaugment must be"),
        ({"crop": ["0.1", 1]}, "crop must be"),
        ({"crop": [0.9, 0.5]}, "crop must be"),
        ({"start": "weights"}, "needs text 'clip'"),
        ({"lr": 1e9, "amp": False, "clip_norm": 0.0, "epochs": 9}, "the loss became nan"),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainError, match=message) as caught:
        start(photos, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_a_damaged_photo_is_named(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    write_photos(folder, 12)
    (folder / "03.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(TrainError, match=r"03\.png"):
        start(folder, tmp_path / "run")
