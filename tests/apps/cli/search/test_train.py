"""`enn search train`: what reaches the library, what is kept for a later run, what is said."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_cases import ENN, GALLERY, document, refused, run
from hypothesis import given
from hypothesis import strategies as st

from apps.cli.training_settings import changed, json_value
from retrieval.mini import train as mini
from retrieval.training import run as contrastive


class Library:
    """Stands for the training: remembers what it was asked, and can be interrupted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.interrupt = False
        self.result: dict[str, Any] = {}

    def train(self, config: Any, **options: Any) -> dict[str, Any]:
        self.calls.append((config, options))
        output = options["output"]
        output.mkdir(parents=True, exist_ok=True)
        (output / "checkpoint.pt").touch()
        if options["progress"] is not None:
            options["progress"]("training", 1, 2, "loss 0.5")
        if self.interrupt:
            raise KeyboardInterrupt
        return {"model": str(output / "model"), "epochs": config.epochs, **self.result}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    """The default output is a folder below the current one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def library(monkeypatch) -> Library:
    library = Library()
    monkeypatch.setattr(contrastive, "train", library.train)
    monkeypatch.setattr(mini, "train", library.train)
    for name in ("RANK", "WORLD_SIZE", "ENN_DATA"):
        monkeypatch.delenv(name, raising=False)
    return library


def test_configurations_are_listed():
    done = run("train", "--config", "list")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()]
    assert names == ["coco", "flickr30k", "flickr8k", "long-eclip-mini"]
    assert set(document("train", "--config", "list")) == set(names)
    told = refused("train")
    assert "give --config: coco, flickr30k, flickr8k, long-eclip-mini" in told
    assert "no configuration 'no-such'; give one of coco" in refused("train", "--config", "no-such")


@pytest.mark.parametrize("name", ["flickr8k", "long-eclip-mini"])
def test_a_run_is_the_librarys(tmp_path, library, name):
    output = tmp_path / "out"
    common = ["train", "--config", name, "--data", tmp_path, "--output", output]
    made = document(*common, "--set", "epochs=2")
    assert made == {"model": str(output / "model"), "epochs": 2}
    config, options = library.calls[0]
    assert config.epochs == 2
    assert (options["data"], options["output"]) == (tmp_path, output)
    assert "give --resume" in refused(*common)
    assert len(library.calls) == 1
    # A run goes on with its own settings, wherever they came from.
    assert document("train", "--resume", "--output", output)["epochs"] == 2
    assert library.calls[1][0] == config
    kept = output / "settings.json"
    # What a continuation changes may be refused, so the run's own settings stay.
    assert document("train", "--resume", "--output", output, "--set", "epochs=3")["epochs"] == 3
    assert json.loads(kept.read_text())["epochs"] == 2
    assert document("train", "--config", kept, "--output", tmp_path / "b")["epochs"] == 2


def test_what_is_stopped_says_how_to_go_on(tmp_path, library):
    library.interrupt = True
    output = tmp_path / "my run"
    common = ["train", "--config", "flickr8k", "--output", output, "--set", "lr=2e-3"]
    done = run(*common, "--data", tmp_path)
    assert done.code == 130
    hint = done.err.strip().partition("go on with: ")[2]
    words = shlex.split(hint)
    assert words[:3] == ["enn", "search", "train"]
    library.interrupt = False
    assert run(*words[2:]).code == 0
    assert library.calls[1][0] == library.calls[0][0]
    assert library.calls[1][0].lr == 2e-3
    assert library.calls[1][1]["data"] == tmp_path


def test_resume_needs_a_run(tmp_path, library):
    assert "leave --resume out" in refused("train", "--resume", "--output", tmp_path / "no")
    assert "has no settings.json; give the --config" in refused(
        "train", "--resume", "--output", tmp_path
    )
    assert not library.calls


def test_own_data_replaces_the_configurations(tmp_path, library):
    (tmp_path / "photos").mkdir()
    (tmp_path / "w.pt").touch()
    base = ["train", "--config", "flickr8k", "--output"]
    run(*base, "a", "--dataset", "photos", "--images", "photos", "--weights", "w.pt")
    config = library.calls[0][0]
    # Absolute, so that the run can be resumed from elsewhere; no split of another data set.
    assert config.dataset == config.images == str(tmp_path / "photos")
    assert config.weights == str(tmp_path / "w.pt")
    assert config.split == ""
    run(*base, "b", "--dataset", "wds:tars", "--split", "train+val")
    config = library.calls[1][0]
    assert (config.dataset, config.split) == (f"wds:{tmp_path / 'tars'}", "train+val")
    (tmp_path / "coco").mkdir()
    run(*base, "c", "--dataset", "coco")
    assert library.calls[2][0].dataset == "coco"
    run(*base, "d")
    assert library.calls[3][0].split == "train+restval"
    told = refused("train", "--config", "long-eclip-mini", "--dataset", "x", "--split", "y")
    assert "leave --dataset, --split out" in told


def test_settings_are_changed_by_name(tmp_path, library):
    changes = ["rule=local", "vision.width=192", "amp=false", "crop=[0.6, 1]", "holdout=5"]
    base = ["train", "--config", "flickr8k", "--output", tmp_path / "a"]
    assert run(*base, *(word for change in changes for word in ("--set", change))).code == 0
    config = library.calls[0][0]
    assert (config.rule, config.amp, config.crop, config.holdout) == ("local", False, [0.6, 1], 5)
    assert config.vision["width"] == 192
    assert config.vision["patch_size"] == 16  # the configuration's own
    for change, says in [
        ("epocs=3", "unknown setting epocs; valid: dataset"),
        ("epochs=three", "epochs must be like"),
        ("epochs=0", "at least 1"),
        ("rule=magic", "rule must be one of"),
        ("epochs", "--set needs NAME=VALUE"),
        ("=3", "--set needs NAME=VALUE"),
        ("epochs.x=3", "epochs is 30, it has no entries"),
        ("recipe=mini", "recipe is no setting; give another --config"),
    ]:
        assert says in refused("train", "--config", "flickr8k", "--set", change)
    assert len(library.calls) == 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_values_are_json_or_text(value):
    assert json_value(json.dumps(value)) == value
    assert changed({"a": 1}, [f"b={json.dumps(value)}"]) == {"a": 1, "b": value}


def test_a_deep_value_is_text():
    assert json_value("[" * 100_000) == "[" * 100_000
    assert json_value("runs/a=b") == "runs/a=b"


def test_only_the_first_process_speaks(tmp_path, library, monkeypatch):
    base = ["train", "--config", "flickr8k", "--output", tmp_path / "a"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run(*base)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert library.calls[0][1]["progress"] is None
    assert not (tmp_path / "a" / "settings.json").exists()
    library.interrupt = True
    done = run("train", "--config", "flickr8k", "--output", tmp_path / "b")
    assert (done.code, done.out, done.err) == (130, "", "")
    monkeypatch.setenv("RANK", "0")
    done = run("train", "--config", "flickr8k", "--output", tmp_path / "c")
    assert done.code == 130
    assert "torchrun --nproc-per-node 2 -m apps.cli search train --output" in done.err
    told = refused("train", "--config", "long-eclip-mini", "--output", tmp_path / "d")
    assert "without torchrun" in told


def test_the_result_is_said_and_numbers_that_are_none_are_null(tmp_path, library):
    library.result = {"loss": math.nan, "holdout": {"t2i_R@1": 12.5}}
    done = run("train", "--config", "flickr8k", "--output", tmp_path / "a b")
    assert "holdout t2i_R@1" in done.out
    assert "12.5" in done.out
    assert f"--model '{tmp_path / 'a b' / 'model'}'" in done.err
    made = document("train", "--config", "flickr8k", "--output", tmp_path / "b")
    assert made["loss"] is None
    assert made["holdout"] == {"t2i_R@1": 12.5}


def test_an_unknown_recipe_is_refused(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"recipe": "alchemy"}')
    assert "recipe 'alchemy'; valid: contrastive, mini" in refused("train", "--config", file)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"epochs": null}'])
def test_files_that_are_no_configuration(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_text(text)
    refused("train", "--config", Path(file))


# --- in processes of their own -----------------------------------------------------------------

TINY = (
    *("--set", "vision.image_size=32", "--set", "vision.width=32", "--set", "vision.layers=2"),
    *("--set", 'preprocess={"size": [32, 32], "mode": "squash"}', "--set", "vision.head_width=16"),
    *("--set", "batch_size=4", "--set", "workers=0", "--set", "warmup=2"),
)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder as a user may have it: pictures and captions.csv."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for photo in sorted(GALLERY.glob("*.webp"))[:12]:
            shutil.copy(photo, folder)
            writer.writerow([photo.name, f"a photo of a {photo.stem[3:].replace('_', ' ')}"])
    return folder


def test_a_folder_is_trained_on_and_searched(tmp_path, photos):
    made = document(
        "train", "--config", "flickr8k", "--dataset", photos, "--output", tmp_path / "run",
        "--set", "epochs=2", "--set", "holdout=2", *TINY,
    )  # fmt: skip
    assert (made["epochs"], made["steps"]) == (2, 4)
    assert "t2i_R@1" in made["holdout"]
    assert document("index", photos, "--model", made["model"])["added"] == 12
    assert len(document("query", "a dog", "--index", photos, "-k", "3")["results"]) == 3
    told = refused("train", "--resume", "--output", tmp_path / "run", "--set", "lr=1")
    assert "other options (lr)" in told
    assert document("train", "--resume", "--output", tmp_path / "run")["steps"] == 4


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_ctrl_c_in_a_real_process_and_on_with_it(tmp_path, photos):
    common = ["--config", "flickr8k", "--dataset", photos, "--set", "epochs=15", *TINY]
    process = subprocess.Popen(
        [ENN, "search", "train", *common, "--output", tmp_path / "run", "--set", "save_every=1"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    hint = err.strip().splitlines()[-1].partition("go on with: ")[2]
    words = shlex.split(hint)
    assert words == ["enn", "search", "train", "--output", str(tmp_path / "run"), "--resume"]
    made = document(*words[2:])
    assert (made["epochs"], made["steps"]) == (15, 45)
    whole = document("train", *common, "--output", tmp_path / "whole", "--set", "save_every=1")
    weights = [Path(m["model"]) / "model.safetensors" for m in (made, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_torchrun_speaks_with_one_voice(tmp_path, photos):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "-m", "apps.cli", "search", "train", "--config", "flickr8k", "--dataset", photos,
        "--output", tmp_path / "run", "--set", "epochs=2", *TINY, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["steps"] == 6
    assert done.stderr.count("enn search") <= 1
    assert Path(made["model"], "model.safetensors").is_file()
