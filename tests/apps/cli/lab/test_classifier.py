"""`enn train classifier`: what it says, keeps and refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from apps.cli.main import app
from enn_core.lab.classify import run as library

SMALL = ["--arch", "mlp:4x16", "--set", "train=64", "--set", "batch_size=32", "--epochs", "2"]
ENN = Path(sys.executable).with_name("enn")


def run(*args: str | Path) -> SimpleNamespace:
    words = ["train", "classifier", *map(os.fspath, args)]
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def refused(*args: str | Path) -> str:
    """The one line of a user's error."""
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    lines = [line for line in done.err.splitlines() if line.startswith("enn ")]
    assert len(lines) == 1
    assert done.err.endswith(lines[0] + "\n")
    return lines[0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "ENN_DATA"):
        monkeypatch.delenv(name, raising=False)


def test_a_run_says_what_it_reached_and_where_it_is(tmp_path):
    done = run("out", *SMALL, "--layers", "enn")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == [
        *("test", "validation", "parameters", "bases", "model", "eigen"),
    ]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert f"{100 * result['test_accuracy']:.2f} % right" in done.out
    assert f"{result['parameters']['fused']:,} after fusing" in done.out
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["arch"], settings["layers"], settings["train"]) == ("mlp:4x16", "enn", 64)
    assert "holds a run already; give --resume" in refused("out", *SMALL)
    # The same again, from its own settings.
    again = run("again", "--config", tmp_path / "out" / "settings.json", "--json")
    other = json.loads(again.out)
    assert other["parameters"] == result["parameters"]
    assert other["model"] == "again/model.safetensors"


def test_a_run_that_stopped_goes_on_with_what_it_says(tmp_path):
    first = run("out", *SMALL, "--set", "stop_after=1")
    assert first.code == 0
    assert not first.out.startswith("test")
    hint = first.err.strip().splitlines()[-1]
    assert "1 of 2 epochs; go on with: enn train classifier out --resume" in hint
    words = shlex.split(hint.partition("go on with: ")[2])
    done = run(*words[3:])
    assert done.code == 0
    assert done.out.startswith("test")
    text = refused("out", "--resume", "--set", "lr=0.1", "--rule", "local")
    assert "rule 'backprop' there, 'local' now; lr 0.002 there, 0.1 now" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "mnist"], "give one of digits, fashion-mnist"),
        (["--data", "cifar100"], "--data-dir or $ENN_DATA"),
        (["--data", "imagefolder:no"], "there is no folder 'no'"),
        (["--data", "imagefolder:."], "needs folders train/CLASS and test/CLASS"),
        (["--arch", "resnet51"], "give one of mlp"),
        (["--rule", "magic"], "give backprop, local, or one of"),
        (["--rule", "loco", "--layers", "enn"], "trains plain layers"),
        (["--rule", "loco"], "or give arch mlp or conv-small"),
        (["--rule", "loco", "--arch", "mlp", "--set", "amp=bf16"], "rule 'loco' has no amp"),
        (["--weights", "none.pt"], "there is no weights file"),
        (["--config", "no-such"], "give one of cifar, cifar-resnet152"),
        (["--set", "speed=1"], "unknown setting speed; valid: data"),
        (["--set", "lr"], "--set needs NAME=VALUE"),
        (["--resume"], "there is no run in 'out' to resume"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, args, message):
    assert message in refused("out", *args)
    assert not list(tmp_path.iterdir())


def test_a_run_without_output_has_a_folder_that_says_what_it_is(tmp_path):
    assert run(*SMALL, "--rule", "local").code == 0
    folder = Path("runs", "digits-mlp-4x16-local-plain")
    assert (tmp_path / folder / "result.json").is_file()
    assert f"{str(folder)!r} holds a run already" in refused(*SMALL, "--rule", "local")
    assert run("--resume", folder).code == 0
    assert "give OUTPUT, the directory of the run to go on with" in refused("--resume")


def test_output_must_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    assert "'file' is a file" in refused("file", *SMALL)
    assert "Not a directory" in refused("file/out", *SMALL)


def test_configurations_are_listed():
    done = run("--config", "list")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()]
    assert names == sorted(names)
    assert {"small", "cifar", "imagenet-resnet152"} <= set(names)
    assert set(json.loads(run("--config", "list", "--json").out)) == set(names)


def test_a_folder_is_remembered_wherever_it_is(tmp_path, monkeypatch):
    kept = {}

    def train(config, **options):
        kept.update(options, spec=config.data, weights=config.weights)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "train", train)
    (tmp_path / "set").mkdir()
    done = run("out", "--data", "imagefolder:set", "--weights", "w.pt", "--data-dir", "d")
    assert done.code == 130
    assert done.err.strip() == "stopped; nothing was written"
    assert kept["spec"] == f"imagefolder:{tmp_path / 'set'}"
    assert kept["weights"] == str(tmp_path / "w.pt")
    assert (str(kept["data"]), str(kept["output"])) == ("d", "out")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path):
    child = subprocess.Popen(
        [ENN, "train", "classifier", tmp_path / "my run", *SMALL, "--epochs", "100000"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "my run" / "checkpoint.pt").exists() and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130
    words = shlex.split(err.strip().splitlines()[-1].partition("go on with: ")[2])
    assert words == ["enn", "train", "classifier", str(tmp_path / "my run"), "--resume"]
    assert "Traceback" not in err
