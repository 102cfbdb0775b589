"""The compiled tower gives torch's numbers or none at all; caches may vanish or rot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from retrieval.model import runtime
from retrieval.model.clip_towers import PixelTower
from retrieval.model.preprocess import Preprocess
from retrieval.model.runtime import ImageRuntime, available_runtimes

SIZE = (16, 20)

needs_openvino = pytest.mark.skipif(
    "openvino" not in available_runtimes(), reason="openvino is not installed"
)


class Block(nn.Module):
    """Convolution, attention and normalisation: what towers are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache é"
    monkeypatch.setattr(runtime, "cache_dir", lambda: folder)
    return folder


def make(name: str = "auto", key: str = "key", tower=None, precision: str = "f32") -> ImageRuntime:
    module = PixelTower(Block(), Preprocess(size=SIZE, mean=(0.1, 0.2, 0.3)))
    tower = tower or (lambda: module)
    return ImageRuntime(tower, SIZE, key=key, runtime=name, precision=precision)


def pixels(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SIZE, 3), dtype=np.uint8)


def expected(n: int) -> np.ndarray:
    x = torch.from_numpy(pixels(n)).permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        return Block().double().eval()(x).float().numpy()


def never() -> nn.Module:
    raise AssertionError("the tower was asked for")


@pytest.mark.parametrize("name", available_runtimes())
def test_numbers_are_torchs_in_double(name):
    run = make(name)
    assert run.name == name
    np.testing.assert_allclose(run(pixels(11)), expected(11), atol=1e-5)
    assert run(pixels(11)).dtype == np.float32
    fixed = pixels(11)
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(run(fixed), expected(11), atol=1e-5)
    assert run(pixels(0)).shape == (0, 16)


@pytest.mark.parametrize("name", available_runtimes())
def test_bf16_is_near_and_leaves_the_tower_as_it_was(name):
    module = PixelTower(Block(), Preprocess(size=SIZE, mean=(0.1, 0.2, 0.3)))
    run = make(name, tower=lambda: module, precision="bf16")
    assert (run.name, run.precision) == (name, "bf16")
    rows = run(pixels(11))
    assert rows.dtype == np.float32
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    exact = expected(11) / np.linalg.norm(expected(11), axis=1, keepdims=True)
    assert (unit * exact).sum(1).min() > 0.9995
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    if name == "torch":  # a CPU without bf16 units lets OpenVINO compute in f32
        assert np.abs(rows - expected(11)).max() > 1e-5


@needs_openvino
def test_both_precisions_share_a_compiled_graph(cache):
    make(precision="f32")(pixels(1))
    make(tower=never, precision="bf16")(pixels(1))
    assert len(list(cache.iterdir())) == 1


@needs_openvino
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_an_answer_does_not_depend_on_its_batch(precision):
    run = make("openvino", precision=precision)
    together = run(pixels(11))
    for rows in ([3], [0, 1, 2], [10, 4], list(range(10))):
        np.testing.assert_array_equal(run(pixels(11)[rows]), together[rows])


@needs_openvino
def test_the_second_start_needs_no_tower(cache):
    first = make()(pixels(3))
    np.testing.assert_array_equal(make(tower=never)(pixels(3)), first)
    assert len(list(cache.iterdir())) == 1
    make(key="other weights")(pixels(1))
    assert len(list(cache.iterdir())) == 2


