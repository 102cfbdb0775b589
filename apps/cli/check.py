"""`enn check`: what is stored, against the digests it was stored with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import JsonOption
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    ProgressLine,
    absolute,
    counted,
    emit,
    emit_json,
    printable,
    quote,
    stoppable,
)

if TYPE_CHECKING:
    from enn_core.files.digests import Damage

__all__ = ["CHECK_EPILOG", "check"]

CHECK_EPILOG = """\b
Examples:
  enn check                               the index here, all profiles, what came along
  enn check ~/Photos default              an index, a profile
  enn check runs/mine study.json --json   a run's folder, a file
  enn check ~/Photos --repair

\b
Exit codes: 0 nothing is damaged, or all is repaired; 1 something is damaged;
2 user error."""

_TENSORS = (".safetensors",)
_STATES = (".pt", ".pth")
_AGAIN = "write it again, or restore it from a backup"


_Tell = Callable[[str, int, int], None]
"""Shows a stage's name, what is done of it, and its whole."""


@dataclass(frozen=True)
class _Thing:
    """Something that is stored.

    Attributes:
        kind: what it is, one word.
        path: where.
        look: says what is damaged, and changes nothing.
        mend: puts right what can be, and says what that was.
    """

    kind: str
    path: Path
    look: Callable[[], list[Damage]]
    mend: Callable[[_Tell], list[Damage]] | None = None


def check(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="An index or an indexed folder, a profile's name or journal, a file of a model, "
            "checkpoint, calibration, of lessons or Parquet, or a folder of such files. Without "
            "one: the index found here or above, all profiles, shipped models and photos, the "
            "cache of prepared brains.",
            show_default=False,
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Put right what can be: embed the pictures of damaged vectors again, set damaged "
            "lessons aside (a copy stays), delete damaged entries of caches. Close programs that "
            "use it first.",
        ),
    ] = False,
    json: JsonOption = False,
) -> int:
    """Check what is stored for damage; read only, unless --repair is given.

    Every block of vectors, row and file is compared with the digest that was stored with it. Files
    of earlier versions have none, or few: of them only what no reader could use is found.
    """
    things = list(_all_things() if not targets else _things_of(targets))
    results: list[tuple[_Thing, list[Damage]]] = []
    with stoppable("stopped; nothing was changed that is not whole"), ProgressLine() as line:
        for number, thing in enumerate(things):
            line.show("checking", number, len(things), printable(thing.path.name))
            damage = thing.look()
            if damage and repair and thing.mend is not None:
                damage = thing.mend(line.show)
            results.append((thing, damage))
    left = sum(any(not each.repaired for each in damage) for _, damage in results)
    if json:
        checked = [
            {"kind": thing.kind, "path": str(thing.path), "damage": [asdict(d) for d in damage]}
            for thing, damage in results
        ]
        emit_json({"checked": checked, "damaged": left})
    else:
        _say(results, left, repair)
    return EXIT_SKIPPED if left else EXIT_OK


def _say(results: Sequence[tuple[_Thing, list[Damage]]], left: int, repair: bool) -> None:
    for thing, damage in results:
        whole = not any(not each.repaired for each in damage)
        state = "fine" if not damage else "repaired" if whole else "damaged"
        emit(f"{thing.kind:<12} {state:<9} {printable(thing.path)}")
        for each in damage:
            names = [Path(each.file).name] if Path(each.file) != thing.path else []
            part = ", ".join([*names, each.part] if each.part else names)
            part += ": " if part else ""
            remedy = f"; {each.remedy}" if each.remedy else ""
            emit(f"  {printable(part + each.lost + remedy)}")
    if not results:
        emit("there is nothing to check here")
    mendable = any(thing.mend is not None and damage for thing, damage in results)
    if left and mendable and not repair:
        emit(f"{counted(left, 'thing')} damaged; `enn check --repair` puts right what can be")


# --- what there is -------------------------------------------------------------------------------


def _all_things() -> Iterator[_Thing]:
    """What is the user's, and what came along."""
    from apps.cli.search.group import find_index
    from enn_core.lessons.places import profiles_dir

    with contextlib.suppress(CommandError, ModuleNotFoundError):
        yield _index(find_index(None))
    yield from map(_journal, sorted(profiles_dir().glob("*/*/*.sqlite")))
    yield from _shipped()
    with contextlib.suppress(ModuleNotFoundError):
        from neuro.scans.prep_cache import default_cache_dir

        if default_cache_dir().is_dir():
            yield _brain_cache(default_cache_dir())


def _things_of(targets: Sequence[str]) -> Iterator[_Thing]:
    for target in targets:
        path = absolute(Path(target))
        if path.is_dir():
            found = list(_in_folder(path))
            if not found:
                raise CommandError(
                    f"{quote(path)} holds no index, model or checkpoint; give a folder that does"
                )
            yield from found
        elif path.exists():
            yield _file(path)
        else:
            yield from _profile(target)


