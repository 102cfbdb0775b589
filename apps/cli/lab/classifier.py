"""`enn train`: the group, and `enn train classifier`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.lab.bench import add_bench
from apps.cli.options import JsonOption, show_help
from apps.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    CommandError,
    Interrupted,
    ProgressLine,
    absolute,
    emit,
    emit_json,
    note,
    printable,
    quote,
)
from apps.cli.training_settings import SETTINGS, changed, plain_json

if TYPE_CHECKING:
    from enn_core.lab.classify.config import ClassifyConfig

__all__ = ["classifier", "train_app"]

train_app = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    name="train",
    rich_markup_mode=None,
    help="Train image classifiers by backpropagation, local learning, LOCO and others.",
    epilog="""\b
Examples:
  enn train classifier runs/digits --data digits --arch vit-tiny --layers enn
  enn train classifier --config list

\b
`enn search train` and `enn brain train` train the models of the two apps.""",
)


add_bench(train_app)


@train_app.command(
    "classifier",
    epilog="""\b
Examples:
  enn train classifier runs/vit                          a small ViT on digits
  enn train classifier runs/enn --layers enn --set lr=1e-2
  enn train classifier runs/local --data fashion-mnist --rule local --layers enn
  enn train classifier runs/mlp --arch mlp:11 --rule loco --set lr=1e-3
  enn train classifier runs/r50 --config cifar --data-dir ~/data
  enn train classifier runs/flowers --data imagefolder:flowers --arch resnet50 \\
      --weights resnet50.pth --epochs 20 --set crop='[0.3,1]' --set flip=true
  enn train classifier runs/r50 --resume
  torchrun --nproc-per-node 8 -m apps.cli train classifier runs/in --config imagenet

\b
--data: digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, or imagefolder:DIR with
images in DIR/train/CLASS and DIR/test/CLASS.
--arch: mlp, mlp:11 (weight layers), mlp:11x512 (and width), mlp-relu, conv-small,
vit-tiny, vit-tiny:4 (side of patches), resnet-small, resnet18, resnet50, resnet101,
resnet152, vit-b16, or any model of other libraries as timm:NAME or torchvision:NAME.
--rule: backprop (end to end), local (blocks that learn from heads of their own), loco
(without any gradient), or the name of another rule; a wrong name lists them.
--layers: plain; enn, eigen layers kept orthonormal; enn-penalty, the paper's.
--set changes a setting: --set lr=1e-2 --set options.probes=8; a wrong name lists all.
OUTPUT/settings.json holds those of the run, and is a configuration itself; log.csv and
curves.png show how it goes; model.safetensors is the plain network in the end, and
result.json its accuracy. The test images are looked at once, after the last epoch.
Exit codes: 0 ok, 2 user error (no such data, other settings, ...), 130 stopped.""",
)
def classifier(
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUTPUT",
            help="Directory for checkpoints, log and model. [default: runs/DATA-ARCH-RULE-LAYERS]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help='Settings to begin with: a name, or a .json file; "list" shows the names. '
            "[default: small]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Data set. [default: digits]", show_default=False),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Network. [default: vit-tiny]", show_default=False),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How it learns. [default: backprop]", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="plain|enn|enn-penalty",
            help="Form of its linear maps. [default: plain]",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Begin with these weights of the plain network (.safetensors, .pt, .pth).",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory that data sets lie in. [default: $ENN_DATA]",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Rounds over the data.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of weights, order and split.", show_default=False),
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
        bool, typer.Option("--resume", help="Go on with the run that is in OUTPUT.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Train an image classifier. Can be stopped at any time; --resume goes on."""
    if config == "list":
        _list(json)
        return EXIT_OK
    if resume and output is None:
        raise CommandError("give OUTPUT, the directory of the run to go on with")
    if output is not None:
        _check_output(output, resume)
    from enn_core.lab.classify.config import ClassifyConfig, read_config
    from enn_core.lab.classify.run import train

    source = config or (os.fspath(output / SETTINGS) if output and resume else "small")
    flags = {"data": _data_name(data), "arch": arch, "rule": rule, "layers": layers}
    flags |= {"weights": os.fspath(absolute(weights.expanduser())) if weights else None}
    flags |= {"epochs": epochs, "seed": seed}  # type: ignore[dict-item]
    given = {name: value for name, value in flags.items() if value is not None}
    values = changed({**read_config(source), **given}, changes or [])
    settings = ClassifyConfig.load(source, values)
    if output is None:
        output = Path("runs", _run_name(settings))
        _check_output(output, resume)
    first = int(os.environ.get("RANK", "0")) == 0
    if not first:
        try:
            train(settings, data=data_dir, output=output)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return EXIT_OK
    again = ["enn"]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        again = ["torchrun", "--nproc-per-node", os.environ["WORLD_SIZE"], "-m", "apps.cli"]
    again += ["train", "classifier", os.fspath(output), "--resume"]
    if data_dir is not None:
        again += ["--data-dir", os.fspath(data_dir)]
    try:
        with ProgressLine() as line:
            result = train(settings, data=data_dir, output=output, progress=line.show)
    except KeyboardInterrupt:
        kept = (output / SETTINGS).is_file()
        hint = f"go on with: {printable(shlex.join(again))}" if kept else "nothing was written"
        raise Interrupted(f"stopped; {hint}") from None
    if json:
        emit_json(plain_json(result))
    else:
        _say(result)
        if result["epochs"] < settings.epochs:
            more = f"{shlex.join(again)} --set stop_after=0"
            note(f"{result['epochs']} of {settings.epochs} epochs; go on with: {printable(more)}")
    return EXIT_OK


