"""Scans of the visitors of the brain page: in folders of their own, worked on one by one.

A session is what one browser tab has given. Its files lie in one folder, which goes some time after
the tab was closed or last used, and with the server; those of one scan go when the visitor deletes
it. No session that holds scans ever goes for a newcomer.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apps.web.brain.worker import EXPLANATION, HEAD, Worker, WorkerError, write_volume
from apps.web.limits import (
    ALL_SCANS_BYTES,
    SCANS_EACH,
    SESSIONS,
    SESSIONS_EACH,
    SESSIONS_NEAR,
    SESSIONS_SURE,
    WAITING_EACH,
    WAITING_SCANS,
)
from apps.web.private_folder import make_private_folder
from apps.web.turns import Seat, TooMany, Turns, check_share
from enn_core.lessons.places import LOCAL

if TYPE_CHECKING:
    from neuro.age.predict import BrainAge, Seen
    from neuro.scans.preprocess import InputKind, Prepared

__all__ = [
    "Desk",
    "Looked",
    "Scan",
    "Session",
    "SessionError",
    "Sessions",
    "Step",
    "clean_label",
]

IDLE_SECONDS = 2 * 3600.0  # without any request; the help of `enn demo brain` tells it
CLOSED_SECONDS = 90.0  # a tab that is loaded again comes back within these

TABS_EACH = 64  # that are counted

State = Literal["waiting", "working", "ready", "failed"]
STARTING, LOOKING = "starting", "networks"
_OWN_MACHINE = Seat("", LOCAL)
_ENDED = "this session has ended; load the page again"


class SessionError(ValueError):
    """A session or scan that is not there, or no more fit in; one line, fit to show."""


@dataclass(frozen=True)
class Step:
    """One step of the work on a scan; `seconds` is None while it goes on."""

    name: str
    began: float
    seconds: float | None = None


@dataclass
class Looked:
    """What the work on a scan gave: the prepared brain, and what the networks made of it."""

    prepared: Prepared
    seen: Seen


@dataclass
class Scan:
    """One scan of a session.

    Attributes:
        number: unique in its session.
        label: what the visitor sees it called.
        kind: what the file holds.
        folder: where its files lie.
        source: the file itself; gone once it has been read.
        note: where it is from, if it is none of the visitor's.
        age: of the person in years, if known.
        state: how far the work is.
        steps: of the work, the last one going on.
        error: why it failed.
        seat: whose it is, for its turn.
        shown: whether the picture of the scan as it came is there.
        looked: what the work gave; there when it is ready.
        explaining: whether its explanation is being computed.
        explained: when that is there: the years that its full colour stands for.
    """

    number: int
    label: str
    kind: InputKind
    folder: Path
    source: Path
    note: str = ""
    age: float | None = None
    seat: Seat = _OWN_MACHINE
    state: State = "waiting"
    steps: list[Step] = field(default_factory=list)
    error: str = ""
    shown: bool = False
    looked: Looked | None = None
    explaining: bool = False
    explained: float | None = None
    cancelled: bool = False

    def begin(self, name: str) -> None:
        """The next step; ends the one before."""
        self.end()
        self.steps.append(Step(name, time.monotonic()))

    def end(self) -> None:
        """The last step is over."""
        if self.steps and self.steps[-1].seconds is None:
            last = self.steps[-1]
            self.steps[-1] = replace(last, seconds=time.monotonic() - last.began)

    @property
    def busy(self) -> bool:
        """Whether something about it may change without the visitor's doing."""
        return self.state in {"waiting", "working"} or self.explaining


