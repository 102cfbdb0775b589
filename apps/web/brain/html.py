"""The HTML of the brain page: pure functions from values to strings, everything escaped.

Shown by `gr.HTML` like that of `apps.web.search.html`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from apps.web.html import icon, notice_html

if TYPE_CHECKING:
    from apps.web.brain.session import Scan, Step
    from neuro.age.predict import Estimate
    from neuro.scans.quality import Flag, Quality

__all__ = [
    "LOGO",
    "Sample",
    "add_html",
    "axis_svg",
    "empty_html",
    "failed_html",
    "flag_word",
    "flags_html",
    "gap_text",
    "progress_html",
    "quality_html",
    "refused_html",
    "result_html",
    "scans_html",
    "table_html",
    "viewer_html",
    "warning_html",
    "years",
]

KINDS = (
    ("head", "a whole head, as scanners make it"),
    ("brain", "an extracted brain"),
    ("mni", "a brain in MNI space"),
)

STEPS = {
    "head": ("reading", "2 mm", "brain extraction", "registration", "intensity"),
    "brain": ("reading", "2 mm", "brain mask", "registration", "intensity"),
    "mni": ("reading", "to the grid", "intensity"),
}
_AFTER = ("pictures", "networks")
_SPOKEN = {
    "starting": "Loading the libraries",
    "reading": "Reading the file",
    "2 mm": "Resampling to 2 mm",
    "brain extraction": "Finding the brain",
    "brain mask": "Finding the brain",
    "registration": "Registering it to MNI152",
    "to the grid": "Bringing it to the grid",
    "intensity": "Scaling its intensities",
    "pictures": "Drawing pictures",
    "networks": "Asking the networks",
}

AXIS = (0, 100)  # years


@dataclass(frozen=True)
class Sample:
    """A scan that the page offers: its key, its name, and what it is."""

    key: str
    name: str
    note: str


def warning_html() -> str:
    """Always in view."""
    return (
        '<p class="enn-warning" role="note"><b>Research use, not a medical device.</b> '
        "<span>Nothing shown here may guide diagnosis or treatment.</span></p>"
    )


def add_html(session: str, samples: Sequence[Sample], limit: int) -> str:
    """Uploading a scan or choosing one that is there.

    Args:
        session: secret of the session that uploads go to.
        samples: what is offered, at least one.
        limit: bytes of an upload.
    """
    kinds = "".join(f'<option value="{key}">{text}</option>' for key, text in KINDS)
    first, *others = samples
    offered = (
        f'<button type="button" class="enn-chip" data-sample="{escape(first.key)}" '
        f'title="{escape(first.note)}">{escape(first.name)}</button>'
    )
    if others:
        options = "".join(
            f'<option value="{escape(s.key)}" title="{escape(s.note)}">{escape(s.name)}</option>'
            for s in others
        )
        offered += (
            '<select class="enn-chip" data-part="sample" aria-label="Sample heads">'
            f'<option value="">a sample head…</option>{options}</select>'
        )
    return (
        f'<div class="enn-add" data-session="{escape(session)}" data-limit="{limit}">'
        '<label class="enn-drop"><input type="file" multiple class="enn-file" '
        'accept=".nii,.gz,.mgz,.mgh" aria-label="Upload T1-weighted scans">'
        f'{_UPLOAD}<span class="enn-drop-text"><b>Upload T1-weighted scans</b>'
        f"<small>.nii, .nii.gz or .mgz, up to {limit // 2**20} MB; choose or drop</small>"
        "</span></label>"
        '<label class="enn-kind">The file holds '
        f'<select data-part="kind">{kinds}</select></label>'
        f'<div class="enn-samples" role="group" aria-label="Scans to try"><span>Or try</span>'
        f"{offered}</div>"
        '<p class="enn-sending" role="status"></p><p class="enn-problem" role="alert"></p></div>'
    )


def scans_html(scans: Sequence[tuple[Scan, str]], chosen: int | None) -> str:
    """The session's scans as a row of buttons; each with its age or state in words."""
    if not scans:
        return ""
    items = "".join(
        f'<li class="enn-scan" data-state="{scan.state}" data-scan="{scan.number}">'
        '<button type="button" data-do="choose" '
        f'aria-pressed="{str(scan.number == chosen).lower()}">'
        f"<b>{escape(scan.label)}</b><span>{escape(said)}</span></button>"
        f'<button type="button" class="enn-remove" data-do="remove" '
        f'aria-label="Delete {escape(scan.label)}" title="Delete this scan">✕</button></li>'
        for scan, said in scans
    )
    return f'<ul class="enn-scans" aria-label="Scans of this session">{items}</ul>'


