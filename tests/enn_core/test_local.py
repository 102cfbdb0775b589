"""Local learning: locality, memory, frozen blocks, exact resume, stalled blocks."""

from __future__ import annotations

import copy
import doctest
import gc
import random
import signal
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
from local_toys import batch, make, same, weights
from places import CASES
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from enn_core import LocalBlock, LocalTrainer, local, orthogonality_error
from enn_core.local import adamw, plot_losses, random_stream, stalled_blocks


def test_examples():
    assert doctest.testmod(local).failed == 0


def test_no_gradient_of_a_block_reaches_another():
    blocks = make().blocks
    x, target = batch(0)
    x.requires_grad_()
    for index, block in enumerate(blocks):
        h, prediction = block(x)
        assert not h.requires_grad
        F.cross_entropy(prediction, target).backward()
        for other, owner in enumerate(blocks):
            reached = [p.grad is not None for p in owner.parameters()]
            assert all(reached) if other == index else not any(reached)
        block.zero_grad(set_to_none=True)
        if index:
            continue
        assert x.grad is None
        x = h


def test_update_of_a_block_depends_on_no_later_block():
    whole, alone = make(3), make(1)
    alone.blocks[0].load_state_dict(whole.blocks[0].state_dict())
    for step in range(5):
        whole.step(*batch(step))
        alone.step(*batch(step))
    first = zip(whole.blocks[0].parameters(), alone.blocks[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in first)


def test_block_sees_what_the_block_before_said_before_its_update():
    trainer = make(2, schedule=None)
    seen = []
    trainer.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frozen = copy.deepcopy(trainer.blocks[0])
    x, target = batch(0)
    trainer.step(x, target)
    with random_stream(torch.device("cpu"), 5, 0, 0, 0):
        assert torch.equal(seen[0], frozen(x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_block_works_under_autocast_checkpoint_and_deepcopy(reentrant):
    block = copy.deepcopy(make(1).blocks[0])
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, prediction = checkpoint(block, x, use_reentrant=reentrant)
        prediction.float().sum().backward()
    assert h.dtype == torch.bfloat16
    assert x.grad is None
    assert all(p.grad is not None for p in block.parameters())


def test_blocks_in_data_parallel_learn_alike(tmp_path):
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        plain, parallel = make(schedule=None), make(schedule=None)
        wrapped = [nn.parallel.DistributedDataParallel(block) for block in parallel.blocks]
        parallel = LocalTrainer(wrapped, F.cross_entropy, seed=5)
        plain = LocalTrainer(plain.blocks, F.cross_entropy, seed=5)
        for step in range(3):
            plain.step(*batch(step))
            parallel.step(*batch(step))
        assert same(plain, parallel)
        assert torch.equal(plain.answer(batch(9)[0]), parallel.answer(batch(9)[0]))
    finally:
        torch.distributed.destroy_process_group()


class _Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class _Both(nn.Module):
    """Blocks may pass on more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        left, right = x["pair"] if isinstance(x, dict) else (x, x)
        return {"pair": _Pair(self.left(left), self.right(right)), "rest": [left, 3]}


class _Sum(nn.Module):
    def forward(self, h):
        return h["pair"].left + h["pair"].right


def test_blocks_may_pass_trees_of_tensors():
    blocks = [LocalBlock(_Both(), _Sum()), LocalBlock(_Both(), _Sum())]
    trainer = LocalTrainer(blocks, F.mse_loss)
    x = torch.randn(4, 6)
    h, _ = blocks[0](x)
    assert isinstance(h["pair"], _Pair)
    assert not h["pair"].left.requires_grad
    assert len(trainer.step(x, torch.zeros(4, 6))) == 2


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (F.cross_entropy, torch.randint(4, (16,))),
        (F.l1_loss, torch.randn(16, 4)),
        (
            lambda z, t: F.cross_entropy(F.normalize(z) @ t.T * 10, torch.arange(16)),
            torch.eye(16, 4),
        ),
    ],
    ids=["classification", "regression", "contrastive"],
)
def test_every_block_learns_any_task(task, target):
    trainer = make(optimizer=partial(adamw, lr=3e-2), schedule=None)
    trainer = LocalTrainer(trainer.blocks, task, optimizer=partial(adamw, lr=3e-2))
    x = torch.randn(16, 6)
    for _ in range(60):
        trainer.step(x, target)
    assert (trainer.losses[-10:].mean(0) < 0.9 * trainer.losses[0]).all()


def test_answer_is_the_last_prediction_and_evaluation_is_put_back():
    trainer = make()
    trainer.blocks[1].block[1].eval()  # a norm that its user froze
    modes = [m.training for b in trainer.blocks for m in b.modules()]
    x, _ = batch(0)
    predictions = trainer.predict(x)
    assert len(predictions) == 3
    assert torch.equal(trainer.answer(x), predictions[-1])
    assert not predictions[-1].requires_grad
    assert [m.training for b in trainer.blocks for m in b.modules()] == modes
    assert torch.equal(trainer.network().eval()(x), predictions[-1])


def test_graph_and_gradients_of_a_block_are_gone_before_the_next_runs():
    alive: list[int] = []

    class Probe:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    counts = []

    class Watch(nn.Linear):
        def forward(self, x):
            counts.append(len(alive))
            return super().forward(x)

    def pack(tensor):
        probe = Probe()
        return (tensor, probe)

    blocks = [LocalBlock(Watch(6, 6), nn.Linear(6, 4)) for _ in range(4)]
    trainer = LocalTrainer(blocks, F.cross_entropy)
    gc.disable()  # nothing may depend on a collection
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
            trainer.step(*batch(0))
    finally:
        gc.enable()
    assert counts == [0, 0, 0, 0]
    assert all(p.grad is None for b in blocks for p in b.parameters())


def test_random_numbers_depend_on_seed_step_and_block_alone():
    a, b = make(), make()
    for step in range(4):
        torch.manual_seed(step)
        a.step(*batch(step))
        torch.rand(7)
        state = torch.get_rng_state()
        b.step(*batch(step))
        assert torch.equal(torch.get_rng_state(), state)
    assert same(a, b)
    assert not same(a, make(seed=6))


def test_orthonormality_is_held_or_penalised():
    held, soft, free = (
        make(1, retract_every=n, penalty=p, optimizer=partial(adamw, lr=3e-2), schedule=None)
        for n, p in ((1, 0.0), (0, 1.0), (0, 0.0))
    )
    for step in range(30):
        for trainer in (held, soft, free):
            trainer.step(*batch(step))
    errors = [max(orthogonality_error(t.blocks[0]).values()) for t in (held, soft, free)]
    assert errors[0] < 2e-3
    assert errors[0] < errors[1] < errors[2]


def test_clipping_bounds_the_update():
    step = partial(torch.optim.SGD, lr=1.0)
    trainer = make(1, optimizer=lambda b: step(b.parameters()), schedule=None, clip=1e-3)
    before = [p.clone() for p in trainer.blocks[0].parameters()]
    trainer.step(*batch(0))
    moved = zip(before, trainer.blocks[0].parameters(), strict=True)
    assert sum((a - b).square().sum() for a, b in moved) <= 1.01e-6


def test_frozen_blocks_only_compute():
    trainer = make()
    blocks = trainer.blocks
    blocks[0].requires_grad_(False)
    blocks[0].eval()
    trainer = LocalTrainer(blocks, F.cross_entropy)
    before = [p.clone() for p in weights(trainer)]
    trainer.step(*batch(0))
    kept = [torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True)]
    count = len(blocks[0].state_dict())
    assert all(kept[:count])
    assert not any(kept[-2:])
    other = LocalTrainer(blocks, F.cross_entropy)
    other.load_state_dict(trainer.state_dict())


def test_mixed_precision():
    trainer = make(autocast=torch.bfloat16)
    for step in range(3):
        trainer.step(*batch(step))
    assert all(p.dtype == torch.float32 for p in trainer.blocks[0].parameters())
    assert trainer.answer(batch(0)[0]).dtype == torch.bfloat16


def test_state_goes_on_bit_for_bit(tmp_path):
    straight, first, second = make(), make(), make()
    for step in range(11):
        straight.step(*batch(step))
    for step in range(5):
        first.step(*batch(step))
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    for step in range(second.steps, 11):
        second.step(*batch(step))
    assert same(straight, second)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="kills the POSIX way")
def test_killed_run_goes_on_bit_for_bit(tmp_path, one_thread):
    path = tmp_path / "state.pt"
    process = subprocess.Popen(
        [sys.executable, "-m", "local_toys", str(path)],
        cwd=CASES,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for _ in range(4):
            acknowledged = process.stdout.readline()
        time.sleep(random.random() / 5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    resumed, straight = make(), make()
    resumed.load(path)
    assert resumed.steps >= int(acknowledged) > 0
    until = resumed.steps + 5
    while resumed.steps < until:
        resumed.step(*batch(resumed.steps))
    while straight.steps < until:
        straight.step(*batch(straight.steps))
    assert same(straight, resumed)


def test_stalled_blocks_are_named(caplog):
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    ramp = torch.linspace(2, 1, 400, dtype=torch.float64)
    flat_after = torch.maximum(ramp, torch.tensor(1.6))
    losses = noise + torch.stack([ramp, flat_after, torch.full_like(ramp, 2.0)], dim=1)
    report = stalled_blocks(losses, 200)
    assert sorted(report) == [1, 2]
    assert "while others' do" in report[1]
    assert "not below that of the first 100 steps" in report[2]
    assert stalled_blocks(losses[:150], 200) == {}
    converged = noise + torch.exp(-torch.arange(400, dtype=torch.float64) / 20)[:, None]
    assert stalled_blocks(converged, 200) == {}

    trainer = make()
    for row in losses.tolist():
        trainer.record(row)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2  # each once
    assert sorted(message[:23] for message in messages) == [
        "block 2 of 3 has stalle",
        "block 3 of 3 has stalle",
    ]
    assert sorted(trainer.stalled()) == [1, 2]


def test_losses_are_drawn():
    axes = plot_losses(torch.rand(50, 3))
    assert [line.get_label() for line in axes.lines] == ["block 1", "block 2", "block 3"]


def test_errors_say_what_to_do():
    shared = nn.Linear(8, 4)
    twice = [LocalBlock(nn.Linear(6, 8), shared), LocalBlock(nn.Linear(8, 8), shared)]
    with pytest.raises(ValueError, match=r"parameter head.weight of block 2 is in block 1 too"):
        LocalTrainer(twice, F.cross_entropy)
    with pytest.raises(ValueError, match="no blocks"):
        LocalTrainer([], F.cross_entropy)
    with pytest.raises(ValueError, match="task Linear has parameters"):
        LocalTrainer(make().blocks, nn.Linear(2, 2))
    each = LocalTrainer(make().blocks, partial(F.cross_entropy, reduction="none"))
    with pytest.raises(ValueError, match=r"loss of shape \(16,\)"):
        each.step(*batch(0))
    with pytest.raises(FloatingPointError, match="the loss of block 1 is nan at step 1"):
        make().step(torch.full((16, 6), torch.nan), batch(0)[1])
    with pytest.raises(ValueError, match="has 3 blocks and the trainer 2"):
        make(2).load_state_dict(make(3).state_dict())
    with pytest.raises(ValueError, match="no state of a LocalTrainer"):
        make().load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="block 1 has no schedule"):
        make(schedule=None).load_state_dict(make().state_dict())
