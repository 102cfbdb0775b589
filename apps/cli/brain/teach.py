"""`enn brain teach`, `history`, `undo`, `forget`, `profiles`, `export`, `import`: site profiles."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    BrainModelOption,
    CacheOption,
    InputOption,
    NoCacheOption,
    cache_folder,
    flag_text,
    load_brain,
    open_site,
    prepare,
)
from apps.cli.options import ForceOption, JsonOption, ProfileOption
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    confirm,
    confirm_erasing,
    counted,
    emit,
    emit_json,
    note,
    note_damaged,
    printable,
    quote,
    refuse_ending,
    refuse_overwrite,
    size,
)

if TYPE_CHECKING:
    from neuro.age.predict import BrainAge, Seen
    from neuro.scans.batch import Outcome
    from neuro.teach import Lesson, Site, SiteEntry

__all__ = ["app", "export", "forget", "history", "import_", "profiles", "teach", "undo"]

app = typer.Typer(rich_markup_mode=None)

# Named here: the journals' module needs numpy, and help should not wait for it.
DEFAULT = "default"

_NOTHING = "nothing was taught under profile {} yet; `enn brain teach` does it"


@app.command(
    "teach",
    epilog="""\b
Examples:
  enn brain teach scan.nii.gz --age 63.4 --profile site-a
  enn brain teach scan.nii.gz --age 63.4 --profile site-a --preview
  enn brain teach sub-01/mri/brain.mgz --input brain --age 41 --yes
  enn brain predict ~/site-a --profile site-a        uses what was taught

\b
The profile keeps what the last blocks of the networks read of the scan (770 kB), the
file's name and the ages; never the scan. The networks stay as they are.

\b
Exit codes: 0 ok; 1 refused, with the reason (also of a preview), or the scan cannot be
prepared; 2 user error; 130 not accepted.""",
)
def teach(
    scan: Annotated[
        Path,
        typer.Argument(
            metavar="SCAN",
            help="A T1-weighted scan of a person whose age is known.",
            show_default=False,
        ),
    ],
    age: Annotated[
        float | None,
        typer.Option(
            metavar="YEARS",
            help="Age at the scan. [default: that of a participants.tsv beside or above it]",
            show_default=False,
        ),
    ] = None,
    profile: ProfileOption = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what would change, and learn nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Learn even what is refused as odd or harmful.")
    ] = False,
    input: InputOption = "head",
    model: BrainModelOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    json: JsonOption = False,
) -> int:
    """Tell the age of a scanned person, so that this scanner's other scans get better ages.

    Name a profile for each scanner or protocol. Shows what the lesson does to this scan, to the
    ones taught before, and to scans like those that the model was trained on; on a terminal, asks
    whether to learn it.
    """
    from neuro.scans.find import find_scans
    from neuro.teach import Site, check_age

    if preview and force:
        raise CommandError("--preview and --force exclude each other; a preview writes nothing")
    found = find_scans([scan])
    if len(found) != 1:
        raise CommandError(f"{quote(scan)} holds {len(found):,} scans; give one at a time")
    known = found[0].age if age is None else age
    if known is None:
        why = f" ({printable(found[0].note)})" if found[0].note else ""
        raise CommandError(
            f"the age of {quote(scan)} is not known{why}; give it with --age, in years"
        )
    known = check_age(known)
    brain = load_brain(model)
    with Site.open(brain, profile or DEFAULT) as site:
        seen: list[Seen] = []

        def look(outcome: Outcome) -> dict[str, Any]:
            error = outcome.error
            if outcome.prepared is not None:
                seen.append(brain.look(outcome.prepared, name=outcome.scan.name, age=known))
                error = next((flag.text for flag in seen[0].flags if flag.fatal), "")
            flags = flag_text(seen[0].flags) if seen else ""
            return {"file": str(outcome.scan.path), "flags": flags, "error": error}

        kept = cache_folder(cache, no_cache)
        (row,) = prepare(found, input, jobs=1, cache=kept, stage="looking", each=look)  # type: ignore[arg-type]
        if row["error"]:
            return EXIT_SKIPPED
        earlier = [each for each in site.taught() if each.name != seen[0].name]
        lesson = site.preview(seen[0], known, earlier=earlier)
        against = lesson.refused
        held = against is not None and not force
        if not json:
            _say_lesson(lesson, earlier, site.name)
            if held:
                note(f"refused: {printable(str(against))}; --force learns it all the same")
        if not (preview or held):
            although = f", although {printable(against)}" if against else ""
            if not (yes or json) and asks():
                if against:
                    note(f"against it: {printable(against)}")
                confirm(f"Learn this under profile {site.name}?", "")
            lesson = site.teach(seen[0], known, earlier=earlier, force=force)
            if not json and lesson.entry is not None:
                emit(f"learnt: lesson {lesson.entry} of profile {site.name}{although}")
        elif not json:
            note("nothing was written")
    if json:
        emit_json(_document(lesson, earlier, site.name, preview))
    return EXIT_SKIPPED if lesson.refused else EXIT_OK


def asks() -> bool:
    """Whether somebody sits there to accept a lesson; a script accepts by giving the command."""
    return sys.stdin.isatty()


def _say_lesson(lesson: Lesson, earlier: list[Seen], profile: str) -> None:
    name = printable(lesson.name)
    emit(f"{name}: told {lesson.age:.1f} years, predicted {lesson.before:.1f}")
    emit(f"  with the lesson: {lesson.after:.1f}")
    if earlier:
        before, after = _errors(lesson, earlier)
        many = counted(len(earlier), "scan")
        emit(f"  {many} taught before: mean error {before:.1f} -> {after:.1f} years")
    emit(
        f"  scans like those of the training: {lesson.protected:.2f} years from the model's own "
        "ages (root mean square)"
    )
    emit(
        f"  kept under profile {profile}: {size(lesson.stored_bytes)} of what the last blocks read "
        "of it, the name, both ages; never the scan"
    )


def _errors(lesson: Lesson, earlier: list[Seen]) -> tuple[float, float]:
    """Mean absolute errors of the scans taught before, without and with the lesson."""
    ages = [float(seen.age or 0.0) for seen in earlier]
    before, after = (
        sum(abs(float(said) - age) for said, age in zip(each, ages, strict=True)) / len(ages)
        for each in (lesson.earlier_before, lesson.earlier_after)
    )
    return before, after


def _document(lesson: Lesson, earlier: list[Seen], profile: str, preview: bool) -> dict[str, Any]:
    return {
        "profile": profile,
        "name": lesson.name,
        "preview": preview,
        "lesson": lesson.entry,
        "refused": lesson.refused,
        "age": lesson.age,
        "before": round(lesson.before, 3),
        "after": round(lesson.after, 3),
        "earlier": [
            {
                "name": seen.name,
                "age": seen.age,
                "before": round(float(before), 3),
                "after": round(float(after), 3),
            }
            for seen, before, after in zip(
                earlier, lesson.earlier_before, lesson.earlier_after, strict=True
            )
        ],
        "protected": round(lesson.protected, 4),
        "stored_bytes": lesson.stored_bytes,
        "seconds": round(lesson.seconds, 4),
    }


@app.command(
    "history",
    epilog="""\b
