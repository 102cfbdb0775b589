"""Training `long-eclip-mini`: an eigen image tower against the frozen text tower.

The early blocks of the backbone stay at their ImageNet weights, so what they say of every augmented
view is computed once and cached ("block inputs"); the later blocks, the head and the last map are
eigen layers that learn from those. Two processor cores train the shipped model in under an hour.

Objective: cross-entropy over cosine / temperature in both directions; an image is compared with one
caption of *every* training image (the text tower is frozen, so those are free), a caption with the
images of its batch. Q and P are retracted onto orthonormal matrices while the optimizer runs.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from enn_core import Retraction, fuse, orthogonality_error, param_groups, to_enn
from enn_core.averages import keep_as_they_are
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tables import write_table
from enn_core.files.tensors import read_state, write_state
from retrieval.mini.block_inputs import BlockInputs, Progress, imagenet_backbone
from retrieval.mini.config import TrainConfig, TrainError
from retrieval.mini.learner import Learner, average_
from retrieval.mini.refine import refine_head
from retrieval.model.mini_tower import MiniTower, fold_batchnorm
from retrieval.model.tower_folder import save_tower
from retrieval.training.training_log import plot

__all__ = ["TrainConfig", "TrainError", "train"]

FORMAT: Content = Content()
"""Steps from older checkpoints to today's; the first ones have no number."""