def _in_folder(folder: Path) -> Iterator[_Thing]:
    inside = folder / ".enn-index"
    for place in (folder, inside):
        if any((place / name).exists() for name in ("manifest.json", "catalog.sqlite")):
            yield _index(place)
            return
    if any(folder.glob("*.npz")):
        yield _brain_cache(folder)
    for path in sorted(folder.rglob("*")):
        if (path.suffix in (*_TENSORS, *_STATES, ".parquet") and path.is_file()) or (
            path.name == "config.json" and path.with_name("model.safetensors").is_file()
        ):
            yield _file(path)


def _profile(name: str) -> Iterator[_Thing]:
    from enn_core.lessons.places import LOCAL, ProfileError, check_name, profiles_dir

    folder = profiles_dir() / LOCAL
    try:
        found = sorted((folder / check_name(name)).glob("*.sqlite"))
    except ProfileError:
        found = []
    if not found:
        names = sorted(path.name for path in folder.glob("*") if any(path.glob("*.sqlite")))
        raise CommandError(
            f"there is no file, folder or profile {quote(name)}; profiles: "
            f"{printable(', '.join(names[:10])) or 'none yet'}"
        )
    yield from map(_journal, found)


def _file(path: Path) -> _Thing:
    if path.name == "catalog.sqlite" or path.suffix == ".faiss":
        return _index(path.parent)
    if path.suffix == ".sqlite":
        return _journal(path)
    kinds: dict[str, tuple[str, Callable[[Path], object]]] = {
        ".parquet": ("export", _read_parquet),
        ".json": ("document", _read_json),
        ".npz": ("cache", _read_brain),
        **dict.fromkeys(_TENSORS, ("model", _read_tensors)),
        **dict.fromkeys(_STATES, ("checkpoint", _read_state)),
    }
    if path.suffix not in kinds:
        raise CommandError(
            f"{quote(path)} is of no kind that can be checked; valid are indexes, profiles, and "
            f"files that end in {', '.join(sorted(kinds))}"
        )
    kind, read = kinds[path.suffix]
    return _Thing(kind, path, lambda: _told(path, read))


def _index(folder: Path) -> _Thing:
    from apps.cli.search.group import load_model
    from retrieval.index.check import check_index, repair_index
    from retrieval.index.manifest import Manifest

    return _Thing(
        "index",
        folder,
        lambda: check_index(folder),
        lambda tell: repair_index(
            folder,
            lambda name: load_model(name, None, Manifest.read(folder).precision),
            lambda done, total: tell("embedding", done, total),
        ),
    )


def _journal(path: Path) -> _Thing:
    from enn_core.lessons.check import check_journal, repair_journal

    return _Thing("profile", path, lambda: check_journal(path), lambda _: repair_journal(path))


def _shipped() -> Iterator[_Thing]:
    from enn_core.files.shipped import NotInstalledError

    def looked(find: Callable[[], Path]) -> list[Damage]:
        try:
            return _told(find(), lambda _: None)
        except (ValueError, OSError) as error:  # its line names the file, and what to do
            return [_damage(Path(), error, "")]

    found: list[tuple[str, str, Callable[[], Path]]] = []
    with contextlib.suppress(ModuleNotFoundError):
        from retrieval.model.loading import MINI, shipped_model

        found.append(("model", MINI, shipped_model))
    with contextlib.suppress(ModuleNotFoundError):
        from neuro.age.predict import shipped_weights

        found.append(("model", "brain-age-ixi", shipped_weights))
    with contextlib.suppress(ModuleNotFoundError):
        from apps.web.search.gallery import gallery

        found.append(("photos", "sample gallery", gallery))
    for kind, name, find in found:
        with contextlib.suppress(ValueError, OSError):  # what is wrong is told when it is looked at
            try:
                find()
            except NotInstalledError:
                continue
        yield _Thing(kind, Path(name), partial(looked, find))


def _brain_cache(folder: Path) -> _Thing:
    def damaged() -> list[Damage]:
        return [
            found for path in sorted(folder.glob("*.npz")) for found in _told(path, _read_brain)
        ]

    def mend(_: _Tell) -> list[Damage]:
        found = damaged()
        for each in found:
            Path(each.file).unlink(missing_ok=True)
        return [replace(each, remedy="", repaired=True) for each in found]

    return _Thing("cache", folder, damaged, mend)


# --- files that are read whole -------------------------------------------------------------------


def _told(path: Path, read: Callable[[Path], object]) -> list[Damage]:
    try:
        read(path)
    except (OSError, ValueError) as error:
        return [_damage(path, error, _AGAIN)]
    return []


def _damage(path: Path, error: Exception, remedy: str) -> Damage:
    from enn_core.files.digests import Damage

    return Damage(str(path), "", " ".join(str(error).split()), remedy)


def _read_tensors(path: Path) -> None:
    from enn_core.files.tensors import read_tensors

    read_tensors(path)


def _read_state(path: Path) -> None:
    from enn_core.files.tensors import read_state

    read_state(path)


def _read_json(path: Path) -> None:
    from enn_core.files.digests import check_seal

    content: Any = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    check_seal(content)


def _read_parquet(path: Path) -> None:
    from retrieval.index.parquet import check_parquet

    check_parquet(path)


def _read_brain(path: Path) -> None:
    from neuro.scans.prep_cache import read_prepared

    read_prepared(path)
