"""ENN-l (Algorithm 1): a network cut into blocks that learn from their own losses.

>>> import torch
>>> from torch import nn
>>> from enn_core.local import LocalBlock, LocalTrainer
>>> first = LocalBlock(nn.Linear(4, 8), nn.Linear(8, 2))
>>> second = LocalBlock(nn.Linear(8, 8), nn.Linear(8, 2))
>>> trainer = LocalTrainer([first, second], nn.functional.cross_entropy)
>>> losses = trainer.step(torch.randn(3, 4), torch.tensor([0, 1, 1]))
>>> len(losses), trainer.steps
(2, 1)
>>> trainer.answer(torch.randn(5, 4)).shape  # of the last head
torch.Size([5, 2])
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.files.tensors import read_state, write_state
from enn_core.orthogonality import Retraction, factors, orthogonality_penalty, param_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Task = Callable[[Any, Any], Tensor]
MakeOptimizer = Callable[[nn.Module], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]
Penalty = Callable[[nn.Module], Tensor]

FORMAT: Content = Content()
"""Steps from older states of a `LocalTrainer` to today's."""
_WINDOW = 200  # steps in which a block must get better
_log = logging.getLogger(__name__)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to a tensor, or to those in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def detached(value: Any) -> Any:
    """The same tensor, or tuple, list or dict of tensors, cut off from its graph."""
    return map_tensors(Tensor.detach, value)


