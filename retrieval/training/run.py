"""A contrastive run: data, steps, checkpoints, log, model.

One process or several (torchrun). Whatever is random depends on the seed and the place in the run
alone, so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms.v2 import MixUp

from enn_core import orthogonality_error, param_groups
from enn_core.averages import keep_as_they_are
from enn_core.files.atomic import clear_strays, own_name
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tables import write_table
from enn_core.files.tensors import DamagedFileError, read_state, write_state
from enn_core.local import Learner, Recipe, random_stream
from enn_core.torchrun import processes
from retrieval.datasets.captioned import CaptionDataset
from retrieval.datasets.protocols import DATASETS, open_dataset
from retrieval.training.caption_features import text_features
from retrieval.training.config import TrainConfig
from retrieval.training.loss import contrastive_loss, gather_rows, principal_components
from retrieval.training.pairs import Augment, Batches, Pairs, captions_of, loader
from retrieval.training.settings import TrainError
from retrieval.training.student import make_student
from retrieval.training.training_log import plot

__all__ = ["train"]

Progress = Callable[[str, int, int, str], None]

# Settings that may change between a run and its continuation: none decides what is learnt.
FORMAT: Content = Content()
"""Steps from older checkpoints to today's; the first ones have no number."""
_FREE = ("stop_after", "workers", "save_every", "micro_batch", "images", "annotations", "weights")


