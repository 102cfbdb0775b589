"""`enn brain train`: a model from scans of known age."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.cli.brain.group import (
    CacheOption,
    InputOption,
    JobsOption,
    NoCacheOption,
    ScansArgument,
    cache_folder,
    output_folder,
    write_table,
)
from apps.cli.brain.labelled_scans import labelled_scans, prepare_labelled
from apps.cli.brain.predict import score_text
from apps.cli.options import ForceOption, JsonOption
from apps.cli.terminal import (
    EXIT_OK,
    CommandError,
    counted,
    emit,
    emit_json,
    note,
    quote,
    stoppable,
)

if TYPE_CHECKING:
    import torch

    from neuro.dataset import BrainDataset
    from neuro.scans.find import Scan
    from neuro.scans.preprocess import InputKind

__all__ = ["app", "train"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "train",
    epilog="""\b
Examples:
  enn brain train ~/bids --out runs/mine
  enn brain train prepared --input mni --out runs/mine --rule backprop
  enn brain train prepared --input mni --out runs/sfcn --architecture sfcn \\
      --layers plain --target bins --device cuda
  enn brain train prepared --input mni --out runs/tuned --architecture sfcn \\
      --layers plain --rule backprop --weights run_20190719_00_epoch_best_mae.p

\b
Ages come from a participants.tsv (participant_id, age) beside or above the scans, or
from a list with the columns file and age; one scan of each person is learnt from.
Writes to --out: model.safetensors (take it with --model), report.json (scores of ages
predicted by networks that had not seen the person), curves.csv and curves.png (loss of
each block), left_out.csv (scans that could not be used).
Run the same command again after a stop, and it goes on with the next epoch.

\b
Exit codes: 0 ok, 2 user error, 130 stopped by Ctrl-C.""",
)
def train(
    data: ScansArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False),
    ],
    input: InputOption = "head",
    rule: Annotated[
        str,
        typer.Option(
            metavar="local|backprop",
            help="Every block learns from its own head (ENN-l), or all from the last.",
        ),
    ] = "local",
    architecture: Annotated[
        str, typer.Option(metavar="NAME", help="bins4 (ours), yin2023, or sfcn.")
    ] = "bins4",
    layers: Annotated[
        str, typer.Option(metavar="enn|plain", help="Eigen convolutions, or torch's own.")
    ] = "enn",
    target: Annotated[
        str,
        typer.Option(
            metavar="value|absolute|bins",
            help="Squared or absolute error of the age, or soft bins of ages.",
        ),
    ] = "value",
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Published SFCN weights that an sfcn starts from: Peng et al. 2021, or pyment's "
            "as safetensors. Their heads are learnt anew.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the scans.")] = 12,
    members: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            help="Networks; each leaves out one of as many folds, and all answer together.",
        ),
    ] = 5,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Scans in a step.")] = 8,
    lr: Annotated[float, typer.Option(metavar="RATE", help="Highest learning rate.")] = 3e-3,
    views: Annotated[
        int, typer.Option(metavar="N", min=1, help="Variations of each scan; 1 is none.")
    ] = 4,
    seed: Annotated[int, typer.Option(metavar="N", help="Of folds, weights and order.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where steps are computed: cpu, or cuda.")
    ] = "cpu",
    jobs: JobsOption = 1,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> int:
    """Train a brain-age model, with intervals and bias correction, from scans of known age."""
    from neuro.age.networks import ARCHITECTURES
    from neuro.scans.preprocess import check_kind
    from neuro.train import TrainConfig, fit

    kind = check_kind(input)
    if architecture not in ARCHITECTURES:
        raise CommandError(
            f"got --architecture {architecture}, valid are {', '.join(ARCHITECTURES)}"
        )
    if layers not in ("enn", "plain"):
        raise CommandError(f"got --layers {layers}, valid are enn and plain")
    if not 0 < lr < 1:
        raise CommandError(f"got --lr {lr}, give a rate between 0 and 1, as 3e-3")
    config = TrainConfig(
        architecture=architecture,
        layers=layers,  # type: ignore[arg-type]
        rule=rule,  # type: ignore[arg-type]
        target=target,  # type: ignore[arg-type]
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        views=views,
        refit=target != "bins",
        seed=seed,
    )
    if weights is not None:
        from neuro.age.networks import build
        from neuro.age.published_weights import start_from_

        start_from_(build(architecture, layers="plain"), weights)  # before hours of preparing
    where = _device(device)
    folder = output_folder(out)
    if (folder / "model.safetensors").exists() and not force:
        raise CommandError(f"{quote(out)} holds a trained model; give another --out, or --force")
    kept = cache_folder(cache, no_cache)
    scans = labelled_scans(data, one_each=True)
    smallest = max(members, -(-batch_size * members // (members - 1)))
    if len(scans) < smallest:
        raise CommandError(
            f"got {counted(len(scans), 'scan')} of known age; {members} networks and batches of "
            f"{batch_size} need {smallest} or more: give a smaller --batch-size or --members"
        )
    again = f"run the same command again to go on; {quote(out)} keeps what is done"
    dataset, failed = _dataset(scans, kind, jobs, kept)
    write_table(folder / "left_out.csv", ("file", "error"), failed)
    with stoppable(f"stopped; {again}"):
        _, about = fit(
            dataset, config, folder, members=members, weights=weights, report=_report, device=where
        )
    if sys.stderr.isatty():
        note("")
    stalled = _stalled(folder / "curves.csv")
    for text in stalled:
        note(f"warning: {text}")
    if json:
        emit_json({"out": str(folder), "stalled": stalled, "left_out": failed, **about})
    else:
        emit(f"model of {counted(len(dataset), 'scan')} in {quote(folder / 'model.safetensors')}")
        emit(f"people that the networks had not seen: {score_text(about['out_of_fold'])}")
    return EXIT_OK


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise CommandError(f"there is no device {name!r} here; valid is cpu") from None
    return device


def _dataset(
    scans: list[Scan], kind: InputKind, jobs: int, cache: Path | None
) -> tuple[BrainDataset, list[dict[str, Any]]]:
    """The scans that can be used, in the order of their names, and those that cannot."""
    import numpy as np

    from neuro.dataset import BrainDataset
    from neuro.scans.grid import crop

    volumes: dict[str, np.ndarray] = {}
    failed = prepare_labelled(
        scans,
        kind,
        jobs=jobs,
        cache=cache,
        stage="preparing",
        use=lambda scan, prepared: volumes.update({scan.name: crop(prepared.image)}),
    )
    used = sorted((scan for scan in scans if scan.name in volumes), key=lambda scan: scan.name)
    ages = np.array([scan.age for scan in used], np.float64)
    names = tuple(scan.name for scan in used)
    return BrainDataset(names, ages, np.stack([volumes[name] for name in names])), failed


def _report(line: str) -> None:
    """Progress of `fit`: a line that is overwritten on a terminal, else a line each."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
    else:
        note(line)


def _stalled(curves: Path) -> list[str]:
    """Blocks that got no better in the second half of the training, in words."""
    import torch

    from enn_core.local import stalled_blocks

    rows: dict[str, list[list[float]]] = {}
    with curves.open(newline="") as file:
        for row in csv.DictReader(file):
            step = [float(value) for name, value in row.items() if name.startswith("block_")]
            rows.setdefault(row["network"], []).append(step)
    texts = []
    for network, losses in rows.items():
        stalled = stalled_blocks(torch.tensor(losses), len(losses) // 2)
        for block, why in stalled.items():
            texts.append(f"block {block + 1} of network {network} has stalled: {why}")
    return texts
