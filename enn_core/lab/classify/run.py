"""Training a classifier: data, steps, checkpoints, log, models.

One process or several (torchrun). Whatever is random depends on the seed and the place in the run
alone, so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from enn_core.convert import conversion_report, fuse
from enn_core.files.atomic import replacing
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tables import write_table
from enn_core.files.tensors import DamagedFileError, read_state, write_state
from enn_core.lab.classify.batches import Augment, Batches, feed
from enn_core.lab.classify.config import ClassifyConfig, ClassifyError
from enn_core.lab.classify.datasets import ImageData, Images, load_data
from enn_core.lab.classify.networks import build_network
from enn_core.lab.classify.training_log import plot, write_tensorboard
from enn_core.lab.classify.weights import about_network, load_plain, own_names, save_network
from enn_core.local import random_stream
from enn_core.loco import UnsupportedModel, calibrate_
from enn_core.orthogonality import orthogonality_error
from enn_core.rules import RULES, Rule, RuleError, make_rule
from enn_core.rules import rule_options as options_of
from enn_core.rules.base import TrainerRule
from enn_core.torchrun import processes

__all__ = ["learning_rate", "train"]

Progress = Callable[[str, int, int, str], None]

SETTINGS = "settings.json"
# What may change between a run and its continuation: none decides what is learnt.
FORMAT: Content = Content()
"""Steps from older checkpoints to today's; the first ones have no number."""
_FREE = ("stop_after", "workers", "save_every")
_EVALUATED = 256  # images at once
_PLOT_SECONDS = 20.0  # a picture takes longer than an epoch of a small network
_NAMES = {
    ("backprop", "plain"): "backprop-adamw",
    ("backprop", "enn"): "enn",
    ("backprop", "enn-penalty"): "enn-penalty",
    ("local", "plain"): "dgl",
    ("local", "enn"): "local-enn",
    ("local", "enn-penalty"): "local-enn",
}


