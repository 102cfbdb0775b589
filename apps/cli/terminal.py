"""What the `enn` command says and how: results on stdout, everything else on stderr.

File names may hold any bytes. Machines get them whole (`write_paths`, JSON); for people what a
terminal cannot show, or would obey, is escaped (`printable`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enn_core.lessons.events import DamagedEntry

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_SKIPPED",
    "EXIT_USER",
    "CommandError",
    "Interrupted",
    "ProgressLine",
    "absolute",
    "confirm",
    "confirm_erasing",
    "counted",
    "duration",
    "emit",
    "emit_json",
    "note",
    "note_damaged",
    "prepare_streams",
    "printable",
    "quote",
    "refuse_ending",
    "refuse_overwrite",
    "size",
    "stoppable",
    "write_paths",
]

EXIT_OK = 0
EXIT_SKIPPED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130

# Seconds between two lines of progress where there is no terminal, and those that a rate looks
# back.
_LINE_SECONDS = 10.0
_RATE_SECONDS = 15.0


class CommandError(ValueError):
    """A user's mistake: one line with what was given, what is valid, what to do."""


class Interrupted(Exception):
    """Ctrl-C; the text says what is kept and how to go on."""


@contextlib.contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Says `message` when Ctrl-C ends what is inside."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None


# --- streams -----------------------------------------------------------------------------------


def prepare_streams() -> None:
    """Make printing safe for any text, and warnings one line each."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    if not os.environ.get("ENN_DEBUG"):
        warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], *_args: object, **_kwargs: object
) -> None:
    # Libraries warn programmers of what users cannot change.
    if category is UserWarning:
        note(f"warning: {' '.join(str(message).split())}")


def emit(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")


def emit_json(document: Any) -> None:
    """The one JSON document of a `--json` run.

    ASCII only: whatever the terminal's encoding, the text arrives, and a name that is not UTF-8
    keeps its bytes as the lone surrogates that Python reads back.
    """
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def write_paths(paths: Iterable[str | os.PathLike[str]], *, nul: bool = False) -> None:
    """Paths exactly as they are on disk, one a line or each ended by NUL."""
    sys.stdout.flush()
    end = b"\0" if nul else b"\n"
    out = getattr(sys.stdout, "buffer", None)
    for path in paths:
        raw = os.fsencode(path) + end
        if out is not None:
            out.write(raw)
        else:
            sys.stdout.write(raw.decode("utf-8", "surrogateescape"))
    if out is not None:
        out.flush()


def note(text: str) -> None:
    """A line for people, on stderr, whatever happens to stdout."""
    print(text, file=sys.stderr, flush=True)


def note_damaged(entries: Sequence[DamagedEntry]) -> None:
    """Say which lessons of a profile are damaged, and what can be done."""
    for each in entries:
        on = f", on {quote(each.subject)}" if each.subject else ""
        note(
            f"lesson {each.seq} is damaged ({printable(each.why)}){on}: until it is forgotten, or "
            "set aside by `enn check --repair`, nothing that was taught is used"
        )


def confirm(question: str, refusal: str) -> None:
    """Ask on a terminal; elsewhere nobody can answer, so `refusal` is raised.

    Raises:
        CommandError: there is no terminal.
        typer.Abort: the answer is no.
    """
    import typer

    if not _is_terminal():
        raise CommandError(refusal)
    typer.confirm(question, abort=True, err=True)


def confirm_erasing(what: str) -> None:
    """`confirm` that something is erased for good."""
    confirm(f"Erase {what} for good?", f"{what} would be erased for good; add --yes to do it")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


# --- text --------------------------------------------------------------------------------------


def printable(text: str | os.PathLike[str]) -> str:
    """A name for the eyes: control characters and bytes that are no text are escaped."""
    shown = []
    for char in os.fspath(text):
        if char.isprintable():
            shown.append(char)
        elif "\udc80" <= char <= "\udcff":
            shown.append(f"\\x{ord(char) - 0xDC00:02x}")
        else:
            shown.append(char.encode("unicode_escape").decode("ascii"))
    return "".join(shown)


def quote(path: str | os.PathLike[str]) -> str:
    """A path within a sentence."""
    return f"'{printable(path)}'"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """1 lesson, 2,000 lessons."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def size(count: float) -> str:
    """Bytes for people: 999 B, 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --- progress ----------------------------------------------------------------------------------


class ProgressLine:
    """Progress on stderr: a bar on a terminal, else a plain line every ten seconds.

    Use as a context manager; call `show` as often as you like.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._recent: deque[tuple[float, int]] = deque()
        self._told = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """How far it is: `done` of `total` (None if unknown) in this stage."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._task = stage, None
            self._recent.clear()
        pace = self._pace(now, done, total)
        if note:
            pace = f"{pace}, {note}" if pace else note
        if self._bar is not None:
            if self._task is None:
                for task in list(self._bar.task_ids):
                    self._bar.remove_task(task)
                self._task = self._bar.add_task(stage, total=total, completed=done, pace=pace)
            self._bar.update(self._task, completed=done, total=total, pace=pace)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            self._line(f"{stage}: {count}{', ' if pace else ''}{pace}")

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._line(text)

    @staticmethod
    def _line(text: str) -> None:
        note(text)

    def _pace(self, now: float, done: int, total: int | None) -> str:
        """Rate over the last seconds, and the time left at it."""
        recent = self._recent
        if recent and recent[-1][1] > done:
            recent.clear()
        recent.append((now, done))
        while len(recent) > 2 and now - recent[0][0] > _RATE_SECONDS:
            recent.popleft()
        span, gained = now - recent[0][0], done - recent[0][1]
        if span < 0.2 or gained < 1:
            return ""
        rate = gained / span
        pace = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
        if total is not None and done < total:
            pace += f", {duration((total - done) / rate)} left"
        return pace


def absolute(path: Path) -> Path:
    """Absolute without following links, so that names stay those the user knows."""
    return Path(os.path.abspath(path))


def refuse_ending(path: Path, endings: Mapping[str, str]) -> None:
    """Refuse an output file whose ending promises what is not written. None promises nothing.

    Args:
        path: the file.
        endings: valid endings in lower case, and what such a file gets.
    """
    if path.suffix and path.suffix.lower() not in endings:
        valid = " or ".join(f"{ending} ({what})" for ending, what in endings.items())
        raise CommandError(f"{quote(path)} ends in {quote(path.suffix)}; valid is {valid}")


def refuse_overwrite(path: Path, force: bool) -> None:
    """Refuse an output file that exists, or cannot, before any work is done."""
    if path.is_dir():
        raise CommandError(f"{quote(path)} is a directory; give the name of a file")
    if path.exists() and not force:
        raise CommandError(f"{quote(path)} exists; give another name, or --force to overwrite it")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"there is no directory {quote(path.absolute().parent)}; make it first")
