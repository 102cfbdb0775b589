"""`enn search eval` and `enn search eval-build`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.options import ForceOption, JsonOption, ManyValues
from apps.cli.search.group import (
    ModelOption,
    PrecisionOption,
    PretrainedOption,
    load_model,
)
from apps.cli.terminal import (
    EXIT_OK,
    EXIT_SKIPPED,
    CommandError,
    ProgressLine,
    counted,
    duration,
    emit,
    emit_json,
    note,
    printable,
    quote,
    refuse_ending,
    refuse_overwrite,
    stoppable,
)

if TYPE_CHECKING:
    from retrieval.datasets.captioned import CaptionDataset

__all__ = ["app", "build", "evaluate"]

app = typer.Typer(rich_markup_mode=None)


# --- eval --------------------------------------------------------------------------------------


@app.command(
    "eval",
    cls=ManyValues,
    epilog="""\b
Examples:
  enn search eval --dataset flickr30k --images flickr30k-images
  enn search eval --dataset coco --protocol longclip --data ~/data \\
      --models list.txt --output "{dataset}_{model}_{protocol}.json" --skip-existing
  enn search eval --dataset dataset_flickr8k.json --images Flicker8k_Dataset --split val
  enn search eval --dataset ~/Photos/captioned --limit 100 --failures worst.png
  enn search eval --dataset wds:~/flickr30k_wds --model ViT-B-32 \\
      --pretrained laion2b_s34b_b79k --recall-k 1 5 10 --output r.json

\b
Data sets: flickr30k, coco, flickr8k (protocol karpathy); flickr30k, coco, urban1k
(protocol longclip: all 31,783 photos, val2017, pairs); a folder with captions.csv
(columns image and caption); a captions file (Karpathy's or COCO's JSON, CSV, TSV,
.token) with --images; wds:DIR with tars in DIR/test.
A stopped run goes on where it was when it is started again.
The result is in CLIP_benchmark's form: image_retrieval_recall@K is text to image,
text_retrieval_recall@K image to text.
Exit codes: 0 ok, 1 some models failed, 2 user error (missing images, no such split,
...), 130 stopped.""",
)
def evaluate(
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE|wds:DIR",
            help="flickr30k, coco, flickr8k, urban1k, a folder, a captions file, or tars.",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="karpathy or longclip, for a named data set. [default: its first]",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the images.", show_default=False),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Captions, if not found by name.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that data sets lie in. [default: $ENN_DATA]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Split; several are joined by +, as in train+restval. [default: test, or the "
            "one that the protocol has]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    pretrained: PretrainedOption = None,
    precision: PrecisionOption = None,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Several models: one --model a line, or MODEL,PRETRAINED as CLIP_benchmark has.",
            show_default=False,
        ),
    ] = None,
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
            help="Keep only the first N captions of each image.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Only the first N images: a quick look.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images per call of the model.")
    ] = 32,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the bootstrap intervals.")] = 0,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the result as JSON; {dataset}, {model}, {pretrained}, {protocol} and "
            "{split} are filled in.",
            show_default=False,
        ),
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave out models whose result is there.")
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write every query's rank as Parquet.", show_default=False
        ),
    ] = None,
    failures: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Draw the worst answers (.png, .jpg, .webp).",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep all vectors here; without it they are kept until the run is complete.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Measure Recall@K of models on captioned images, in both directions."""
    from retrieval.datasets.protocols import open_dataset
    from retrieval.eval.contact_sheet import FORMATS

    if models is not None and (model is not None or pretrained is not None):
        raise CommandError("give --models, or --model and --pretrained, not both")
    if skip_existing and output is None:
        raise CommandError("--skip-existing needs --output, the file that may exist")
    if output is not None and "{" not in Path(output).suffix:
        refuse_ending(Path(output), {".json": "results"})
    if failures is not None and Path(failures).suffix.lower() not in FORMATS:
        raise CommandError(f"--failures must end in {', '.join(FORMATS)}, got {quote(failures)}")
    spec = dataset if dataset.startswith("wds:") else os.path.expanduser(dataset)
    if spec.startswith("wds:"):
        spec = f"wds:{os.path.expanduser(spec.removeprefix('wds:'))}"
    found = open_dataset(
        spec,
        protocol=protocol,
        images=images,
        annotations=annotations,
        split=split,
        data=data,
        captions_per_image=captions_per_image,
        limit=limit,
    )
    wanted = _models(models) if models is not None else [(model, pretrained)]
    runs = [
        _Run(name, weights, *_outputs(dataset, found, name, weights, (output, ranks, failures)))
        for name, weights in wanted
    ]
    ks = tuple(recall_k or (1, 5, 10))
    todo = [
        run for run in runs if not (skip_existing and _is_there(run, found, ks, precision, force))
    ]
    _check_outputs(todo, force)
    results, failed = [], 0
    for run in todo:
        try:
            results.append(_measure(run, found, ks, precision, batch_size, seed, features))
        except (OSError, ValueError) as error:
            if len(wanted) == 1:
                raise
            failed += 1
            note(f"{printable(run.model or 'the shipped model')}: {printable(str(error))}")
            continue
        if not json:
            _say_result(results[-1])
    if json:
        emit_json(results[0] if len(wanted) == 1 and results else results)
    if len(todo) < len(runs):
        note(f"{counted(len(runs) - len(todo), 'result')} there already")
    return EXIT_SKIPPED if failed else EXIT_OK


