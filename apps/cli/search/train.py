"""`enn search train`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.cli.options import JsonOption
from apps.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    CommandError,
    ProgressLine,
    absolute,
    emit,
    emit_json,
    note,
    printable,
    quote,
    stoppable,
)
from apps.cli.training_settings import SETTINGS, changed, keep_settings, plain_json

__all__ = ["app", "train"]

app = typer.Typer(rich_markup_mode=None)

# Where `TrainConfig` and `train` of each recipe are.
_RECIPES = {
    "contrastive": ("retrieval.training.config", "retrieval.training.run"),
    "mini": ("retrieval.mini.config", "retrieval.mini.train"),
}


@app.command(
    "train",
    epilog="""\b
Examples:
  enn search train --config list
  enn search train --config flickr8k --data ~/data --output runs/f8k
  enn search train --resume --output runs/f8k
  enn search train --config flickr8k --output runs/mine \\
      --dataset ~/Photos/captioned --set batch_size=32 --set holdout=50
  enn search train --config coco --data ~/data --weights longclip-B.pt \\
      --output runs/coco
  torchrun --nproc-per-node 8 -m apps.cli search train --config coco ...
  enn search index ~/Photos --model runs/mine/model

\b
--dataset takes what `enn search eval` takes: a folder with captions.csv (columns image
and caption, optionally split), a captions file (Karpathy's JSON, ...) with --images,
wds:DIR with tars in DIR/train, flickr8k, flickr30k or coco.
--set changes a setting of the configuration: --set lr=1e-3 --set vision.width=192;
a wrong name lists all of them. OUTPUT/settings.json holds those of the run, and is a
configuration itself. OUTPUT/log.csv and curves.png show how it goes.
Exit codes: 0 ok, 2 user error (no such configuration, missing data, ...), 130 stopped.""",
)
def train(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help='Name of a shipped configuration, or a .json file; "list" shows the names.',
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for checkpoints, log and model.")
    ] = Path("runs/search"),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory that data sets lie in. [default: $ENN_DATA]",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|FILE|wds:DIR",
            help="Train on this instead of the configuration's data set.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the images.", show_default=False),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions of a named data set. [default: looked for in --images and --data]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split; several are joined by +. [default: the configuration's; train, or all "
            "where there are none, with --dataset]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Checkpoint whose text tower is kept, for configurations that need one.",
            show_default=False,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a setting; may be given several times.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --output.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Train a search model. Can be stopped at any time; --resume goes on."""
    if config == "list":
        _list(json)
        return EXIT_OK
    _check_output(output, resume)
    source = config if config is not None else _settings_of(output, resume)
    flags = _flags(dataset, images, annotations, split, weights)
    settings, run = _settings(source, flags, changes or [])
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not (resume and (output / SETTINGS).is_file()):
        keep_settings(output, settings)
    if not first:
        try:
            run(data=data, output=output, progress=None)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return EXIT_OK
    again = ["enn"]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        again = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "-m", "apps.cli"]
    again += ["search", "train", "--output", os.fspath(output), "--resume"]
    if data is not None:
        again += ["--data", os.fspath(data)]
    with (
        stoppable(f"stopped; go on with: {printable(shlex.join(again))}"),
        ProgressLine() as line,
    ):
        result = run(data=data, output=output, progress=line.show)
    if json:
        emit_json(plain_json(result))
    else:
        _say(result)
    return EXIT_OK


def _list(as_json: bool) -> None:
    from retrieval.training.settings import list_configs

    found = list_configs()
    if as_json:
        emit_json(found)
        return
    width = max(map(len, found))
    for name, what in found.items():
        emit(f"{name:<{width}}  {what}")


def _check_output(output: Path, resume: bool) -> None:
    if (output / "checkpoint.pt").exists() and not resume:
        raise CommandError(
            f"{quote(output)} holds a run already; give --resume to go on, or another --output"
        )
    if resume and not output.is_dir():
        raise CommandError(f"there is no run in {quote(output)} to resume; leave --resume out")


def _settings_of(output: Path, resume: bool) -> str:
    """The configuration of the run that is in a directory."""
    from retrieval.training.settings import list_configs

    if not resume:
        raise CommandError(
            f"give --config: {', '.join(list_configs())}, or a .json file; `--config list` "
            "says what they are"
        )
    if not (output / SETTINGS).is_file():
        raise CommandError(
            f"{quote(output)} has no {SETTINGS}; give the --config that the run was started with"
        )
    return os.fspath(output / SETTINGS)


def _flags(
    dataset: str | None,
    images: Path | None,
    annotations: Path | None,
    split: str | None,
    weights: Path | None,
) -> dict[str, Any]:
    """Options as settings; files that are there become absolute, so that a run can be resumed."""
    given: dict[str, Any] = {}
    if dataset is not None:
        # What the configuration says of its own data set belongs to that.
        given |= {"dataset": _place(dataset), "images": "", "annotations": ""}
        given |= {"split": "", "protocol": ""}
    if images is not None:
        given["images"] = _place(os.fspath(images))
    if annotations is not None:
        given["annotations"] = _place(os.fspath(annotations))
    if split is not None:
        given["split"] = split
    if weights is not None:
        given["weights"] = _place(os.fspath(weights))
    return given


def _place(spec: str) -> str:
    tars, path = ("wds:", spec[4:]) if spec.startswith("wds:") else ("", spec)
    expanded = Path(os.path.expanduser(path))
    from retrieval.datasets.protocols import DATASETS

    is_there = (expanded.exists() and spec not in DATASETS) or tars
    return f"{tars}{absolute(expanded)}" if is_there else f"{tars}{expanded}"


def _settings(
    source: str, flags: Mapping[str, Any], changes: Sequence[str]
) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """All settings of a run, and what trains with them."""
    from retrieval.training.settings import make_settings, read_config

    given = read_config(source)
    recipe = given["recipe"]
    if recipe not in _RECIPES:
        raise CommandError(f"{source} has recipe {recipe!r}; valid: {', '.join(_RECIPES)}")
    if recipe == "mini":
        if flags:
            raise CommandError(
                f"{source} has a recipe for its own data set and weights; leave "
                f"--{', --'.join(key for key, value in flags.items() if value)} out"
            )
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise CommandError(f"{source} trains in one process: start it without torchrun")
    config, library = map(import_module, _RECIPES[recipe])
    values = changed({**given, **flags}, changes)
    settings = make_settings(config.TrainConfig, values, source)
    return {"recipe": recipe, **asdict(settings)}, partial(library.train, settings)


def _say(result: Mapping[str, Any]) -> None:
    for key, value in result.items():
        if isinstance(value, Mapping):
            for name, number in value.items():
                emit(f"{key} {name:<{max(0, 13 - len(key))}} {number}")
        else:
            emit(f"{key:<14} {value:.4g}" if isinstance(value, float) else f"{key:<14} {value}")
    note(f"use it: enn search index FOLDER --model {shlex.quote(printable(result['model']))}")
