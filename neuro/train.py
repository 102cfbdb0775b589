"""Training a brain-age network by ENN-l or by backpropagation, in one loop.

The rule decides only what the loop goes over: every block with its own head and optimizer
("local"), or all blocks with the last head ("backprop"). Views, order of scans, steps, learning
rates and the closed-form heads at the end are the same.

A model is several networks (`fit`): each is trained without one fold of the subjects, so that every
subject has a prediction by a network that never saw it. From those come the intervals and the bias
correction; new scans get the average.

>>> TrainConfig(rule="local", epochs=3).rule
'local'
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from enn_core.files.atomic import replacing
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tables import write_table
from enn_core.files.tensors import read_state, write_state
from enn_core.local import LocalTrainer, plot_losses
from enn_core.orthogonality import param_groups
from neuro.age.calibrate import BiasCorrection, CalibrationError, Conformal
from neuro.age.model import Answer, BrainAgeModel, Member, answer, by_head, features_of, last_inputs
from neuro.age.networks import BrainNet, Layers, build
from neuro.age.population import summarise
from neuro.age.published_weights import start_from_
from neuro.age.targets import AgeBins, AgeValue, Target
from neuro.augment import views
from neuro.dataset import BrainDataset, folds
from neuro.metrics import evaluate
from neuro.scans.grid import GRID, as_input, uncrop
from neuro.scans.quality import IntensityReference

__all__ = [
    "TrainConfig",
    "TrainError",
    "describe_scans_",
    "fit",
    "make_inputs",
    "refit_heads_",
    "train_network",
]

Report = Callable[[str], None]

FORMAT: Content = Content()
"""Steps from older states to today's; the first ones have no number."""
_EVALUATED = 8  # scans at once where nothing is learnt


class TrainError(ValueError):
    """A configuration or a folder that cannot be trained with."""


