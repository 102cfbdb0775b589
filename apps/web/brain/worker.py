"""A process that prepares scans for the brain page, one at a time.

Extraction and registration take all of a core and a gigabyte or two, and libraries in C may crash
on files that nobody vouches for. In a process of its own that costs one scan, not the page.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.scans.preprocess import InputKind, Prepared

__all__ = ["BRAIN", "EXPLANATION", "HEAD", "PLANES", "Worker", "WorkerError", "write_volume"]

HEAD, BRAIN, PLANES = "head.nii.gz", "brain.nii.gz", "planes.png"
"""What is written beside a scan: it as it came, its brain in MNI space, and a picture of that."""
EXPLANATION = "explanation.nii.gz"
"""What is written when it is asked for: what the answer depends on, in MNI space."""

LIMIT_SECONDS = 600.0
# A head as it came is shown with its own voxels up to this many, coarser above.
_SHOWN_VOXELS = 2**24


class WorkerError(RuntimeError):
    """A scan that could not be prepared; one line without the file's name."""


class Worker:
    """Prepares scans in a process that is started when needed, and again should it die.

    For one thread at a time.
    """

    def __init__(self, *, limit: float = LIMIT_SECONDS) -> None:
        self._limit = limit
        self._process: Any = None
        self._pipe: Any = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the process if there is none."""
        with self._lock:
            if self._process is not None and self._process.is_alive():
                return
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()

    def warm_up(self) -> None:
        """Starts the process and has it load what the first head would wait for."""
        self.start()
        with contextlib.suppress(OSError):
            self._pipe.send(None)

    def prepare(
        self, path: Path, kind: InputKind, folder: Path, on_step: Callable[[str], None]
    ) -> Prepared:
        """Prepares one file.

        Args:
            path: the file; any content.
            kind: "head", "brain" or "mni".
            folder: where HEAD, BRAIN and PLANES are written.
            on_step: told each step as it begins, and HEAD when that has been written.

        Raises:
            WorkerError: with the reason.
        """
        self.start()
        end = time.monotonic() + self._limit
        try:
            self._pipe.send((str(path), kind, str(folder)))
            while self._pipe.poll(max(0.0, end - time.monotonic())):
                what, value = self._pipe.recv()
                if what == "done":
                    return value
                if what == "failed":
                    raise WorkerError(value)
                on_step(value)
        except (EOFError, OSError):
            self.stop()
            raise WorkerError(
                "ended the process that worked on it: a damaged file, or not enough memory"
            ) from None
        self.stop()
        raise WorkerError(f"took more than {self._limit / 60:.0f} minutes and was stopped")

    def stop(self) -> None:
        """Ends the process."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                process.join(5)
                self._pipe.close()


# --- in the process ----------------------------------------------------------------------------


def _serve(pipe: Any) -> None:
    import warnings

    from enn_core.child_process import follow_parent

    follow_parent()
    # What libraries print could name files.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    from neuro.scans.preprocess import Preprocessor

    preprocessor = Preprocessor()
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            if job is None:
                _load()
            else:
                path, kind, folder = job
                pipe.send(_answer(preprocessor, Path(path), kind, Path(folder), pipe))


def _load() -> None:
    from neuro.scans.template import load_template

    with contextlib.suppress(Exception):  # it fails again, and is told, with the first scan
        import ants  # noqa: F401
        import deepbet  # noqa: F401

        load_template()


def _answer(
    preprocessor: Any, path: Path, kind: InputKind, folder: Path, pipe: Any
) -> tuple[str, Any]:
    from neuro.scans.quality import save_picture
    from neuro.scans.read import VolumeError, read_volume
    from neuro.scans.template import MNI_AFFINE

    def step(name: str) -> None:
        pipe.send(("step", name))

    try:
        step("reading")
        volume = read_volume(path)
        _write_head(volume, folder / HEAD)
        step(HEAD)
        prepared = preprocessor(volume, kind, progress=step)
        step("pictures")
        write_volume(prepared.image, MNI_AFFINE, folder / BRAIN)
        save_picture(prepared.image, folder / PLANES)
    except VolumeError as error:
        return "failed", str(error)
    except MemoryError:
        return "failed", "needs more memory than is free"
    except Exception as error:
        text = " ".join(str(error).replace(str(folder), "").split())
        return "failed", f"failed with {type(error).__name__}: {text[:200]}"
    return "done", prepared


def _write_head(volume: Any, path: Path) -> None:
    """The scan as it came, in 8 bits: a browser need not read the file itself."""
    import numpy as np

    from neuro.scans.preprocess import at_2_mm

    voxels, affine = volume.voxels, volume.affine
    if voxels.size > _SHOWN_VOXELS:
        voxels, affine = at_2_mm(voxels, affine)
    low, high = np.percentile(voxels, (0.5, 99.7))
    values = np.clip((voxels - low) * (255 / max(high - low, 1e-6)), 0, 255)
    write_volume(values.astype(np.uint8), affine, path)


def write_volume(values: Any, affine: Any, path: Path) -> None:
    """Writes values on a grid as NIfTI for the viewer."""
    import gzip

    import nibabel

    from enn_core.files.atomic import replacing

    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
