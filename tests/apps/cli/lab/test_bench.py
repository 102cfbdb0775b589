"""`enn train bench core`: what it runs, what it says, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from apps.cli.lab.bench import bench_app, core
from apps.cli.terminal import CommandError
from enn_core.lab.bench import suites
from enn_core.lab.bench.one_run import Cell, Method
from enn_core.lab.bench.suites import Suite

TINY = Suite(
    (Cell("digits", 100, 50, "mlp:3x16", steps=5, batch=10),),
    tuple(Method(rule, rule, (1e-2,)) for rule in ("backprop-adamw", "dfa", "dgl")),
    (0, 1),
)


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "QUICK", TINY)


def run(*args: str) -> Any:
    app = typer.Typer()
    app.add_typer(bench_app)
    return CliRunner().invoke(app, ["bench", "core", *args], catch_exceptions=False)


def test_table_and_files() -> None:
    done = run("--quick", "--workers", "1")
    assert done.exit_code == 0
    assert "digits-100/mlp:3x16" in done.stdout
    assert "backprop-adamw" in done.stdout
    assert "[" in done.stdout.split("dfa")[1]  # the interval of its difference
    folder = Path("runs/bench-quick")
    names = {".lock", "runs.jsonl", "runs.csv", "table.csv", "table.png", "overview.png"}
    assert {path.name for path in folder.iterdir()} == names
    before = (folder / "runs.jsonl").read_bytes()
    again = json.loads(run("--quick", "--workers", "1", "--json").stdout)
    assert (folder / "runs.jsonl").read_bytes() == before
    assert [line["method"] for line in again["table"]] == ["backprop-adamw", "dfa"]
    assert all(line["seeds"] == 2 for line in again["table"])
    assert "cannot train digits-100/mlp:3x16: dgl" in done.stdout
    assert "3 blocks at most" in again["left_out"]["digits-100/mlp:3x16"]["dgl"]


def test_parts_of_a_suite() -> None:
    listed = json.loads(run("--quick", "--list", "--json").stdout)
    assert listed == {"cells": ["digits-100/mlp:3x16"], "methods": ["backprop-adamw", "dfa", "dgl"]}
    done = run("--quick", "--method", "dfa", "--workers", "1", "--output", "part", "--json")
    assert [line["method"] for line in json.loads(done.stdout)["table"]] == ["dfa"]


def test_what_does_not_exist() -> None:
    with pytest.raises(CommandError, match="cell 'cifar' is unknown; give one of digits-100/mlp"):
        run("--quick", "--cell", "cifar")
    with pytest.raises(CommandError, match="method 'backprob' is unknown; give one of backprop"):
        run("--quick", "--method", "backprob")
    with pytest.raises(CommandError, match="--quick and --large exclude each other"):
        run("--quick", "--large")
    Path("file").touch()
    with pytest.raises(CommandError, match="'file' is a file"):
        run("--quick", "--output", "file")


def test_it_is_a_command_of_enn_train() -> None:
    from apps.cli.lab.classifier import train_app

    groups = [group.typer_instance for group in train_app.registered_groups]
    assert bench_app in groups
    assert core in [command.callback for command in bench_app.registered_commands]