class Session:
    """What one tab has given.

    Args:
        token: the secret that it is known by.
        owner: scope of the visitor it belongs to.
        folder: of its files.
        network: where the visitor is, see `apps.web.visitors.network_of`.
    """

    def __init__(self, token: str, owner: str, folder: Path, network: str = "") -> None:
        self.token = token
        self.seat = Seat(network, owner)
        self.folder = folder
        self.scans: dict[int, Scan] = {}
        self.tabs: dict[str, None] = {}  # what those that show it call themselves, oldest first
        self.used = time.monotonic()
        self.closed: float | None = None
        self.ended = False
        self.lock = threading.RLock()
        self._last = 0

    @property
    def owner(self) -> str:
        """Scope of the visitor."""
        return self.seat.visitor

    def add(self, label: str, kind: InputKind, *, note: str = "", age: float | None = None) -> Scan:
        """Room for one more scan; its `source` is to be written."""
        with self.lock:
            if self.ended:
                raise SessionError(_ENDED)
            if len(self.scans) >= SCANS_EACH:
                raise SessionError(
                    f"a session holds {SCANS_EACH} scans; remove one, or use `enn brain predict` "
                    "for many"
                )
            self._last += 1
            folder = self.folder / str(self._last)
            folder.mkdir(mode=0o700)
            scan = Scan(self._last, label, kind, folder, folder / "scan", note, age, self.seat)
            self.scans[scan.number] = scan
            return scan

    def end(self, *, empty: bool = False) -> bool:
        """Takes no more scans and cancels the work on those that are there.

        Args:
            empty: only if there are none.

        Returns:
            Whether it has ended.
        """
        with self.lock:
            if empty and self.scans:
                return False
            self.ended = True
            for scan in self.scans.values():
                scan.cancelled = True
            return True

    def get(self, number: object) -> Scan:
        """A scan; raises SessionError if it is not there."""
        scan = self.scans.get(number) if isinstance(number, int) else None
        if scan is None:
            raise SessionError("this scan is no longer there")
        return scan

    def remove(self, number: object) -> None:
        """Deletes a scan and its files."""
        with self.lock:
            scan = self.get(number)
            scan.cancelled = True
            del self.scans[scan.number]
        shutil.rmtree(scan.folder, ignore_errors=True)


