"""What the commands of `enn search` share: the group, its options, finding index and model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.options import show_help
from apps.cli.terminal import CommandError, absolute, emit, emit_json, note, printable, quote

if TYPE_CHECKING:
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.search import Searcher
    from retrieval.teach.teacher import Teacher

__all__ = [
    "IndexOption",
    "ModelName",
    "ModelOption",
    "PrecisionOption",
    "PretrainedOption",
    "find_index",
    "list_models_asked",
    "load_model",
    "note_cut",
    "open_taught",
    "search_app",
    "teacher_of",
]

search_app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    name="search",
    rich_markup_mode=None,
    help="Index and search folders of pictures, and teach the search by marks.",
    epilog="""\b
Examples:
  enn search index ~/Photos
  cd ~/Photos; enn search query "a dog in the snow"
  enn search teach "a dog in the snow" --good 12,40 --bad 7
  enn search info --index ~/Photos""",
)

IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="Index directory, or a folder that has its index inside. "
        "By default that of the current folder or of one above it.",
        show_default=False,
    ),
]


def list_models_asked(context: typer.Context, name: str | None) -> str | None:
    """Ends the command with the names of models where that is what `--model` asks for."""
    if name != "list":
        return name
    from retrieval.model.loading import list_models

    names = list_models()
    if context.params.get("json"):
        emit_json(names)
    else:
        emit("\n".join(names))
    raise typer.Exit


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        callback=list_models_asked,
        help="long-eclip-mini (shipped), an architecture with its weights "
        "(ViT-B-32:laion2b_s34b_b79k, long-eclip-b16:FILE), ORG/NAME on the hub, or a directory; "
        '"list" shows the names.',
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        callback=list_models_asked,
        help="An architecture with its weights (long-eclip-b16:FILE, "
        'ViT-B-32:laion2b_s34b_b79k), ORG/NAME on the hub, or a directory; "list" shows the names.',
    ),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option(
        "--pretrained",
        metavar="TAG|FILE",
        help="Weights for --model, if it is an architecture alone.",
        show_default=False,
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="f32|bf16",
        help="What the image tower computes in. bf16 is up to 2.5 times as fast on CPUs with units "
        "for it, and rounds the vectors. [default: f32; an index keeps its own]",
        show_default=False,
    ),
]


def find_index(given: Path | None) -> Path:
    """The index directory for a `--index` option, or that of the current folder.

    Looks, as git does, in the folder itself and in those above it.

    Raises:
        CommandError: if there is none.
    """
    from retrieval.index.eigen_index import default_index_dir

    start = absolute(given if given is not None else Path())
    if given is not None and not start.is_dir():
        raise CommandError(
            f"there is no directory {quote(given)}; give an index directory or an indexed folder"
        )
    if (start / "manifest.json").is_file():
        return start
    for folder in (start, *start.parents):
        inside = default_index_dir(folder)
        if (inside / "manifest.json").is_file():
            return inside
    raise CommandError(
        f"no index in {quote(start)} or above it; build one with `enn search index FOLDER`, "
        "or name one with --index DIR"
    )


def open_taught(
    index: Path | None, profile: str | None, *, new: bool = False, damaged: bool = False
) -> Searcher:
    """An index under a profile: the one named, else "default", else (nothing was taught) none.

    Args:
        index: a `--index` option.
        profile: a `--profile` option.
        new: open the profile even if it does not exist yet.
        damaged: open it even if entries are damaged.

    Raises:
        CommandError: if another profile is named that does not exist.
    """
    from retrieval.search import open_index
    from retrieval.teach.profiles import DEFAULT, check_name, list_profiles

    name = check_name(DEFAULT if profile is None else profile)
    searcher = open_index(find_index(index))
    try:
        names = list_profiles(searcher.model)
        if new or name in names:
            from retrieval.teach.teacher import Teacher

            return searcher.with_teacher(Teacher.open(searcher.model, name, damaged=damaged))
        if name != DEFAULT:
            there = ", ".join(names[:10]) if names else "none yet"
            raise CommandError(
                f"there is no profile {name!r}; there are, for this index's model: {there}; "
                "the first `enn search teach` makes one"
            )
    except BaseException:
        searcher.close()
        raise
    return searcher


def teacher_of(searcher: Searcher) -> Teacher:
    """The profile of `open_taught`.

    Raises:
        CommandError: if there is none, as nothing was taught yet.
    """
    if searcher.teacher is None:
        raise CommandError("nothing was taught yet; `enn search teach` does it")
    return searcher.teacher


def load_model(
    name: str | None, pretrained: str | None, precision: str | None = None
) -> RetrievalModel:
    """A model by its `--model` and `--pretrained`, the shipped one without them."""
    from retrieval.model.loading import MINI, load

    name = MINI if name is None else name
    _say_loading(name)
    return load(name, checkpoint=pretrained, precision=precision or "f32")


def _say_loading(name: str) -> None:
    # It takes seconds, and the first time on a machine longer: the network is compiled.
    if sys.stderr.isatty():
        note(f"loading {printable(name)} ...")


def note_cut(model: RetrievalModel, what: str) -> None:
    """Tell that a text was longer than the model reads."""
    if model.truncated_texts:
        note(
            f"warning: {what} is longer than the {model.context_length} tokens that "
            f"{model.name} reads; the rest is left out"
        )
