"""`enn search eval` and `enn search train`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.cli_options import (
    ForceOption,
    JsonOption,
    ManyValues,
    ModelOption,
    PretrainedOption,
    load_model,
    search_app,
)
from apps.cli_terminal import (
    EXIT_OK,
    CommandError,
    Interrupted,
    ProgressLine,
    duration,
    emit,
    emit_json,
    quote,
    refuse_overwrite,
)

__all__ = ["evaluate", "train"]


# --- eval --------------------------------------------------------------------------------------


@search_app.command(
    "eval",
    cls=ManyValues,
    epilog="""\b
Examples:
  enn search eval --dataset dataset_flickr8k.json --images Flicker8k_Dataset --split val
  enn search eval --dataset karpathy.json --images DIR --split test \\
      --model ViT-B-32 --pretrained laion2b_s34b_b79k --recall-k 1 5 10 --output r.json

\b
The result is in CLIP_benchmark's form: image_retrieval_recall@K is text to image,
text_retrieval_recall@K image to text.
Exit codes: 0 ok, 2 user error (missing images, no such split, ...), 130 stopped.""",
)
def evaluate(
    dataset: Annotated[
        Path, typer.Option(metavar="FILE", help="Captions in Karpathy's JSON form (or .json.gz).")
    ],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the images.")],
    split: Annotated[
        str,
        typer.Option(metavar="NAME", help="Split; several are joined by +, as in train+restval."),
    ] = "test",
    model: ModelOption = None,
    pretrained: PretrainedOption = None,
    recall_k: Annotated[
        list[int] | None,
        typer.Option(
            "--recall-k",
            metavar="K...",
            min=1,
            help="One or more K. [default: 1 5 10]",
            show_default=False,
        ),
    ] = None,
    captions_per_image: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Keep only the first N captions of each image; COCO's protocol takes 5.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images per call of the model.")
    ] = 32,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the result as JSON.", show_default=False),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Measure Recall@K of a model on captioned images, in both directions."""
    from retrieval.datasets import load_karpathy
    from retrieval.evaluate import evaluate as measure
    from retrieval.evaluate import write_result

    if output is not None:
        refuse_overwrite(output, force)
    if not images.is_dir():
        raise CommandError(f"there is no folder {quote(images)}; give the folder of the images")
    data = load_karpathy(dataset, images, split, captions_per_image=captions_per_image)
    loaded = load_model(model, pretrained)
    with _stoppable("stopped; nothing was written"), ProgressLine() as line:
        result = measure(
            loaded, data, tuple(recall_k or (1, 5, 10)), batch_size=batch_size, progress=line.show
        )
    if output is not None:
        write_result(result, output)
    if json:
        emit_json(result)
    else:
        _say_result(result)
    return EXIT_OK


def _say_result(result: dict[str, Any]) -> None:
    emit(
        f"{result['dataset']} {result['split']}: {result['n_images']:,} images, "
        f"{result['n_captions']:,} captions ({result['protocol']})"
    )
    emit(f"{result['model']} {result['pretrained']}, {duration(result['seconds'])}")
    metrics = result["metrics"]
    for name, label in (("image_retrieval", "text to image"), ("text_retrieval", "image to text")):
        for key, value in metrics.items():
            if key.startswith(f"{name}_recall@") and key.rpartition("@")[2].isdigit():
                low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
                k = key.rpartition("@")[2]
                emit(f"  {label}  R@{k:<4} {value:6.1%}   (95 %: {low:.1%} to {high:.1%})")


# --- train -------------------------------------------------------------------------------------


@search_app.command(
    "train",
    epilog="""\b
Examples:
  enn search train --config long-eclip-mini --output runs/mini
  enn search train --config my.json --data /data --output runs/mine
  enn search train --config my.json --output runs/mine --resume
  enn search index ~/Photos --model runs/mine/model

\b
Exit codes: 0 ok, 2 user error (no such configuration, missing data, ...), 130 stopped.""",
)
def train(
    config: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Name of a shipped configuration, or .json.")
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for checkpoints, log and model.")
    ] = Path("runs/search"),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory that the configuration's data sets lie in. [default: $ENN_DATA]",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --output.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """Train a search model. Can be stopped at any time; --resume goes on."""
    from retrieval.train import TrainConfig
    from retrieval.train import train as run

    settings = TrainConfig.load(config)
    started = (output / "checkpoint.pt").exists()
    if started and not resume:
        raise CommandError(
            f"{quote(output)} holds a run already; give --resume to go on, or another --output"
        )
    if resume and not output.is_dir():
        raise CommandError(f"there is no run in {quote(output)} to resume; leave --resume out")
    hint = f"stopped; go on with: enn search train --config {config} --output {output} --resume"
    with _stoppable(hint), ProgressLine() as line:
        result = run(settings, data=data, output=output, progress=line.show)
    if json:
        emit_json({key: _plain(value) for key, value in result.items()})
    else:
        for key, value in result.items():
            emit(f"{key:<14} {value}")
    return EXIT_OK


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


@contextlib.contextmanager
def _stoppable(message: str) -> Iterator[None]:
    """Says `message` when Ctrl-C ends what is inside."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None