Examples:
  enn brain history --profile site-a
  enn brain history --json

\b
Exit codes: 0 ok, also when nothing was taught; 1 a lesson is damaged; 2 user error.""",
)
def history(
    profile: ProfileOption = None, model: BrainModelOption = None, json: JsonOption = False
) -> int:
    """List what was taught, oldest first.

    Prints number, time, name, the age told and the model's own, also of lessons that are undone.
    """
    from neuro.teach import Site

    with Site.open(load_brain(model), profile or DEFAULT, damaged=True) as site:
        lessons, damaged, name = site.history(), site.damaged(), site.name
    note_damaged(damaged)
    if json:
        emit_json([_entry(lesson) for lesson in lessons])
        return EXIT_SKIPPED if damaged else EXIT_OK
    if not lessons and not damaged:
        note(_NOTHING.format(name))
    for lesson in lessons:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(lesson.at))
        undone = "" if lesson.active else "  (undone or replaced)"
        emit(f"{lesson.entry:>5}  {when}  {_told(lesson)}{undone}")
    return EXIT_SKIPPED if damaged else EXIT_OK


def _told(lesson: SiteEntry) -> str:
    name = printable(lesson.name)
    return f"{name}: {lesson.age:.1f} years, by the model alone {lesson.predicted:.1f}"


def _entry(lesson: SiteEntry) -> dict[str, Any]:
    return {
        "lesson": lesson.entry,
        "at": lesson.at,
        "name": lesson.name,
        "age": lesson.age,
        "predicted": round(lesson.predicted, 3),
        "active": lesson.active,
    }


@app.command(
    "undo",
    epilog="""\b
Examples:
  enn brain undo --profile site-a          the newest lesson that is not undone
  enn brain undo 2 --profile site-a        lesson 2 of `enn brain history`

\b
Exit codes: 0 ok, 2 user error (no such lesson, undone already, ...).""",
)
def undo(
    lesson: Annotated[
        int | None,
        typer.Argument(metavar="N", min=1, help="Number of the lesson.", show_default=False),
    ] = None,
    profile: ProfileOption = None,
    model: BrainModelOption = None,
    json: JsonOption = False,
) -> int:
    """Take back a lesson: ages are as if it had never been given."""
    with _open(load_brain(model), profile) as site:
        name, undone = site.name, site.undo(lesson)
    if json:
        emit_json({"profile": name, **_entry(undone)})
    else:
        emit(f"lesson {undone.entry} of profile {name} is undone: {_told(undone)}")
    return EXIT_OK


@app.command(
    "forget",
    epilog="""\b