def train(
    config: ClassifyConfig,
    *,
    data: Path | None = None,
    output: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a classifier; called again with the same output it goes on from the last checkpoint.

    Under torchrun every process calls this; the first one writes and reports.

    Args:
        config: see `ClassifyConfig`.
        data: directory of the data sets; the environment variable ENN_DATA if None.
        output: directory for `settings.json` (a configuration like any other), `checkpoint.pt`,
            `log.csv`, `curves.png` and, at the end, `result.json`, `model.safetensors` (plain,
            fused) and `model-eigen.safetensors`. Nothing is left there if the run cannot start.
        progress: called with (stage, done, total, note).

    Returns:
        What `result.json` holds: "model" and "eigen" (files), "rule", "epochs", "steps", "loss",
        "valid_accuracy", "test_accuracy" (None if it was stopped early), "parameters" (of the
        network: "stored", "fused"; "heads", which only training needs; "trainable", of both) and
        "orthogonality", the largest relative error of Q and P. Accuracies are shares.

    Raises:
        ClassifyError, DataError, NetworkError, RuleError: missing data, settings that do not fit
            together, an output directory that belongs to other settings, a loss that is not
            finite.
    """
    with processes() as (rank, world, device):
        if config.batch_size % world:
            raise ClassifyError(
                f"batch_size {config.batch_size} cannot be shared by {world} processes evenly"
            )
        made = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        try:
            run = _Run(config, data, output, (rank, world, device), progress)
            run.resume()
        except BaseException:
            if made:
                with contextlib.suppress(OSError):  # another process was first
                    output.rmdir()
            raise
        run.keep_settings()
        run.fit()
        return run.finish()


def learning_rate(config: ClassifyConfig, step: int, steps: int) -> float:
    """The rate at a step (from 0) of a run of so many: warm-up, then cosine or drops."""
    rising = max(1, round(config.warmup * steps))
    if step < rising:
        return config.lr * (step + 1) / rising
    if config.drops:
        drops = sum(step >= at * steps for at in config.drops)
        return max(config.lr / 10**drops, min(config.lr, config.final_lr))
    done = min(1.0, (step - rising + 1) / max(1, steps - rising + 1))
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


class _Run:
    """Rule, data and place of a run."""

    def __init__(
        self,
        config: ClassifyConfig,
        root: Path | None,
        output: Path,
        place: tuple[int, int, torch.device],
        progress: Progress | None,
    ) -> None:
        self.config, self.output = config, output
        self.rank, self.world, self.device = place
        self.report = progress if progress is not None and self.rank == 0 else _silent
        self.report("reading the data", 0, 1, "")
        self.data = _data(config, root)
        channels, height, width = self.data.shape
        side = config.image_size
        self.shape = (channels, side or height, side or width)
        self.per_epoch = len(self.data.train_y) // config.batch_size
        if not self.per_epoch:
            raise ClassifyError(
                f"{len(self.data.train_y)} training images are fewer than one batch of "
                f"{config.batch_size}; set batch_size to {len(self.data.train_y)} or less"
            )
        self.steps = config.epochs * self.per_epoch
        self.report("building the network", 0, 1, "")
        self.rule_name = rule_name(config)
        self.rule = self._rule()
        self.step = 0
        self.losses: list[list[float]] = []  # of this epoch, per step and block
        self.seconds = 0.0  # of this epoch, in this process
        self.log: list[dict[str, Any]] = []
        self.plotted = time.monotonic()

    def _rule(self) -> Rule:
        config = self.config
        model = build_network(config.arch, self.shape, len(self.data.classes), seed=config.seed)
        self.names = set(model.state_dict())
        if config.weights:
            fresh = load_plain(model, Path(config.weights))
            if fresh and not self.rank:
                warnings.warn(
                    f"'{config.weights}' tells other classes: {', '.join(fresh)} start anew",
                    stacklevel=2,
                )
        model.to(self.device)
        some = self._prepare(self.data.train_x[torch.arange(min(256, len(self.data.train_y)))])
        if "sigma" in options_of(self.rule_name) and not config.weights:
            # Deep networks answer perturbations from such weights alone: eleven layers on digits
            # reach 93 %, 79 % from usual ones.
            with random_stream(self.device, config.seed, -2), contextlib.suppress(UnsupportedModel):
                calibrate_(model, some)  # the rule itself tells of what it cannot train
        options = _options(config, self.rule_name, self.steps, self.device, self.world)
        try:
            return make_rule(
                self.rule_name,
                model,
                some[:4],
                len(self.data.classes),
                lr=config.lr,
                steps=self.steps,
                seed=config.seed,
                **options,
            )
        except RuleError as error:
            if RULES[self.rule_name].needs == "layers" and not config.arch.startswith("mlp"):
                raise ClassifyError(f"{error}; or give arch mlp or conv-small") from error
            raise

    def _prepare(self, x: Tensor) -> Tensor:
        """Images as the network takes them, on its device."""
        x = self.data.normalized(x.to(self.device, non_blocking=True))
        if x.shape[2:] != self.shape[1:]:
            x = F.interpolate(x, self.shape[1:], mode="bilinear", antialias=True)
        return x

    # --- steps -----------------------------------------------------------------------------

    def fit(self) -> None:
        """Train the epochs that are left."""
        config = self.config
        last = min(config.epochs, config.stop_after or config.epochs)
        batches = Batches(
            len(self.data.train_y), config.batch_size, epochs=last, seed=config.seed,
            start=self.step, rank=self.rank, world=self.world,
        )  # fmt: skip
        if not len(batches):
            return
        augment = Augment(config.pad, tuple(config.crop), config.flip, tuple(config.randaugment))
        began = time.monotonic()
        for x, y in feed(self.data.train_x, self.data.train_y, batches, augment, config.workers):
            self.losses.append(self._train_step(x, y))
            self.step += 1
            self.seconds += time.monotonic() - began
            began = time.monotonic()
            recent = np.mean([row[-1] for row in self.losses[-20:]])
            self.report("training", self.step, self.steps, f"loss {recent:.3f}{self._judged()}")
            if self.step % self.per_epoch == 0:
                self._end_epoch()
                began = time.monotonic()
            elif self.step % config.save_every == 0:
                self._save()

    def _train_step(self, x: Tensor, y: Tensor) -> list[float]:
        """One step; the loss of every block, or of the answer alone where blocks have none."""
        config = self.config
        rule, x, y = self.rule, self._prepare(x), y.to(self.device)
        try:
            losses = rule.trainer.step(x, y) if type(rule) is TrainerRule else [rule.step(x, y)]
        except FloatingPointError as error:
            raise ClassifyError(self._diverged()) from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise ClassifyError(
                    f"not enough memory for batches of {config.batch_size} images of "
                    f"{self.shape[1]} x {self.shape[2]}; give a smaller batch_size, or amp=bf16"
                ) from error
            raise
        if not all(map(math.isfinite, losses)):
            raise ClassifyError(self._diverged())
        return losses

    def _diverged(self) -> str:
        return (
            f"the loss is not finite at step {self.step + 1}; give a smaller lr "
            f"({self.config.lr:g} now), or a clip_norm"
        )

    def _judged(self) -> str:
        row = self.log[-1] if self.log else {}
        return (
            f", validation {100 * row['valid_accuracy']:.1f} %" if "valid_accuracy" in row else ""
        )

    def _end_epoch(self) -> None:
        mean = np.mean(self.losses, axis=0)
        if self.world > 1:
            total = torch.from_numpy(mean).to(self.device)
            distributed.all_reduce(total)
            mean = (total / self.world).cpu().numpy()
        epoch = self.step // self.per_epoch
        row: dict[str, Any] = {"epoch": epoch, "step": self.step, "loss": float(mean[-1])}
        if len(mean) > 1:
            row.update({f"loss_{i + 1}": float(value) for i, value in enumerate(mean)})
        row["lr"] = learning_rate(self.config, self.step - 1, self.steps)
        if len(self.data.valid_y):
            row["valid_accuracy"] = self._accuracy(
                "validating", self.rule.network(), self.data.valid_x, self.data.valid_y
            )
        orthogonality = _orthogonality(self.rule.network())
        if orthogonality is not None:
            row["orthogonality"] = orthogonality
        row["images_per_s"] = round(self.per_epoch * self.config.batch_size / self.seconds, 1)
        self.log.append(row)
        self.losses, self.seconds = [], 0.0
        self._save()
        if not self.rank:
            write_table(self.log, self.output / "log.csv")
            if time.monotonic() - self.plotted > _PLOT_SECONDS:
                plot(self.log, self.output / "curves.png")
                self.plotted = time.monotonic()
            write_tensorboard(self.log, self.output / "tensorboard")
        self.report("training", self.step, self.steps, f"loss {row['loss']:.3f}{self._judged()}")

    @torch.no_grad()
    def _accuracy(self, stage: str, network: nn.Module, images: Images, labels: Tensor) -> float:
        """Share of right answers, each process judging its part."""
        count = len(labels)
        # As many for every process; one too many does not count.
        share = torch.arange(math.ceil(count / self.world)) * self.world + self.rank
        right = torch.zeros((), dtype=torch.int64)
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            for rows in share.split(_EVALUATED):
                self.report(stage, int(rows[0]), count, "")
                rows = rows[rows < count]
                if len(rows):
                    answer = network(self._prepare(images[rows])).argmax(1).cpu()
                    right += (answer == labels[rows]).sum()
        finally:
            for module, training in modes:
                module.training = training
        if self.world > 1:
            right = right.to(self.device)
            distributed.all_reduce(right)
        return int(right) / count

    # --- files -----------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def resume(self) -> None:
        """Continue from the last checkpoint, if any."""
        if not self._checkpoint.exists():
            return
        try:
            state = read_state(self._checkpoint)
            state = upgraded(state, state.get("format", 1), FORMAT)
            theirs = state["classifier"]
        except FormatError as error:
            raise ClassifyError(f"'{self._checkpoint}' {error}") from None
        except DamagedFileError as error:
            raise ClassifyError(str(error)) from None
        except Exception as error:  # whatever a damaged file makes torch raise
            raise ClassifyError(
                f"'{self._checkpoint}' is no checkpoint of a classifier; give another output"
            ) from error
        mine = {k: v for k, v in self._settings().items() if k not in _FREE}
        changed = [
            f"{key} {theirs[key]!r} there, {value!r} now"
            for key, value in mine.items()
            if key in theirs and theirs[key] != value
        ]
        if changed:
            raise ClassifyError(
                f"'{self.output}' holds a run with other settings ({'; '.join(changed)}); leave "
                "them as they are, or give another output"
            )
        if state["images"] != _fingerprint(self.data):
            raise ClassifyError(f"'{self.output}' holds a run on other images; give another output")
        if state["world"] != self.world:
            raise ClassifyError(
                f"'{self.output}' holds a run of {state['world']} processes, these are "
                f"{self.world}; start as many"
            )
        self.rule.load_state_dict(state["rule"])
        self.step, self.log = state["step"], state["log"]
        self.losses, self.seconds = state["losses"][self.rank], state["seconds"]
        if self.log and not self.rank:  # killed between the two, a row stood in this file alone
            write_table(self.log, self.output / "log.csv")

    def keep_settings(self) -> None:
        """Write the settings of a new run."""
        if self.rank or self.step:
            return
        with replacing(self.output / SETTINGS) as temporary:
            text = json.dumps(self._settings(), indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.config)
        return {**settings, "options": dict(settings["options"])}

    def _save(self) -> None:
        losses = [self.losses]
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            distributed.all_gather_object(gathered, self.losses)
            losses = gathered
        if self.rank:
            return
        state = {
            "format": FORMAT.number,
            "classifier": self._settings(),
            "images": _fingerprint(self.data),
            "world": self.world,
            "rule": self.rule.state_dict(),
            "step": self.step,
            "losses": losses,
            "seconds": self.seconds,
            "log": self.log,
        }
        try:
            write_state(state, self._checkpoint)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise ClassifyError(
                f"cannot write '{self._checkpoint}': is the disk full? The last checkpoint is kept"
            ) from error

    def finish(self) -> dict[str, Any]:
        """Write the network, and judge it once on the test part if the run is complete."""
        network = self.rule.network()
        plain = fuse(network)
        test = None
        if self.step == self.steps:
            test = self._accuracy("testing", plain, self.data.test_x, self.data.test_y)
        last = self.log[-1] if self.log else {}
        counts = count_parameters(self.rule)
        eigen = counts["stored"] != counts["fused"] or "orthogonality" in last
        result: dict[str, Any] = {
            "model": str(self.output / "model.safetensors"),
            "eigen": str(self.output / "model-eigen.safetensors") if eigen else None,
            "rule": self.rule_name,
            "epochs": self.step // self.per_epoch,
            "steps": self.step,
            "loss": last.get("loss"),
            "valid_accuracy": last.get("valid_accuracy"),
            "test_accuracy": test,
            "parameters": counts,
            "orthogonality": last.get("orthogonality"),
        }
        if self.rank:
            return result
        if self.log:
            plot(self.log, self.output / "curves.png")
        about = about_network(self.config.arch, self.data, self.shape)
        state = own_names(plain.state_dict(), self.names)
        save_network(self.output / "model.safetensors", state, about)
        if eigen:
            save_network(self.output / "model-eigen.safetensors", network.state_dict(), about)
        with replacing(self.output / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result


def _silent(stage: str, done: int, total: int, note: str) -> None:
    """No progress."""


def _data(config: ClassifyConfig, root: Path | None) -> ImageData:
    return load_data(
        config.data,
        root=root,
        valid=config.valid,
        train=config.train or None,
        size=config.image_size or None,
        seed=config.seed,
    )


def _fingerprint(data: ImageData) -> str:
    digest = hashlib.blake2b(repr((data.name, data.shape, data.classes)).encode(), digest_size=16)
    for labels in (data.train_y, data.valid_y, data.test_y):
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


# --- rules -------------------------------------------------------------------------------------


def rule_name(config: ClassifyConfig) -> str:
    """The name in `RULES` that a configuration's rule and layers have.

    Raises:
        ClassifyError: there is no such rule, or it does not train such layers.
    """
    named = _NAMES.get((config.rule, config.layers))
    if named is not None:
        return named
    if config.rule not in RULES:
        raise ClassifyError(
            f"rule {config.rule!r} is unknown; give backprop, local, or one of {', '.join(RULES)}"
        )
    if config.layers != "plain":
        raise ClassifyError(
            f"rule {config.rule!r} trains plain layers, got layers {config.layers!r}; give rule "
            "backprop or local with these"
        )
    return config.rule


def _options(
    config: ClassifyConfig, name: str, steps: int, device: torch.device, world: int
) -> dict[str, Any]:
    """What a configuration says to a rule.

    Raises:
        ClassifyError: it asks for what the rule, or this machine, cannot do.
    """
    if config.amp == "fp16" and device.type != "cuda":
        raise ClassifyError("amp 'fp16' needs a CUDA device; give amp bf16 or none here")
    options: dict[str, Any] = {}
    if world > 1:
        options["wrap"] = DistributedDataParallel
    if config.amp != "none":
        options["autocast"] = torch.bfloat16 if config.amp == "bf16" else torch.float16
    if config.clip_norm:
        options["clip"] = config.clip_norm
    if config.label_smoothing:
        options["task"] = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    schedule = (config.final_lr, config.warmup, config.drops)
    defaults = ClassifyConfig()
    if schedule != (defaults.final_lr, defaults.warmup, defaults.drops):
        options["schedule"] = partial(_schedule, config=config, steps=steps)
    accepted = options_of(name)
    words = {"wrap": "several processes", "autocast": "amp", "clip": "clip_norm"} | {
        "task": "label_smoothing",
        "schedule": "a final_lr, warmup or drops of its own",
    }
    for option in options:
        if option not in accepted:
            raise ClassifyError(f"rule {config.rule!r} has no {words[option]}; leave it out")
    for option in ("weight_decay", "blocks", "head"):
        if option in accepted:
            options[option] = getattr(config, option)
    if config.layers == "enn":
        options["retract_every"] = config.retract_every
    if config.layers == "enn-penalty":
        options["penalty"] = config.penalty
        if name == "local-enn":
            options["retract_every"] = 0
    return {**options, **config.options}


def _schedule(optimizer: Optimizer, config: ClassifyConfig, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: learning_rate(config, step, steps) / config.lr)


def _orthogonality(network: nn.Module) -> float | None:
    """Largest relative error of Q and P; None without eigen layers."""
    errors = orthogonality_error(network)
    return max(errors.values()) if errors else None


def count_parameters(rule: Rule) -> dict[str, int]:
    """Parameters of a rule's network and of what it is trained with.

    Returns:
        "stored" and "fused": of the network, as it is trained and after `fuse`; "heads": of the
        blocks' own heads, which only training needs; "trainable": of both.
    """
    network = rule.network()
    report = conversion_report(network)
    own = {id(p) for p in network.parameters()}
    trainer = getattr(rule, "trainer", None)
    blocks = trainer.blocks if trainer is not None else []
    heads = [p for block in blocks for p in block.parameters() if id(p) not in own]
    learnt = [p for p in [*network.parameters(), *heads] if p.requires_grad]
    return {
        "stored": report.parameters_stored,
        "fused": report.parameters_fused,
        "heads": sum(p.numel() for p in heads),
        "trainable": sum(p.numel() for p in learnt),
    }
