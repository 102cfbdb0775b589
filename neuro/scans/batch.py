"""Many scans, each on its own: in processes beside this one, so that nothing stops the run.

>>> from neuro.scans.find import find_scans                                # doctest: +SKIP
>>> for done in prepare_all(find_scans(["study/"]), jobs=2):          # doctest: +SKIP
...     print(done.scan.name, done.error or done.prepared.quality.dice)
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuro.scans.find import Scan

if TYPE_CHECKING:
    from neuro.scans.preprocess import InputKind, Prepared, Preprocessor

__all__ = ["Outcome", "prepare_all", "prepare_scan", "write_outputs"]

_CRASHED = (
    "ended the process that worked on it; not enough memory, perhaps: try it alone with --jobs 1"
)
_END = b"\0"


@dataclass(frozen=True)
class Outcome:
    """What became of a scan.

    Attributes:
        scan: the scan.
        prepared: None if it failed.
        error: why it failed, in one line without the file's name; "" if it did not.
        seconds: that it took.
        cached: whether it was prepared in an earlier run.
        remark: on the cache, if its entry was damaged; "" if not.
    """

    scan: Scan
    prepared: Prepared | None
    error: str
    seconds: float
    cached: bool = False
    remark: str = ""


def prepare_scan(
    path: Path | str,
    kind: InputKind = "head",
    *,
    preprocessor: Preprocessor | None = None,
    cache: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Prepared, bool]:
    """Prepare one file in this process, or take it from the cache.

    Args:
        path: the file.
        kind: "head", "brain" or "mni".
        preprocessor: one that was used before has its networks loaded.
        cache: folder of a `PrepCache`; None keeps nothing.
        progress: called with the name of each step as it begins.

    Returns:
        The brain, and whether it was in the cache.

    Raises:
        VolumeError: it cannot be read or prepared.
    """
    from neuro.scans.prep_cache import PrepCache
    from neuro.scans.preprocess import Preprocessor, check_kind
    from neuro.scans.read import content_hash, read_volume

    kind = check_kind(kind)
    kept = None if cache is None else PrepCache(cache)
    if kept is not None:
        found = kept.find(content_hash(path), kind)
        if found is not None:
            return found, True
    if progress is not None:
        progress("reading")
    prepared = (preprocessor or Preprocessor())(read_volume(path), kind, progress=progress)
    if kept is not None:
        kept.add(prepared)
    return prepared, False


def prepare_all(
    scans: Iterable[Scan],
    *,
    kind: InputKind = "head",
    jobs: int = 1,
    cache: Path | str | None = None,
    out: Path | None = None,
    on_step: Callable[[Scan, str], None] | None = None,
) -> Generator[Outcome, None, None]:
    """Prepare scans in `jobs` processes; yields each as it is done, whatever became of it.

    Each process takes about 2 GB and two threads. One that dies (a library that crashes, no
    memory) costs the scan it worked on and no other.

    Args:
        scans: what to do.
        kind: of all of them.
        jobs: processes.
        cache: folder of a `PrepCache`; None keeps nothing.
        out: folder for `write_outputs`; None writes nothing.
        on_step: called in this process, in a thread of its own, as each step begins.
    """
    todo = deque(scans)
    context = multiprocessing.get_context("spawn")
    # A bare pipe: a queue has a lock, which a process that is killed may hold. What is written at
    # once in less than 4 kB arrives whole.
    told, steps = context.Pipe(duplex=False)
    names = {scan.name: scan for scan in todo}
    listener = threading.Thread(target=_listen, args=(told, names, on_step), daemon=True)
    listener.start()

    def pool(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(steps,))

    job = _Job(kind, None if cache is None else Path(cache), out)
    suspects: list[Scan] = []
    executor = pool(jobs)
    running: dict[Future[Outcome], Scan] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                scan = todo.popleft()
                running[executor.submit(_work, scan, job)] = scan
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in done:
                scan = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    broken = True
                    suspects.append(scan)
                else:
                    yield outcome
            if broken:
                # One of them did it: each gets a process for itself.
                suspects += running.values()
                running.clear()
                executor.shutdown(cancel_futures=True)
                for scan in suspects:
                    yield _alone(pool, scan, job)
                suspects.clear()
                executor = pool(jobs)
    finally:
        # Left early, nobody waits for what is still being worked on.
        workers = list((getattr(executor, "_processes", None) or {}).values()) if running else []
        executor.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            process.terminate()
        steps.send_bytes(_END)
        listener.join()
        told.close()
        steps.close()


def write_outputs(prepared: Prepared, folder: Path, name: str) -> None:
    """Write `<name>_T1w.nii.gz` (the brain), `<name>_T1w.json` and `<name>_T1w.png`."""
    import gzip

    import nibabel

    from enn_core.files.atomic import replacing
    from neuro.scans.quality import save_picture
    from neuro.scans.template import MNI_AFFINE

    image = nibabel.Nifti1Image(prepared.image, MNI_AFFINE)
    image.header.set_xyzt_units("mm")
    # 4 is NIfTI's code of MNI space.
    image.set_sform(MNI_AFFINE, 4)
    image.set_qform(MNI_AFFINE, 4)
    with replacing(folder / f"{name}_T1w.nii.gz") as temporary:
        # No time and no name in it: the same brain gives the same file.
        temporary.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
    with replacing(folder / f"{name}_T1w.json") as temporary:
        temporary.write_text(json.dumps(prepared.record, indent=2) + "\n", encoding="ascii")
    save_picture(prepared.image, folder / f"{name}_T1w.png")


@dataclass(frozen=True)
class _Job:
    kind: InputKind
    cache: Path | None
    out: Path | None


# --- in the worker -----------------------------------------------------------------------------

_preprocessor: Preprocessor | None = None
_steps: Any = None


def _start(steps: Any) -> None:
    import warnings

    from enn_core.child_process import follow_parent

    global _steps
    _steps = steps
    follow_parent()
    warnings.simplefilter("ignore")


def _work(scan: Scan, job: _Job) -> Outcome:
    import warnings

    from neuro.scans.prep_cache import CacheDamage
    from neuro.scans.preprocess import Preprocessor
    from neuro.scans.read import VolumeError

    global _preprocessor
    if _preprocessor is None:
        _preprocessor = Preprocessor()
    start = time.perf_counter()
    prepared, cached, error = None, False, ""
    remarks: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", CacheDamage)
            prepared, cached = prepare_scan(
                scan.path,
                job.kind,
                preprocessor=_preprocessor,
                cache=job.cache,
                progress=lambda step: _steps.send_bytes(f"{scan.name}\0{step}".encode()),
            )
        if job.out is not None:
            write_outputs(prepared, job.out, scan.name)
    except VolumeError as failure:
        error = str(failure)
    except MemoryError:
        error = "needs more memory than is free"
    except ModuleNotFoundError:
        raise
    except Exception as failure:
        text = " ".join(str(failure).split())
        error = f"failed with {type(failure).__name__}: {text[:200]}"
    remark = "; ".join(str(each.message) for each in remarks)
    return Outcome(scan, prepared, error, time.perf_counter() - start, cached, remark)


# --- in the caller -----------------------------------------------------------------------------


def _alone(pool: Callable[[int], ProcessPoolExecutor], scan: Scan, job: _Job) -> Outcome:
    start = time.perf_counter()
    with pool(1) as executor:
        try:
            return executor.submit(_work, scan, job).result()
        except BrokenProcessPool:
            return Outcome(scan, None, _CRASHED, time.perf_counter() - start)


def _listen(told: Any, names: dict[str, Scan], tell: Callable[[Scan, str], None] | None) -> None:
    while (message := told.recv_bytes()) != _END:
        if tell is not None:
            name, _, step = message.decode().partition("\0")
            tell(names[name], step)