def train(
    config: TrainConfig,
    *,
    data: Path | str | None = None,
    output: Path | str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a tower; called again with the same output it goes on from the last checkpoint.

    Under torchrun every process calls this; the first one writes and reports.

    Args:
        config: see `TrainConfig`.
        data: directory of the data sets; the environment variable ENN_DATA if None.
        output: directory for `texts/`, `checkpoint.pt`, `log.csv`, `curves.png` and `model/`,
            which `retrieval.load(OUTPUT/model)` takes.
        progress: called with (stage, done, total, note).

    Returns:
        "model" (directory), "epochs", "steps", "loss" (of the last block in the last epoch),
        "orthogonality" (largest relative error of Q and P) and, with a holdout, "holdout"
        (recalls in percent).

    Raises:
        TrainError: missing data or weights, settings that do not fit them, or an output
            directory that belongs to another configuration.
        DatasetError: as `open_dataset`.
    """
    root = data if data is not None else os.environ.get("ENN_DATA")
    folder = Path(root) if root is not None else None
    output = Path(output)
    with processes() as (rank, world, device):
        if config.batch_size % world:
            raise TrainError(
                f"batch_size {config.batch_size} cannot be shared by {world} processes evenly"
            )
        output.mkdir(parents=True, exist_ok=True)
        report = progress if progress is not None and rank == 0 else _silent
        dataset = _dataset(config, folder)
        run = _Run(config, dataset, folder, output, (rank, world, str(device)), report)
        run.resume()
        run.fit()
        return run.finish()


def _silent(stage: str, done: int, total: int, note: str) -> None:
    """No progress."""


def _attention(device: str) -> contextlib.AbstractContextManager[Any]:
    """Which attention kernel to train with.

    torch's fused one for CPUs takes half of a small ViT's step in bfloat16: 8.3 ms an image against
    3.4 with products of matrices (width 128, 4 layers, 50 tokens, one thread).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()


def _dataset(config: TrainConfig, data: Path | None) -> CaptionDataset:
    spec: str = config.dataset
    if spec not in DATASETS and not spec.startswith("wds:") and not Path(spec).exists() and data:
        spec = str(data / spec)
    images = config.images or None
    if images is not None and not Path(images).exists() and data:
        images = str(data / images)
    return open_dataset(
        spec,
        protocol=config.protocol or None,
        images=images,
        annotations=config.annotations or None,
        split=config.split or None,
        data=data,
        captions_per_image=config.captions_per_image or None,
        default_split="train",
    )


def _hold_out(total: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to train on and to keep out; the choice is fixed, whatever the run's seed."""
    held = np.sort(np.random.default_rng(2026).permutation(total)[:count])
    return np.setdiff1d(np.arange(total), held), held


@dataclass
class _Wanted:
    """What the losses of a batch compare its images with; as `contrastive_loss` takes it.

    Attributes:
        short: (n, d) first sentences, for Long-CLIP's short branch.
    """

    targets: Tensor
    texts: Tensor
    bank: Tensor | None = None
    own: Tensor | None = None
    short: Tensor | None = None


class _Run:
    """Student, optimizers and place of a run."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: CaptionDataset,
        data: Path | None,
        output: Path,
        place: tuple[int, int, str],
        report: Progress,
    ) -> None:
        self.config, self.dataset, self.output, self.report = config, dataset, output, report
        self.rank, self.world, self.device = place
        self.fit_set, self.held = _hold_out(len(dataset.images), config.holdout)
        if len(self.fit_set) < config.batch_size:
            raise TrainError(
                f"{len(self.fit_set)} training images are fewer than one batch of "
                f"{config.batch_size}; set batch_size to {len(self.fit_set)} or less"
            )
        torch.manual_seed(config.seed)
        self.student, self.encoder = make_student(config, data, self.device)
        self.per_epoch = len(self.fit_set) // config.batch_size
        self.steps = config.epochs * self.per_epoch
        self._read_texts()
        blocks: list[nn.Module] = list(self.student.blocks)
        if self.world > 1:
            blocks = [DistributedDataParallel(block) for block in blocks]
        recipe = Recipe(
            self._loss,
            self._optimizer,
            retract_every=config.retract_every if config.layers == "exact" else 0,
            penalty=config.penalty if config.layers == "penalty" else 0.0,
            clip=config.clip_norm or None,
            autocast=torch.bfloat16 if config.amp else None,
        )
        self.learners = [Learner(block, i, recipe) for i, block in enumerate(blocks)]
        self.mean = AveragedModel(self.student, avg_fn=self._mean_of)
        keep_as_they_are(self.mean)  # what is saved is their product
        self.mean.requires_grad_(False)
        self.step = 0
        self.losses: list[list[float]] = []  # of this epoch, per step and block
        self.seconds = 0.0  # of this epoch, in this process
        self.log: list[dict[str, Any]] = []
        self._captions: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def _read_texts(self) -> None:
        """Features of every caption, computed once by the first process."""
        config, student = self.config, self.student
        folder = self.output / "texts"
        texts = list(self.dataset.captions)

        def features(texts: list[str]) -> Tensor:
            rows = text_features(
                texts, self.encoder.encode, key=self.encoder.key, folder=folder, report=self.report
            )
            return torch.from_numpy(np.array(rows))

        encoded = features(texts)
        trained = np.isin(self.dataset.image_of_caption, self.fit_set)
        student.centre_text(encoded[torch.from_numpy(trained)].mean(0).to(self.device))
        with torch.no_grad():
            self.texts = student.adapt_text(encoded.to(self.device)).cpu()
            if config.short_weight:
                short = features([text.split(". ")[0] for text in texts])
                self.short = student.adapt_text(short.to(self.device)).cpu()

    def _optimizer(self, block: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        bare: Any = block.module if isinstance(block, DistributedDataParallel) else block
        return torch.optim.AdamW(
            [
                *param_groups(bare.local.block, config.lr, config.weight_decay),
                *param_groups(bare.local.head, config.lr, config.head_weight_decay),
            ]
        )

    def _mean_of(self, mean: Tensor, now: Tensor, count: Tensor | int) -> Tensor:
        # Early steps weigh more, so that the start is forgotten.
        decay = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        return mean.lerp(now, 1 - decay)

    def _rate(self, step: int) -> float:
        config = self.config
        # A short run on a few photos must get beyond its warm-up.
        warmup = min(config.warmup, self.steps // 5)
        if step < warmup:
            return config.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return config.final_lr + (config.lr - config.final_lr) * cosine

    # --- steps -----------------------------------------------------------------------------

    def fit(self) -> None:
        """Train the epochs that are left."""
        config = self.config
        last = min(config.epochs, config.stop_after or config.epochs)
        if self.step >= last * self.per_epoch:
            return
        augment = Augment(
            self.student.preprocess, tuple(config.crop), config.flip, tuple(config.randaugment)
        )
        batches = Batches(
            self.fit_set, config.batch_size, epochs=last, seed=config.seed, start=self.step,
            rank=self.rank, world=self.world,
        )  # fmt: skip
        self.student.train()
        began = time.monotonic()
        for pixels, images in loader(
            Pairs(self.dataset, augment, config.seed), batches, config.workers
        ):
            epoch = self.step // self.per_epoch
            with _attention(self.device):
                self.losses.append(self._train_step(pixels, images.numpy(), epoch))
            self.seconds += time.monotonic() - began
            began = time.monotonic()
            recent = np.mean([row[-1] for row in self.losses[-20:]])
            self.report("training", self.step, self.steps, f"loss {recent:.3f}")
            if self.step % self.per_epoch == 0:
                self._end_epoch(epoch)
            elif self.step % config.save_every == 0:
                self._save()

    def _train_step(self, pixels: Tensor, images: np.ndarray, epoch: int) -> list[float]:
        """One step on a batch; the loss of each block."""
        config = self.config
        x: Any = pixels.to(self.device, non_blocking=True).float()
        wanted = self._wanted(images, epoch)
        if config.mixup:
            with random_stream(torch.device(self.device), config.seed, self.step):
                mix = MixUp(alpha=config.mixup, num_classes=len(x))
                x, wanted.targets = mix(x, torch.arange(len(x), device=self.device))
        losses = []
        rate = self._rate(self.step)
        for learner in self.learners:
            for group in learner.optimizer.param_groups if learner.optimizer else ():
                group["lr"] = rate
            x, loss = learner.learn(x, wanted, seed=config.seed, step=self.step)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainError(
                    f"the loss became {losses[-1]} at step {self.step}; a smaller lr "
                    f"({config.lr:g} now) or amp=false may help"
                )
        self.step += 1
        self.mean.update_parameters(self.student)
        return losses

    def _wanted(self, images: np.ndarray, epoch: int) -> _Wanted:
        captions = self._captions_of(epoch)
        rows = torch.from_numpy(captions[images])
        wanted = _Wanted(
            targets=torch.eye(len(images), device=self.device),
            texts=self.texts[rows].to(self.device),
        )
        if self.config.text_bank:
            bank = torch.from_numpy(captions[self.fit_set])
            wanted.bank = self.texts[bank].to(self.device)
            wanted.own = torch.from_numpy(np.searchsorted(self.fit_set, images)).to(self.device)
        if self.config.short_weight:
            wanted.short = self.short[rows].to(self.device)
        return wanted

    def _loss(self, prediction: tuple[Tensor, Tensor], wanted: _Wanted) -> Tensor:
        config, (z, log_scale) = self.config, prediction
        with torch.autocast(z.device.type, enabled=False):  # scores of half precision tie
            loss = contrastive_loss(
                z, wanted.texts, log_scale, wanted.targets, bank=wanted.bank, own=wanted.own,
                label_smoothing=config.label_smoothing,
            )  # fmt: skip
            if wanted.short is not None:
                whole = principal_components(gather_rows(z), config.short_components)
                mine = whole[self.rank * len(z) : (self.rank + 1) * len(z)]
                loss = loss + config.short_weight * contrastive_loss(
                    mine, wanted.short, log_scale, wanted.targets,
                    label_smoothing=config.label_smoothing,
                )  # fmt: skip
        return loss

    def _captions_of(self, epoch: int) -> np.ndarray:
        if self._captions[0] != epoch:
            self._captions = epoch, captions_of(self.dataset, self.config.seed, epoch)
        return self._captions[1]

    # --- ends of epochs --------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        mean = np.mean(self.losses, axis=0)
        if self.world > 1:
            total = torch.from_numpy(mean).to(self.device)
            distributed.all_reduce(total)
            mean = (total / self.world).cpu().numpy()
        last: Any = self.student.blocks[-1]
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step, "loss": float(mean[-1])}
        if len(mean) > 1:
            row.update({f"loss_{i + 1}": float(value) for i, value in enumerate(mean)})
        row["temperature"] = last.head.log_scale.neg().exp().item()
        row["orthogonality"] = max(orthogonality_error(self.student.tower).values(), default=0.0)
        row["images_per_s"] = round(self.per_epoch * self.config.batch_size / self.seconds, 1)
        note = f"loss {row['loss']:.3f}"
        if len(self.held):
            row.update(self.recalls())
            note += f" R@10 {row['t2i_R@10']:.1f}"
        self.log.append(row)
        self.losses, self.seconds = [], 0.0
        self._save()
        if not self.rank:
            write_table(self.log, self.output / "log.csv")
            plot(self.log, self.output / "curves.png")
        self.report("training", self.step, self.steps, note)

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """Recall@1/5/10 in percent among the held-out images, by the averaged weights."""
        from retrieval.eval.recall import retrieval_ranks

        self.mean.eval()
        pairs = Pairs(self.dataset, Augment(self.student.preprocess), self.config.seed)
        parts = np.array_split(self.held, math.ceil(len(self.held) / 64))
        batches = [[(0, int(i)) for i in part] for part in parts]
        z = []
        for pixels, _ in loader(pairs, batches, 0):
            with torch.autocast(
                torch.device(self.device).type, torch.bfloat16, enabled=self.config.amp
            ):
                z.append(self.mean(pixels.to(self.device).float()).float().cpu())
        owners = self.dataset.image_of_caption
        kept = np.isin(owners, self.held)
        to_image, to_text = retrieval_ranks(
            self.texts[torch.from_numpy(kept)].numpy(),
            torch.cat(z).numpy(),
            np.searchsorted(self.held, owners[kept]),
        )
        return {
            f"{name}_R@{k}": round(100 * float((ranks <= k).mean()), 2)
            for name, ranks in (("t2i", to_image), ("i2t", to_text))
            for k in (1, 5, 10)
        }

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
            theirs = state["config"]
        except FormatError as error:
            raise TrainError(f"{self._checkpoint} {error}") from None
        except DamagedFileError as error:
            raise TrainError(str(error)) from None
        except Exception as error:  # whatever a damaged file makes torch raise
            raise TrainError(f"{self._checkpoint} is no checkpoint of a contrastive run") from error
        mine = {k: v for k, v in self._settings().items() if k not in _FREE}
        changed = [key for key, value in mine.items() if theirs.get(key) != value]
        if changed or state["images"] != self.dataset.hash:
            what = ", ".join(changed) or "other images or captions"
            raise TrainError(
                f"{self.output} holds a run with other options ({what}); give another output"
            )
        self.student.load_state_dict(state["student"])
        self.mean.load_state_dict(state["mean"])
        self.step, self.log = state["step"], state["log"]
        if self.log and not self.rank:  # killed between the two, a row stood in this file alone
            write_table(self.log, self.output / "log.csv")
        for learner, saved in zip(self.learners, state["optimizers"], strict=True):
            if learner.optimizer is not None:
                learner.optimizer.load_state_dict(saved)
            if learner.retraction is not None:
                learner.retraction.steps = self.step
        self.losses, self.seconds = state["losses"][self.rank], state["seconds"]

    def _settings(self) -> dict[str, Any]:
        return copy.deepcopy(asdict(self.config))

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
            "config": self._settings(),
            "images": self.dataset.hash,
            "student": self.student.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizers": [one.optimizer and one.optimizer.state_dict() for one in self.learners],
            "step": self.step,
            "losses": losses,
            "seconds": self.seconds,
            "log": self.log,
        }
        write_state(state, self._checkpoint)

    def finish(self) -> dict[str, Any]:
        """Write the averaged tower as a model directory."""
        folder = self.output / "model"
        result: dict[str, Any] = {
            "model": str(folder),
            "epochs": self.step // self.per_epoch,
            "steps": self.step,
            "loss": self.log[-1]["loss"] if self.log else math.nan,
            "orthogonality": self.log[-1]["orthogonality"] if self.log else math.nan,
        }
        if len(self.held):
            result["holdout"] = self.recalls()
        if not self.rank:
            averaged: Any = self.mean.module
            clear_strays(self.output, ".model.")
            new = self.output / own_name(".model")
            new.mkdir()
            try:
                averaged.eval().save(new, self._settings())
                new.chmod(0o755)
                old = self.output / ".model-old"
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return result
