"""A tiny data set, settings that train on it in a second, and a program that runs them."""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retrieval.training.config import TrainConfig
from retrieval.training.run import train

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}

TINY: dict[str, Any] = {
    "split": "",
    "vision": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 4, "head_width": 16},
    "preprocess": {"mode": "squash"},
    "epochs": 2,
    "batch_size": 8,
    "lr": 3e-3,
    "warmup": 2,
    "randaugment": [1, 5],
    "workers": 0,
    "save_every": 1,
}


def write_photos(folder: Path, count: int = 24) -> None:
    """Squares of noise in three colours, with captions that name them."""
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(count):
        name, colour = list(COLOURS.items())[i % 3]
        pixels = np.clip(rng.normal(colour, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        lines += [f"{i:02}.png,a {name} square", f"{i:02}.png,something {name}"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gradients(output: Path, settings: dict[str, Any]) -> None:
    """Gradients of the very first step, to `output`/gradients.safetensors; under torchrun too."""
    from safetensors.torch import save_file

    from enn_core.torchrun import processes
    from retrieval.training.pairs import Augment, Batches, Pairs, loader
    from retrieval.training.run import _dataset, _Run, _silent

    config = TrainConfig(**settings)
    output.mkdir(exist_ok=True)
    with processes() as (rank, world, device):
        place = (rank, world, str(device))
        dataset = _dataset(config, None)
        run = _Run(config, dataset, None, output, place, _silent)
        batches = Batches(
            run.fit_set, config.batch_size, epochs=1, seed=0, rank=place[0], world=place[1]
        )
        pairs = Pairs(dataset, Augment(run.student.preprocess), config.seed)
        pixels, images = next(iter(loader(pairs, batches, 0)))
        found: dict[str, Any] = {}

        def keep(*_: Any) -> None:
            for name, value in run.student.named_parameters():
                if value.grad is not None:
                    found[name] = value.grad.clone()

        for learner in run.learners:
            learner.optimizer.register_step_pre_hook(keep)
        run._train_step(pixels, images.numpy(), 0)
        if place[0] == 0:
            save_file(found, output / "gradients.safetensors")


def _name_threads() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print("threads at the end:", *sorted(names), flush=True)


def main() -> None:
    """python training_cases.py run|gradients OUTPUT SETTINGS, in a process of its own."""
    import torch

    atexit.register(_name_threads)  # runs last
    torch.set_num_threads(1)
    what, output, given = sys.argv[1:]
    settings = {**TINY, **json.loads(given)}
    if what == "gradients":
        gradients(Path(output), settings)
    else:
        train(TrainConfig(**settings), output=output, progress=lambda *a: print(*a, flush=True))


if __name__ == "__main__":
    main()
