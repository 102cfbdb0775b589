"""The blocks of a `LocalTrainer` in several processes, to the same bits as in one.

No gradient passes between blocks, so while the second process trains its blocks on one batch, the
first is at the next. Activations go from each process to the next through `torch.distributed`
(gloo between CPUs, NCCL between GPUs); a few may be on their way, then the sender waits.

    trainer = LocalTrainer(blocks, F.cross_entropy)
    if __name__ == "__main__":  # the other processes import this file
        with Pipeline(trainer, processes=2, checkpoint="run.pt", every=500) as pipeline:
            for images, labels in batches:
                pipeline.step(images, labels)
        trainer.answer(images)  # as if it had run here
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from enn_core.child_process import follow_parent
from enn_core.local import Learner, LocalTrainer, map_tensors, without_gaps

_LOST = 3  # exit status of a process whose neighbour is gone
_GRACE = 10.0  # seconds that processes get to end by themselves
_MAIN = "a script that opens a Pipeline does so under `if __name__ == '__main__':`"
_EVER = timedelta(days=365)  # a process may wait for work as long as its user thinks


class _LostError(Exception):
    """The neighbour of a process is gone or silent."""


class PipelineError(RuntimeError):
    """A process of the pipeline has ended or failed; the message says which, and what is saved."""


class Pipeline:
    """Runs a trainer's schedule with its blocks spread over processes of this machine.

    This process keeps the first blocks; the others are sent away and come back, with their
    optimizers, by `sync` and at the end. Results equal those of `LocalTrainer.step` bit for bit on
    CPUs, if both use as many threads: set `torch.set_num_threads` first, the other processes use
    the same number. Blocks, task, optimizer and schedule must be picklable.

    Args:
        trainer: whose `step` must not be called meanwhile.
        processes: how many, with this one.
        groups: blocks of each process, first process first (`cuts.balance` finds good ones); as
            even as can be by default.
        devices: device of each further process's blocks; where they are by default.
        checkpoint: file that is written at the start and every `every` steps, as by
            `LocalTrainer.save`; writing it lets the pipeline run empty.
        every: steps between checkpoints; 0 for none but the first.
        depth: batches on their way between two processes before the sender waits.
        timeout: seconds without an answer after which a process counts as dead.

    Raises:
        ValueError: impossible groups.
        PipelineError: a process did not start.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        processes: int = 2,
        *,
        groups: Sequence[int] | None = None,
        devices: Sequence[torch.device | str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 0,
        depth: int = 2,
        timeout: float = 1800.0,
    ) -> None:
        sizes = _sizes(len(trainer.learners), processes, groups)
        if devices is not None and len(devices) != processes - 1:
            raise ValueError(
                f"{len(devices)} devices for {processes - 1} further processes; give one each"
            )
        if depth < 1:
            raise ValueError(f"depth={depth} is invalid, give a number of batches >= 1")
        if dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is in use in this process; a Pipeline needs it for itself"
            )
        self.trainer, self.timeout = trainer, timeout
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.every, self._saved = every, -1
        self._own = trainer.learners[: sizes[0]]
        self._rows: list[deque[list[float]]] = [deque() for _ in sizes]
        self._workers: list[_Worker] = []
        self._open = False
        if self.checkpoint is not None:
            trainer.save(self.checkpoint)
            self._saved = trainer.steps
        if processes > 1:
            self._start(sizes, devices, depth)
        self._open = trainer.lent = True

    def _start(
        self, sizes: Sequence[int], devices: Sequence[torch.device | str] | None, depth: int
    ) -> None:
        learners = self.trainer.learners
        with tempfile.TemporaryDirectory(prefix="enn-pipeline-") as folder, _loopback():
            first = sizes[0]
            for rank in range(1, len(sizes)):
                group = learners[first : first + sizes[rank]]
                first += sizes[rank]
                parcel = Path(folder, f"blocks-{rank}")
                _pack(group, parcel)
                device = devices[rank - 1] if devices is not None else group[0].device
                self._workers.append(
                    _Worker.start(
                        _Place(
                            rank=rank,
                            size=len(sizes),
                            meeting=str(Path(folder, "meeting")),
                            parcel=str(parcel),
                            device=str(device),
                            depth=depth,
                            threads=torch.get_num_threads(),
                        ),
                        _names(group),
                    )
                )
            try:
                for worker in self._workers:  # before meeting: who waits for the dead waits long
                    self._receive(worker, "loaded")
                _meet(str(Path(folder, "meeting")), 0, len(sizes))
                self._next = _Sender(1, depth, timedelta(seconds=self.timeout))
                for worker in self._workers:
                    self._receive(worker, "ready")
            except BaseException:
                self._abort()
                raise

    def step(self, x: Any, target: Any) -> None:
        """Train every block on one batch; the later blocks will get to it.

        Losses come to `trainer.losses` in the order of the steps, a few steps late.

        Raises:
            PipelineError: a process is dead or failed. The run is over; the trainer goes on from
                its last checkpoint.
        """
        trainer = self.trainer
        with self._guarded():
            self._collect()
            x, losses = _learn(self._own, x, target, trainer.seed, trainer.steps)
            if self._workers:
                target = map_tensors(torch.clone, target)  # it may be reused by the caller
                self._next.send(("step", trainer.seed, trainer.steps, x, target))
                trainer.stale = (
                    "the newest blocks are in other processes; call sync of the Pipeline first"
                )
            trainer.steps += 1
            self._rows[0].append(losses)
            self._record()
            if self.checkpoint is not None and self.every and not trainer.steps % self.every:
                self.save(self.checkpoint)

    def drain(self) -> None:
        """Wait until all blocks have learned from all batches; `trainer.losses` is complete."""
        with self._guarded():
            for worker in self._workers:
                while len(self._rows[worker.rank]) < len(self._rows[0]):
                    self._receive(worker, "losses")
            self._record()

    def sync(self) -> None:
        """`drain`, and fetch blocks and optimizers into the trainer."""
        with self._guarded():
            if self._workers:
                self._next.send(("state",))
            states = [self._receive(worker, "state") for worker in self._workers]
            away = self.trainer.learners[len(self._own) :]
            arrived = (state for data in states for state in _loads(data))
            for learner, state in zip(away, arrived, strict=True):
                learner.load_state_dict(state)
            self._record()
            self.trainer.stale = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """`sync`, then write the trainer's state to a file."""
        self.sync()
        self.trainer.save(path)
        self.checkpoint, self._saved = Path(path), self.trainer.steps

    def close(self) -> None:
        """`sync`, end the other processes and give the blocks back to the trainer."""
        if not self._open:
            return
        self.sync()
        with suppress(_LostError):
            if self._workers:
                self._next.send(("stop",))
                self._next.flush()
        self._end(_GRACE)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def _record(self) -> None:
        while all(self._rows):
            self.trainer.record([loss for row in self._rows for loss in row.popleft()])

    def _collect(self) -> None:
        """Take what the processes have sent so far; see whether all are alive."""
        for worker in self._workers:
            while worker.pipe.poll():
                self._take(worker)
            if not worker.process.is_alive():
                raise self._failure()

    def _receive(self, worker: _Worker, kind: str) -> Any:
        """Wait for a message of this kind; losses before it are filed."""
        while True:
            ready = wait([worker.pipe, worker.process.sentinel], self.timeout)
            if worker.pipe not in ready:
                raise self._failure() if ready else self._silent(worker)
            got, content = self._take(worker)
            if got == kind:
                return content

    def _take(self, worker: _Worker) -> tuple[str, Any]:
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._failure() from None
        if kind == "losses":
            self._rows[worker.rank].append(content)
        elif kind == "error":
            worker.error = content
            raise self._failure()
        return kind, content

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the pipeline; lost connections are explained."""
        if not self._open:
            raise RuntimeError("the Pipeline is closed; open another one for the trainer")
        try:
            yield
        except _LostError:
            failure = self._failure()
            self._abort()
            raise failure from None
        except BaseException:
            self._abort()
            raise

    def _failure(self) -> PipelineError:
        """The error for a process that failed: the first cause, not who noticed."""
        wait([worker.process.sentinel for worker in self._workers], _GRACE)
        for worker in self._workers:
            worker.process.join(1)
            with suppress(EOFError, OSError):
                while not worker.error and worker.pipe.poll():
                    kind, content = worker.pipe.recv()
                    worker.error = content if kind == "error" else ""
        for worker in self._workers:
            if worker.error:
                reason = worker.error.strip().rpartition("\n")[2]
                error = PipelineError(f"{worker} failed: {reason}; {self._what_is_left()}")
                error.add_note(worker.error)
                return error
        for worker in self._workers:
            status = worker.process.exitcode
            if status not in (None, 0, _LOST):
                how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
                hint = "" if self._open else f"; {_MAIN}"
                return PipelineError(f"{worker} {how}; {self._what_is_left()}{hint}")
        return PipelineError(f"the connection to a process was lost; {self._what_is_left()}")

    def _silent(self, worker: _Worker) -> PipelineError:
        return PipelineError(
            f"{worker} has not answered for {self.timeout:g} s; {self._what_is_left()}"
        )

    def _what_is_left(self) -> str:
        if self._saved < 0:
            return "nothing was saved, pass checkpoint= next time"
        return f"load {self.checkpoint}, saved after step {self._saved}, to go on"

    def _abort(self) -> None:
        if self._open and self._workers:
            left = self._what_is_left()
            self.trainer.stale = f"a Pipeline of this trainer ended early; {left}"
        self._end(0)

    def _end(self, grace: float) -> None:
        for worker in self._workers:
            worker.process.join(grace)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        if self._workers and dist.is_initialized():
            dist.destroy_process_group()
        self._workers = []
        self._open = self.trainer.lent = False


def _sizes(blocks: int, processes: int, groups: Sequence[int] | None) -> list[int]:
    if not 1 <= processes <= blocks:
        raise ValueError(
            f"processes={processes} is invalid for {blocks} blocks, give 1 to {blocks}"
        )
    if groups is None:
        return [(i + 1) * blocks // processes - i * blocks // processes for i in range(processes)]
    if len(groups) != processes or sum(groups) != blocks or min(groups) < 1:
        raise ValueError(
            f"groups={list(groups)} is invalid, give {processes} sizes >= 1 with sum {blocks}"
        )
    return list(groups)


@dataclass(frozen=True)
class _Place:
    """What a further process has to know."""

    rank: int
    size: int
    meeting: str
    parcel: str
    device: str
    depth: int
    threads: int


@dataclass
class _Worker:
    """A further process as seen from the first."""

    rank: int
    process: Any
    pipe: Connection
    blocks: str
    error: str = ""

    @classmethod
    def start(cls, place: _Place, blocks: str) -> _Worker:
        context = mp.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(place, theirs), daemon=True, name=f"enn-blocks-{place.rank}"
        )
        process.start()
        theirs.close()
        return cls(place.rank, process, pipe, blocks)

    def __str__(self) -> str:
        return f"process {self.rank + 1} ({self.blocks})"


def _names(learners: Sequence[Learner]) -> str:
    first, last = learners[0].index + 1, learners[-1].index + 1
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _pack(learners: Sequence[Learner], path: Path) -> None:
    try:
        torch.save([(x.block, x.index, x.recipe, x.state_dict()) for x in learners], path)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PipelineError(
            f"{_names(learners)} cannot be sent to another process ({error}); define task, "
            "optimizer and modules at the top of a file"
        ) from error


def _unpack(place: _Place) -> list[Learner]:
    # weights_only=False: this file was written by the process that started this one.
    parcel = torch.load(place.parcel, map_location=place.device, weights_only=False)
    learners = []
    for block, index, recipe, state in parcel:
        learner = Learner(block.to(place.device), index, recipe)
        learner.load_state_dict(state)
        learners.append(learner)
    return learners


def _work(place: _Place, pipe: Connection) -> None:
    """Main function of a further process."""
    follow_parent()
    torch.set_num_threads(place.threads)
    try:
        learners = _unpack(place)
        pipe.send(("loaded", None))
        _meet(place.meeting, place.rank, place.size)
        pipe.send(("ready", None))
        _serve(place, learners, pipe)
    except Exception as error:
        if isinstance(error, _LostError):
            sys.exit(_LOST)
        with suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _serve(place: _Place, learners: list[Learner], pipe: Connection) -> None:
    last = place.rank == place.size - 1
    onward = None if last else _Sender(place.rank + 1, place.depth, None)
    while True:
        message = _receive(place.rank - 1, torch.device(place.device))
        if message[0] == "step":
            _, seed, step, x, target = message
            x, losses = _learn(learners, x, target, seed, step)
            message = ("step", seed, step, x, target)
        if onward is not None:
            onward.send(message)
        if message[0] == "step":
            pipe.send(("losses", losses))
        elif message[0] == "state":
            file = io.BytesIO()
            torch.save([learner.state_dict() for learner in learners], file)
            pipe.send(("state", file.getvalue()))
        else:
            if onward is not None:
                onward.flush()
            return


def _learn(
    learners: Sequence[Learner], x: Any, target: Any, seed: int, step: int
) -> tuple[Any, list[float]]:
    losses = []
    for learner in learners:
        x, loss = learner.learn(x, target, seed=seed, step=step)
        losses.append(loss)
    return x, [float(loss) for loss in losses]


def _loads(data: bytes) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = torch.load(
        io.BytesIO(data), map_location="cpu", weights_only=True
    )
    return states


@contextmanager
def _loopback() -> Iterator[None]:
    """Processes of one machine talk over its loopback, and listen nowhere else."""
    name = "GLOO_SOCKET_IFNAME"
    mine = sys.platform.startswith("linux") and name not in os.environ
    if mine:
        os.environ[name] = "lo"
    try:
        yield
    finally:
        if mine:
            del os.environ[name]


def _meet(meeting: str, rank: int, size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=_EVER
    )


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        raise _LostError(str(error)) from error


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was in a message."""

    index: int


