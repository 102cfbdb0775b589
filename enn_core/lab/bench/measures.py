"""What a run costs and what it does to the weights: memory, parameters, condition, drift."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from enn_core.convert import conversion_report, fuse
from enn_core.orthogonality import orthogonality_error
from enn_core.rules import Rule
from enn_core.rules.srip_ocnn import matrices

__all__ = ["SavedMemory", "about_weights", "trained_modules"]


class _Held:
    """A tensor that autograd keeps; weakly referenced, to see when it lets go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedMemory:
    """Bytes that autograd keeps for backward passes at once.

    Attributes:
        peak: the most, in bytes; each storage counts once, `fixed` ones not at all.
    """

    def __init__(self) -> None:
        self.peak = self._now = 0
        self._users: dict[int, int] = {}

    @contextmanager
    def watch(self, fixed: list[Tensor]) -> Iterator[None]:
        """Count what is kept inside, but for the storages of `fixed` (weights, the batch)."""
        known = {tensor.untyped_storage().data_ptr() for tensor in fixed}

        def pack(tensor: Tensor) -> _Held | Tensor:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in known:
                return tensor
            held = _Held(tensor)
            if not self._users.get(place):
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
            self._users[place] = self._users.get(place, 0) + 1
            weakref.finalize(held, self._release, place, storage.nbytes())
            return held

        def unpack(held: _Held | Tensor) -> Tensor:
            return held if isinstance(held, Tensor) else held.tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _release(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self._now -= size


def trained_modules(rule: Rule) -> list[nn.Module]:
    """The network, and what it is trained with (heads, feedback)."""
    return [rule.network(), *getattr(rule, "blocks", [])]


def about_weights(rule: Rule) -> dict[str, float | int | None]:
    """Parameters, condition and drift of a rule's network.

    Returns:
        "stored" and "fused": parameters of the network as it is trained and fused; "trainable":
        of it and the heads it is trained with; "condition": median over its weights, as matrices
        (out, inputs), of largest by smallest singular value; "drift": largest
        `||Q^T Q - I||_F / sqrt(r)`, None without eigen layers.
    """
    network = rule.network()
    report = conversion_report(network)
    learnt = {p for module in trained_modules(rule) for p in module.parameters() if p.requires_grad}
    conditions = []
    with torch.no_grad():
        for _, matrix in matrices(fuse(network)):
            values = torch.linalg.svdvals(matrix.double())
            conditions.append(float(values[0] / values[-1].clamp_min(1e-12)))
    drift = orthogonality_error(network)
    return {
        "stored": report.parameters_stored,
        "fused": report.parameters_fused,
        "trainable": sum(p.numel() for p in learnt),
        "condition": sorted(conditions)[len(conditions) // 2] if conditions else None,
        "drift": max(drift.values()) if drift else None,
    }
