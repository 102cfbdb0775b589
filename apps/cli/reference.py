"""The reference page of the `enn` command, made from its own help.

python -m apps.cli.reference > docs/cli.md
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import typer

from apps.cli.main import app

__all__ = ["commands", "reference"]

_HEAD = """# The `enn` command

Made from the command's own help (`python -m apps.cli.reference > docs/cli.md`).
The same from Python: [python.md](python.md).

- Results go to stdout; progress, warnings and errors go to stderr.
- Exit codes: 0 ok, 1 finished with skipped items or a lesson refused, 2 user error, 130 stopped
  with Ctrl-C (70: a bug; `ENN_DEBUG=1` shows the traceback).
- `--json` prints one JSON document, in ASCII. File names that are not UTF-8 appear in it with
  lone surrogates (`\\udcff` for the byte `ff`), as Python's `os.fsencode` takes them.
- `--paths` and `-0` print paths byte for byte as they are on disk.
- The index of a folder is `.enn-index` inside it, found from any folder below, as git does.
- What `enn search teach` learns is kept in a profile: a file in this user's data directory (or
  below `$ENN_PROFILES`), not in the index, which may be deleted and built again. `query` uses the
  profile `default` if there is one, another with `--profile NAME`, none with `--no-profile`.
"""


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its path, such as ("enn", "search", "index")."""

    def below(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield path, command
        for name in command.list_commands(None) if hasattr(command, "commands") else ():
            yield from below((*path, name), command.commands[name])

    return below(("enn",), typer.main.get_command(app))


def reference() -> str:
    """The page in Markdown."""
    parts = [_HEAD]
    # The help is as wide as the terminal otherwise.
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "90"
    try:
        for path, _ in commands():
            page = io.StringIO()
            with contextlib.redirect_stdout(page):
                app([*path[1:], "--help"], standalone_mode=False)
            parts.append(f"## {' '.join(path)}\n\n```text\n{page.getvalue().rstrip()}\n```\n")
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