Examples:
  enn brain forget 3 --profile site-a            erases one lesson
  enn brain forget --profile site-a --yes        erases all of them

\b
Exit codes: 0 ok, 2 user error (no such lesson, not confirmed, ...).""",
)
def forget(
    lesson: Annotated[
        int | None,
        typer.Argument(metavar="N", min=1, help="Number of the lesson.", show_default=False),
    ] = None,
    profile: ProfileOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    model: BrainModelOption = None,
    json: JsonOption = False,
) -> int:
    """Erase a lesson for good, or all of a profile.

    Unlike after `undo`, nothing of it stays readable: no name, no age, no numbers. Files that were
    exported are not touched.
    """
    with _open(load_brain(model), profile, damaged=True) as site:
        name = site.name
        many = sum(lesson in (None, each.entry) for each in site.history())
        many += sum(lesson in (None, each.seq) for each in site.damaged())
        if many and not yes:
            confirm_erasing(f"{counted(many, 'lesson')} of profile {name}")
        count = site.forget(lesson)
    if json:
        emit_json({"profile": name, "forgotten": count})
    else:
        emit(f"{counted(count, 'lesson')} of profile {name} erased")
    return EXIT_OK


@app.command(
    "profiles",
    epilog="""\b
Examples:
  enn brain profiles
  ENN_PROFILES=/data/profiles enn brain profiles

\b
Exit codes: 0 ok, 1 a profile cannot be read, 2 user error.""",
)
def profiles(model: BrainModelOption = None, json: JsonOption = False) -> int:
    """List the profiles that the model was taught under.

    Profiles lie in this user's data directory, or in the one that ENN_PROFILES names.
    """
    from enn_core.lessons.errors import JournalError
    from enn_core.lessons.places import profiles_dir
    from neuro.teach import Site, list_sites

    brain = load_brain(model)
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for name in list_sites(brain):
        try:
            with Site.open(brain, name) as site:
                rows.append({"profile": name, "scans": len(site), "file": str(site.path)})
        except JournalError as error:
            broken.append(f"profile {name} cannot be read: {error}")
    if json:
        emit_json(rows)
    for row in () if json else rows:
        emit(f"{row['profile']:<16} {counted(row['scans'], 'labelled scan')}")
    if not rows and not broken:
        note(f"no profile in {quote(profiles_dir())} yet; `enn brain teach` makes one")
    for line in broken:
        note(printable(line))
    return EXIT_SKIPPED if broken else EXIT_OK


@app.command(
    "export",
    epilog="""\b
Examples:
  enn brain export site-a.json --profile site-a

\b
Exit codes: 0 ok, 2 user error.""",
)
def export(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")],
    profile: ProfileOption = None,
    model: BrainModelOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Write a profile's lessons to a file, for the same model elsewhere.

    It holds the names and ages of the scans and what the last blocks read of them.
    """
    refuse_ending(output, {".json": "lessons"})
    refuse_overwrite(output, force)
    with _open(load_brain(model), profile) as site:
        count, name = site.export(output), site.name
    if json:
        emit_json({"profile": name, "file": str(output), "lessons": count})
    else:
        emit(f"{counted(count, 'lesson')} of profile {name} written to {printable(output)}")
    return EXIT_OK


@app.command(
    "import",
    epilog="""\b
Examples:
  enn brain import site-a.json --profile site-a

\b
Exit codes: 0 ok, 2 user error (other model, damaged file, ...): nothing is changed.""",
)
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by `enn brain export`.")],
    profile: ProfileOption = None,
    model: BrainModelOption = None,
    json: JsonOption = False,
) -> int:
    """Add the lessons of a file to a profile, which may be new; those it has are passed over."""
    from neuro.teach import Site

    with Site.open(load_brain(model), profile or DEFAULT) as site:
        count = site.import_(file)
        name, total = site.name, len(site)
    if json:
        emit_json({"profile": name, "file": str(file), "lessons": count, "total": total})
    else:
        emit(f"{counted(count, 'lesson')} imported into profile {name}, {total:,} are in force")
    return EXIT_OK


def _open(brain: BrainAge, profile: str | None, *, damaged: bool = False) -> Site:
    """The profile of a `--profile` option, which must exist; see `Site.open`."""
    site = open_site(brain, profile or DEFAULT, damaged=damaged)
    if site is None:  # never, of a profile that is named
        raise CommandError(_NOTHING.format(profile or DEFAULT))
    return site
