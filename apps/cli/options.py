"""What several groups of commands share: options, and their help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["ForceOption", "JsonOption", "ManyValues", "ProfileOption", "show_help"]

# Eager: read before other options, so that those whose value is "list" know how to list.
JsonOption = Annotated[bool, typer.Option("--json", is_eager=True, help="Print one JSON document.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Profile of lessons. [default: default]",
        show_default=False,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]


class ManyValues(TyperCommand):
    """Lets `--recall-k 1 5 10` be written as such: click's options take a fixed number."""

    options = ("--recall-k", "--good", "--bad", "--unmark")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._repeated(args)))

    def _repeated(self, args: Sequence[str]) -> Iterator[str]:
        option, given = "", False
        for i, arg in enumerate(args):
            name, equals, _ = arg.partition("=")
            if arg == "--":
                yield from args[i:]
                return
            if name in self.options:
                option, given = name, bool(equals)
            elif option and arg.replace(",", "").lstrip("-").isdigit():
                # The first follows its flag; every further one gets a flag of its own.
                if given:
                    yield option
                given = True
            else:
                option = ""
            yield arg


def show_help(context: typer.Context) -> None:
    """What a group does that is given no command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