def train(
    config: TrainConfig,
    *,
    data: Path | str | None = None,
    output: Path | str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a tower; run it again with the same output to resume after an interruption.

    Args:
        config: see `TrainConfig`.
        data: directory of the data sets; the environment variable ENN_DATA if None.
        output: directory for the caches, `checkpoint.pt`, `log.csv`, `curves.png` and `model/`,
            which `retrieval.load(OUTPUT/model)` takes.
        progress: called with (stage, done, total, note).

    Returns:
        "model" (directory), "epochs", "orthogonality" (largest relative error of Q and P) and,
        with a holdout, "holdout" (recalls in percent).

    Raises:
        TrainError: no data directory is named, missing data, or an output directory that belongs
            to another configuration.
    """
    from retrieval.datasets.captioned import load_karpathy

    report = progress or (lambda *_: None)
    place = data or os.environ.get("ENN_DATA")
    if not place:
        raise TrainError(
            f"{config.dataset} lies in no known place; name the directory of the data sets with "
            "--data or $ENN_DATA"
        )
    root = Path(place)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    images = load_karpathy(root / config.dataset, root / config.images, config.splits)
    cache = BlockInputs(
        images,
        config.first_block,
        config.views,
        config.distill > 0 or config.refine_epochs > 0,
        output / "cache",
        report,
    )
    fit, held = _hold_out(len(cache), config.holdout)
    if len(fit) < config.batch_size:
        raise TrainError(
            f"{len(fit)} training images are fewer than one batch of {config.batch_size}"
        )
    run = _Run(config, cache, fit, held, output)
    run.resume()
    run.fit(report)
    run.refine(report)
    return run.finish()


def _hold_out(total: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to keep out; the choice is fixed, whatever the run's seed."""
    if count >= total:
        raise TrainError(f"holdout of {count} images leaves nothing of {total}")
    held = np.sort(np.random.default_rng(2026).permutation(total)[:count])
    return np.setdiff1d(np.arange(total), held), held


class _Run:
    """Model, optimizer and schedule of a training run, with exact resume at epoch ends."""

    def __init__(
        self,
        config: TrainConfig,
        cache: BlockInputs,
        fit: np.ndarray,
        held: np.ndarray,
        output: Path,
    ) -> None:
        self.config, self.cache, self.fit_set, self.held = config, cache, fit, held
        self.output = output
        torch.manual_seed(config.seed)
        tower = MiniTower(config.hidden, config.dim, config.dropout)
        backbone: Any = imagenet_backbone()
        backbone.reset_classifier(0)
        fold_batchnorm(backbone)
        tower.backbone.load_state_dict(backbone.state_dict())
        tower.text_mean.copy_(cache.text[torch.from_numpy(fit)].reshape(-1, 384).mean(0))
        learned = [f"backbone.blocks.{i}" for i in range(config.first_block, 7)]
        if config.rule == "enn":
            to_enn(tower, include=[*learned, "backbone.conv_head", "hidden", "proj"], inplace=True)
        self.model = Learner(tower, config.first_block)
        self.model.requires_grad_(False)
        heads = [tower.norm, tower.hidden, tower.proj, tower.text_proj]
        for module in (*self.model.blocks, *heads):
            module.requires_grad_(True)
        for module in tower.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.requires_grad_(False)  # depthwise filters keep their ImageNet weights
        self.model.log_scale.requires_grad_(True)
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(
            [
                *param_groups(nn.ModuleList(self.model.blocks), config.backbone_lr, decay),
                *param_groups(nn.ModuleList(heads), config.head_lr, decay),
                {"params": [self.model.log_scale], "lr": config.head_lr, "weight_decay": 0.0},
            ]
        )
        if config.rule == "enn":
            Retraction(self.optimizer, tower, every=config.retract_every)
        self.steps = config.epochs * (len(fit) // config.batch_size)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        keep_as_they_are(self.average)  # what is saved is their product
        self.epoch = self.step = 0
        self.log: list[dict[str, Any]] = []

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (0.1 * self.steps))
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    @property
    def _checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def resume(self) -> None:
        """Continue from the last finished epoch, if any."""
        if not self._checkpoint.exists():
            return
        state = read_state(self._checkpoint)
        try:
            state = upgraded(state, state.get("format", 1), FORMAT)
        except FormatError as error:
            raise TrainError(f"{self._checkpoint} {error}") from None
        mine, theirs = asdict(self.config), dict(state["config"])
        for one in (mine, theirs):
            one.pop("stop_after")
        if mine != theirs:
            changed = ", ".join(k for k in mine if mine[k] != theirs.get(k))
            raise TrainError(
                f"{self.output} holds a run with other options ({changed}); give another output"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self.log = state["epoch"], state["step"], state["log"]
        if self.log:  # killed between the two, a row stood in this file alone
            write_table(self.log, self.output / "log.csv")

    def _save(self) -> None:
        state = {
            "format": FORMAT.number,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "log": self.log,
        }
        write_state(state, self._checkpoint)

    def fit(self, report: Progress) -> None:
        """Train the epochs that are left."""
        last = self.config.stop_after or self.config.epochs
        while self.epoch < last:
            # Streams depend on the seed and the epoch alone, so a resumed run repeats them.
            rng = np.random.default_rng([self.config.seed, self.epoch])
            torch.manual_seed(self.config.seed * 100_003 + self.epoch)
            self.model.train()
            losses = []
            order = rng.permutation(self.fit_set)
            size = self.config.batch_size
            for start in range(0, len(order) - size + 1, size):
                losses.append(self._train_step(order[start : start + size], rng))
                report("training", self.step, self.steps, f"loss {np.mean(losses[-20:]):.3f}")
            self.epoch += 1
            row = {"epoch": self.epoch, "step": self.step, "loss": float(np.mean(losses))}
            row["temperature"] = self.model.log_scale.neg().exp().item()
            row["orthogonality"] = max(orthogonality_error(self.model.tower).values(), default=0.0)
            if len(self.held):
                row.update(self.recalls())
            self.log.append(row)
            self._save()
            write_table(self.log, self.output / "log.csv")
            recall = f" R@1 {row['t2i_R@1']:.1f}" if len(self.held) else ""
            report("training", self.step, self.steps, f"loss {row['loss']:.3f}{recall}")

    def _train_step(self, images: np.ndarray, rng: np.random.Generator) -> float:
        config, cache, model = self.config, self.cache, self.model
        views = rng.integers(config.views, size=len(images))
        bank = cache.captions_of(self.fit_set, rng)
        own = torch.from_numpy(np.searchsorted(self.fit_set, images))
        z = model.images(cache.batch(images, views))
        text = model.tower.adapt_text(bank)
        scaled = model.log_scale.exp().clamp(max=100.0) * z
        smoothing = config.label_smoothing
        to_text = F.cross_entropy(scaled @ text.T, own, label_smoothing=smoothing)
        to_image = F.cross_entropy(
            text[own] @ scaled.T, torch.arange(len(images)), label_smoothing=smoothing
        )
        loss = (to_text + to_image) / 2
        if config.distill:
            rows = [cache.logits[i, v] for i, v in zip(images, views, strict=True)]
            teacher = torch.from_numpy(np.stack(rows)).float().softmax(1)
            student = (scaled @ model.tower.adapt_text(cache.class_text).T).log_softmax(1)
            loss = loss + config.distill * F.kl_div(student, teacher, reduction="batchmean")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        average_(self.average, model, self.step, config.ema)
        return loss.item()

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """Recall@1/5/10 in percent among the held-out images, by the averaged weights."""
        from retrieval.eval.recall import retrieval_ranks

        self.average.eval()
        views = np.zeros(64, dtype=int)
        z = [
            self.average.images(self.cache.batch(part, views[: len(part)]))
            for part in np.array_split(self.held, math.ceil(len(self.held) / 64))
        ]
        text = self.cache.text[torch.from_numpy(self.held)].flatten(0, 1)
        to_image, to_text = retrieval_ranks(
            self.average.tower.adapt_text(text).numpy(),
            torch.cat(z).numpy(),
            np.repeat(np.arange(len(self.held)), self.cache.per_image),
        )
        return {
            f"{name}_R@{k}": round(100 * float((ranks <= k).mean()), 2)
            for name, ranks in (("t2i", to_image), ("i2t", to_text))
            for k in (1, 5, 10)
        }

    @torch.no_grad()
    def _pooled(self, report: Progress) -> torch.Tensor:
        """Pooled features of the first views of every image, by the averaged weights."""
        views = self.config.refine_views
        plain = Learner(fuse(self.average.tower), self.config.first_block).eval()  # type: ignore[arg-type]
        rows = []
        for start in range(0, len(self.cache), 16):
            images = np.arange(start, min(start + 16, len(self.cache)))
            every = np.repeat(images, views)
            inputs = self.cache.batch(every, np.tile(np.arange(views), len(images)))
            rows.append(plain.pooled(inputs).view(len(images), views, -1))
            report("features", int(images[-1]) + 1, len(self.cache), "")
        return torch.cat(rows)

    def refine(self, report: Progress) -> None:
        """Second stage: train the averaged tower's head on."""
        if not self.config.refine_epochs or self.epoch < self.config.epochs:
            return
        tower = refine_head(
            self.average.tower, self._pooled(report), self.cache, self.fit_set, self.config, report
        )
        self.average.tower = tower

    def finish(self) -> dict[str, Any]:
        """Write the averaged tower as a model directory, and the curves."""
        # The averaged factors are saved multiplied out: any W has exact factors again.
        tower = self.average.tower.eval()
        folder = self.output / "model"
        preprocess = {"size": [224, 224], "mode": "squash", "interpolation": "bicubic"}
        save_tower(
            tower,
            folder,
            {
                "architecture": "long-eclip-mini",
                "hidden": self.config.hidden,
                "dim": self.config.dim,
                "preprocess": preprocess,
                "text": "all-MiniLM-L6-v2",
                "context_length": 248,
                "training": asdict(self.config),
            },
        )
        plot(self.log, self.output / "curves.png")
        result = {
            "model": str(folder),
            "epochs": self.epoch,
            "orthogonality": self.log[-1]["orthogonality"],
        }
        if len(self.held):
            result["holdout"] = self.recalls()
        return result
