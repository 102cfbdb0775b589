"""Running an image tower fast on a CPU: OpenVINO where it is installed, plain torch otherwise.

The tower is compiled from its fused (plain) form and the compiled form is kept in the user's cache
directory, so that later starts need neither torch's tracing nor the tower's weights in memory.
Every compiled tower is compared with torch once when it is made, and with that reference answer
each time it is loaded: a damaged cache file, or less precision than was asked for, can never write
vectors.

bf16 multiplies in bfloat16 where the CPU has units for it. Measured on ViT-B/16: 2.4 times the
images per second, cosines with f32 of 0.9999 and more; see `benchmarks/clip_speed.py`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enn_core.files.atomic import new_folder
from enn_core.files.digests import file_sha256

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PRECISIONS", "RUNTIMES", "ImageRuntime", "available_runtimes", "cache_dir"]

RUNTIMES = ("auto", "openvino", "torch")
PRECISIONS = ("f32", "bf16")

logger = logging.getLogger(__name__)

_SUMS = "sha256"
"""Name of the file in a cached model's folder with the digests of the others."""

# Bump when the traced graph changes for the same weights.
_GRAPH_VERSION = 2

# Largest difference from torch in f32, relative to the largest output, that a compiled tower may
# show. In bf16 a ViT-B/16 shows 0.004, the shipped convolutional network 0.04.
_TOLERANCE = {"f32": 1e-4, "bf16": 0.1}

# torch eager is fastest on small batches: large ones spend their time on fresh memory.
_TORCH_BATCH = 8

_the_core: Any = None
_core_lock = threading.Lock()

# Images per inference request; a batch is spread over as many requests as run at once. Few, so that
# a ViT's activations stay in the cache: ViT-B/16 takes 130 ms an image by 2, 140 by 8.
_OPENVINO_BATCH = 2


