"""Blocks in several processes: the same bits as in one, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import Any, cast

import pytest
import torch
from local_toys import batch, make, same
from torch import nn
from torch.nn import functional as F

from enn_core import LocalBlock, LocalTrainer, Pipeline, PipelineError

pytestmark = pytest.mark.usefixtures("one_thread")


def straight(steps: int) -> LocalTrainer:
    trainer = make()
    for step in range(steps):
        trainer.step(*batch(step))
    return trainer


def _run(pipeline: Pipeline, first: int, end: int) -> None:
    for step in range(first, end):
        pipeline.step(*batch(step))


@pytest.mark.skipif(sys.platform == "win32", reason="kills the POSIX way")
def test_same_bits_as_one_process_and_a_dead_worker_leaves_a_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    trainer = make()
    trainer.step(*batch(0))  # optimizers travel with their blocks
    pipeline = Pipeline(trainer, processes=3, checkpoint=path, every=10)
    assert path.exists()
    for step in range(1, 8):
        pipeline.step(*batch(step))
    pipeline.drain()
    assert torch.equal(trainer.losses, straight(8).losses)
    with pytest.raises(RuntimeError, match="call sync of the Pipeline first"):
        trainer.answer(batch(0)[0])
    with pytest.raises(RuntimeError, match="a Pipeline trains these blocks"):
        trainer.step(*batch(8))
    pipeline.sync()
    assert same(trainer, straight(8))
    x = batch(99)[0]
    assert torch.equal(trainer.answer(x), straight(8).answer(x))

    for step in range(8, 12):
        pipeline.step(*batch(step))
    os.kill(pipeline._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(PipelineError, match=r"process 3 \(block 3\) was killed by signal 9; ") as e:
        _run(pipeline, 12, 2000)
    assert str(e.value).endswith(f"load {path}, saved after step 10, to go on")
    with pytest.raises(RuntimeError, match="ended early; load"):
        trainer.step(*batch(0))
    with pytest.raises(RuntimeError, match="the Pipeline is closed"):
        pipeline.step(*batch(0))
    trainer.load(path)
    assert same(trainer, straight(10))
    trainer.step(*batch(10))
    assert same(trainer, straight(11))


class Fails(nn.Module):
    """A block that breaks at its third batch, or where it should travel."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("no third batch")
        return self.map(x.mT).mT  # not contiguous


@pytest.mark.slow
def test_failing_block_is_named():
    trainer = LocalTrainer([LocalBlock(Fails(), nn.Identity()) for _ in range(2)], F.mse_loss)
    cast(Any, trainer.blocks[0]).block.calls = -100
    x, target = torch.randn(6, 4), torch.zeros(6, 4)
    with Pipeline(trainer, groups=[1, 1]) as pipeline:
        for _ in range(2):
            pipeline.step(x, target)
        pipeline.sync()
        assert trainer.losses.shape == (2, 2)
        pipeline.step(x, target)
        with pytest.raises(
            PipelineError, match=r"process 2 \(block 2\) failed: ArithmeticError: no t"
        ):
            pipeline.sync()
    with pytest.raises(RuntimeError, match="nothing was saved, pass checkpoint= next time"):
        trainer.answer(x)


def test_one_process_needs_no_others(tmp_path):
    trainer = make()
    with Pipeline(trainer, processes=1, checkpoint=tmp_path / "run.pt", every=2) as pipeline:
        for step in range(3):
            pipeline.step(*batch(step))
    assert same(trainer, straight(3))
    again = make()
    again.load(tmp_path / "run.pt")
    assert again.steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 4}, "processes=4 is invalid for 3 blocks, give 1 to 3"),
        ({"groups": [3, 0]}, r"groups=\[3, 0\] is invalid, give 2 sizes >= 1 with sum 3"),
        ({"depth": 0}, "depth=0 is invalid"),
        ({"devices": ["cpu", "cpu"]}, "2 devices for 1 further processes"),
    ],
)
def test_impossible_pipelines(options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(make(), **options)


def test_what_cannot_travel_is_said_before_anything_starts():
    trainer = LocalTrainer(make().blocks, lambda p, t: F.cross_entropy(p, t))
    with pytest.raises(PipelineError, match=r"blocks 2 to 3 cannot be sent.*top of a file"):
        Pipeline(trainer)
    trainer.step(*batch(0))  # still usable


@pytest.mark.slow
def test_script_without_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from torch import nn
            from enn_core import LocalBlock, LocalTrainer, Pipeline
            blocks = [LocalBlock(nn.Linear(2, 2), nn.Identity()) for _ in range(2)]
            Pipeline(LocalTrainer(blocks, nn.functional.mse_loss))
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr.strip().rpartition("\n")[2]
