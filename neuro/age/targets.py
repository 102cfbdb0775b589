"""What a head predicts and how it is scored: age as a number, or as a distribution over bins.

A target turns a head's output into a loss against known ages, and into ages.

>>> import torch
>>> bins = AgeBins(low=20, high=80, step=2)
>>> bins.ages(bins.soft_labels(torch.tensor([50.0])).log()).round()
tensor([50.])
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AgeBins", "AgeValue", "Target", "make_target", "target_settings"]


class Target(Protocol):
    """What the training loop and prediction need to know of a head's output."""

    @property
    def outputs(self) -> int:
        """Numbers that a head predicts for each scan."""
        ...

    def loss(self, prediction: Tensor, ages: Tensor) -> Tensor:
        """(N, outputs), (N,) years -> mean loss, a scalar."""
        ...

    def ages(self, prediction: Tensor) -> Tensor:
        """(N, outputs) -> (N,) years."""
        ...


@dataclass(frozen=True)
class AgeValue:
    """Age as one number in units of the training ages' spread; the output 0 is their mean.

    No age is below 0 (the last ReLU of Yin et al. 2023).

    Attributes:
        mean, sd: of the training ages, years.
        power: 1 for the absolute error, 2 for the squared error.
    """

    mean: float
    sd: float
    power: Literal[1, 2] = 2

    @property
    def outputs(self) -> int:
        return 1

    def loss(self, prediction: Tensor, ages: Tensor) -> Tensor:
        wanted = (ages - self.mean) / self.sd
        loss = F.l1_loss if self.power == 1 else F.mse_loss
        return loss(prediction[:, 0].float(), wanted.float())

    def ages(self, prediction: Tensor) -> Tensor:
        return (prediction[:, 0].float() * self.sd + self.mean).clamp(min=0)


@dataclass(frozen=True)
class AgeBins:
    """Age as a distribution over equal bins; its expectation is the prediction.

    The label is a normal distribution around the age, cut into the bins (Peng et al. 2021, there
    40 bins from 42 to 82 years with sigma 1). Ages beyond the bins count as the bin at the edge.

    Attributes:
        low, high: years at the first bin's lower and the last bin's upper edge.
        step: width of a bin, years.
        sigma: of the label, years.
        expectation: weight of the expectation's squared error, in units of (high - low) / 4, beside
            the Kullback-Leibler divergence from the label.
    """

    low: float = 15.0
    high: float = 90.0
    step: float = 2.5
    sigma: float = 4.0
    expectation: float = 0.5

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.step > 0 and self.sigma > 0):
            raise ValueError(
                f"got bins from {self.low} to {self.high} by {self.step} with sigma {self.sigma}; "
                "low must be below high, step and sigma above 0"
            )

    @property
    def outputs(self) -> int:
        return max(1, round((self.high - self.low) / self.step))

    def centres(self) -> Tensor:
        """(outputs,) middle of each bin, years."""
        return self.low + self.step * (torch.arange(self.outputs) + 0.5)

    def soft_labels(self, ages: Tensor) -> Tensor:
        """(N,) years -> (N, outputs) probabilities."""
        edges = self.low + self.step * torch.arange(1, self.outputs, device=ages.device)
        below = torch.special.ndtr((edges - ages.double()[:, None]) / self.sigma)
        ends = torch.zeros_like(below[:, :1])
        return torch.diff(torch.cat([ends, below, ends + 1], 1), dim=1).float()

    def loss(self, prediction: Tensor, ages: Tensor) -> Tensor:
        labels = self.soft_labels(ages)
        logs = prediction.float().log_softmax(1)
        divergence = F.kl_div(logs, labels, reduction="batchmean")
        scale = (self.high - self.low) / 4
        error = (self.ages(prediction) - ages.float()) / scale
        return divergence + self.expectation * error.square().mean()

    def ages(self, prediction: Tensor) -> Tensor:
        return prediction.float().softmax(1) @ self.centres().to(prediction.device)


def make_target(settings: dict[str, Any]) -> Target:
    """The target that `target_settings` described.

    Raises:
        ValueError: unknown kind.
    """
    rest = {name: value for name, value in settings.items() if name != "kind"}
    match settings.get("kind"):
        case "value":
            return AgeValue(**rest)
        case "bins":
            return AgeBins(**rest)
    raise ValueError(f"got target kind {settings.get('kind')!r}, valid are 'value' and 'bins'")


def target_settings(target: AgeValue | AgeBins) -> dict[str, Any]:
    """A target as JSON, for checkpoints."""
    return {"kind": "value" if isinstance(target, AgeValue) else "bins", **asdict(target)}