def cache_dir() -> Path:
    """Where compiled towers are kept; the directory may be deleted at any time."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("eigen-suite", appauthor=False)) / "runtime"


def available_runtimes() -> list[str]:
    """Runtimes that can be asked for here, fastest first."""
    found = importlib.util.find_spec("openvino") is not None
    return ["openvino", "torch"] if found else ["torch"]


class ImageRuntime:
    """Image tower as a function of uint8 pixels.

    Nothing is compiled before the first call. Calls may come from several threads; one runs at a
    time. With OpenVINO the answer for an image does not depend on what else is in its batch.
    """

    def __init__(
        self,
        tower: Callable[[], nn.Module],
        size: tuple[int, int],
        *,
        key: str,
        runtime: str = "auto",
        device: str = "cpu",
        precision: str = "f32",
    ) -> None:
        """Prepare a runtime.

        Args:
            tower: gives the fused module, uint8 (N, H, W, 3) -> float (N, n); called only when
                the compiled form is not cached.
            size: (height, width) of the pixels.
            key: identifies weights and preprocessing, for the cache.
            runtime: "openvino", "torch", or "auto" for the faster one that works here.
            device: torch device; other than "cpu" means torch.
            precision: "f32", or "bf16" for products in bfloat16 with sums in float32. Without
                units for it a CPU is no faster with bf16, and OpenVINO then computes in f32.

        Raises:
            ValueError: for an unknown runtime or precision, or OpenVINO where it cannot run.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
        if runtime == "openvino" and device != "cpu":
            raise ValueError(f"runtime openvino runs on the CPU; use runtime torch for {device!r}")
        if runtime == "openvino" and "openvino" not in available_runtimes():
            raise ValueError("runtime openvino needs the package: pip install 'eigen-suite[fast]'")
        if runtime == "auto":
            runtime = available_runtimes()[0] if device == "cpu" else "torch"
            self._may_fall_back = True
        else:
            self._may_fall_back = False
        self.name = runtime
        self.precision = precision
        self._tower = tower
        self._size = size
        self._key = key
        self._device = device
        self._run: Callable[[np.ndarray], np.ndarray] | None = None
        self._lock = threading.Lock()

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run the tower.

        Args:
            pixels: (N, H, W, 3) uint8, N >= 0.

        Returns:
            (N, n) float32, inputs of the final linear map.

        Raises:
            ValueError: for another shape or type.
        """
        height, width = self._size
        if pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be uint8 (N, {height}, {width}, 3), got {pixels.dtype} {pixels.shape}"
            )
        with self._lock:
            if self._run is None:
                self._run = self._prepare()
            if len(pixels) == 0:
                # The width is known only to the network itself.
                blank = np.zeros((1, height, width, 3), dtype=np.uint8)
                return self._run(blank)[:0]
            # torch warns of arrays that cannot be written, such as those of PIL.
            return self._run(np.require(pixels, requirements=["C", "W"]))

    def _prepare(self) -> Callable[[np.ndarray], np.ndarray]:
        if self.name == "openvino":
            try:
                return self._openvino()
            except Exception as error:
                _pass_on_interrupt(error)
                # OpenVINO raises bare RuntimeErrors for whatever its plugins do not support.
                if not self._may_fall_back:
                    raise
                reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                logger.warning("OpenVINO cannot run this model (%s); using torch", reason[0])
                self.name = "torch"
        tower = self._tower()
        return _torch_runner(_rounded(tower) if self.precision == "bf16" else tower, self._device)

    def _openvino(self) -> Callable[[np.ndarray], np.ndarray]:
        openvino = _import_openvino()
        key = f"{self._key}|{self._size}|{openvino.__version__}|{_GRAPH_VERSION}"
        folder = cache_dir() / hashlib.sha256(key.encode()).hexdigest()[:32]
        core = _core(openvino)
        probe = _probe(self._size)
        if not (folder / _SUMS).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a version that kept no digests
        else:
            try:
                _check_sums(folder)
                expected = np.load(folder / "probe.npy", allow_pickle=False)
                graph = core.read_model(folder / "tower.xml")
                run = _compile(openvino, core, graph, self.precision)
                _check(run(probe), expected, self.precision)
                return run
            except Exception as error:
                _pass_on_interrupt(error)
                logger.warning("discarding the cached model %s: %s", folder, _first_line(error))
                shutil.rmtree(folder, ignore_errors=True)
        tower = self._tower()
        expected = _torch_runner(tower, "cpu")(probe)
        graph = _to_openvino(openvino, tower, self._size)
        run = _compile(openvino, core, graph, self.precision)
        _check(run(probe), expected, self.precision)
        # An index can be built without a cache: full disks and read-only homes are no error.
        with contextlib.suppress(OSError, RuntimeError), new_folder(folder) as new:
            openvino.save_model(graph, new / "tower.xml", compress_to_fp16=False)
            np.save(new / "probe.npy", expected)
            (new / _SUMS).write_text(_sums(new), encoding="ascii")
        return run


def _sums(folder: Path) -> str:
    """The files of a cached model with their digests, one a line."""
    files = sorted(path for path in folder.iterdir() if path.name != _SUMS)
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in files)


def _check_sums(folder: Path) -> None:
    """Raise ValueError if a cached model is not what was written, byte by byte.

    The comparison with torch alone would pass a weight that changed a little.
    """
    if (folder / _SUMS).read_text(encoding="ascii") != _sums(folder):
        raise ValueError("its files do not fit their digests")


def _pass_on_interrupt(error: BaseException | None) -> None:
    """Raise the Ctrl-C that an extension module reports as a failure of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        error = error.__cause__ or error.__context__


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    On import it reports to its maker's analytics service unless the user has opted out or
    `openvino_telemetry` is missing, for which case it carries a stub of its own.
    """
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return importlib.import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


def _core(openvino: Any) -> Any:
    """The process's own `Core`, which is never given up.

    The CPU plugin of OpenVINO 2026.4 gives the thread that makes it another stack for signals, and
    unmaps that when the last reference goes, in whichever thread: the next signal with a handler,
    such as Ctrl-C, then ends the process with a segmentation fault.
    """
    global _the_core
    with _core_lock:
        if _the_core is None:
            _the_core = openvino.Core()
        return _the_core


def _to_openvino(openvino: Any, tower: nn.Module, size: tuple[int, int]) -> Any:
    """Graph of a torch module, dynamic in the batch.

    `openvino.convert_model` would trace twice and report the conversion to its maker.
    """
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # Two images, so that tracing cannot mistake the batch for a constant 1.
    example = torch.from_numpy(np.concatenate([_probe(size)] * 2))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention ops have no counterpart
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer remarks on every shape check; the result is compared with torch's anyway.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(tower, example, check_trace=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    frontend = FrontEndManager().load_by_framework("pytorch")
    # A name of its own: the frontend reads from the decoder and does not keep it alive.
    decoder = TorchScriptPythonDecoder(traced, example_input=example)
    graph = frontend.convert(frontend.load(decoder))
    graph.reshape([-1, *size, 3])
    graph.validate_nodes_and_infer_types()
    return graph


def _compile(
    openvino: Any, core: Any, graph: Any, precision: str
) -> Callable[[np.ndarray], np.ndarray]:
    # The precision is pinned: left alone, OpenVINO takes bf16 wherever a CPU has units for it.
    # Throughput means one stream per core or so, which wait for each other less than threads
    # inside a layer.
    compiled = core.compile_model(
        graph, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
    )
    queue = openvino.AsyncInferQueue(compiled)

    def run(pixels: np.ndarray) -> np.ndarray:
        rows: dict[int, np.ndarray] = {}

        def keep(request: Any, start: int) -> None:
            rows[start] = np.array(request.get_output_tensor().data, dtype=np.float32)

        queue.set_callback(keep)
        for start in range(0, len(pixels), _OPENVINO_BATCH):
            queue.start_async([pixels[start : start + _OPENVINO_BATCH]], start)
        queue.wait_all()
        return np.concatenate([rows[start] for start in sorted(rows)])

    return run


def _rounded(tower: nn.Module) -> nn.Module:
    """A copy that computes in bf16, but for what the outermost module does itself: scale pixels.

    Not autocast: it rounds every weight anew in every call, which costs more than it gains.
    """
    tower = copy.deepcopy(tower)
    for part in tower.children():
        part.bfloat16()
    return tower


def _torch_runner(tower: nn.Module, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    tower = tower.eval().to(device)

    def run(pixels: np.ndarray) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for start in range(0, len(pixels), _TORCH_BATCH):
                batch = torch.from_numpy(pixels[start : start + _TORCH_BATCH]).to(device)
                rows.append(tower(batch).float().cpu().numpy())
        return np.concatenate(rows)

    return run


def _probe(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """One fixed image with structure at every scale."""
    return np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)


def _check(got: np.ndarray, expected: np.ndarray, precision: str) -> None:
    if got.shape != expected.shape:
        raise RuntimeError(f"output has shape {got.shape}, torch gives {expected.shape}")
    difference = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12)
    if not difference <= _TOLERANCE[precision]:
        raise RuntimeError(f"output differs from torch by {difference:.1e} of its largest value")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