@needs_openvino
@pytest.mark.parametrize("file", ["tower.xml", "tower.bin", "probe.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "one bit"])
def test_a_damaged_cache_is_made_again(cache, file, damage, caplog):
    first = make()(pixels(3))
    path = next(cache.glob(f"*/{file}"))
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "one bit":  # too little for the comparison with torch
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        middle = len(data) // 2
        data[middle : middle + 64] = bytes(255 - b for b in data[middle : middle + 64])
        path.write_bytes(data)
    np.testing.assert_array_equal(make("openvino")(pixels(3)), first)
    assert "discarding the cached model" in caplog.text
    np.testing.assert_array_equal(make(tower=never)(pixels(3)), first)


@needs_openvino
def test_a_cache_that_cannot_be_written_is_no_error(cache, tmp_path):
    cache.write_text("a file where the directory should be")
    np.testing.assert_allclose(make("openvino")(pixels(3)), expected(3), atol=1e-5)


@needs_openvino
def test_lower_precision_is_found_out(monkeypatch, caplog):
    """A compiled tower that rounds must not write vectors."""
    compile_tower = runtime._compile

    def rounding(*arguments):
        run = compile_tower(*arguments)
        return lambda batch: torch.from_numpy(run(batch)).bfloat16().float().numpy()

    monkeypatch.setattr(runtime, "_compile", rounding)
    make("openvino", key="asked for", precision="bf16")(pixels(1))
    with pytest.raises(RuntimeError, match="differs from torch"):
        make("openvino")(pixels(1))
    with caplog.at_level(logging.WARNING):
        run = make("auto")
        np.testing.assert_allclose(run(pixels(3)), expected(3), atol=1e-5)
    assert run.name == "torch"
    assert "using torch" in caplog.text


def test_ctrl_c_while_openvino_loads_is_no_reason_to_use_torch(monkeypatch):
    """Extension modules say "initialization failed" when a Ctrl-C stops them."""

    def stopped():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(runtime, "available_runtimes", lambda: ["openvino", "torch"])
    monkeypatch.setattr(runtime, "_import_openvino", stopped)
    with pytest.raises(KeyboardInterrupt):
        make("auto")(pixels(1))


def test_without_openvino_torch_runs(monkeypatch):
    monkeypatch.setattr(runtime, "available_runtimes", lambda: ["torch"])
    run = make("auto")
    assert run.name == "torch"
    np.testing.assert_allclose(run(pixels(3)), expected(3), atol=1e-5)
    with pytest.raises(ValueError, match=r"eigen-suite\[fast\]"):
        make("openvino")


def test_threads_may_share_a_runtime():
    run = make()
    want = expected(8)
    got: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        got[i] = run(pixels(8)[i : i + 2])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        np.testing.assert_allclose(got[i], want[i : i + 2], atol=1e-5)


def test_other_pixels_and_names_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \(N, 16, 20, 3\), got float64"):
        make()(np.zeros((1, *SIZE, 3)))
    with pytest.raises(ValueError, match="auto, openvino, torch"):
        make("onnx")
    with pytest.raises(ValueError, match="f32, bf16, got 'int8'"):
        make(precision="int8")
    with pytest.raises(ValueError, match="CPU"):
        ImageRuntime(never, SIZE, key="", runtime="openvino", device="cuda")


@needs_openvino
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_signals_work_after_a_runtime_is_given_up_in_another_thread(tmp_path, pytestconfig):
    """OpenVINO's plugin would unmap the stack that the main thread handles signals on."""
    script = (
        "import gc, os, signal, threading\n"
        "from pathlib import Path\n"
        "from tests.retrieval.model.test_runtime import make, pixels, runtime\n"
        f"runtime.cache_dir = lambda: Path({str(tmp_path)!r})\n"
        "box = [make('openvino')]\n"
        "box[0](pixels(1))\n"
        "def give_up(): box.clear(); gc.collect()\n"
        "thread = threading.Thread(target=give_up); thread.start(); thread.join()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        cwd=pytestconfig.rootpath, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr[-2000:]


@needs_openvino
def test_openvino_is_imported_without_its_telemetry(tmp_path):
    """It would report every import to its maker, and leave an id in the user's home."""
    code = (
        "import sys; from retrieval.model.runtime import _import_openvino as o; o().Core();"
        "sys.exit('openvino_telemetry' in sys.modules)"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert not (tmp_path / "intel").exists()