@dataclass(frozen=True)
class TrainConfig:
    """How one network is trained.

    Attributes:
        architecture: see `neuro.age.networks.ARCHITECTURES`.
        layers: "enn" (kept exactly orthonormal) or "plain".
        options: of the architecture.
        rule: "local" or "backprop".
        target: "value" (squared error), "absolute" or "bins".
        epochs, batch_size: passes over the scans, scans per step.
        lr: highest learning rate; rises for a fifth of the steps, then falls as a cosine.
        weight_decay, head_decay: of blocks and of heads.
        views: variations of each scan (`neuro.augment`); 1 for the scan alone. Each is mirrored in
            half of the steps besides.
        refit: replace the heads by their ridge regression after training ("value" only).
        precision: of the blocks while training.
        seed: of initialisation, order and dropout.
    """

    architecture: str = "bins4"
    layers: Layers = "enn"
    options: dict[str, Any] = field(default_factory=dict)
    rule: Literal["local", "backprop"] = "local"
    target: Literal["value", "absolute", "bins"] = "value"
    epochs: int = 12
    batch_size: int = 8
    lr: float = 3e-3
    weight_decay: float = 1e-3
    head_decay: float = 1e-2
    views: int = 4
    refit: bool = True
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid in (
            ("rule", ("local", "backprop")),
            ("target", ("value", "absolute", "bins")),
            ("precision", ("bfloat16", "float32")),
        ):
            if getattr(self, name) not in valid:
                raise TrainError(
                    f"got {name} {getattr(self, name)!r}, valid are {', '.join(valid)}"
                )
        for name in ("epochs", "batch_size", "views"):
            if getattr(self, name) < 1:
                raise TrainError(f"got {name} {getattr(self, name)}, give 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `TrainConfig(**...)` reads it."""
        return dataclasses.asdict(self)


def make_inputs(data: BrainDataset, config: TrainConfig, report: Report | None = None) -> Tensor:
    """What the first block reads: every view of every scan through the network's fixed stem.

    Returns:
        (n, views, channels, i, j, k) float16.
    """
    stem = build(config.architecture, layers="plain", **config.options).stem
    made: list[Tensor] = []
    for number, (subject, volume) in enumerate(zip(data.ids, data.volumes, strict=True), start=1):
        if report is not None and (number % 25 == 0 or number == len(data)):
            report(f"views of scan {number} of {len(data)}")
        with torch.no_grad():
            made.append(
                stem(torch.from_numpy(as_input(views(volume, subject, config.views)))).half()
            )
    return torch.stack(made)


def train_network(
    config: TrainConfig,
    inputs: Tensor,
    ages: np.ndarray,
    *,
    weights: Path | str | None = None,
    state: Path | None = None,
    report: Report | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BrainNet, Target, Tensor]:
    """Train one network on all of these scans.

    Args:
        config: how.
        inputs: (n, views, ...) of `make_inputs`.
        ages: (n,) years.
        weights: published SFCN weights that an `sfcn` starts from (`neuro.age.published_weights`).
        state: file that the run is continued from, if it is there, and that is written after each
            epoch. Continuing gives the same bits on the CPU.
        report: called with a line after each epoch.
        device: where the steps are computed; inputs stay where they are.

    Returns:
        The network (on the CPU, in evaluation mode), its target, the losses (steps, units) float64.

    Raises:
        TrainError: fewer scans than a batch, or a state of another run.
        CheckpointError: `weights` is no published SFCN, or the architecture is none.
        FloatingPointError: a loss is not finite.
    """
    n = len(inputs)
    if n != len(ages) or n < config.batch_size:
        raise TrainError(
            f"got {n} scans and {len(ages)} ages for batches of {config.batch_size}; give as many "
            "ages as scans, and one batch of them or more"
        )
    target = _target(config, ages)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = build(
            config.architecture, outputs=target.outputs, layers=config.layers, **config.options
        )
        if weights is not None:
            start_from_(net, weights)
    # In full precision for every rule, so that both begin alike.
    net.standardise_heads_(_batches(inputs[:, 0]))
    net.train().to(device)
    steps = config.epochs * (n // config.batch_size)
    trainer = LocalTrainer(
        net.units(config.rule),
        target.loss,
        optimizer=lambda unit: _optimizer(unit, config),
        schedule=lambda optimizer: _schedule(optimizer, steps),
        retract_every=1,
        autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        seed=config.seed,
    )
    done, run = 0, _fingerprint(config, ages, weights)
    if state is not None and state.exists():
        done = _resume(state, trainer, run)
    known = torch.as_tensor(ages, dtype=torch.float32, device=device)
    for epoch in range(done, config.epochs):
        for rows, view, mirrored in _epoch(config, epoch, n, inputs.shape[1]):
            x = inputs[rows, view].float()
            x[mirrored] = x[mirrored].flip(2)
            trainer.step(x.to(device), known[rows.to(device)])
        if state is not None:
            content = {"trainer": trainer.state_dict(), "epoch": epoch + 1, "run": run}
            write_state({"format": FORMAT.number, **content}, state)
        if report is not None:
            last = trainer.losses[-(n // config.batch_size) :].mean(0).tolist()
            report(f"epoch {epoch + 1}/{config.epochs}: loss {' '.join(f'{v:.3f}' for v in last)}")
    return net.eval().cpu(), target, trainer.losses


@torch.no_grad()
def refit_heads_(net: BrainNet, target: Target, inputs: Tensor, ages: np.ndarray) -> None:
    """Replace every grid head by its ridge regression on these scans and their mirror images.

    Args:
        net: trained; changed in place.
        target: must be an `AgeValue`.
        inputs: (n, ...) unaugmented, as the first block reads them.
        ages: (n,) years.
    """
    if not isinstance(target, AgeValue):
        raise TrainError("heads of age bins cannot be refitted; train with target 'value'")
    wanted = torch.as_tensor((ages - target.mean) / target.sd)
    both = zip(
        net.pooled(_batches(inputs)), net.pooled(_batches(inputs, mirrored=True)), strict=True
    )
    for head, (pooled, mirrored) in zip(net.grid_heads(), both, strict=True):
        # The answer averages both sides too, so the mean of both is what the map will see.
        head.refit_((pooled + mirrored) / 2, wanted)


def fit(
    data: BrainDataset,
    config: TrainConfig,
    folder: Path | str,
    *,
    members: int = 5,
    weights: Path | str | None = None,
    report: Report | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BrainAgeModel, dict[str, Any]]:
    """Train a model on a data set, with intervals and bias correction; resumes what is in `folder`.

    Args:
        data: subjects of known age.
        config: of each network; member m takes the seed `config.seed + m`.
        folder: gets `model.safetensors`, `report.json`, `curves.csv`, `curves.png` and, for each
            member while it trains, its state.
        members: networks; each is trained without one of as many folds.
        weights: that each starts from, as in `train_network`.
        report: called with lines of progress.
        device: where the steps are computed.

    Returns:
        The model, and scores of out-of-fold predictions: by a single network that has not seen the
        subject, so the average of all will do a little better on new scans.

    Raises:
        TrainError, CheckpointError: as `train_network`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    say = report or (lambda line: None)
    inputs = make_inputs(data, config, report)
    held_out = folds(data.ids, data.ages, members, config.seed)
    trained: list[Member] = []
    curves: list[Tensor] = []
    heads: list[np.ndarray] = []
    for number, out in enumerate(held_out):
        rows = np.setdiff1d(np.arange(len(data)), out)
        net, target, losses = train_network(
            dataclasses.replace(config, seed=config.seed + number),
            inputs[rows],
            data.ages[rows],
            weights=weights,
            state=folder / f"network-{number + 1}.pt",
            report=functools.partial(_say_of, say, f"network {number + 1}/{members}"),
            device=device,
        )
        if config.refit and isinstance(target, AgeValue):
            refit_heads_(net, target, inputs[rows, 0], data.ages[rows])
        trained.append(Member(net, target))
        curves.append(losses)
        heads.append(by_head(net, target, inputs[out, 0]))
    said = np.empty((len(data), heads[0].shape[1]))
    said[np.concatenate(held_out)] = np.concatenate(heads)
    kind: Answer = "last" if config.rule == "backprop" and not config.refit else "mean"
    predicted = answer(said, kind)
    scores = evaluate(predicted, data.ages)
    about = {
        "config": config.to_dict(),
        "subjects": len(data),
        "ages": [float(data.ages.min()), float(data.ages.max())],
        "out_of_fold": scores,
        "out_of_fold_by_head": [
            evaluate(said[:, head], data.ages)["mae"] for head in range(said.shape[1])
        ],
    }
    if weights is not None:
        about["weights"] = {"file": Path(weights).name, "sha256": _sha256(weights)}
    model = BrainAgeModel(
        trained,
        kind,
        Conformal.fit(predicted, data.ages),
        _bias(predicted, data.ages),
        about,
    )
    describe_scans_(model, data, report)
    model.save(folder / "model.safetensors")
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    _write_curves(curves, folder)
    for number in range(members):
        (folder / f"network-{number + 1}.pt").unlink(missing_ok=True)
    return model, about


def _bias(predicted: np.ndarray, ages: np.ndarray) -> BiasCorrection | None:
    """Cole's correction; None where predictions hardly follow the ages."""
    try:
        return BiasCorrection.fit(predicted, ages, "cole")
    except CalibrationError:
        return None


@torch.no_grad()
def describe_scans_(
    model: BrainAgeModel, data: BrainDataset, report: Report | None = None
) -> BrainAgeModel:
    """Give a model the summary statistics of its training scans, where there are enough of them.

    Of their intensities, by which scans that are unlike them are told (20 scans), and of their
    features, which teaching a site leaves alone (3 scans).
    """
    if len(data) >= 20 and data.volumes.shape[1:] == GRID:
        model.reference = IntensityReference.fit(uncrop(volume) for volume in data.volumes)
    if len(data) >= 3:
        rows = []
        for number, volume in enumerate(data.volumes, start=1):
            if report is not None and (number % 25 == 0 or number == len(data)):
                report(f"statistics of scan {number} of {len(data)}")
            rows.append(features_of(model, last_inputs(model, volume)))
        model.population = summarise(rows)
    return model


def _say_of(say: Report, who: str, line: str) -> None:
    say(f"{who}, {line}")


def _write_curves(curves: Sequence[Tensor], folder: Path) -> None:
    """Losses of every network, step and unit as CSV; the first network's as a picture."""
    from matplotlib.figure import Figure

    rows = (
        {"network": number, "step": step}
        | {f"block_{unit}": f"{value:.5f}" for unit, value in enumerate(row, start=1)}
        for number, losses in enumerate(curves, start=1)
        for step, row in enumerate(losses.tolist(), start=1)
    )
    write_table(rows, folder / "curves.csv")
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot_losses(curves[0], figure.add_subplot())
    figure.savefig(folder / "curves.png", dpi=120)


def _target(config: TrainConfig, ages: np.ndarray) -> Target:
    if config.target == "bins":
        return AgeBins()
    spread = float(ages.std())
    power: Literal[1, 2] = 1 if config.target == "absolute" else 2
    return AgeValue(float(ages.mean()), spread if spread > 0 else 1.0, power)


def _batches(inputs: Tensor, mirrored: bool = False) -> Iterator[Tensor]:
    """(n, ...) in parts that fit the cache, float32."""
    for part in inputs.split(_EVALUATED):
        yield part.float().flip(2) if mirrored else part.float()


def _epoch(
    config: TrainConfig, epoch: int, scans: int, views: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of an epoch: scans, their views, which to mirror; from seed and epoch alone."""
    rng = np.random.default_rng([config.seed, epoch])
    order = rng.permutation(scans)
    view, mirrored = rng.integers(views, size=scans), rng.random(scans) < 0.5
    size = config.batch_size
    for start in range(0, scans - size + 1, size):
        part = slice(start, start + size)
        yield (
            torch.from_numpy(order[part]),
            torch.from_numpy(view[part]),
            torch.from_numpy(mirrored[part]),
        )


def _optimizer(unit: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: bases do not decay, the head decays more than the block."""
    groups = param_groups(unit.block, weight_decay=config.weight_decay)  # type: ignore[arg-type]
    groups.append({"params": list(unit.head.parameters()), "weight_decay": config.head_decay})  # type: ignore[union-attr]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear rise over a fifth of the steps, then a cosine to zero."""
    rise = max(1, steps // 5)

    def share(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _fingerprint(config: TrainConfig, ages: np.ndarray, weights: Path | str | None) -> str:
    """What a state must have been made with to be continued."""
    made: list[Any] = [config.to_dict(), [round(float(age), 4) for age in ages]]
    return json.dumps(made if weights is None else [*made, _sha256(weights)])


def _sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _resume(state: Path, trainer: LocalTrainer, run: str) -> int:
    """Load a state into the trainer; how many epochs are done."""
    try:
        stored = read_state(state)
        stored = upgraded(stored, stored.get("format", 1), FORMAT)
    except FormatError as error:
        raise TrainError(f"{state} {error}") from None
    except Exception as error:
        raise TrainError(f"{state}: no intact training state ({error}); delete it") from None
    if stored.get("run") != run:
        raise TrainError(
            f"{state}: was written with another configuration or other subjects; give another "
            "folder, or delete it"
        )
    trainer.load_state_dict(stored["trainer"])
    return int(stored["epoch"])
