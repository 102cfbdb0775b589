"""Running `enn search` inside the tests' process, with models that are loaded once."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from places import GALLERY

from apps.cli.main import app

__all__ = ["ENN", "GALLERY", "document", "load_models_once", "refused", "run"]

ENN = Path(sys.executable).with_name("enn")

# Typer's own runner makes all commands anew at each call, which takes longer than most of them.
_COMMAND = typer.main.get_command(app)


def run(*args: str | Path, stdin: bytes = b"") -> SimpleNamespace:
    """Exit code, output as text and as bytes, and what went to stderr."""
    given = ["search", *(os.fspath(arg) for arg in args)]
    out, err, input = (io.TextIOWrapper(io.BytesIO(b), "utf-8") for b in (b"", b"", stdin))
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", input)
        code = _COMMAND.main(given, standalone_mode=False)
    raw, told = (_content(stream) for stream in (out, err))
    text = raw.decode("utf-8", "replace")
    return SimpleNamespace(code=code, out=text, raw=raw, err=told.decode("utf-8"))


def _content(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue()


def document(*args: str | Path, code: int = 0) -> Any:
    """The JSON document of a run that ends with `code`."""
    done = run(*args, "--json")
    assert done.code == code, done.err
    return json.loads(done.out)


def refused(*args: str | Path) -> str:
    """The one line of a user's error."""
    done = run(*args)
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    return done.err


def load_models_once(patch: pytest.MonkeyPatch) -> None:
    """Let commands of this process share their models, until the patch ends."""
    from retrieval.model import loading as models

    once = functools.cache(models.load)

    def load(
        name: str = models.MINI, *, checkpoint: str | None = None, precision: str = "f32"
    ) -> Any:
        return once(name, checkpoint=checkpoint, precision=precision)

    patch.setattr(models, "load", load)
