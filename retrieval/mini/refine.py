"""Second stage of training: the head learns on, and learns words that no caption uses.

The frozen ImageNet classifier knows 1,000 kinds of things, captions of a small data set a few
dozen. With the backbone finished, its pooled features of all views are fixed, so the classifier's
logits can be read off them by a linear map `logits = x @ W`. For two classes with equal covariance
`C` of the features, `C @ w_c` is the direction from the mean to class c (linear discriminant
analysis); adding a multiple of it to the features of a real photo gives features of that photo
with some of class c in it. The head is trained to find the class's name there, beside the captions.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core import Retraction, fuse, param_groups, to_enn
from retrieval.mini.learner import average_
from retrieval.model.mini_tower import MiniTower

if TYPE_CHECKING:
    from retrieval.mini.block_inputs import BlockInputs, Progress
    from retrieval.mini.config import TrainConfig

__all__ = ["class_directions", "refine_head"]

_BATCH = 512
_EMA = 0.99
_GAIN = (10.0, 20.0)  # logits that an imagined class gains
_RIDGE = 1e-4  # of the mean variance


def class_directions(features: Tensor, logits: Tensor) -> Tensor:
    """Directions in feature space that raise one class's logit by 1 each.

    Args:
        features: (N, n) pooled features.
        logits: (N, K) a classifier's logits of the same views.

    Returns:
        (K, n): along row k the linear read-out of class k, less the mean of all, grows by 1.
    """
    x = features - features.mean(0)
    covariance = x.T @ x / len(x)
    ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    readout = torch.linalg.solve(covariance + ridge, x.T @ (logits - logits.mean(0)) / len(x))
    readout = readout - readout.mean(1, keepdim=True)
    directions = covariance @ readout
    return (directions / (directions * readout).sum(0)).T.contiguous()


def refine_head(
    tower: MiniTower,
    features: Tensor,
    cache: BlockInputs,
    fit: np.ndarray,
    config: TrainConfig,
    report: Progress,
) -> MiniTower:
    """Train the head and the last map on, the backbone frozen.

    Args:
        tower: after the first stage, plain or eigen.
        features: (N, V, n) pooled features of the first V views of every training image.
        cache: captions, class names and logits of the same images.
        fit: images to train on.
        config: `refine_epochs`, `refine_lr`, `imagined`, `distill`, `rule`, `seed`.
        report: progress.

    Returns:
        A new tower with plain layers, in evaluation mode.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    tower = fuse(tower).requires_grad_(False)  # type: ignore[assignment]
    if config.rule == "enn":
        to_enn(tower, include=["hidden", "proj"], inplace=True)
    head = nn.ModuleList([tower.norm, tower.hidden, tower.proj, tower.text_proj])
    head.requires_grad_(True)
    head.train()
    tower.dropout.train()
    log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
    optimizer = torch.optim.AdamW(
        [
            *param_groups(head, config.refine_lr, config.weight_decay),
            {"params": [log_scale], "weight_decay": 0.0},
        ],
        lr=config.refine_lr,
    )
    if config.rule == "enn":
        Retraction(optimizer, tower, every=config.retract_every)
    size = min(_BATCH, len(fit))
    steps = config.refine_epochs * (len(fit) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=0.1,
    )
    views = features.shape[1]
    logits = torch.from_numpy(np.asarray(cache.logits[:, :views], dtype=np.float32))
    directions = class_directions(features[fit].flatten(0, 1), logits[fit].flatten(0, 1))
    average = copy.deepcopy(head)
    step = 0
    for _ in range(config.refine_epochs):
        order = rng.permutation(fit)
        for start in range(0, len(order) - size + 1, size):
            images = order[start : start + size]
            view = rng.integers(views, size=size)
            bank = tower.adapt_text(cache.captions_of(fit, rng))
            names = tower.adapt_text(cache.class_text)
            own = torch.from_numpy(np.searchsorted(fit, images))
            x = features[images, view]
            scale = log_scale.exp().clamp(max=100.0)
            z = scale * _vectors(tower, x)
            to_text = F.cross_entropy(z @ bank.T, own)
            loss = (to_text + F.cross_entropy(bank[own] @ z.T, torch.arange(size))) / 2
            if config.distill:
                loss = loss + config.distill * F.kl_div(
                    (z @ names.T).log_softmax(1),
                    logits[images, view].softmax(1),
                    reduction="batchmean",
                )
            if config.imagined:
                kind = torch.from_numpy(rng.integers(len(directions), size=size))
                gain = torch.from_numpy(rng.uniform(*_GAIN, size=(size, 1))).float()
                # Pooled ReLU6 activations stay within 0..6.
                imagined = (x + gain * directions[kind]).clamp(0, 6)
                scores = scale * _vectors(tower, imagined) @ names.T
                loss = loss + config.imagined * F.cross_entropy(scores, kind)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            average_(average, head, step, _EMA)
            report("refining", step, steps, f"loss {loss.item():.3f}")
    head.load_state_dict(average.state_dict())
    return fuse(tower).eval()  # type: ignore[return-value]


def _vectors(tower: MiniTower, pooled: Tensor) -> Tensor:
    return F.normalize(tower.proj(tower.head(pooled)), dim=-1)
