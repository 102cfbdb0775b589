"""What the terminal shows: texts, counts, paths, progress."""

from __future__ import annotations

import io
import os
import sys

from hypothesis import given
from hypothesis import strategies as st

from apps.cli import terminal as cli_terminal
from apps.cli.terminal import ProgressLine, counted, duration, printable, size, write_paths

# --- texts -------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(codec=None)))
def test_printable_text_is_one_harmless_line(text):
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_printable_names_the_bytes():
    assert printable(os.fsdecode(b"a\xffb\nc\x1b[0m")) + "é" == r"a\xffb\nc\x1b[0m" + "é"


def test_counts_sizes_and_durations():
    assert (counted(1, "lesson"), counted(2000, "lesson")) == ("1 lesson", "2,000 lessons")
    assert counted(0, "query", "queries") == "0 queries"
    assert [size(n) for n in (0, 999, 1500, 25e6, 3e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "25.0 MB",
        "3000.0 TB",
    ]
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


def test_paths_keep_their_bytes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    names = [b"a b.jpg", b"na\xefve.jpg", "日本.jpg".encode()]
    write_paths([os.fsdecode(name) for name in names])
    write_paths([os.fsdecode(name) for name in names], nul=True)
    assert raw.getvalue() == b"".join(n + b"\n" for n in names) + b"".join(n + b"\0" for n in names)


# --- progress ----------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine() as line:
        line.show("looking", 5, None)
        line.show("indexing", 1, 10, "1 skipped")
        line.say("skipped [red]a.jpg[/red]: broken")
        line.show("indexing", 10, 10)
    text = terminal.getvalue()
    assert "skipped [red]a.jpg[/red]: broken" in text
    assert "indexing" in text
    assert "10/10" in text


def test_progress_elsewhere_is_plain_lines_now_and_then(monkeypatch):
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(cli_terminal.time, "monotonic", lambda: clock[0])
    with ProgressLine() as line:
        for second in range(26):
            clock[0] = float(second)
            line.show("indexing", second * 20, 1000)
    assert stream.getvalue().splitlines() == [
        "indexing: 200 of 1,000, 20/s, 0:40 left",
        "indexing: 400 of 1,000, 20/s, 0:30 left",
    ]