class LocalBlock(nn.Module):
    """A part of a network with its head; no gradient passes its input or its output.

    `forward(x)` returns `(h, prediction)`: `h = block(x)`, the next block's input, detached, and
    `prediction = head(h)`, whose loss trains block and head and nothing else. End-to-end
    backpropagation is the case of one `LocalBlock` that holds the whole network.

    Args:
        block: any module of one argument (a tensor, or a tuple, list or dict of tensors).
        head: any module that maps the block's output to a prediction.
    """

    def __init__(self, block: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.head = head

    def forward(self, x: Any) -> tuple[Any, Any]:
        h = self.block(detached(x))
        return detached(h), self.head(h)


def adamw(block: nn.Module, lr: float = 1e-3, weight_decay: float = 1e-2) -> Optimizer:
    """AdamW over `param_groups`: no decay of bases, biases and norms."""
    return torch.optim.AdamW(param_groups(block, weight_decay=weight_decay), lr=lr)


@dataclass(frozen=True)
class Recipe:
    """How every block learns; see `LocalTrainer`. Goes to other processes with their blocks."""

    task: Task
    optimizer: MakeOptimizer = adamw
    schedule: MakeSchedule | None = None
    retract_every: int = 10
    penalty: float | Penalty = 0.0
    clip: float | None = None
    autocast: torch.dtype | None = None


class Learner:
    """One block with its optimizer: what `LocalTrainer` does for each block, wherever that lies.

    Args:
        block: returns `(h, prediction)`.
        index: its place in the network, which also chooses its random stream.
        recipe: how it learns.
    """

    def __init__(self, block: nn.Module, index: int, recipe: Recipe) -> None:
        self.block, self.index, self.recipe = block, index, recipe
        self.replica = 0  # copies that see different data draw different numbers
        if isinstance(block, DistributedDataParallel):
            self.replica = dist.get_rank(block.process_group)
        self.optimizer: Optimizer | None = None
        self.schedule: LRScheduler | None = None
        self.retraction: Retraction | None = None
        if any(p.requires_grad for p in block.parameters()):  # else: frozen, it only computes
            self.optimizer = recipe.optimizer(block)
            if recipe.schedule is not None:
                self.schedule = recipe.schedule(self.optimizer)
            if recipe.retract_every and any(True for _ in factors(block)):
                self.retraction = Retraction(self.optimizer, block, recipe.retract_every)
        # Gradients of small numbers are zero in float16 unless they are scaled.
        half = recipe.autocast is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    @property
    def device(self) -> torch.device:
        parameter = next(self.block.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def learn(self, x: Any, target: Any, *, seed: int, step: int) -> tuple[Any, Tensor]:
        """One step of the block; its output from before the update, and its task loss.

        The random numbers depend on seed, step and index alone (and the replica, if the block is
        in `DistributedDataParallel`), so it does not matter where and after what the block runs.
        When this returns, its graph and gradients are freed.
        """
        recipe, device = self.recipe, self.device
        with random_stream(device, seed, step, self.index, self.replica), torch.enable_grad():
            with torch.autocast(
                device.type, dtype=recipe.autocast, enabled=recipe.autocast is not None
            ):
                h, prediction = self.block(x)
                loss = recipe.task(prediction, target)
            if loss.ndim:
                raise ValueError(
                    f"the task returned a loss of shape {tuple(loss.shape)}, it must be a number"
                )
            if self.optimizer is not None:
                total = loss
                if callable(recipe.penalty):
                    total = total + recipe.penalty(self.block)
                elif recipe.penalty:
                    total = total + orthogonality_penalty(self.block, recipe.penalty)
                self.scaler.scale(total).backward()
                self._update()
        return map_tensors(without_gaps, detached(h)), loss.detach()

    def _update(self) -> None:
        optimizer = cast(Optimizer, self.optimizer)
        if self.recipe.clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.block.parameters(), self.recipe.clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.schedule is not None:
            self.schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "block": self.block.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "retraction": self.retraction.steps if self.retraction else 0,
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.block.load_state_dict(state["block"])
        for name in ("optimizer", "schedule"):
            mine, stored = getattr(self, name), state[name]
            if (mine is None) != (stored is None):
                raise ValueError(
                    f"block {self.index + 1} has {'no' if mine is None else 'an'} {name} and the "
                    "state is of one that differs in this; build the trainer as it was built then"
                )
            if mine is not None:
                mine.load_state_dict(stored)
        if self.retraction is not None:
            self.retraction.steps = state["retraction"]
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class LocalTrainer:
    """Trains a list of blocks by Algorithm 1: each from its own loss, by its own optimizer.

    The blocks of one batch learn one after the other, and each graph is freed before the next is
    built: the peak of memory is one block's. `enn_core.Pipeline` runs the same schedule in several
    processes, to the same bits.

    Args:
        blocks: modules that return `(h, prediction)`, as `LocalBlock` does; no parameter may be in
            two of them. Whether they are in training mode is yours to say. Frozen blocks only
            compute.
        task: `task(prediction, target)` gives a scalar loss, e.g. `F.cross_entropy`, `F.l1_loss`,
            or a contrastive loss. What it should learn itself (a temperature) belongs in the heads.
        optimizer: makes each block's optimizer.
        schedule: makes the scheduler of an optimizer, stepped once a batch.
        retract_every: steps between retractions of eigen layers; 0 for none.
        penalty: coefficient of the paper's orthogonality term (2e-4 there, without retraction), or
            a function of a block that gives the term itself.
        clip: largest gradient norm of a block.
        autocast: dtype of mixed precision, e.g. `torch.bfloat16`; with float16 losses are scaled.
        seed: of the random numbers that blocks draw while training (dropout).

    Attributes:
        steps: batches seen.

    Raises:
        ValueError: no blocks, a parameter in two blocks, or a task with parameters.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        task: Task,
        *,
        optimizer: MakeOptimizer = adamw,
        schedule: MakeSchedule | None = None,
        retract_every: int = 10,
        penalty: float | Penalty = 0.0,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        _check_blocks(blocks, task)
        recipe = Recipe(task, optimizer, schedule, retract_every, penalty, clip, autocast)
        self.learners = [Learner(block, index, recipe) for index, block in enumerate(blocks)]
        self.steps, self.seed = 0, seed
        self._losses = array("d")
        self._stalled: frozenset[int] = frozenset()
        self.lent = False  # to a Pipeline, which alone may train the blocks then
        self.stale = ""  # why the blocks here are not the newest, while they are not

    @property
    def blocks(self) -> list[nn.Module]:
        return [learner.block for learner in self.learners]

    def step(self, x: Any, target: Any) -> list[float]:
        """Train every block on one batch.

        Args:
            x: input of the first block, on its device.
            target: second argument of the task.

        Returns:
            The loss of each block before its update, first block first.

        Raises:
            FloatingPointError: a loss is not finite; the weights are spoilt.
        """
        self._check_mine()
        losses = []
        for learner in self.learners:
            x, loss = learner.learn(x, target, seed=self.seed, step=self.steps)
            losses.append(loss)
        self.steps += 1
        return self.record([float(loss) for loss in losses])

    def record(self, losses: Sequence[float]) -> list[float]:
        """Append one batch's losses to the log; warns of blocks that have stalled."""
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of block {index + 1} is {loss} at step "
                    f"{len(self._losses) // len(losses) + 1}; load the last checkpoint, and lower "
                    "the learning rate or clip gradients"
                )
        self._losses.extend(losses)
        if len(self._losses) % (_WINDOW * len(losses)) == 0:
            stalled = self.stalled()
            for index in sorted(set(stalled) - self._stalled):
                _log.warning(
                    "block %d of %d has stalled: %s", index + 1, len(losses), stalled[index]
                )
            self._stalled = frozenset(stalled)
        return list(losses)

    @property
    def losses(self) -> Tensor:
        """Loss of every step and block, (steps, blocks) float64."""
        return torch.tensor(self._losses, dtype=torch.float64).view(-1, len(self.learners))

    def stalled(self, window: int = _WINDOW) -> dict[int, str]:
        """Blocks that have stopped getting better too early, by index, with the reason.

        A block has stalled if in the last `window` steps its loss did not fall by more than its
        noise while another block's did, or if it has never fallen below that of its first steps.
        """
        return stalled_blocks(self.losses, window)

    @torch.no_grad()
    def predict(self, x: Any) -> list[Any]:
        """Predictions of all heads, in evaluation mode; the last is the network's answer."""
        self._check_newest()
        predictions = []
        with _evaluating(self.blocks), self._precision():
            for block in self.blocks:
                x, prediction = block(x)
                predictions.append(prediction)
        return predictions

    @torch.no_grad()
    def answer(self, x: Any) -> Any:
        """The network's answer: the last head's prediction, in evaluation mode."""
        self._check_newest()
        *before, last = self.blocks
        with _evaluating(self.blocks), self._precision():
            for block in before:
                x = block.block(x) if isinstance(block, LocalBlock) else block(x)[0]
            return last(x)[1]

    def network(self) -> nn.Sequential:
        """The blocks and the last head as one plain module that shares their parameters."""
        self._check_newest()
        blocks = cast(list[LocalBlock], self.blocks)
        return nn.Sequential(*(block.block for block in blocks), blocks[-1].head)

    def _precision(self) -> torch.autocast:
        learner = self.learners[-1]
        dtype = learner.recipe.autocast
        return torch.autocast(learner.device.type, dtype=dtype, enabled=dtype is not None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, besides the batches to come."""
        self._check_newest()
        return {
            "format": FORMAT.number,
            "steps": self.steps,
            "seed": self.seed,
            "losses": self.losses,
            "blocks": [learner.state_dict() for learner in self.learners],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; on the CPU, bit for bit.

        Raises:
            ValueError: it is another kind of state, or of another number of blocks.
        """
        if self.lent:
            self._check_mine()
        if "format" not in state:
            raise ValueError(
                "this is no state of a LocalTrainer; give what its state_dict returned"
            )
        try:
            state = upgraded(dict(state), state["format"], FORMAT)
        except FormatError as error:
            raise ValueError(f"the state of a LocalTrainer {error}") from None
        if len(state["blocks"]) != len(self.learners):
            raise ValueError(
                f"the state has {len(state['blocks'])} blocks and the trainer "
                f"{len(self.learners)}; cut the network as it was cut then"
            )
        for learner, stored in zip(self.learners, state["blocks"], strict=True):
            learner.load_state_dict(stored)
        self.steps, self.seed = state["steps"], state["seed"]
        self._losses = array("d", state["losses"].flatten().tolist())
        self.stale = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, all or nothing: a kill leaves the old file or the new one."""
        write_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that `save` wrote, here or in a `Pipeline`."""
        self.load_state_dict(read_state(path))

    def _check_mine(self) -> None:
        if self.lent:
            raise RuntimeError("a Pipeline trains these blocks; use its step, or close it first")
        self._check_newest()

    def _check_newest(self) -> None:
        if self.stale:
            raise RuntimeError(self.stale)


def _check_blocks(blocks: Sequence[nn.Module], task: Task) -> None:
    if not blocks:
        raise ValueError("there are no blocks; give at least one")
    owner: dict[Tensor, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(parameter, index) != index:
                raise ValueError(
                    f"parameter {name} of block {index + 1} is in block {owner[parameter] + 1} "
                    "too; cut the network so that each parameter is in one block"
                )
    if isinstance(task, nn.Module) and any(p.requires_grad for p in task.parameters()):
        raise ValueError(
            f"task {type(task).__name__} has parameters, which all blocks would share; give each "
            "head its own"
        )


@contextmanager
def random_stream(device: torch.device, *key: int) -> Iterator[None]:
    """Random numbers of a stream of its own, chosen by `key`, on the CPU and on one device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    gpus = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def without_gaps(tensor: Tensor) -> Tensor:
    """The tensor without gaps in memory: then it is the same in another process, strides too."""
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride()[axis])
    return tensor if tensor.permute(order).is_contiguous() else tensor.contiguous()


@contextmanager
def _evaluating(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode for a while; every module gets back its own mode."""
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    trained = [block.training for block in blocks]
    for block in blocks:
        block.eval()
    try:
        yield
    finally:
        for block, was in zip(blocks, trained, strict=True):
            block.train(was)  # modules may act on it,
        for module, was in modes:
            module.training = was  # and some were in another mode than their block


def stalled_blocks(losses: Tensor, window: int = _WINDOW) -> dict[int, str]:
    """What `LocalTrainer.stalled` says, for any log of losses (steps, blocks)."""
    half = window // 2
    if half < 2 or len(losses) < 2 * half:
        return {}
    before, after = losses[-2 * half : -half], losses[-half:]
    falling = _has_fallen(before, after)
    stalled = {}
    for index in range(losses.shape[1]):
        level = f"{float(after[:, index].mean()):.4g}"
        first = losses[:half, index : index + 1]
        if falling[index]:
            continue
        if not bool(_has_fallen(first, after[:, index : index + 1])):
            started = f"{float(first.mean()):.4g}"
            stalled[index] = f"loss {level}, not below that of the first {half} steps ({started})"
        elif bool(falling.any()):
            stalled[index] = f"loss {level}, not falling for {2 * half} steps while others' do"
    return stalled


def _has_fallen(before: Tensor, after: Tensor) -> Tensor:
    """Whether the mean fell by more than twice its standard error, per column."""
    error = (before.var(0) / len(before) + after.var(0) / len(after)).sqrt()
    return before.mean(0) - after.mean(0) > 2 * error


def plot_losses(losses: Tensor, axes: Axes | None = None, smooth: float = 0.02) -> Axes:
    """Loss of each block against steps, as the method's Figure 6. Needs matplotlib.

    Args:
        losses: (steps, blocks), as `LocalTrainer.losses`.
        axes: to draw on; a new figure's by default.
        smooth: share of the steps that each point averages.
    """
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(6, 4), layout="constrained").add_subplot()
    width = max(1, round(smooth * len(losses)))
    means = losses.unfold(0, width, 1).mean(-1)
    for index in range(losses.shape[1]):
        axes.plot(
            range(width, len(losses) + 1), means[:, index].tolist(), label=f"block {index + 1}"
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return axes
