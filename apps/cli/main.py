"""The `enn` command.

`enn search` is in `apps.cli.search`, `enn brain` in `apps.cli.brain`, `enn train`, `enn convert`
and `enn fuse` in `apps.cli.lab`. Here is the demo and what all commands share: errors in one line,
exit codes, Ctrl-C, closed pipes. Nothing heavy is imported before a command runs, so that
`enn --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from apps.cli.brain.commands import brain_app
from apps.cli.check import CHECK_EPILOG, check
from apps.cli.extras import missing_package
from apps.cli.lab.classifier import train_app
from apps.cli.lab.convert import CONVERT_EPILOG, FUSE_EPILOG, convert, fuse
from apps.cli.options import show_help
from apps.cli.search.commands import search_app
from apps.cli.search.group import list_models_asked
from apps.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USER,
    Interrupted,
    note,
    prepare_streams,
    printable,
)

__all__ = ["app"]

EXIT_BUG = 70

# Public only by its subclasses; typer had click's own classes before it had a copy of them.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _ClosedPipe(Exception):
    """Whoever read our output has had enough."""


class _Root(TyperGroup):
    """Turns whatever a command ends with into one line and an exit code."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> int:
        prepare_streams()
        code = self._run(args, complete_var, extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args: Sequence[str] | None, complete_var: str | None, extra: Any) -> int:
        try:
            result = super().main(args, "enn", complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
            return result if isinstance(result, int) else EXIT_OK
        except (_ClosedPipe, BrokenPipeError):
            _drop_stdout()
            return EXIT_OK
        except (KeyboardInterrupt, typer.Abort, Interrupted) as error:
            note(f"\n{error}" if isinstance(error, Interrupted) else "\nstopped")
            return EXIT_INTERRUPTED
        except Exception as error:
            if os.environ.get("ENN_DEBUG"):
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else _command(self, args)
            if isinstance(error, _UsageError):
                note(f"{command}: {_usage(error)}; see `{command} --help`")
                return EXIT_USER
            text, code = _explain(error)
            note(f"{command}: {text}")
            return code

    def make_context(self, *args: Any, **options: Any) -> Any:
        # Here and in `invoke`: before typer's own handling, which would exit with 1.
        try:
            return super().make_context(*args, **options)
        except BrokenPipeError as error:
            raise _ClosedPipe from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ClosedPipe from error
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None


def _drop_stdout() -> None:
    """What is still buffered for a closed pipe must not raise again at the interpreter's end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _command(commands: Any, args: Sequence[str] | None) -> str:
    """Name of the command that was asked for, for error lines."""
    words = ["enn"]
    for word in sys.argv[1:] if args is None else args:
        commands = getattr(commands, "commands", {}).get(word)
        if commands is None:
            break
        words.append(word)
    return " ".join(words)


def _usage(error: Any) -> str:
    text = " ".join(str(error.format_message()).split()).rstrip(".")
    name = error.ctx.command.name if error.ctx is not None else ""
    if type(error).__name__ == "NoSuchOption" and name in {"query", "teach", "forget"}:
        text += "; put `--` before a query that begins with '-'"
    return printable(text)


def _explain(error: Exception) -> tuple[str, int]:
    """One line for an exception, and the exit code."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return missing_package(error), EXIT_USER
    if isinstance(error, MemoryError):
        return "not enough memory; close other programs, or give a smaller --batch-size", EXIT_USER
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return printable(" ".join(error.strerror.split())), EXIT_USER
        return f"'{printable(os.fsdecode(error.filename))}': {error.strerror}", EXIT_USER
    text = printable(" ".join(str(error).split()) or type(error).__name__)
    ours = type(error).__module__.partition(".")[0] in {"apps", "enn_core", "neuro", "retrieval"}
    if ours or isinstance(error, OSError | ValueError):
        return text, EXIT_USER
    return f"unexpected {type(error).__name__}: {text} (ENN_DEBUG=1 shows where)", EXIT_BUG


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 88}