class _Sender:
    """Sends messages (tuples with tensors anywhere) to one process, a few ahead of it."""

    def __init__(self, to: int, depth: int, timeout: timedelta | None) -> None:
        self.to, self.depth, self.timeout = to, depth, timeout
        self._on_their_way: deque[tuple[list[Any], list[Tensor]]] = deque()

    def send(self, message: Any) -> None:
        tensors: list[Tensor] = []

        def slot(tensor: Tensor) -> _Slot:
            tensors.append(tensor)
            return _Slot(len(tensors) - 1)

        skeleton = map_tensors(slot, message)
        described, flat = [], []
        for tensor in tensors:
            tensor = without_gaps(tensor)
            described.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cuda))
            flat.append(tensor.as_strided((tensor.numel(),), (1,)))
        letter = torch.frombuffer(bytearray(pickle.dumps((skeleton, described))), dtype=torch.uint8)
        parts = [torch.tensor([len(letter)]), letter, *(part for part in flat if part.numel())]
        with _connected():
            works = [dist.isend(part, self.to) for part in parts]
        self._on_their_way.append((works, parts))
        while len(self._on_their_way) > self.depth:
            self._wait()

    def flush(self) -> None:
        while self._on_their_way:
            self._wait()

    def _wait(self) -> None:
        works, _ = self._on_their_way.popleft()
        with _connected():
            for work in works:
                work.wait(*([self.timeout] if self.timeout else []))


def _receive(source: int, device: torch.device) -> Any:
    with _connected():
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, source)
        letter = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(letter, source)
        skeleton, described = pickle.loads(letter.numpy().tobytes())
        tensors = []
        for dtype, shape, stride, is_cuda in described:
            flat = torch.empty(shape.numel(), dtype=dtype, device=device if is_cuda else "cpu")
            if flat.numel():
                dist.recv(flat, source)
            tensors.append(flat.as_strided(shape, stride))
    return _filled(skeleton, tensors)


def _filled(skeleton: Any, tensors: list[Tensor]) -> Any:
    if isinstance(skeleton, _Slot):
        return tensors[skeleton.index]
    if isinstance(skeleton, tuple) and hasattr(skeleton, "_fields"):
        return type(skeleton)(*(_filled(item, tensors) for item in skeleton))
    if isinstance(skeleton, (tuple, list)):
        return type(skeleton)(_filled(item, tensors) for item in skeleton)
    if isinstance(skeleton, dict):
        return {key: _filled(item, tensors) for key, item in skeleton.items()}
    return skeleton