def empty_html() -> str:
    """Before the first scan."""
    return (
        f'<div class="enn-message">{_BRAIN}<h2>Give a T1-weighted scan of a head</h2>'
        "<p>The page extracts the brain, registers it, and predicts the person's age with an "
        "interval. Tell it true ages and it adapts to your scanner.</p></div>"
    )


def viewer_html() -> str:
    """The three-plane viewer; a script fills it."""
    sliders = "".join(
        f'<label><span>{low}</span><input type="range" min="0" max="1" step="0.005" value="0.5" '
        f'data-axis="{axis}" aria-label="{low} to {high}"><span>{high}</span></label>'
        for axis, (low, high) in enumerate((("Left", "Right"), ("Back", "Front"), ("Low", "High")))
    )
    return (
        '<div class="enn-viewer" hidden><div class="enn-views">'
        '<span class="enn-switch" role="group" aria-label="What is shown">'
        '<button type="button" data-view="head" aria-pressed="true">Scan</button>'
        '<button type="button" data-view="brain" aria-pressed="false">Brain in MNI space</button>'
        "</span>"
        '<span class="enn-explain"><button type="button" class="enn-chip" data-do="explain" '
        'aria-pressed="false" hidden>Show what the answer depends on</button></span>'
        '</div><div class="enn-canvas"><canvas tabindex="0" '
        'aria-label="Three planes of the scan; scroll to move through the slices"></canvas>'
        '<img class="enn-planes" alt="Three planes of the brain" hidden></div>'
        f'<div class="enn-sliders">{sliders}</div>'
        '<p class="enn-note enn-legend" hidden></p>'
        '<p class="enn-note enn-where"></p></div>'
    )


def progress_html(scan: Scan, ahead: int, now: float) -> str:
    """The steps of the work on a scan, with their times.

    Args:
        scan: waiting or working.
        ahead: scans that are worked on before it.
        now: `time.monotonic`.
    """
    if scan.state == "waiting":
        scans = "1 scan is" if ahead == 1 else f"{ahead} scans are"
        text = f"Waiting: {scans} worked on before this one." if ahead else "Waiting for its turn."
        return (
            '<div class="enn-job" role="status"><progress class="enn-progress" '
            f'aria-label="Progress"></progress><p>{text}</p></div>'
        )
    done = {step.name: step for step in scan.steps}
    names = ["starting", *STEPS[scan.kind], *_AFTER]
    rows = "".join(_step(name, done.get(name), now) for name in names)
    finished = sum(step.seconds is not None for step in done.values())
    return (
        '<div class="enn-job"><progress class="enn-progress" aria-label="Progress" '
        f'max="{len(names)}" value="{finished}"></progress>'
        f'<ol class="enn-steps">{rows}</ol></div>'
    )


def _step(name: str, step: Step | None, now: float) -> str:
    state, seconds = "later", ""
    if step is not None and step.seconds is None:
        state, seconds = "now", f"{now - step.began:.0f} s"
    elif step is not None and step.seconds is not None:
        state, seconds = "done", f"{step.seconds:.1f} s"
    said = escape(_SPOKEN.get(name, name))
    return f'<li data-state="{state}"><span>{said}</span><span>{seconds}</span></li>'


def failed_html(label: str, reason: str) -> str:
    """A scan that could not be prepared; the reason goes on from its name."""
    return _refused(f"<b>{escape(label)}</b> {escape(reason)}")


def refused_html(label: str, reason: str) -> str:
    """A scan of which nothing may be predicted; the reason is a sentence of its own."""
    return _refused(f"<b>{escape(label)}</b>: {escape(reason)}")


def _refused(text: str) -> str:
    return (
        '<section class="enn-result enn-refused" role="alert"><h2>No age is given</h2>'
        f"<p>{text}</p></section>"
    )