app = typer.Typer(
    cls=_Root,
    name="enn",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    epilog="""\b
Examples:
  enn demo search                          a page with a sample gallery
  enn search index ~/Photos                make a folder searchable
  enn search query "a dog in the snow"     find pictures in it
  enn train classifier runs/digits         train a small network

\b
Exit codes: 0 ok, 1 finished with skipped items or a lesson refused, 2 user error,
130 stopped by Ctrl-C.
Results go to stdout, progress and warnings to stderr. ENN_DEBUG=1 shows tracebacks.""",
)
demo_app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    name="demo",
    rich_markup_mode=None,
    help="Web pages to try it all out.",
    epilog="""\b
Examples:
  enn demo search
  enn demo search ~/Photos --port 8080
  enn demo brain""",
)
app.add_typer(search_app)
app.add_typer(brain_app)
app.add_typer(train_app)
app.add_typer(demo_app)
app.command("check", epilog=CHECK_EPILOG)(check)
app.command("convert", epilog=CONVERT_EPILOG)(convert)
app.command("fuse", epilog=FUSE_EPILOG)(fuse)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"enn {version('eigen-suite')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _enn(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Search pictures with words, tell brain age, train networks and convert them."""
    show_help(context)


_HostOption = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
_PortOption = Annotated[
    int, typer.Option(metavar="PORT", min=0, max=65535, help="0 takes any free port.")
]
_ProxiesOption = Annotated[
    str,
    typer.Option(
        metavar="ADDRESSES",
        envvar="FORWARDED_ALLOW_IPS",
        help="Proxies that are trusted to tell whom they ask for: 192.0.2.7,10.0.0.0/8.",
        show_default=False,
    ),
]


def _proxies(given: str) -> dict[str, str]:
    return {"forwarded_allow_ips": given} if given else {}


_OpenOption = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]


@demo_app.command(
    "search",
    epilog="""\b
Examples:
  enn demo search                          the sample gallery that comes along
  enn demo search ~/Photos ~/Scans         your own folders; indexed at first
  enn demo search --index /data/index      an index somewhere else
  enn demo search --host 0.0.0.0 --auth-file users.txt

\b
Exit codes: 0 stopped with Ctrl-C, 2 user error (port taken, no such folder, ...).""",
)
def demo_search(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Folders of pictures.", show_default=False),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Index directory, if it is not inside the folder.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=list_models_asked,
            help='Model for folders that have no index yet; "list" shows the names.',
            show_default=False,
        ),
    ] = None,
    host: _HostOption = "127.0.0.1",
    port: _PortOption = 7860,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Lines of user:password; without it everybody who reaches the address may search.",
            show_default=False,
        ),
    ] = None,
    open_browser: _OpenOption = False,
    forwarded_allow_ips: _ProxiesOption = "",
) -> None:
    """Serve the search page until Ctrl-C.

    Without folders it shows a sample gallery of free photos; what is taught there lies in the
    profile "demo" (`enn search history --profile demo`, `forget --profile demo`) and changes no
    search of yours. On your own folders "default" learns, as with `enn search teach`. The page
    listens on this machine alone unless --host says otherwise.
    """
    from apps.web.search.serve import serve

    serve(
        index,
        folders or [],
        host=host,
        port=port,
        auth_file=auth_file,
        open_browser=open_browser,
        model=model,
        **_proxies(forwarded_allow_ips),
    )


@demo_app.command(
    "brain",
    epilog="""\b
Examples:
  enn demo brain
  enn demo brain --model runs/mine/model.safetensors
  ENN_DATA=~/data enn demo brain           offers its sample heads as well

\b
Exit codes: 0 stopped with Ctrl-C, 2 user error (port taken, no such file, ...).""",
)
def demo_brain(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A model of `enn brain train`; the one that comes along by default.",
            show_default=False,
        ),
    ] = None,
    host: _HostOption = "127.0.0.1",
    port: _PortOption = 7860,
    auth_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Lines of user:password; without it everybody who reaches the address may use it.",
            show_default=False,
        ),
    ] = None,
    open_browser: _OpenOption = False,
    forwarded_allow_ips: _ProxiesOption = "",
) -> None:
    """Serve the brain-age page until Ctrl-C. Research use, not a medical device.

    Upload a T1-weighted scan, see its predicted age with an interval, and tell true ages to adapt
    the model to a scanner. It listens on this machine alone unless --host says otherwise. Scans are
    deleted with the session: 90 seconds after its tab is closed, two hours after its last request.
    What is taught stays in its profile.
    """
    from apps.web.brain.serve import serve

    serve(
        model,
        host=host,
        port=port,
        auth_file=auth_file,
        open_browser=open_browser,
        **_proxies(forwarded_allow_ips),
    )
