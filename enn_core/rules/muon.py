"""Muon: updates whose singular values are all about equal, for matrices; AdamW for the rest.

The control for orthogonal weights: it changes the geometry of the steps alone, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from enn_core.orthogonality import param_groups
from enn_core.rules.backprop import one_block
from enn_core.rules.base import RuleError, TrainerRule


def muon(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    momentum: float = 0.95,
    **training: Any,
) -> TrainerRule:
    """`torch.optim.Muon` for weights of two dimensions and convolutions, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise RuleError(
            f"rule 'muon' needs torch 2.9 or newer, this is {torch.__version__}; update torch, or "
            "use backprop-adamw"
        )
    optimizer = partial(MuonAdamW, lr=lr, weight_decay=weight_decay, momentum=momentum)
    return one_block(model, optimizer, steps=steps, seed=seed, **training)


class MuonAdamW(Optimizer):
    """One optimizer of two: Muon steps the matrices, AdamW all other parameters, at one rate.

    Muon's updates are scaled to the root mean square of AdamW's (`match_rms_adamw`), so that one
    learning rate serves both. A convolution's weight counts as the matrix (out, in * kernel).

    Args:
        model: whose trainable parameters are stepped.
        lr: learning rate of both.
        weight_decay: of matrices and whatever else AdamW decays (`param_groups`).
        momentum: of Muon.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 1e-2, momentum: float = 0.95
    ) -> None:
        kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
        matrices: list[nn.Parameter] = []
        groups = param_groups(model, weight_decay=weight_decay)
        for group in groups:
            matrices += [p for p in group["params"] if p.ndim == 2 or id(p) in kernels]
            group["params"] = [p for p in group["params"] if p.ndim != 2 and id(p) not in kernels]
        rest = [group for group in groups if group["params"]]
        own = [{"params": matrices, "weight_decay": weight_decay}] if matrices else []
        super().__init__([*own, *rest], {"lr": lr})
        # Views share the memory of the weights; gradients are lent to them in each step.
        self._views = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in matrices]
        self._parts: list[tuple[Optimizer, int]] = []  # with the first of its groups here
        if matrices:
            make: Callable[..., Optimizer] = torch.optim.Muon
            self._parts.append(
                (
                    make(
                        [view for _, view in self._views],
                        lr=lr,
                        weight_decay=weight_decay,
                        momentum=momentum,
                        adjust_lr_fn="match_rms_adamw",
                    ),
                    0,
                )
            )
        if rest:
            copies = [{**group, "params": list(group["params"])} for group in rest]
            self._parts.append((torch.optim.AdamW(copies, lr=lr), len(own)))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient."""
        for parameter, view in self._views:
            grad = parameter.grad
            view.grad = None if grad is None else grad.reshape(view.shape)
        for part, first in self._parts:
            for offset, group in enumerate(part.param_groups):
                group["lr"] = self.param_groups[first + offset]["lr"]
            part.step()
        for _, view in self._views:
            view.grad = None

    def state_dict(self) -> dict[str, Any]:
        parts = [part.state_dict() for part, _ in self._parts]
        return {**super().state_dict(), "parts": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for (part, _), stored in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(stored)
