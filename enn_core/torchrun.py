"""The group of processes that torchrun started, if it did."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
from collections.abc import Iterator

import torch
from torch import distributed


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, processes, device) of this process; the group is joined, and left at the end."""
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, torch.device("cuda" if cuda else "cpu")
        return
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    # Blocks in DistributedDataParallel are in circles of references and keep the group's threads
    # after the group is left; a thread that meets the interpreter's end aborts the process.
    atexit.register(gc.collect)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield (
            distributed.get_rank(),
            distributed.get_world_size(),
            torch.device(f"cuda:{local}" if cuda else "cpu"),
        )
    finally:
        distributed.destroy_process_group()
