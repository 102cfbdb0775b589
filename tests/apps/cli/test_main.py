"""What all `enn` commands share: help, errors in one line, exit codes, pipes, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from apps.cli import main as cli
from apps.cli.main import app
from apps.cli.reference import commands, reference
from apps.cli.terminal import (
    CommandError,
)

ENN = Path(sys.executable).with_name("enn")


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_has_help_with_examples_and_exit_codes(path):
    code, out, err = run(*path[1:], "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {' '.join(path)}")
    assert "Examples:" in out
    groups = {("enn", group) for group in ("brain", "demo", "search", "train")}
    if path not in groups | {("enn", "train", "bench")}:
        assert "Exit codes:" in out
    assert max(map(len, out.splitlines())) <= 90


def test_the_commands_of_the_manual_are_there():
    search = ["index", "query", "teach", "history", "undo", "forget", "profiles", "caption"]
    search += [
        "info",
        "compact",
        "backup",
        "export",
        "import",
        "eval",
        "eval-build",
        "train",
        "export-model",
        "upgrade",
    ]
    expected = {("enn",), ("enn", "search"), ("enn", "demo")}
    expected |= {("enn", "demo", "brain"), ("enn", "demo", "search")}
    expected |= {("enn", "search", name) for name in search}
    brain = ["predict", "preprocess", "explain", "calibrate", "evaluate", "train"]
    brain += ["export-bundle"]
    brain += ["teach", "history", "undo", "forget", "profiles", "export", "import"]
    expected |= {("enn", "brain")} | {("enn", "brain", name) for name in brain}
    expected |= {("enn", "train"), ("enn", "train", "classifier")}
    expected |= {("enn", "train", "bench"), ("enn", "train", "bench", "core")}
    assert {path for path, _ in commands()} == expected | {
        ("enn", name) for name in ("check", "convert", "fuse")
    }


def test_reference_page_equals_the_help():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "rebuild it: python -m apps.cli.reference > docs/cli.md"


def test_a_group_alone_shows_its_help():
    for args in ((), ("search",), ("brain",), ("demo",), ("train",)):
        code, out, err = run(*args)
        assert (code, err) == (0, "")
        assert out.startswith("Usage: enn")


def test_version():
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("enn ")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["serch"], "enn: No such command 'serch'"),
        (["search", "quer", "x"], "enn search: No such command 'quer'"),
        (["search", "query", "x", "--kk", "3"], "No such option: --kk"),
        (["search", "query", "x", "-k", "many"], "enn search query: Invalid value"),
        (["search", "query", "x", "-k", "0"], "Invalid value for"),
        (["search", "caption"], "Missing argument 'PHOTO'"),
        (["demo", "search", "--port", "99999"], "enn demo search: Invalid value"),
    ],
)
def test_usage_errors_are_one_line(args, expected):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert expected in err
    assert "--help`" in err
    assert err.count("\n") == 1


def test_unexpected_errors_are_one_line_and_traced_on_demand(monkeypatch):
    def broken(*_args: object, **_options: object) -> None:
        raise TypeError("two\nlines")

    monkeypatch.setattr("apps.web.search.serve.serve", broken)
    code, out, err = run("demo", "search")
    assert (code, out) == (cli.EXIT_BUG, "")
    assert err == ("enn demo search: unexpected TypeError: two lines (ENN_DEBUG=1 shows where)\n")
    monkeypatch.setenv("ENN_DEBUG", "1")
    with pytest.raises(TypeError, match="two"):
        run("demo", "search")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "a\nb"), "'a\\nb': No such file"),
        (ModuleNotFoundError("No module", name="gradio"), "pip install 'eigen-suite[demo]'"),
        (MemoryError(), "not enough memory"),
        (CommandError("one line"), "enn demo search: one line\n"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_errors_of_users_and_machines_end_with_2(error, expected, monkeypatch):
    def broken(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("apps.web.search.serve.serve", broken)
    code, out, err = run("demo", "search")
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("apps.web.search.serve.serve", lambda *args, **kw: calls.append((args, kw)))
    assert run("demo", "search")[0] == 0
    options = ["--index", "i", "--host", "::1", "--port", "0", "--auth-file", "a", "--model", "m"]
    assert run("demo", "search", str(tmp_path), "b", *options, "--open")[0] == 0
    assert calls[0][0] == (None, [])
    assert calls[1][0] == (Path("i"), [tmp_path, Path("b")])
    assert calls[1][1] == {
        "host": "::1",
        "port": 0,
        "auth_file": Path("a"),
        "open_browser": True,
        "model": "m",
    }


def test_the_brain_demo_passes_its_options_on(monkeypatch):
    calls = []
    monkeypatch.setattr("apps.web.brain.serve.serve", lambda *args, **kw: calls.append((args, kw)))
    assert run("demo", "brain")[0] == 0
    options = ["--model", "m", "--host", "::1", "--port", "0", "--auth-file", "a", "--open"]
    assert run("demo", "brain", *options)[0] == 0
    common = {"host": "127.0.0.1", "port": 7860, "auth_file": None, "open_browser": False}
    assert calls[0] == ((None,), common)
    common = {"host": "::1", "port": 0, "auth_file": Path("a"), "open_browser": True}
    assert calls[1] == ((Path("m"),), common)


def test_ctrl_c_anywhere_ends_with_130(monkeypatch):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apps.web.search.serve.serve", interrupted)
    code, out, err = run("demo", "search")
    assert (code, out, err.strip()) == (130, "", "stopped")


def test_help_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from apps.cli.main import app\n"
        "app(['search', 'index', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'faiss', 'gradio', 'retrieval', 'enn_core', 'rich.progress'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_installed_command_runs():
    done = subprocess.run([ENN, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([ENN, "search", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([ENN, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