class Sessions:
    """All sessions of a server.

    Args:
        root: folder for theirs; a new temporary one, gone with `close`, by default.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._kept = None
        if root is None:
            root, self._kept = make_private_folder("enn-brain-")
        self.root = root
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._sweeper = threading.Thread(target=self._sweeps, name="sessions", daemon=True)
        self._sweeper.start()

    def open(self, token: object, owner: str, network: str = "") -> Session:
        """The visitor's session of that token, or a new one if there is none.

        Where too many are open, one without scans ends for it.

        Args:
            token: what the browser remembers.
            owner, network: see `Session`.

        Raises:
            SessionError: too many with scans are open.
        """
        with contextlib.suppress(SessionError):
            return self.get(token, owner)
        with self._lock:
            self._make_room(owner, network)
            token = secrets.token_urlsafe(24)
            folder = self.root / secrets.token_hex(8)
            folder.mkdir(mode=0o700)
            session = self._sessions[token] = Session(token, owner, folder, network)
            return session

    def _make_room(self, owner: str, network: str) -> None:
        everyone = list(self._sessions.values())
        own = [session for session in everyone if session.owner == owner]
        near = [session for session in everyone if session.seat.network == network]
        if owner != LOCAL and len(own) >= SESSIONS_EACH:
            crowd, whose = own, f"you have {len(own)} sessions with scans"
        elif network and len(near) >= _share(len(everyone) - len(near)):
            crowd, whose = near, f"{len(near)} sessions of your network hold scans"
        elif len(everyone) >= SESSIONS:
            crowd, whose = everyone, f"all {len(everyone)} hold scans"
        else:
            return
        count = Counter(session.seat.network for session in crowd)
        # Closed tabs first; then where most are, those that nobody has used for longest.
        crowd.sort(key=lambda s: (s.closed is None, -count[s.seat.network], s.used))
        for session in crowd:
            if session.end(empty=True):
                self._drop(session)
                return
        raise SessionError(
            f"this server has no room for another session: {whose}, and none is ended for another; "
            "try again later, or close a tab of yours"
        )

    def get(self, token: object, owner: str) -> Session:
        """The visitor's session of that token.

        Raises:
            SessionError: it has ended, or is somebody else's.
        """
        with self._lock:
            session = self._sessions.get(token) if isinstance(token, str) else None
            if session is None or session.owner != owner:
                raise SessionError(_ENDED)
            session.used, session.closed = time.monotonic(), None
            return session

    def enter(self, tab: str, session: Session) -> None:
        """A tab shows a session.

        Args:
            tab: what its browser calls it, anything.
            session: one that is open.
        """
        with self._lock:
            session.tabs[tab[:64]] = None
            while len(session.tabs) > TABS_EACH:  # those of a browser that crashed
                del session.tabs[next(iter(session.tabs))]

    def leave(self, tab: str, token: object, owner: str) -> None:
        """A tab was closed or is loaded again: its session goes unless it comes back soon.

        Raises:
            SessionError: as `get`.
        """
        session = self.get(token, owner)
        with self._lock:
            session.tabs.pop(tab[:64], None)
            if not session.tabs:
                session.closed = time.monotonic()

    def end(self, token: object, owner: str) -> None:
        """Deletes a session and its files."""
        session = self.get(token, owner)
        with self._lock:
            self._drop(session)

    def room(self, seat: Seat) -> int:
        """Bytes that may still be uploaded by somebody: of all, and half of all from elsewhere."""
        with self._lock:
            seats = {session.folder: session.seat for session in self._sessions.values()}
        total = near = 0
        for path in _listed(self.root):  # imports lie there too, while they arrive
            size, whose = _size(path), seats.get(path)
            total += size
            if whose is not None and (whose == seat or whose.network == seat.network != ""):
                near += size
        left = ALL_SCANS_BYTES - total
        return left if seat.visitor == LOCAL else min(left, ALL_SCANS_BYTES // 2 - near)

    def close(self) -> None:
        """Deletes everything."""
        self._ended.set()
        with self._lock:
            for session in list(self._sessions.values()):
                self._drop(session)
        shutil.rmtree(self.root, ignore_errors=True)
        if self._kept is not None:
            self._kept.close()

    def _drop(self, session: Session) -> None:
        self._sessions.pop(session.token, None)
        session.end()
        shutil.rmtree(session.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Ends the sessions that are over."""
        now = time.monotonic()
        with self._lock:
            for session in list(self._sessions.values()):
                left = session.closed is not None and now - session.closed > CLOSED_SECONDS
                if left or now - session.used > IDLE_SECONDS:
                    self._drop(session)

    def _sweeps(self) -> None:
        while not self._ended.wait(10):
            self.sweep()