@app.command(
    "eval-build",
    epilog="""\b
Examples:
  enn search eval-build *.json --output benchmark.csv

\b
Also reads results of CLIP_benchmark, whose build reads ours. Results that tested one
data set differently (another protocol, split or number of images) are refused: one
table of each.
Exit codes: 0 ok, 2 user error (no result, mixed protocols, ...).""",
)
def build(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Results of eval, or folders of them.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The table.")] = Path(
        "benchmark.csv"
    ),
    force: ForceOption = False,
) -> int:
    """Put results of eval in one table (CSV)."""
    from retrieval.eval.report import write_table

    refuse_ending(output, {".csv": "a table"})
    refuse_overwrite(output, force)
    count = write_table(files, output)
    note(f"{counted(count, 'result')} in {quote(output)}")
    return EXIT_OK


@dataclass(frozen=True)
class _Run:
    """One model and where its results go."""

    model: str | None
    pretrained: str | None
    output: Path | None
    ranks: Path | None
    failures: Path | None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.output, self.ranks, self.failures) if path is not None]


def _models(file: Path) -> list[tuple[str | None, str | None]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(f"cannot read {quote(file)}: {reason}") from None
    found: list[tuple[str | None, str | None]] = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            name, comma, weights = (part.strip() for part in text.partition(","))
            found.append((name, weights if comma and weights else None))
    if not found:
        raise CommandError(f"{quote(file)} names no models; expected one a line")
    return found


def _outputs(
    spec: str,
    found: CaptionDataset,
    model: str | None,
    pretrained: str | None,
    templates: tuple[str | None, ...],
) -> list[Path | None]:
    from retrieval.datasets.protocols import DATASETS
    from retrieval.eval.report import output_path
    from retrieval.model.loading import MINI

    return [
        None
        if template is None
        else output_path(
            template,
            dataset=spec if spec in DATASETS else found.name,
            model=model or MINI,
            pretrained=pretrained,
            protocol=found.protocol,
            split=found.split,
        )
        for template in templates
    ]


def _is_there(
    run: _Run, found: CaptionDataset, ks: tuple[int, ...], precision: str | None, force: bool
) -> bool:
    from retrieval.eval.report import same_question

    if run.output is None or not run.output.is_file():
        return False
    if same_question(run.output, found.hash, ks, precision or "f32"):
        return True
    if force:
        return False
    raise CommandError(
        f"{quote(run.output)} exists but does not hold this evaluation (other images, captions, "
        "K or precision); give another name, or --force to overwrite it"
    )


def _check_outputs(runs: list[_Run], force: bool) -> None:
    seen: set[Path] = set()
    for run in runs:
        for path in run.files:
            if path in seen:
                raise CommandError(
                    f"{quote(path)} would be written twice; put {{model}} and {{pretrained}} in it"
                )
            seen.add(path)
            refuse_overwrite(path, force)


def _measure(
    run: _Run,
    found: CaptionDataset,
    ks: tuple[int, ...],
    precision: str | None,
    batch_size: int,
    seed: int,
    features: Path | None,
) -> dict[str, Any]:
    from retrieval.eval.contact_sheet import write_contact_sheet
    from retrieval.eval.feature_cache import FeatureCache, default_cache_dir
    from retrieval.eval.recall import measure, write_result
    from retrieval.eval.report import write_ranks

    loaded = load_model(run.model, run.pretrained, precision)
    cache = FeatureCache(features or default_cache_dir(), loaded)
    with (
        stoppable("stopped; start it again to go on from the vectors that are done"),
        ProgressLine() as line,
    ):
        measured = measure(
            loaded, found, ks, batch_size=batch_size, seed=seed, progress=line.show, cache=cache
        )
        if run.ranks is not None:
            write_ranks(measured, run.ranks)
        if run.failures is not None:
            write_contact_sheet(measured, run.failures)
        if run.output is not None:
            write_result(measured.result, run.output)
    if features is None:
        cache.drop()
    return measured.result


def _say_result(result: dict[str, Any]) -> None:
    protocol = ", ".join(filter(None, (result["protocol"], result["deviations"])))
    emit(
        f"{result['dataset']} {result['split']}: {result['n_images']:,} images, "
        f"{result['n_captions']:,} captions ({protocol})"
    )
    emit(f"{result['model']} {result['pretrained']}, {duration(result['seconds'])}")
    if result["n_captions_truncated"]:
        cut, tokens = result["n_captions_truncated"], result["context_length"]
        emit(f"  {counted(cut, 'caption')} cut to {tokens} tokens")
    metrics = result["metrics"]
    for name, label in (("image_retrieval", "text to image"), ("text_retrieval", "image to text")):
        for key, value in metrics.items():
            if key.startswith(f"{name}_recall@") and key.rpartition("@")[2].isdigit():
                low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
                k = key.rpartition("@")[2]
                emit(f"  {label}  R@{k:<4} {value:6.1%}   (95 %: {low:.1%} to {high:.1%})")
        mean, median = metrics[f"{name}_mean_rank"], metrics[f"{name}_median_rank"]
        emit(f"  {label}  rank: median {median:g}, mean {mean:.1f}")
