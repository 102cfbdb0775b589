"""`enn search upgrade`: what was taught by a former rule, by that of today."""

from __future__ import annotations

from typing import Annotated

import typer

from apps.cli.options import JsonOption, ProfileOption
from apps.cli.search.group import IndexOption, open_taught, teacher_of
from apps.cli.terminal import EXIT_OK, CommandError, counted, emit, emit_json, note, quote

__all__ = ["app", "upgrade"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "upgrade",
    epilog="""\b
Examples:
  enn search upgrade                         what there is to upgrade
  enn search upgrade --lessons --preview     what would change
  enn search upgrade --lessons --profile anna

\b
Exit codes: 0 ok, 2 user error (nothing to upgrade, ...).""",
)
def upgrade(
    lessons: Annotated[
        bool, typer.Option("--lessons", help="Look up what was taught by the rule adapter.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what would change, and change nothing.")
    ] = False,
    profile: ProfileOption = None,
    index: IndexOption = None,
    json: JsonOption = False,
) -> int:
    """Go over to the rule that new profiles learn by.

    A profile keeps the rule by which it was taught, and with it its answers to the bit. Under the
    rule lookup other wordings of a taught query gain more, and queries that are not near one stay
    exactly as they are. The lessons themselves stay: undo, history and export are as before.
    """
    if preview and not lessons:
        raise CommandError("--preview shows what --lessons would change; give both")
    with open_taught(index, profile) as searcher:
        teacher = teacher_of(searcher)
        name, rule = teacher.name, teacher.rule
        if not lessons:
            _say_rule(name, rule, len(teacher), json)
            return EXIT_OK
        done = teacher.upgrade(searcher.index, preview=preview)
    if json:
        emit_json(
            {
                "profile": name,
                "queries": done.queries,
                "overlap": round(done.overlap, 6),
                "worse": [
                    {"query": query, "before": round(before, 6), "after": round(after, 6)}
                    for query, before, after in done.worse
                ],
                "done": done.done,
            }
        )
        return EXIT_OK
    state = "would be" if preview else "are"
    emit(f"profile {name}: {counted(done.queries, 'taught query', 'taught queries')} {state} "
         "looked up from now on; each keeps its own answers")  # fmt: skip
    emit(f"  other searches: {done.overlap:.0%} of the best pictures of generic queries stay")
    for query, before, after in done.worse:
        emit(f"  less in line with its own marks: {quote(query)} ({before:.0%} -> {after:.0%})")
    if preview:
        note("nothing was written; leave out --preview to upgrade")
    return EXIT_OK


def _say_rule(name: str, rule: str | None, queries: int, json: bool) -> None:
    old = rule == "adapter"
    if json:
        emit_json({"profile": name, "rule": rule, "queries": queries, "upgrade": old})
    elif old:
        emit(f"profile {name}: {counted(queries, 'taught query', 'taught queries')} under the rule "
             "adapter; --lessons --preview shows what the rule lookup would change")  # fmt: skip
    else:
        emit(f"profile {name}: nothing to upgrade; its rule is {rule or 'not chosen yet'}")
