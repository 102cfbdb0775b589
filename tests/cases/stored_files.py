"""One of every kind of file that the suite stores, made by its own commands from small inputs.

They lie in one folder that is restored before every try, so that paths are the same and whole
files can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_server import CommandServer, Done, Fault
from index_cases import age, photo

__all__ = ["QUERY", "SCANS", "Stored"]

QUERY = "a red thing"
PICTURES = 60
LESSONS = (("one", 1, 2), ("two", 3, 4), ("three", 5, 6))
SCANS = ("sub-01", "sub-02")


class Stored:
    """The folder `here`, and what commands say of it.

    Args:
        folder: to work in.
        server: that runs the commands.
    """

    def __init__(self, folder: Path, server: CommandServer) -> None:
        self.server = server
        self.here, self._made = folder / "here", folder / "made"
        self._good = self._made
        self.here.mkdir(parents=True)
        self.photos, self.index = self.here / "photos", self.here / "photos" / ".enn-index"
        self.profiles = self.here / "profiles"
        self.brains, self.model = self.here / "brains", self.here / "brains" / "model.safetensors"
        self._env = {"ENN_PROFILES": str(self.profiles), "HOME": str(folder)}
        self._search()
        self._brain()
        self._classifier()
        shutil.copytree(self.here, self._made)

    def run(self, *args: str | Path, fault: Fault | None = None, **ask: Any) -> Done:
        """A command, in this folder's environment."""
        return self.server.run(*args, fault=fault, env=self._env, **ask)

    def call(self, name: str, *args: Any) -> Done:
        """A function of this module, in a process of its own."""
        return self.server.call(f"stored_files:{name}", *args, env=self._env)

    def restore(self, *parts: str) -> None:
        """Put folders and files back as they were made; everything if none is named."""
        for part in parts or sorted({*os.listdir(self.here), *os.listdir(self._good)}):
            here, good = self.here / part, self._good / part
            if here.is_dir():
                shutil.rmtree(here)
            else:
                here.unlink(missing_ok=True)
            if good.is_dir():
                shutil.copytree(good, here)
            elif good.exists():
                shutil.copy2(good, here)

    def keep(self, name: str) -> None:
        """Restore what is here now, from now on."""
        self._good = self._made.with_name(name)
        if self._good.exists():
            shutil.rmtree(self._good)
        shutil.copytree(self.here, self._good)

    def reset(self) -> None:
        """Restore what was made at first, from now on."""
        self._good = self._made
        self.restore()

    def files(self) -> dict[str, str]:
        """Digest of every file, by its path in the folder."""
        return {
            path.relative_to(self.here).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.here.rglob("*"))
            if path.is_file()
        }

    # --- commands ------------------------------------------------------------------------------

    def search(self, *args: str | Path, index: Path | None = None, **ask: Any) -> Done:
        """`enn search` on the index of the pictures."""
        return self.run("search", *args, "--index", index or self.index, **ask)

    def update(self, **ask: Any) -> Done:
        """`enn search index` on the folder of pictures."""
        words = ("search", "index", self.photos, "--workers", "1", "--batch-size", "4")
        return self.run(*words, **ask)

    def scan(self, number: int = 0) -> Path:
        return self.brains / f"{SCANS[number]}_T1w.nii.gz"

    def brain(self, command: str, *args: str | Path, **ask: Any) -> Done:
        """`enn brain` with the tiny model."""
        words = [command, *args, "--model", self.model]
        if command in ("predict", "teach"):
            words += ["--input", "mni", "--cache", self.brains / "cache"]
        return self.run("brain", *words, **ask)

    def train(self, output: str, *args: str, **ask: Any) -> Done:
        """`enn train classifier` on 64 digits, two epochs."""
        sizes = ("--arch", "mlp:4x16", "--set", "train=64", "--set", "batch_size=32")
        words = ("train", "classifier", self.here / output, *sizes, "--epochs", "2")
        return self.run(*words, *args, **ask)

    def train_brain(self, *args: str, **ask: Any) -> Done:
        """`enn brain train` of two networks on six scans."""
        return self.run("brain", *_training(self.here), *args, **ask)

    def train_tower(self, *settings: str, **ask: Any) -> Done:
        """`enn search train` on the pictures of `write_captioned`, two epochs."""
        places = ("--output", self.here / "tower", "--dataset", self.here / "captioned")
        return self.run("search", "train", *places, *settings, **ask)

    # --- making --------------------------------------------------------------------------------

    def _search(self) -> None:
        for number in range(PICTURES):
            photo(self.photos / f"{number}.png", number)
        age(self.photos)
        _made(self.update())
        for query, good, bad in LESSONS[:2]:
            marks = ("--good", str(good), "--bad", str(bad), "--force")
            _made(self.search("teach", query, *marks))
        _made(self.search("export", self.here / "lessons.json"))
        _made(self.search("export", self.here / "vectors.parquet"))

    def _brain(self) -> None:
        _made(self.call("make_brains", str(self.brains)))
        table = self.here / "ages.csv"
        _made(self.brain("predict", self.brains, "--out", table))
        labelled = "predicted_age,age\n" + "".join(f"{40 + 3 * i},{38 + 4 * i}\n" for i in range(9))
        (self.here / "labelled.csv").write_text(labelled)
        words = (self.here / "labelled.csv", "--out", self.here / "calibration.json")
        _made(self.brain("calibrate", *words))
        _made(self.brain("teach", self.scan(), "--age", "60", "--force"))

    def _classifier(self) -> None:
        _made(self.train("half", "--set", "stop_after=1"))
        _made(self.train("whole"))


