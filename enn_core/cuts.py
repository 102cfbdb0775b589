"""Cutting a network into blocks of like memory or like time.

A model's forward is traced (`torch.fx`) with its modules as leaves, and cut where a single tensor
passes from one part to the next. Nothing is copied: the blocks hold the model's own modules, under
their own names, so training the blocks trains the model.

>>> import torch
>>> from torch import nn
>>> from enn_core.cuts import cut
>>> first, second, third = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2)
>>> model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
>>> blocks = cut(model, torch.randn(8, 4), blocks=2)
>>> [sorted(block.state_dict()) for block in blocks]
[['0.bias', '0.weight'], ['2.bias', '2.weight', '4.bias', '4.weight']]
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from enn_core.heads import Form, make_head
from enn_core.local import LocalBlock, detached

By = Literal["memory", "time"]


class CutError(ValueError):
    """A model that cannot be cut as asked."""


@dataclass(frozen=True)
class Cost:
    """What one module costs in a training step.

    Attributes:
        saved: bytes kept for its backward, without parameters, buffers and its input.
        saved_input: bytes of its input, if it keeps that.
        keeps_output: whether it keeps its own output (which the next module then need not).
        seconds: forward and backward; processor time on the CPU, wall time on an accelerator.
        shape: of its output, if that is one floating-point tensor; else None.
    """

    saved: int
    saved_input: int
    keeps_output: bool
    seconds: float
    shape: tuple[int, ...] | None


def cut(
    model: nn.Module,
    example: Tensor,
    blocks: int = 4,
    by: By = "memory",
) -> list[nn.Module]:
    """Cut a model into consecutive blocks; the largest is made as small as the cuts allow.

    A cut lies where one tensor (N, C, ...) or (N, L, C) passes, before a module with a weight of
    two dimensions or more, so activations and norms stay with what they follow, and before
    features are pooled to vectors (a network that starts with vectors, as an MLP, is cut between
    them). Modules are opened where that gives finer blocks, as long as their forward is the same
    in training and evaluation.

    Args:
        model: its forward takes one tensor; other arguments keep their defaults. The model is
            run on copies of its parts; it and the random state stay as they are.
        example: a batch (N, ...), on the model's device; a small one serves to compare costs.
        blocks: how many.
        by: "memory" (saved-for-backward bytes) or "time" (forward and backward).

    Returns:
        `blocks` modules; applied one after the other they are the model. They share its
        parameters, and the names of their `state_dict` are those of the model.

    Raises:
        CutError: the model cannot be traced, or has not that many places to cut.
    """
    if by not in ("memory", "time"):
        raise ValueError(f"by={by!r} is unknown, valid are 'memory' and 'time'")
    if blocks < 1:
        raise ValueError(f"blocks={blocks} is invalid, give a number >= 1")
    opened: set[nn.Module] = set()
    tried: set[nn.Module] = set()
    trace = _Trace.of(model, opened)
    if blocks == 1:
        return trace.parts([len(trace.ends)])
    while True:
        costs = trace.prune(example)
        prices = [_price(cost, by) for cost in costs]
        finer = _open_costly(model, trace, prices, sum(prices) / blocks, opened, tried)
        if finer is None:
            break
        trace = finer
    if blocks > len(costs):
        raise CutError(
            f"{type(model).__name__} can be cut into {len(costs)} blocks at most, {blocks} were "
            "asked; give fewer, or the blocks themselves as a list"
        )
    sizes = _partition(len(costs), blocks, lambda i, j: _price(_join(costs[i:j]), by))
    return trace.parts(sizes)


def local_blocks(
    model: nn.Module,
    example: Tensor,
    blocks: int = 4,
    *,
    by: By = "memory",
    head: Form = "conv",
    outputs: int | None = None,
    channel_axis: int | None = None,
) -> list[LocalBlock]:
    """Cut a model and give each block a head, ready for a `LocalTrainer`.

    Args:
        model, example, blocks, by: as in `cut`.
        head: form of the heads: "linear", "conv" or "mlp".
        outputs: numbers to predict; as many as the model answers with, by default.
        channel_axis: of the features, if not what `make_head` takes it to be.

    Returns:
        The blocks. The last keeps the model's own end as its head, if that answers with `outputs`
        numbers; features get a head there too.

    Raises:
        CutError: see `cut`; or the model ends in features and `outputs` is not given.
    """
    parts = cut(model, example, blocks, by)
    shapes = [cost.shape for cost in measure(parts, example, repeats=0)]
    end = shapes[-1]
    if outputs is None:
        if end is None or len(end) != 2:
            raise CutError(
                f"{type(model).__name__} does not answer with a row of numbers (it returns "
                f"{end or 'no single tensor'}); say with outputs= how many its heads shall predict"
            )
        outputs = end[1]
    made = []
    for part, shape in zip(parts, shapes, strict=True):
        own = part is parts[-1] and (shape is None or shape == (len(example), outputs))
        if own:
            made.append(LocalBlock(part, nn.Identity()))
            continue
        new = make_head(head, cast(tuple[int, ...], shape), outputs, channel_axis=channel_axis)
        weight = next(p for p in part.parameters() if p.is_floating_point())
        made.append(LocalBlock(part, new.to(weight.device, weight.dtype)))
    return made


def units(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """The finest cut without opening modules other than `nn.Sequential`: see `cut`."""
    trace = _Trace.of(model, set())
    return trace.parts([1] * len(trace.prune(example)))


def balance(costs: Sequence[float], groups: int) -> list[int]:
    """Sizes of consecutive groups whose largest sum is as small as can be.

    >>> balance([1, 1, 1, 3], 2)
    [3, 1]

    Raises:
        ValueError: fewer costs than groups.
    """
    if not 1 <= groups <= len(costs):
        raise ValueError(f"{len(costs)} costs cannot form {groups} groups")
    return _partition(len(costs), groups, lambda i, j: sum(costs[i:j]))


def measure(modules: Iterable[nn.Module], example: Any, repeats: int = 1) -> list[Cost]:
    """Cost of each of consecutive modules in a step of training, one graph at a time.

    Args:
        modules: each takes what the one before returns; a `LocalBlock` counts with its head.
        example: the first one's input.
        repeats: timed runs, of which the fastest counts, after one that is not timed.

    Returns:
        One cost a module. Modules are copied before they run; the random state is put back.
    """
    costs: list[Cost] = []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        for module in modules:
            cost, example = _measure(copy.deepcopy(module), example, bool(costs), repeats)
            costs.append(cost)
    return costs


def _measure(module: nn.Module, x: Any, inner: bool, repeats: int) -> tuple[Cost, Any]:
    fixed = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> tuple[Any, list[Tensor]]:
        given = detached(x)
        if inner and isinstance(given, Tensor) and given.is_floating_point():
            given.requires_grad_()  # as inside a block, where a gradient is wanted
        if isinstance(module, LocalBlock):
            out, prediction = module(given)
            return out, _differentiable(prediction)
        out = module(given)
        return out, _differentiable(out)

    seconds = float("inf")
    for repeat in range(1 + repeats):
        kept.clear()
        start = _clock(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, ends = run()
        pointer = out.untyped_storage().data_ptr() if isinstance(out, Tensor) else 0
        if ends:
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        if repeat:
            seconds = min(seconds, _clock(x) - start)
        module.zero_grad(set_to_none=True)
        ends.clear()
    given = x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
    shape = tuple(out.shape) if isinstance(out, Tensor) and out.is_floating_point() else None
    cost = Cost(
        saved=sum(size for pointer, size in kept.items() if pointer != given),
        saved_input=kept.get(given, 0),
        keeps_output=pointer in kept,
        seconds=seconds,
        shape=shape,
    )
    return cost, detached(out)


def _differentiable(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        value = value.values()
    return [t for v in value for t in _differentiable(v)] if isinstance(value, Iterable) else []


def _clock(x: Any) -> float:
    """Seconds: wall time if an accelerator works, processor time of all threads otherwise."""
    if isinstance(x, Tensor) and x.is_cuda:
        torch.cuda.synchronize(x.device)
        return time.perf_counter()
    return time.process_time()


def _price(cost: Cost, by: By) -> float:
    return cost.saved + cost.saved_input if by == "memory" else cost.seconds


def _join(costs: Sequence[Cost]) -> Cost:
    """Cost of consecutive parts as one: what passes between two of them is kept once."""
    saved = costs[0].saved
    for before, cost in pairwise(costs):
        saved += cost.saved + (0 if before.keeps_output else cost.saved_input)
    seconds = sum(cost.seconds for cost in costs)
    last = costs[-1]
    return Cost(saved, costs[0].saved_input, last.keeps_output, seconds, last.shape)


def _partition(n: int, groups: int, price: Callable[[int, int], float]) -> list[int]:
    """Sizes of `groups` consecutive groups of n items: least maximum, then least sum of squares."""
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for group in range(1, groups + 1):
        row: dict[int, tuple[float, float, int]] = {}
        for end in range(group, n - (groups - group) + 1):
            options = []
            for start, (most, squares, _) in best[-1].items():
                if start < end:
                    cost = price(start, end)
                    options.append((max(most, cost), squares + cost * cost, start))
            row[end] = min(options)
        best.append(row)
    ends = [n]
    for group in range(groups, 0, -1):
        ends.append(best[group][ends[-1]][2])
    return [end - start for start, end in zip(ends[:0:-1], ends[-2::-1], strict=True)]


class _Tracer(fx.Tracer):
    """Follows a forward; modules are leaves, but for sequences and those to be opened."""

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is not nn.Sequential.forward and m not in self.opened


@dataclass
class _Trace:
    """A traced forward: its steps in order, and the steps after which it may be cut."""

    model: nn.Module
    graph: fx.Graph
    steps: list[fx.Node]
    ends: list[int]  # the last step of every part
    places: int  # how many parts there were before any were joined

    @classmethod
    def of(cls, model: nn.Module, opened: set[nn.Module]) -> _Trace:
        others = list(inspect.signature(model.forward).parameters.values())[1:]
        defaults = {p.name: p.default for p in others if p.default is not p.empty}
        graphs = []
        for training in (False, True):
            with _mode(model, [model, *opened], training):
                try:
                    graphs.append(_Tracer(opened).trace(model, concrete_args=defaults))
                except Exception as error:  # user code runs on proxies: anything can come
                    reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    raise CutError(
                        f"the forward of {type(model).__name__} cannot be traced ({reason}); give "
                        "its blocks as a list"
                    ) from error
        if str(graphs[0]) != str(graphs[1]):
            raise CutError(
                f"the forward of {type(model).__name__} differs between training and evaluation, "
                "so a trace would freeze one of them; give its blocks as a list"
            )
        graph = graphs[1]
        _forget_defaults(graph)
        steps = [node for node in graph.nodes if node.op.startswith("call_")]
        ends = _ends(model, graph, steps)
        return cls(model, graph, steps, ends, len(ends))

    def parts(self, sizes: Sequence[int]) -> list[nn.Module]:
        """Modules of so many consecutive parts each."""
        modules: list[nn.Module] = []
        done = 0
        for size in sizes:
            first = self.ends[done - 1] + 1 if done else 0
            done += size
            modules.append(self._part(first, self.ends[done - 1]))
        return modules

    def _part(self, first: int, last: int) -> fx.GraphModule:
        source = self.steps[first - 1] if first else _input(self.graph)
        graph = fx.Graph()
        copies = {source: graph.placeholder("x")}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # only attributes and unused arguments come late
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        for node in self.steps[first : last + 1]:
            copied(node)
        if last == len(self.steps) - 1:
            output = next(node for node in self.graph.nodes if node.op == "output")
            graph.output(fx.map_arg(output.args[0], copied))
        else:
            graph.output(copies[self.steps[last]])
        return fx.GraphModule(self.model, graph, type(self.model).__name__)

    def prune(self, example: Tensor) -> list[Cost]:
        """Measure the parts, and join those between which no features pass."""
        ends: list[int] = []
        costs: list[Cost] = []
        passes = False
        measured = measure(self._finest(), example)
        first = measured[0].shape
        vectors = example.ndim <= 2 or (first is not None and len(first) == 2)
        for end, cost in zip(self.ends, measured, strict=True):
            if passes:
                costs.append(cost)
                ends.append(end)
            else:
                costs[-1:] = [_join([*costs[-1:], cost])]
                ends[-1:] = [end]
            passes = _is_features(cost.shape, len(example), vectors)
        self.ends = ends
        return costs

    def _finest(self) -> list[nn.Module]:
        return self.parts([1] * len(self.ends))

    def leaves(self, part: int) -> Iterator[nn.Module]:
        first = self.ends[part - 1] + 1 if part else 0
        for node in self.steps[first : self.ends[part] + 1]:
            if node.op == "call_module":
                yield self.model.get_submodule(str(node.target))


def _forget_defaults(graph: fx.Graph) -> None:
    """Remove the arguments that keep their defaults, and the checks that they have them.

    The checks would stop a block from being unpickled, too.
    """
    doomed = set([node for node in graph.nodes if node.op == "placeholder"][1:])
    for node in graph.nodes:  # in the order of use
        if doomed.intersection(node.all_input_nodes):
            doomed.add(node)
    for node in reversed(graph.nodes):
        if node in doomed:
            graph.erase_node(node)


def _is_features(shape: tuple[int, ...] | None, batch: int, vectors: bool) -> bool:
    if shape is None or not shape or shape[0] != batch:
        return False
    return len(shape) >= 3 or (len(shape) == 2 and vectors)


def _input(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "placeholder")


def _ends(model: nn.Module, graph: fx.Graph, steps: list[fx.Node]) -> list[int]:
    """Steps after which one value is alive, and the next step starts with weights of its own."""
    position = {node: i for i, node in enumerate(steps)}
    last = len(steps) - 1
    closed = [False] * len(steps)  # no cut after step i
    alive = [0] * len(steps)
    for node in [_input(graph), *steps]:
        start = position.get(node, -1)
        stop = max((position.get(user, last + 1) for user in node.users), default=start)
        for i in range(max(start, 0), min(stop, last + 1)):
            alive[i] += 1
    used: dict[Tensor, list[int]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value = _attribute(model, str(node.target))
            if isinstance(value, Tensor):
                used.setdefault(value, []).extend(position[u] for u in node.users if u in position)
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            for value in [*module.parameters(), *module.buffers()]:
                used.setdefault(value, []).append(position[node])
    for places in used.values():  # what is used twice must not be torn apart
        for i in range(min(places, default=0), max(places, default=0)):
            closed[i] = True
    ends = []
    for i in range(last):
        starts = steps[i + 1]
        begins = starts.op == "call_module" and any(
            p.ndim > 1 for p in model.get_submodule(str(starts.target)).parameters()
        )
        if begins and alive[i] == 1 and steps[i + 1] in steps[i].users and not closed[i]:
            ends.append(i)
    return [*_with_weights(model, steps, ends), last]


def _with_weights(model: nn.Module, steps: list[fx.Node], ends: list[int]) -> list[int]:
    """Drop the ends of parts that hold no parameter: they go with what follows."""
    kept, first = [], 0
    for end in ends:
        if any(
            node.op == "call_module"
            and any(True for _ in model.get_submodule(str(node.target)).parameters())
            for node in steps[first : end + 1]
        ):
            kept.append(end)
            first = end + 1
    return kept


def _attribute(model: nn.Module, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value


@contextmanager
def _mode(model: nn.Module, opened: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Training or evaluation for some modules of a model, for a while."""
    before = [(module, module.training) for module in opened]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def _open_costly(
    model: nn.Module,
    trace: _Trace,
    prices: Sequence[float],
    share: float,
    opened: set[nn.Module],
    tried: set[nn.Module],
) -> _Trace | None:
    """Open the first module, dearest part first, that makes a part above its share divisible."""
    for part in sorted(range(len(prices)), key=lambda i: -prices[i]):
        if prices[part] <= share:
            return None
        for module in trace.leaves(part):
            if module in tried or not any(True for _ in module.children()):
                continue
            tried.add(module)
            try:
                finer = _Trace.of(model, opened | {module})
            except CutError:
                continue
            if finer.places > trace.places:
                opened.add(module)
                return finer
    return None
