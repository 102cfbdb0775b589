"""A chart of what feedback did: where the good pictures of each taught search stood, and stand now.

The chart is a table, one small drawing per row, so it reads the same by eye and by ear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Protocol

__all__ = ["EffectLike", "effects_html"]

SHOWN = 50  # rows


class EffectLike(Protocol):
    """What `retrieval.Effect` has: mean places, counted from 1, NaN without pictures."""

    @property
    def query(self) -> str: ...
    @property
    def good(self) -> int: ...
    @property
    def bad(self) -> int: ...
    @property
    def good_before(self) -> float: ...
    @property
    def good_after(self) -> float: ...
    @property
    def bad_before(self) -> float: ...
    @property
    def bad_after(self) -> float: ...


def effects_html(effects: Sequence[EffectLike], total: int) -> str:
    """The chart.

    Args:
        effects: one per taught search.
        total: pictures in the collection, the last place there is.
    """
    if not effects:
        return ""
    axis = _Axis(total)
    rows = "".join(_row(effect, axis) for effect in effects[:SHOWN])
    rest = len(effects) - SHOWN
    more = f'<p class="enn-note">and {rest:,} more</p>' if rest > 0 else ""
    return (
        f'<p class="enn-note">{escape(_summary(effects))}</p>'
        '<div class="enn-table enn-effects" tabindex="0" role="region" '
        'aria-label="What feedback did"><table>'
        '<thead><tr><th scope="col">Search</th><th scope="col">Marks</th>'
        f'<th scope="col" class="enn-plot" aria-hidden="true">{axis.ticks()}</th>'
        '<th scope="col">Mean place of the good ones</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}"
    )


def _summary(effects: Sequence[EffectLike]) -> str:
    known = [e for e in effects if _known(e.good_before, e.good_after)]
    if not known:
        return "No picture has been marked good yet."
    better = sum(e.good_after < e.good_before for e in known)
    worse = sum(e.good_after > e.good_before for e in known)
    text = f"The good pictures stand higher in {better} of {len(known)} taught searches"
    text += f", lower in {worse}." if worse else "."
    return f"{text} ○ without → ● with what was taught; further left is better."


def _row(effect: EffectLike, axis: _Axis) -> str:
    marks = " · ".join(
        f"{count} {name}" for count, name in ((effect.good, "good"), (effect.bad, "bad")) if count
    )
    if _known(effect.good_before, effect.good_after):
        before, after = effect.good_before, effect.good_after
        plot = axis.plot(before, after)
        places = f"{_place(before)} → <b>{_place(after)}</b>"
    elif _known(effect.bad_before, effect.bad_after):
        plot = ""
        places = f"bad ones: {_place(effect.bad_before)} → {_place(effect.bad_after)}"
    else:
        plot, places = "", "not in this collection"
    return (
        f'<tr><th scope="row">{escape(effect.query)}</th><td>{marks}</td>'
        f'<td class="enn-plot" aria-hidden="true">{plot}</td><td>{places}</td></tr>'
    )


class _Axis:
    """Places 1 to `last` on a logarithmic scale: the first ten matter most."""

    def __init__(self, last: int) -> None:
        self.last = max(10, last)

    def x(self, place: float) -> float:
        """Percent of the width, with room for a dot at both ends."""
        share = math.log(min(max(place, 1.0), self.last)) / math.log(self.last)
        return round(4 + 92 * share, 1)

    def ticks(self) -> str:
        places = [10**power for power in range(len(str(self.last))) if 10**power <= self.last]
        texts = "".join(
            f'<text x="{self.x(place)}%" y="15" text-anchor="middle">{_short(place)}</text>'
            for place in places
        )
        return f'<svg class="enn-plot-svg" width="100%" height="20">{texts}</svg>'

    def plot(self, before: float, after: float) -> str:
        start, end = self.x(before), self.x(after)
        kind = "enn-worse" if after > before else "enn-better"
        return (
            f'<svg class="enn-plot-svg {kind}" width="100%" height="20">'
            '<line class="enn-base" x1="4%" x2="96%" y1="10" y2="10"/>'
            f'<line class="enn-way" x1="{start}%" x2="{end}%" y1="10" y2="10"/>'
            f'<circle class="enn-before" cx="{start}%" cy="10" r="4.5"/>'
            f'<circle class="enn-after" cx="{end}%" cy="10" r="5.5"/></svg>'
        )


def _known(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _place(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0") if value < 99.95 else f"{value:,.0f}"


def _short(place: int) -> str:
    """1000 -> "1k"."""
    for size, unit in ((1_000_000, "M"), (1000, "k")):
        if place >= size:
            return f"{place // size}{unit}"
    return str(place)