def _made(done: Done) -> None:
    if done.code:
        raise RuntimeError(f"cannot be made: {done}")


def _training(here: Path) -> list[str]:
    places = (here / "people", "--out", here / "run", "--cache", here / "brains" / "cache")
    sizes = "--architecture tiny --epochs 2 --members 2 --views 1 --batch-size 2 --input mni"
    return ["train", *map(os.fspath, places), *sizes.split()]


# --- called in processes of their own ------------------------------------------------------------


def make_brains(folder: str) -> None:
    """Two scans in MNI space, a study to train on, and a model that can be taught."""
    import nibabel
    import torch
    from tiny_brain_models import tiny_model

    from neuro.age.calibrate import BiasCorrection, Conformal
    from neuro.age.model import both_sides, features_of
    from neuro.age.population import summarise
    from neuro.scans.grid import as_input, crop
    from neuro.scans.template import MNI_AFFINE, load_template

    place = Path(folder)
    place.mkdir()
    (place / "participants.tsv").write_text("participant_id\tage\nsub-01\t60\nsub-02\t45\n")
    template = load_template()[0]
    for name, scale in zip(SCANS, (200, 150), strict=True):
        values = (template * scale).astype(np.uint8)
        nibabel.Nifti1Image(values, MNI_AFFINE).to_filename(place / f"{name}_T1w.nii.gz")
    people = place.with_name("people")
    people.mkdir()
    lines = ["participant_id\tage"]
    for number, years in enumerate((25, 38, 47, 52, 60, 77)):
        values = template * 200
        values[35:65, 40:80, 30:50] *= 1.2 - years / 100
        image = nibabel.Nifti1Image(np.clip(values, 0, 255).astype(np.uint8), MNI_AFFINE)
        image.to_filename(people / f"sub-{number}_T1w.nii.gz")
        lines.append(f"sub-{number}\t{years}")
    (people / "participants.tsv").write_text("\n".join(lines) + "\n")
    model = tiny_model(
        conformal=Conformal(tuple(np.linspace(-8, 8, 40))),
        bias=BiasCorrection("cole", 0.8, 10.0, 40),
    )
    brain = crop((template * 180).astype(np.uint8)).astype(np.float32)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        noisy = np.clip(brain + (brain > 0) * rng.normal(0, 20, brain.shape), 0, 255)
        x = torch.from_numpy(as_input(noisy.astype(np.uint8)[None]))
        read = [both_sides(m.net, m.target, m.net.stem(x))[1][0].numpy() for m in model.members]
        rows.append(features_of(model, np.stack(read)))
    model.population = summarise(rows)
    model.save(place / "model.safetensors")


def write_captioned(here: str) -> None:
    """Pictures with captions, and a configuration that trains a small tower on them."""
    from training_cases import TINY, write_photos

    folder = Path(here) / "captioned"
    folder.mkdir()
    write_photos(folder)
    settings = {"recipe": "contrastive", "description": "small", **TINY}
    (Path(here) / "tower.json").write_text(json.dumps(settings), encoding="utf-8")


def stop_training(here: str) -> None:
    """`enn brain train`, stopped after its first epoch."""
    import typer

    from apps.cli.main import app
    from neuro import train

    write = train.write_state

    def write_and_stop(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    train.write_state = write_and_stop
    command = typer.main.get_command(app)
    assert command.main(["brain", *_training(Path(here))], standalone_mode=False) == 130


def teach_and_die(index: str, lessons: Sequence[tuple[str, int, int]], journal: str) -> None:
    """Teach, each lesson acknowledged by a line, and be killed while the journal is open.

    Somebody reads the journal meanwhile, so that the lessons are in its log.
    """
    import sqlite3

    from retrieval.search import open_index

    reader = sqlite3.connect(journal, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchone()
    searcher = open_index(index, profile="default")
    for query, good, bad in lessons:
        searcher.teach(query, [good], [bad], force=True)
        print(query, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def classifier_tensors(file: str) -> None:
    """What a classifier's model file holds, as whoever loads it sees it."""
    from enn_core.lab.classify.networks import build_network
    from enn_core.lab.classify.weights import load_plain

    model = build_network("mlp:4x16", (1, 8, 8), 10, seed=0)
    load_plain(model, Path(file))
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    print(json.dumps(digest.hexdigest()))


def lessons_stored(profiles: str) -> None:
    """Every row of every journal, but for when it was taught and its random name."""
    import sqlite3

    stored = {}
    for file in sorted(Path(profiles).rglob("*.sqlite")):
        db = sqlite3.connect(file)
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            continue  # killed before it was made
        rows = db.execute("SELECT seq, kind, subject, active, covers, layout, data FROM events")
        stored[file.name] = [
            [*row[:-1], hashlib.sha256(row[-1]).hexdigest()] for row in sorted(rows)
        ]
        db.close()
    print(json.dumps(stored))
