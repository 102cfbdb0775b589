"""Commands of `enn`, each in a process of its own that has everything imported, and may fail.

`python command_server.py` imports what commands need once, with small models in place of the
shipped ones, then forks for every line on its standard input, so that a command takes milliseconds.
Where `faults.c` is preloaded, the N-th operation of a command that changes a file fails: see
`Fault`.

Commands print numbers with all their digits here, so that results can be compared bit by bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

__all__ = ["KILL", "TORN", "CommandServer", "Done", "Fault", "build_faults"]

KILL = -1
"""Dies before the operation."""
TORN = -2
"""Dies with half of the bytes written."""

_HERE = Path(__file__).resolve().parent
_SECONDS = 120  # that a command may take

_IMPORTED = (
    *("faiss", "filelock", "nibabel", "pyarrow.parquet", "crepes", "sklearn.linear_model"),
    *("matplotlib.figure", "safetensors.torch", "retrieval.search", "retrieval.teach.teacher"),
    *("retrieval.index.update", "retrieval.index.parquet", "neuro.teach", "neuro.train"),
    *("neuro.scans.batch", "neuro.scans.find", "neuro.scans.preprocess", "neuro.age.predict"),
    *("neuro.age.calibrate", "neuro.scans.prep_cache", "enn_core.lab.classify.run", "index_cases"),
    *("apps.cli.search.query", "apps.cli.brain.predict", "sklearn.datasets", "neuro.metrics"),
)


@dataclass(frozen=True)
class Fault:
    """What happens at an operation that writes, syncs, names or cuts a file below a folder.

    Attributes:
        what: KILL, TORN, or the errno of a refusal; 0 counts only. After ENOSPC and EDQUOT what
            needs room is refused from then on.
        at: number of the operation, from 1.
        root: the folder.
    """

    what: int
    at: int
    root: str


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: exit code, negative for a signal.
        out, err: what it printed.
        count: operations that could have failed.
        hits: how many were refused.
        last: the system call that failed first.
    """

    code: int
    out: str
    err: str
    count: int = 0
    hits: int = 0
    last: str = ""

    @property
    def document(self) -> Any:
        """The JSON document that it printed."""
        assert self.code == 0, self
        return json.loads(self.out)


def build_faults(folder: Path) -> tuple[Path | None, str]:
    """The compiled library, or None and the reason why there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux"):
        return None, "faults are injected the way of Linux"
    if compiler is None:
        return None, "needs a C compiler"
    library = folder / "faults.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_HERE / "faults.c")]
    done = subprocess.run([*words, "-ldl"], capture_output=True, text=True)
    if done.returncode:
        return None, f"the C compiler failed: {done.stderr.strip().splitlines()[-1]}"
    return library, ""


class CommandServer:
    """Runs commands, each in a process of its own.

    Args:
        faults: the library of `build_faults`; None runs commands that cannot fail.
    """

    def __init__(self, faults: Path | None = None) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **one, "PYTHONPATH": f"{_HERE}:{_HERE.parents[1]}"}
        if faults is not None:
            environment |= {"LD_PRELOAD": str(faults), "ENN_FAULTS": str(faults)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, *args: str | os.PathLike[str], fault: Fault | None = None, **ask: Any) -> Done:
        """Run a command.

        Args:
            args: its words, without `enn`.
            fault: what goes wrong.
            ask: "env", variables to set; "ann_from" and "ann_candidates" of indexes.
        """
        return self._ask({"args": [os.fspath(arg) for arg in args], **ask}, fault)

    def call(self, name: str, *args: Any, fault: Fault | None = None, **ask: Any) -> Done:
        """Run a function "module:name", with arguments that JSON has."""
        return self._ask({"call": name, "args": args, **ask}, fault)

    def _ask(self, request: dict[str, Any], fault: Fault | None) -> Done:
        assert self._process.stdin is not None
        request["fault"] = None if fault is None else asdict(fault)
        self._process.stdin.write(json.dumps(request, default=os.fspath) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._line()))


# --- the server ----------------------------------------------------------------------------------


def _prepare() -> None:
    """Small models, exact numbers, workers that are forks as well."""
    for name in _IMPORTED:
        importlib.import_module(name)
    import torch
    from index_cases import TinyTestModel

    from apps.cli.brain import predict
    from apps.cli.search import query
    from enn_core.lab.classify.training_log import plot
    from neuro.age import networks
    from neuro.scans import batch
    from neuro.scans.template import load_template
    from retrieval.model import loading

    torch.set_num_threads(1)
    model = TinyTestModel(dim=96)

    def load(name: str = "", **_: Any) -> Any:
        return model

    def exact(number: float, *_: Any) -> float:
        return number

    def tiny(outputs: int) -> Any:
        parts = networks.ARCHITECTURES["bins4"]
        return parts(outputs, widths=(4, 4, 4, 4), strides=(2, 2, 1, 1), bins=2)

    forks = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    for module, attribute, value in (
        (loading, "load", load),
        (query, "round", exact),
        (predict, "round", exact),
        (batch, "multiprocessing", forks),
    ):
        setattr(module, attribute, value)
    networks.ARCHITECTURES["tiny"] = tiny
    # What the first one of each process waits for.
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    load_template()
    with tempfile.TemporaryDirectory() as folder:
        plot([{"epoch": 1, "loss": 1.0, "valid_accuracy": 1.0}], Path(folder, "curves.png"))


def _run(request: dict[str, Any], command: Any) -> int:
    from retrieval.index.eigen_index import EigenIndex

    os.environ.update(request.get("env", {}))
    for setting in ("ann_from", "ann_candidates"):
        setattr(EigenIndex, setting, request.get(setting, getattr(EigenIndex, setting)))
    if "call" in request:
        module, _, name = request["call"].partition(":")
        getattr(importlib.import_module(module), name)(*request["args"])
        return 0
    return command.main(request["args"], standalone_mode=False)


def _child(request: dict[str, Any], command: Any, faults: Any, streams: Sequence[int]) -> None:
    os.setsid()
    signal.alarm(_SECONDS)
    code = 1
    try:
        for number, file in enumerate(streams, 1):
            os.dup2(file, number)
        if request["fault"] is not None:
            root, what, at = (request["fault"][key] for key in ("root", "what", "at"))
            faults.fault_arm(os.fsencode(root), what, at)
        code = _run(request, command)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _answer(request: dict[str, Any], command: Any, faults: Any) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _child(request, command, faults, (out.fileno(), err.fileno()))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):  # its own workers, which may be writing
            os.killpg(pid, signal.SIGKILL)
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode("utf-8", "backslashreplace"))
    if faults is None:
        return Done(code, *told)
    faults.fault_disarm()
    numbers = faults.fault_count(), faults.fault_hits(), faults.fault_last().decode()
    return Done(code, *told, *numbers)


def main() -> None:
    """Answer every line of standard input by one on standard output."""
    import typer

    from apps.cli.main import app

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints is no answer
    faults: Any = None
    if "ENN_FAULTS" in os.environ:
        faults = ctypes.CDLL(os.environ["ENN_FAULTS"])
        faults.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
        faults.fault_count.restype = faults.fault_hits.restype = ctypes.c_long
        faults.fault_last.restype = ctypes.c_char_p
    _prepare()
    command = typer.main.get_command(app)
    gc.collect()
    gc.freeze()  # or every child would look through all of it, and so copy it
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        done = _answer(json.loads(line), command, faults)
        print(json.dumps(asdict(done)), file=answers, flush=True)
    os._exit(0)  # libraries that were loaded have much to say of their end


if __name__ == "__main__":
    main()
