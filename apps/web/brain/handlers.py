"""What the brain page does: handlers from what a visitor did to what the page shows.

Handlers hold only what all visitors share. A visitor's `Screen` comes in and goes out; whose
profiles count comes with the request.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web.brain import html, taught_html
from apps.web.brain.html import Sample
from apps.web.brain.session import Desk, Looked, Scan, Session, SessionError, Sessions, clean_label
from apps.web.brain.worker import BRAIN, EXPLANATION, HEAD, PLANES
from apps.web.html import note_html, notice_html
from apps.web.kept import read_object, read_profile
from apps.web.limits import SCAN_BYTES
from apps.web.visitors import visitor_of
from enn_core.lessons.errors import AlreadyTaught
from enn_core.lessons.events import is_uid
from enn_core.lessons.places import DEFAULT, check_name

if TYPE_CHECKING:
    from apps.web.visitors import Shelf
    from neuro.age.predict import BrainAge, Estimate, Seen
    from neuro.teach import Site

__all__ = ["BrainHandlers", "OfferedScan", "Screen", "read_screen", "write_screen"]

CONFIDENCE = 0.9

# What is raised when something cannot be done, with a line fit to show.
EXPECTED = (LookupError, ValueError, RuntimeError, OSError)


@dataclass(frozen=True)
class OfferedScan:
    """A scan that the page offers: what is told of it, where it is, and what it holds."""

    sample: Sample
    path: Path
    kind: str
    age: float | None = None


@dataclass(frozen=True)
class Screen:
    """What one visitor's page shows.

    Attributes:
        session: secret of the session.
        chosen: number of the scan that is shown.
        profile: site profile that learns and counts.
        state: of all scans when they were last shown, in short.
    """

    session: str = ""
    chosen: int | None = None
    profile: str = DEFAULT
    state: str = ""


def write_screen(screen: Screen) -> str:
    """A screen as text for `apps.web.kept.kept`."""
    return json.dumps(asdict(screen))


def read_screen(text: object) -> Screen:
    """A screen that `write_screen` wrote; what is none of its parts is as on a new page."""
    said = read_object(text)
    session, state = said.get("session"), said.get("state")
    return Screen(
        session=session if isinstance(session, str) else "",
        chosen=_number(said.get("chosen")),
        profile=read_profile(said.get("profile")),
        state=state if isinstance(state, str) else "",
    )


class BrainHandlers:
    """The handlers of the page.

    Args:
        brain: the model.
        sessions, desk: where scans are kept and worked on.
        sites: opens site profiles.
        offered: scans to try, by key.
    """

    def __init__(
        self,
        brain: BrainAge,
        sessions: Sessions,
        desk: Desk,
        sites: Shelf[BrainAge, Site],
        offered: Mapping[str, OfferedScan],
    ) -> None:
        self.brain = brain
        self.sessions = sessions
        self.desk = desk
        self.sites = sites
        self.offered = offered

    # -- the page ----------------------------------------------------------------------------

    def open(self, remembered: str, screen: Screen, request: gr.Request) -> tuple:
        """(add, *page): a visitor arrives, perhaps with a session that still is there."""
        known = read_object(remembered)
        token, profile, tab = (str(known.get(name, "")) for name in ("session", "site", "tab"))
        try:
            visitor = visitor_of(request)
            session = self.sessions.open(token, visitor.known(), visitor.network)
        except EXPECTED as error:
            return notice_html(_line(error), bad=True), *self._nothing(screen)
        self.sessions.enter(tab, session)
        chosen = max(session.scans, default=None)
        screen = Screen(session.token, chosen, read_profile(profile))
        samples = [offered.sample for offered in self.offered.values()]
        return html.add_html(session.token, samples, SCAN_BYTES), *self.show(screen, request)

    def show(
        self,
        screen: Screen,
        request: gr.Request,
        notice: str = "",
        preview: str = "",
        told: Scan | None = None,
    ) -> tuple:
        """The page: (scans, stage, quality, teach, lesson, table, taught, timer, screen).

        Args:
            screen, request: whose page, and what it shows.
            notice, preview: about teaching.
            told: the scan that is shown as it would be with what is told of it, not kept.
        """
        try:
            scope = visitor_of(request).known()
            session = self.sessions.get(screen.session, scope)
        except EXPECTED as error:
            return self._nothing(screen, notice_html(_line(error), bad=True))
        problem = ""  # predictions are there even if nothing can be taught
        try:
            site = self.sites.get(self.brain, scope, screen.profile)
            site.refresh()  # what another process has taught
            lessons = len(site)
        except EXPECTED as error:
            site, lessons, problem = None, 0, _line(error)
        state = _state(session)
        scans = list(session.scans.values())
        estimates = {s.number: self._estimate(s.looked, site) for s in scans if s.looked}
        chosen = session.scans.get(screen.chosen or -1)
        if chosen is None and scans:
            chosen = scans[-1]
        screen = replace(screen, state=state, chosen=None if chosen is None else chosen.number)
        if told is not None and told.looked is not None and told.number == screen.chosen:
            chosen, said = told, estimates | {told.number: self._estimate(told.looked, site)}
        else:
            said = estimates
        stage, quality, form = self._chosen(session, chosen, said, screen, lessons, problem)
        return (
            html.scans_html([(s, self._said(s, estimates)) for s in scans], screen.chosen),
            stage,
            quality,
            form,
            notice + preview,
            self._table(session, scans, estimates, screen),
            self._taught(scope, site, screen),
            gr.Timer(active=any(scan.busy for scan in scans)),
            screen,
        )

    def tick(self, screen: Screen, request: gr.Request) -> tuple:
        """The page while scans are worked on: all of it only when something has come about."""
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
        except EXPECTED:
            return self.show(screen, request)
        if _state(session) != screen.state:
            return self.show(screen, request)
        chosen = session.scans.get(screen.chosen or -1)
        stage: Any = gr.skip()
        if chosen is not None and chosen.state in {"waiting", "working"}:
            stage = self._progress(session, chosen)
        return (gr.skip(), stage, *[gr.skip()] * 6, screen)

    # -- scans -------------------------------------------------------------------------------

    def added(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """After an upload, perhaps of one of several files."""
        data = _data(event)
        turned = self._turned_to(screen, data.get("scan"), request, after=data.get("after"))
        return self.show(turned, request)

    def sample(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """One of the scans that are offered."""
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
            offered = self.offered.get(str(_data(event).get("key")))
            if offered is None:
                raise SessionError("this scan is not offered")
            self.desk.check_room(session.seat)
            scan = session.add(
                clean_label(offered.sample.name),
                offered.kind,  # type: ignore[arg-type]
                note=offered.sample.note,
                age=offered.age,
            )
            try:
                shutil.copyfile(offered.path, scan.source)
                self.desk.submit(scan)
            except (OSError, SessionError):
                session.remove(scan.number)
                raise
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(self._turned_to(screen, scan.number, request), request)

    def _turned_to(
        self, screen: Screen, number: object, request: gr.Request, *, after: object = None
    ) -> Screen:
        """Shows a new scan, unless another of the session is looked at meanwhile: that stays.

        Args:
            screen: as it is.
            number: of the new scan.
            request: of the visitor.
            after: number of the first scan that was given together with it, if that is another.
        """
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
        except EXPECTED:
            return screen
        wanted = _number(number)
        scans = [scan for scan in list(session.scans.values()) if scan.number < (wanted or 0)]
        # One that had to wait for none was turned to; of files given together, the first.
        busy = [scan.number for scan in scans if scan.busy or scan.number == _number(after)]
        if not busy:
            return replace(screen, chosen=wanted)
        # Of two uploads the second may be told before the browser knows that the first is shown.
        return replace(screen, chosen=screen.chosen if screen.chosen in session.scans else busy[0])

    def choose(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Another scan of the session."""
        return self.show(replace(screen, chosen=_number(_data(event).get("scan"))), request)

    def remove(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Deletes a scan with its files."""
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
            session.remove(_number(_data(event).get("scan")))
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(screen, request)

    def clear(self, screen: Screen, request: gr.Request) -> tuple:
        """Deletes all scans of the session."""
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
            for number in list(session.scans):
                session.remove(number)
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(screen, request)

    def explain(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Computes what the answer for a scan depends on, for the viewer."""
        try:
            session = self.sessions.get(screen.session, visitor_of(request).known())
            scan = session.get(_number(_data(event).get("scan")))
            if scan.looked is None:
                raise SessionError("this scan is not ready yet")
            self.desk.explain(scan)
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(screen, request)

    # -- teaching ----------------------------------------------------------------------------

    def gap(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """The true age is told, to see the gap; nothing is taught."""
        try:
            _, scan, told, _ = self._told(screen, request, event, empty=True)
            _keep(scan, told)
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(screen, request)

    def preview(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """What teaching would do; nothing that is told is kept."""
        try:
            session, scan, told, site = self._told(screen, request, event)
            others, seen = _others(session, scan), _seen([told])[0]
            lesson = site.preview(seen, _known(seen), earlier=_seen(others))
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        preview = taught_html.preview_html(lesson, told, others, screen.profile)
        return self.show(screen, request, preview=preview, told=told)

    def accept(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Teaches what was previewed."""
        data = _data(event)
        try:
            if data.get("profile") != screen.profile:
                raise SessionError("another profile was chosen meanwhile; preview it again")
            session, scan, told, site = self._told(screen, request, event)
            others, seen = _others(session, scan), _seen([told])[0]
            insist = data.get("force") is True
            lesson = site.teach(
                seen, _known(seen), earlier=_seen(others), force=insist, uid=_uid(data)
            )
        except AlreadyTaught:
            _keep(scan, told)
            return self.show(screen, request, taught_html.lesson_html("Learned already."))
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        if lesson.entry is None:
            preview = taught_html.preview_html(lesson, told, others, screen.profile)
            return self.show(screen, request, preview=preview, told=told)
        _keep(scan, told)
        text = (
            f"Learned: {scan.label} is {lesson.age:g}. Its prediction goes from "
            f"{lesson.before:.1f} to {lesson.after:.1f} years."
        )
        notice = taught_html.lesson_html(text, undo=lesson.entry, profile=screen.profile)
        return self.show(screen, request, notice)

    def undo(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Takes one lesson back."""
        data = _data(event)
        try:
            if data.get("profile") != screen.profile:
                raise SessionError("another profile was chosen meanwhile; nothing was undone")
            entry = _number(data.get("entry"))
            self.sites.get(self.brain, visitor_of(request).known(), screen.profile).undo(entry)
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(screen, request, taught_html.lesson_html("Undone: it counts no more."))

    def forget(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Erases everything that the profile was taught."""
        try:
            if _data(event).get("profile") != screen.profile:
                raise SessionError("another profile was chosen meanwhile; nothing was forgotten")
            count = self.sites.get(self.brain, visitor_of(request).known(), screen.profile).forget()
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        text = f"Forgotten: {'1 lesson' if count == 1 else f'{count:,} lessons'}."
        return self.show(screen, request, taught_html.lesson_html(text))

    def imported(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """After lessons came from a file."""
        count = _number(_data(event).get("count"))
        text = "Imported." if count is None else f"Imported: {count:,} new."
        return self.show(screen, request, taught_html.lesson_html(text))

    def profile(self, screen: Screen, request: gr.Request, event: gr.EventData) -> tuple:
        """Another profile counts and learns."""
        try:
            name = check_name(str(_data(event).get("profile", "")))
            self.sites.get(self.brain, visitor_of(request).known(), name)
        except EXPECTED as error:
            return self.show(screen, request, notice_html(_line(error), bad=True))
        return self.show(replace(screen, profile=name), request)

    def _told(
        self, screen: Screen, request: gr.Request, event: gr.EventData, *, empty: bool = False
    ) -> tuple[Session, Scan, Scan, Site]:
        """The scan of an event, and as it would be with the age and name that are told of it."""
        data = _data(event)
        scope = visitor_of(request).known()
        session = self.sessions.get(screen.session, scope)
        scan = session.get(_number(data.get("scan")))
        looked = scan.looked
        if looked is None:
            raise SessionError("this scan is not ready yet")
        age = _age(data.get("age"), empty=empty)
        label = clean_label(str(data["name"])) if "name" in data else scan.label
        flags = self.brain.judge(looked.prepared, looked.seen.distance, age)
        seen = replace(looked.seen, name=label, age=age, flags=flags)
        told = replace(scan, label=label, age=age, looked=replace(looked, seen=seen))
        return session, scan, told, self.sites.get(self.brain, scope, screen.profile)

    # -- what is shown -----------------------------------------------------------------------

    def _estimate(self, looked: Looked, site: Site | None) -> Estimate:
        return self.brain.estimate(
            looked.seen, site=site, bias=self.brain.model.bias, confidence=CONFIDENCE
        )

    def _said(self, scan: Scan, estimates: Mapping[int, Estimate]) -> str:
        """One scan in a word or two."""
        if scan.state == "waiting":
            return "waiting"
        if scan.state == "working":
            return "working…"
        if scan.state == "failed":
            return "failed"
        said = estimates[scan.number]
        if said.age is None:
            return "no age"
        return f"{said.age:.1f} years{' ⚠ doubtful' if said.flags else ''}"

    def _chosen(
        self,
        session: Session,
        scan: Scan | None,
        estimates: Mapping[int, Estimate],
        screen: Screen,
        lessons: int,
        problem: str,
    ) -> tuple[str, str, str]:
        """(stage, quality, form) of the scan that is shown."""
        if scan is None:
            return html.empty_html(), "", ""
        if scan.state in {"waiting", "working"}:
            return self._progress(session, scan), "", ""
        address = self._address(session, scan)
        if scan.looked is None:
            return self._view(session, scan) + html.failed_html(scan.label, scan.error), "", ""
        estimate = estimates[scan.number]
        quality = html.quality_html(
            scan.looked.prepared.quality,
            estimate,
            scan.looked.prepared.record["input"]["notes"],
            scan.steps,
            planes=f"{address}/{PLANES}",
        )
        if estimate.age is None:
            refused = html.refused_html(scan.label, estimate.error)
            return self._view(session, scan) + refused, quality, ""
        result = html.result_html(
            scan,
            estimate,
            trained=self.brain.trained_ages,
            profile=screen.profile,
            confidence=CONFIDENCE,
        )
        form = taught_html.form_html(scan, screen.profile, lessons, problem=problem)
        return self._view(session, scan) + result, quality, form

    def _progress(self, session: Session, scan: Scan) -> str:
        steps = html.progress_html(scan, self.desk.ahead(scan), time.monotonic())
        title = f"<h2>{html.escape(scan.label)}</h2>"
        return f'{self._view(session, scan)}<section class="enn-result">{title}{steps}</section>'

    def _address(self, session: Session, scan: Scan) -> str:
        return f"brain/files/{session.token}/{scan.number}"

    def _view(self, session: Session, scan: Scan) -> str:
        """What the viewer is to show."""
        address = self._address(session, scan)
        ready = scan.looked is not None
        facts = {
            "scan": str(scan.number),
            "head": f"{address}/{HEAD}" if scan.shown else "",
            "brain": f"{address}/{BRAIN}" if ready else "",
            "planes": f"{address}/{PLANES}" if ready else "",
            "explain": "working" if scan.explaining else "offer" if ready else "",
        }
        if scan.explained is not None:
            facts |= {"map": f"{address}/{EXPLANATION}", "top": f"{scan.explained:.6g}"}
        data = " ".join(f'data-{key}="{html.escape(value)}"' for key, value in facts.items())
        return f'<div class="enn-view" hidden {data}></div>'

    def _table(
        self,
        session: Session,
        scans: Sequence[Scan],
        estimates: Mapping[int, Estimate],
        screen: Screen,
    ) -> str:
        if not scans:
            return note_html("No scans yet.")
        rows = [_row(scan, estimates.get(scan.number)) for scan in scans]
        heads = ("Scan", "Predicted age", "Flags", "Interval", "True age", "Gap")
        address = f"brain/tables/{session.token}?profile={screen.profile}"
        return (
            html.table_html(rows, heads, "All scans of this session")
            + f'<div class="enn-files"><a class="enn-button" href="{address}" download '
            'data-do="csv">Download as CSV</a><button type="button" class="enn-button enn-danger" '
            'data-do="clear">Delete all scans</button></div>'
        )

    def _taught(self, scope: str, site: Site | None, screen: Screen) -> str:
        try:
            entries = [] if site is None else site.history()
            names = self.sites.names(self.brain, scope)
        except EXPECTED as error:
            return taught_html.profiles_html([], screen.profile) + notice_html(
                _line(error), bad=True
            )
        return (
            taught_html.profiles_html(names, screen.profile)
            + '<h2 class="enn-h2">History</h2>'
            + taught_html.history_html(entries, screen.profile)
            + taught_html.taught_files_html(screen.profile, any_taught=bool(entries))
        )

    def _nothing(self, screen: Screen, notice: str = "") -> tuple:
        """The page without a session."""
        rest = (notice, "", "", gr.Timer(active=False), screen)
        return ("", html.empty_html(), "", "", *rest)


def _keep(scan: Scan, told: Scan) -> None:
    """What was told of a scan is its own from now on."""
    scan.label, scan.age, scan.looked = told.label, told.age, told.looked


def _state(session: Session) -> str:
    scans = list(session.scans.values())
    facts = [(s.number, s.state, s.shown, s.explaining, s.explained) for s in scans]
    return sha256(repr(facts).encode()).hexdigest()[:16]


def _others(session: Session, scan: Scan) -> list[Scan]:
    """The other scans that have an age predicted."""
    return [
        other
        for other in session.scans.values()
        if other is not scan
        and other.looked is not None
        and not any(flag.fatal for flag in other.looked.seen.flags)
    ]


def _seen(scans: Sequence[Scan]) -> list[Seen]:
    return [scan.looked.seen for scan in scans if scan.looked is not None]


def _known(seen: Seen) -> float:
    if seen.age is None:
        raise SessionError("give the true age first")
    return seen.age


def _row(scan: Scan, estimate: Estimate | None) -> tuple[str, ...]:
    known = "–" if scan.age is None else f"{scan.age:.1f}"
    if estimate is None:
        failed = f"failed: {scan.error}"
        said = {"waiting": "waiting", "working": "working…"}.get(scan.state, failed)
        return scan.label, "–", said, "–", known, "–"
    if estimate.age is None:
        return scan.label, "–", f"refused: {estimate.error}", "–", known, "–"
    low, high = estimate.low, estimate.high
    interval = "–" if low is None or high is None else f"{low:.0f} to {high:.0f}"
    gap = "–" if estimate.gap is None else f"{estimate.gap:+.1f}"
    odd = ", ".join(html.flag_word(flag) for flag in estimate.flags)
    flags = f"⚠ {odd}" if odd else "none"
    return scan.label, f"{estimate.age:.1f}", flags, interval, known, gap


def _age(given: object, *, empty: bool) -> float | None:
    text = str(given if given is not None else "").strip().replace(",", ".")
    if not text and empty:
        return None
    try:
        age = float(text)
    except ValueError:
        age = -1.0
    if not 0 <= age <= 120:
        raise SessionError(f"got the age {text[:20]!r}; give years from 0 to 120, such as 63.4")
    return age


def _data(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _uid(data: Mapping[str, Any]) -> str | None:
    """By which a lesson is known that arrives twice."""
    uid = data.get("id")
    if uid is not None and not is_uid(uid):
        raise SessionError("the lesson has no proper id; load the page again")
    return uid


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _line(error: BaseException) -> str:
    """One line for the page."""
    text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    text = " ".join(text.split())[:300]
    return text[:1].upper() + text[1:]