def result_html(
    scan: Scan,
    estimate: Estimate,
    *,
    trained: tuple[float, float],
    profile: str,
    confidence: float,
) -> str:
    """What the model says of one scan.

    Args:
        scan: ready.
        estimate: with a predicted age.
        trained: youngest and oldest age of the training scans.
        profile: name of the site profile that counts.
        confidence: of the interval, 0 to 1.
    """
    age = estimate.age if estimate.age is not None else math.nan
    interval = (
        f"{confidence:.0%} interval <b>{estimate.low:.0f} to {estimate.high:.0f}</b>"
        if estimate.low is not None and estimate.high is not None
        else "no interval: this model has too few test residuals"
    )
    flags = flags_html(estimate.flags)
    rows = []
    taught = age - estimate.raw
    if abs(taught) >= 0.05:
        rows.append(
            f"Without what profile <b>{escape(profile)}</b> was taught: {years(estimate.raw)} "
            f"({taught:+.1f} by teaching)"
        )
    if estimate.corrected is not None:
        rows.append(f"Corrected for the model's bias with age: {years(estimate.corrected)}")
    elif estimate.uncorrected:
        rows.append(f"Not corrected for the model's bias with age: {escape(estimate.uncorrected)}")
    notes = "".join(f"<li>{row}</li>" for row in rows)
    known = ""
    if scan.age is not None and estimate.gap is not None:
        known = f'<p class="enn-gap">{gap_text(estimate.gap, scan.age)}</p>'
    origin = f'<p class="enn-note">{escape(scan.note)}</p>' if scan.note else ""
    return (
        f'<section class="enn-result" aria-label="Predicted age"><h2>Predicted age</h2>'
        f'<p class="enn-age"><b data-part="age">{age:.1f}</b> years{flags}</p>'
        f'<p class="enn-interval">{interval}</p>{known}'
        f"{axis_svg(estimate, scan.age, trained)}"
        f'<ul class="enn-rows">{notes}</ul>{origin}</section>'
    )


def flags_html(flags: Sequence[Flag]) -> str:
    """Beside a number: what makes it doubtful, the gravest in full."""
    if not flags:
        return ""
    words = "".join(
        f'<span class="enn-flag" title="{escape(flag.text)}">{escape(flag_word(flag))}</span>'
        for flag in flags
    )
    return (
        f' <span class="enn-flags">⚠ Doubtful: {words}<small>{escape(flags[0].text)}</small></span>'
    )


def flag_word(flag: Flag) -> str:
    """ "brain volume"."""
    return flag.name.replace("_", " ")


def gap_text(gap: float, age: float) -> str:
    """ "+3.1 years: looks older than 60.3"."""
    if abs(gap) < 0.05:
        return f"Gap <b>0.0 years</b>: as old as it is, {age:.1f}"
    side = "older" if gap > 0 else "younger"
    return f"Gap <b>{gap:+.1f} years</b>: looks {side} than {age:.1f}"


def years(value: float) -> str:
    """ "63.4 years"."""
    return f"{value:.1f} years"


def axis_svg(estimate: Estimate, age: float | None, trained: tuple[float, float]) -> str:
    """Predicted age, interval and true age on an axis of years."""
    width, height, y = 640, 92, 46
    first, last = AXIS
    last = max(last, *(math.ceil(v / 10) * 10 for v in (estimate.high, estimate.age) if v), 0)

    def x(value: float) -> float:
        return round(20 + (width - 40) * (min(max(value, first), last) - first) / (last - first), 1)

    ticks = "".join(
        f'<line class="enn-tick" x1="{x(t)}" x2="{x(t)}" y1="{y + 14}" y2="{y + 19}"/>'
        f'<text x="{x(t)}" y="{y + 34}" text-anchor="middle">{t}</text>'
        for t in range(first, int(last) + 1, 10)
    )
    parts = [
        f'<rect class="enn-trained" x="{x(trained[0])}" y="{y - 16}" rx="4" '
        f'width="{x(trained[1]) - x(trained[0])}" height="30"/>',
        f'<line class="enn-base" x1="20" x2="{width - 20}" y1="{y + 14}" y2="{y + 14}"/>',
        ticks,
    ]
    spoken = ""
    if estimate.low is not None and estimate.high is not None:
        parts.append(
            f'<rect class="enn-range" x="{x(estimate.low)}" y="{y - 6}" rx="5" '
            f'width="{x(estimate.high) - x(estimate.low)}" height="10"/>'
        )
        spoken = f", interval {estimate.low:.0f} to {estimate.high:.0f}"
    if estimate.age is not None:
        if age is not None:
            parts.append(
                f'<line class="enn-way" x1="{x(age)}" x2="{x(estimate.age)}" y1="{y - 1}" '
                f'y2="{y - 1}"/>'
            )
        parts.append(f'<circle class="enn-dot" cx="{x(estimate.age)}" cy="{y - 1}" r="8"/>')
        parts.append(
            f'<text class="enn-said" x="{x(estimate.age)}" y="{y - 22}" text-anchor="middle">'
            f"{estimate.age:.1f}</text>"
        )
        spoken = f"predicted {estimate.age:.1f}" + spoken
    if age is not None:
        at = x(age)
        parts.append(
            f'<path class="enn-true" d="M{at} {y - 10}l8 9-8 9-8-9z"><title>true age</title></path>'
        )
        spoken += f", true age {age:.1f}"
    key = '<span class="enn-key enn-key-dot">predicted</span>'
    if estimate.low is not None:
        key += '<span class="enn-key enn-key-range">interval</span>'
    if age is not None:
        key += '<span class="enn-key enn-key-true">true age</span>'
    key += (
        f'<span class="enn-key enn-key-trained">ages learned from ({trained[0]:.0f} to '
        f"{trained[1]:.0f})</span>"
    )
    return (
        f'<svg class="enn-axis" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Age in years: {spoken}">{"".join(parts)}</svg>'
        f'<p class="enn-keys-row" aria-hidden="true">{key}</p>'
    )


