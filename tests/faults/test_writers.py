"""Every writer is killed, torn, and told of full and broken disks in the middle of its work.

What had been acknowledged is there, files open, the command given again completes with the same
bits as an undisturbed one, and nothing is left lying about.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import pytest
from command_server import KILL, TORN, Done, Fault
from stored_files import Stored
from writers import WRITERS, Writer, names

# Of 15 writers, and one that takes long.
FEW, MANY = 2, 14
LONG = {"a search model"}
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# SQLite opens read-only what it cannot open for writing, and never says why.
READ_ONLY = "cannot be written (attempt to write a readonly database)"
WORDS = {
    errno.ENOSPC: ("No space left", "full", "space", READ_ONLY),
    errno.EDQUOT: ("quota", READ_ONLY),
    errno.EIO: ("Input/output error", "I/O error", "readonly database", "unable to open"),
}


@pytest.fixture(autouse=True)
def _injected(library) -> None:
    if library[0] is None:
        pytest.skip(library[1])


@dataclass
class Undisturbed:
    """What a writer does if nothing happens."""

    operations: int
    before: Any
    after: Any
    names: set[str]


_undisturbed: dict[str, Undisturbed] = {}


def start(stored: Stored, name: str) -> tuple[Writer, Undisturbed]:
    """Make what a writer starts from, and what it makes of it."""
    writer = WRITERS[name]
    stored.reset()
    writer.prepare(stored)
    stored.keep(name)
    if name not in _undisturbed:
        before = writer.state(stored)
        stored.restore()
        done = writer.run(stored, fault=Fault(0, 0, str(stored.here)))
        assert done.code == 0, done
        after = writer.state(stored)
        _undisturbed[name] = Undisturbed(done.count, before, after, names(stored))
        assert writer.state(stored) == after
    return writer, _undisturbed[name]


def check_state(writer: Writer, good: Undisturbed, found: Any, done: Done) -> None:
    """What was acknowledged is there, and nothing that is half of something."""
    if done.code == 0:
        assert found == good.after, f"lost what was acknowledged: {done}"
    elif found not in (good.before, good.after):
        assert writer.partial(good.before, good.after, found), f"neither before nor after: {done}"


def check_again(stored: Stored, writer: Writer, good: Undisturbed, found: Any, done: Done) -> None:
    """The command given again completes, with the same bits, and clears up."""
    if not (writer.once and found == good.after):
        again = writer.run(stored)
        assert again.code == 0, (done, again)
    assert writer.state(stored) == good.after, f"another result after {done}"
    left = names(stored) ^ good.names
    assert not left, f"left lying about, or missing, after {done}: {sorted(left)}"


def check_words(done: Done, error: int) -> None:
    """One line that says what is wrong."""
    assert done.code == 2, done
    assert "Traceback" not in done.err, done
    said = [line for line in done.err.splitlines() if line.startswith("enn ")]
    assert done.err.splitlines()[-1:] == said, done
    assert "[Errno" not in said[0], done
    assert any(word in said[0] for word in WORDS[error]), done


def cases(few: int, many: int) -> list[Any]:
    """Every writer with few faults; and with many, which is slow."""
    found = []
    for count in (few, many):
        for name in WRITERS:
            marks: list[pytest.MarkDecorator] = []
            if count == many:
                marks.append(pytest.mark.slow)
            elif name in LONG:
                continue
            found.append(pytest.param(name, count, marks=marks))
    return found


def places(operations: int, count: int) -> list[int]:
    """So many of the operations, evenly, the first and the last among them if there are more."""
    count = min(count, operations)
    if count == 1:
        return [operations // 2 + 1]
    return [1 + i * (operations - 1) // (count - 1) for i in range(count)]


@pytest.mark.parametrize(("name", "count"), cases(FEW, MANY))
def test_killed(stored: Stored, name: str, count: int) -> None:
    writer, good = start(stored, name)
    # Of the few, neither is the first or last operation.
    some = places(good.operations, count) if count > 3 else places(good.operations, count + 2)[1:-1]
    for number, place in enumerate(some):
        stored.restore()
        what = (KILL, TORN)[number % 2]
        done = writer.run(stored, fault=Fault(what, place, str(stored.here)))
        assert done.hits == 1, done
        found = writer.state(stored)
        check_state(writer, good, found, done)
        check_again(stored, writer, good, found, done)


@pytest.mark.parametrize(("name", "count"), cases(0, 4))
def test_refused(stored: Stored, name: str, count: int) -> None:
    writer, good = start(stored, name)
    turn = list(WRITERS).index(name) % len(ERRORS)
    for error in ERRORS if count else ERRORS[turn : turn + 1]:
        for place in places(good.operations, count or 1):
            stored.restore()
            done = writer.run(stored, fault=Fault(error, place, str(stored.here)))
            if done.code:
                check_words(done, error)
            found = writer.state(stored)
            check_state(writer, good, found, done)
            check_again(stored, writer, good, found, done)
