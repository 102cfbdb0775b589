"""`enn search train`: what reaches the library, what is kept for a later run, what is said."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli_cases import document, refused, run
from hypothesis import given
from hypothesis import strategies as st

from apps.cli_train import _changed, _value
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
    assert "no training configuration 'no-such'; give one of coco" in refused(
        "train", "--config", "no-such"
    )


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
        ("epocs=3", "unknown epocs; valid: dataset"),
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
    assert _value(json.dumps(value)) == value
    assert _changed({"a": 1}, [f"b={json.dumps(value)}"]) == {"a": 1, "b": value}


def test_a_deep_value_is_text():
    assert _value("[" * 100_000) == "[" * 100_000
    assert _value("runs/a=b") == "runs/a=b"


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