class Desk:
    """Works on scans one after the other; visitors take turns.

    Args:
        brain: looks at what was prepared.
        worker: prepares.
    """

    def __init__(self, brain: BrainAge, worker: Worker | None = None) -> None:
        self.brain = brain
        self._worker = worker or Worker()
        self._jobs: list[tuple[Scan, Callable[[Scan], None]]] = []
        self._turns = Turns()
        self._changed = threading.Condition()  # its lock may be taken again
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="brain-desk", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Does before the first visitor what they would wait for."""
        threading.Thread(target=self._worker.warm_up, daemon=True).start()

    def check_room(self, seat: Seat) -> None:
        """Raises SessionError if too many scans of somebody, or of all, are waiting."""
        with self._changed:
            self._check_room(seat)

    def submit(self, scan: Scan) -> None:
        """Prepares and looks at a scan in its turn; raises SessionError if too many wait."""
        self._add(scan, self._prepare)

    def explain(self, scan: Scan) -> None:
        """Computes a scan's explanation in its turn; raises SessionError if too many wait."""
        with self._changed:
            if not scan.explaining and scan.explained is None:
                self._add(scan, self._explain)
                scan.explaining = True

    def ahead(self, scan: Scan) -> int:
        """How many scans come before one that waits, if nobody else comes."""
        with self._changed:
            waiting = [job[0] for job in self._jobs]
            turns = self._turns.copy()
        order = []
        while waiting:
            order.append(waiting.pop(turns.next([each.seat for each in waiting])))
            turns.serve(order[-1].seat)
        return order.index(scan) + 1 if scan in order else 0

    def close(self) -> None:
        """Stops working."""
        with self._changed:
            self._ended = True
            self._jobs.clear()
            self._changed.notify_all()
        self._worker.stop()

    def _add(self, scan: Scan, work: Callable[[Scan], None]) -> None:
        with self._changed:
            self._jobs = [job for job in self._jobs if not job[0].cancelled]
            self._check_room(scan.seat)
            self._jobs.append((scan, work))
            self._changed.notify_all()

    def _check_room(self, seat: Seat) -> None:
        each = WAITING_SCANS if seat.visitor == LOCAL else WAITING_EACH
        waiting = [scan.seat for scan, _ in self._jobs if not scan.cancelled]
        try:
            check_share(waiting, seat, most=WAITING_SCANS, each=each, what="scans")
        except TooMany as error:
            raise SessionError(str(error)) from None

    def _run(self) -> None:
        for scan, work in self._next():
            if scan.cancelled:
                continue
            try:
                work(scan)
            except WorkerError as error:
                _fail(scan, str(error))
            except Exception as error:
                text = " ".join(str(error).replace(str(scan.folder), "").split())
                _fail(scan, f"failed with {type(error).__name__}: {text[:200]}")

    def _next(self) -> Iterator[tuple[Scan, Callable[[Scan], None]]]:
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                job = self._jobs.pop(self._turns.next([scan.seat for scan, _ in self._jobs]))
                self._turns.serve(job[0].seat)
            yield job

    def _prepare(self, scan: Scan) -> None:
        from neuro.teach import ready

        scan.state = "working"
        scan.begin(STARTING)

        def on_step(name: str) -> None:
            if name == HEAD:
                scan.shown = True
            else:
                scan.begin(name)

        prepared = self._worker.prepare(scan.source, scan.kind, scan.folder, on_step)
        # What is shown and taught later needs the file no more.
        scan.source.unlink(missing_ok=True)
        scan.begin(LOOKING)
        seen = self.brain.look(prepared, name=scan.label, age=scan.age)
        ready(self.brain, seen)
        scan.end()
        scan.looked = Looked(prepared, seen)
        scan.state = "ready"

    def _explain(self, scan: Scan) -> None:
        import numpy as np

        from neuro.age.explain import gradient
        from neuro.scans.template import MNI_AFFINE

        if scan.looked is None:
            return
        image = scan.looked.prepared.image
        values = gradient(self.brain.model, image)
        write_volume(values, MNI_AFFINE, scan.folder / EXPLANATION)
        top = float(np.percentile(np.abs(values[image > 0]), 99.5))
        scan.explained, scan.explaining = top, False


def clean_label(name: str) -> str:
    """What a file is called on the page: its own name without folders, endings and odd signs.

    >>> clean_label("C:\\\\scans\\\\sub-01_T1w.nii.gz"), clean_label("  ")
    ('sub-01_T1w', 'scan')
    """
    name = re.split(r"[\\/]", name)[-1]
    name = "".join(sign if sign.isprintable() else " " for sign in name)
    name = re.sub(r"(\.gz|\.nii|\.mgz|\.mgh|\.img|\.hdr)+$", "", name.strip(), flags=re.IGNORECASE)
    return " ".join(name.split())[:60] or "scan"


def _fail(scan: Scan, text: str) -> None:
    scan.end()
    scan.source.unlink(missing_ok=True)
    if scan.explaining:
        scan.explaining = False
        scan.error = f"The explanation {text}"
    else:
        scan.error, scan.state = text, "failed"


def _share(others: int) -> int:
    """How many sessions a network may have beside those of others: three quarters of what is left.

    Cookies cost nothing, and a session that holds scans is not ended for a newcomer: two networks
    that take all they can leave room for others.
    """
    return max(SESSIONS_SURE, (SESSIONS - others) * SESSIONS_NEAR // SESSIONS)


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, some of which may go meanwhile."""
    within = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in within or [path]:
        with contextlib.suppress(OSError):
            info = file.stat()
            total += info.st_size if stat.S_ISREG(info.st_mode) else 0
    return total