def _list(as_json: bool) -> None:
    from enn_core.lab.classify.config import list_configs

    found = list_configs()
    if as_json:
        emit_json(found)
        return
    width = max(map(len, found))
    for name, what in found.items():
        emit(f"{name:<{width}}  {what}")


def _run_name(settings: ClassifyConfig) -> str:
    """A folder's name that says what is trained how."""
    kind, _, folder = settings.data.partition(":")
    data = f"{kind}-{Path(folder).name}" if folder else kind
    text = f"{data}-{settings.arch}-{settings.rule}-{settings.layers}"
    return re.sub(r"[^\w.-]+", "-", text)


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CommandError(f"{quote(output)} is a file; give a directory for the run")
    if (output / "checkpoint.pt").exists() and not resume:
        raise CommandError(
            f"{quote(output)} holds a run already; give --resume to go on, or another OUTPUT"
        )
    if resume and not (output / SETTINGS).is_file():
        raise CommandError(f"there is no run in {quote(output)} to resume; leave --resume out")


def _data_name(data: str | None) -> str | None:
    """A folder that is there becomes absolute, so that the run can be resumed from anywhere."""
    kind, _, folder = (data or "").partition(":")
    place = Path(folder).expanduser()
    if kind == "imagefolder" and folder and place.is_dir():
        return f"imagefolder:{absolute(place)}"
    return data


def _say(result: Mapping[str, Any]) -> None:
    for name, key in (("test", "test_accuracy"), ("validation", "valid_accuracy")):
        if result[key] is not None:
            emit(f"{name:<12} {100 * result[key]:.2f} % right")
    counts = result["parameters"]
    stored = f"{counts['stored']:,} stored, {counts['fused']:,} after fusing"
    heads = f"; {counts['heads']:,} in heads for training alone" if counts["heads"] else ""
    emit(f"{'parameters':<12} {stored}, {counts['trainable']:,} trained{heads}")
    if result["orthogonality"] is not None:
        emit(f"{'bases':<12} {result['orthogonality']:.1e} from orthonormal at most")
    emit(f"{'model':<12} {printable(result['model'])}")
    if result["eigen"]:
        emit(f"{'eigen form':<12} {printable(result['eigen'])}")