def quality_html(
    quality: Quality,
    estimate: Estimate,
    notes: Sequence[str],
    steps: Sequence[Step],
    *,
    planes: str,
) -> str:
    """Whether the scan can be trusted: flags, measures, the registered brain, steps with times.

    Args:
        quality: measures.
        estimate: with flags and the distance to the training scans.
        notes: what was odd about the file.
        steps: of the work.
        planes: address of the picture.
    """
    from neuro.scans.quality import USUAL_DICE, told_apart

    flags = "".join(
        notice_html(flag.text[:1].upper() + flag.text[1:], bad=True) for flag in estimate.flags
    )
    if not flags:
        flags = notice_html("Nothing is odd about this scan.")
    distance = estimate.out_of_distribution
    # Its limit is told beside it.
    far = "–" if math.isnan(distance) else told_apart(distance, 1.0, digits=2)[0]
    facts = [
        (f"{quality.dice:.2f}", f"overlap with the template (Dice; usual: {USUAL_DICE} or more)"),
        ("–" if quality.brain_ml is None else f"{quality.brain_ml:,.0f} mL", "brain volume"),
        (f"{100 * quality.field_of_view:.0f} %", "of the brain within the scan"),
        (
            far,
            "intensity distance to training (1: the farthest scan there)",
        ),
        (f"{quality.spacing_mm:.1f} mm", "largest voxel side"),
    ]
    tiles = "".join(
        f'<div class="enn-tile"><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>'
        for value, name in facts
    )
    rows = "".join(
        f"<tr><td>{escape(_SPOKEN.get(step.name, step.name))}</td>"
        f"<td>{step.seconds or 0:.1f} s</td></tr>"
        for step in steps
        if step.name != "starting"
    )
    total = sum(step.seconds or 0 for step in steps if step.name != "starting")
    odd = "".join(f"<li>{escape(note)}</li>" for note in notes)
    odd = f'<ul class="enn-rows">{odd}</ul>' if odd else ""
    return (
        f'<section class="enn-quality" aria-label="Quality"><h2>Can it be trusted?</h2>{flags}'
        f'<div class="enn-quality-body"><figure><img src="{escape(planes)}" '
        'alt="The registered brain in three planes with the outline of the template" '
        'loading="lazy"><figcaption>The registered brain; the line is the template\'s outline. '
        "L and R are the person's left and right.</figcaption></figure>"
        f'<dl class="enn-tiles">{tiles}</dl></div>{odd}'
        f"<details><summary>What was done, in {total:.1f} s</summary>"
        f'<table class="enn-done"><tbody>{rows}</tbody></table></details></section>'
    )


def table_html(rows: Sequence[Sequence[str]], heads: Sequence[str], label: str) -> str:
    """A table; the first cell of each row names it."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="enn-table" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_SHAPE = (
    '<path d="M12 5.2C10.6 3 7 3.2 6.3 5.8 3.9 6.2 3 9 4.2 10.7 2.6 12.4 3 15.4 5 16.4c.2 2.6 3 4 '
    '5 2.8.8-.5 2-1.4 2-3z"/><path d="M12 5.2c1.4-2.2 5-2 5.7.6 2.4.4 3.3 3.2 2.1 4.9 1.6 1.7 1.2 '
    '4.7-.8 5.7-.2 2.6-3 4-5 2.8-.8-.5-2-1.4-2-3z"/><path d="M12 5.2v11.6M8.4 9.2c1 .2 1.8 1 1.8 '
    '2M15.6 9.2c-1 .2-1.8 1-1.8 2M7.2 14c.9-.6 2-.5 2.7.2M16.8 14c-.9-.6-2-.5-2.7.2"/>'
)
LOGO = icon(_SHAPE, cls="enn-logo", width=1.7)
_BRAIN = icon(_SHAPE, cls="enn-icon", width=1.4)
_UPLOAD = icon(
    '<path d="M12 16V5m0 0L7.5 9.5M12 5l4.5 4.5M4.5 15.5V18a2 2 0 0 0 2 2h11a2 2 0 0 0 2-2v-2.5"/>',
    cls="enn-icon",
)
