"""Caption features on disk: equal to encoding, kept over stops and kills, computed by one only."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.training import caption_features as module
from retrieval.training.caption_features import text_features
from retrieval.training.settings import TrainError


def one(text: str) -> list[float]:
    return [float(len(text)), float(sum(text.encode("utf-8", "surrogatepass"))), 1.0]


def encode(texts: Sequence[str]) -> np.ndarray:
    return np.array([one(text) for text in texts], dtype=np.float32)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """No progress."""


def features(texts, folder, encode=encode, key="k", report=silent) -> np.ndarray:
    return text_features(texts, encode, key=key, folder=Path(folder), report=report)


@given(
    st.lists(st.text(max_size=3) | st.sampled_from(["a", "b"]), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 6),
)
@settings(max_examples=60)
def test_stopped_and_continued_equals_encoding(texts, chunk, stop_after):
    calls: list[list[str]] = []

    def stopping(part: Sequence[str]) -> np.ndarray:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(list(part))
        return encode(part)

    def counting(part: Sequence[str]) -> np.ndarray:
        calls.append(list(part))
        return encode(part)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        with contextlib.suppress(KeyboardInterrupt):
            features(texts, folder, stopping)
        got = features(texts, folder, counting)
        np.testing.assert_array_equal(got, encode(texts))
        encoded = [text for part in calls for text in part]
        assert encoded == list(dict.fromkeys(texts))  # each once, the finished ones not again
        count = len(calls)
        np.testing.assert_array_equal(features(texts, folder, counting), got)
        assert len(calls) == count


def test_it_is_mapped_and_leaves_one_file(tmp_path):
    seen = []
    got = features(["a", "b", "a"], tmp_path / "new" / "texts", report=lambda *a: seen.append(a))
    assert isinstance(got, np.memmap)
    assert got.dtype == np.float32
    assert not got.flags.writeable
    assert seen == [("captions", 2, 2, "")]
    suffixes = sorted(file.suffix for file in (tmp_path / "new" / "texts").iterdir())
    assert suffixes in ([".lock", ".npy"], [".npy"])


def test_other_texts_and_other_towers_have_files_of_their_own(tmp_path):
    first = features(["a", "b"], tmp_path)
    np.testing.assert_array_equal(features(["b", "a"], tmp_path), first[::-1])
    double = features(["a", "b"], tmp_path, lambda t: 2 * encode(t), key="double")
    np.testing.assert_array_equal(double, 2 * first)
    # A text does not run into the next one, nor the key into the texts.
    assert len(features(["ab"], tmp_path)) == 1
    assert len(list(tmp_path.glob("*.npy"))) == 4


@pytest.mark.parametrize("damage", ["cut", "bit", "noise", "rows", "type", "state", "stray"])
def test_damaged_files_are_computed_again(tmp_path, damage):
    texts = [f"text {i}" for i in range(10)]
    (file,) = [Path(features(texts, tmp_path).filename)]
    part, state = file.with_suffix(".part"), file.with_suffix(".json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "bit":
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)
    elif damage == "noise":
        file.write_bytes(os.urandom(500))
    elif damage == "rows":
        np.save(file, encode(texts)[:5])
    elif damage == "type":
        np.save(file, encode(texts).astype(np.float64))
    elif damage == "state":
        file.rename(part)
        state.write_text('{"done": 99, "chunk": 512}')
    elif damage == "stray":
        file.unlink()
        state.write_text('{"done": 10, "chunk": 512}')
    np.testing.assert_array_equal(features(texts, tmp_path), encode(texts))


def test_a_file_of_an_earlier_version_is_read_as_it_is(tmp_path):
    texts = ["a", "bb"]
    file = Path(features(texts, tmp_path).filename)
    np.save(file, 2 * encode(texts))  # without a digest at its end
    np.testing.assert_array_equal(features(texts, tmp_path), 2 * encode(texts))


def test_a_stray_note_is_not_believed_after_a_kill(tmp_path):
    """The note of a lost part must not make zeros of a new one look finished."""
    texts = ["a", "b"]
    file = Path(features(texts, tmp_path).filename)
    file.unlink()
    file.with_suffix(".json").write_text('{"done": 2, "chunk": 512}')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "replacing", killed)
        with pytest.raises(KeyboardInterrupt):
            features(texts, tmp_path)
    np.testing.assert_array_equal(features(texts, tmp_path), encode(texts))


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(TrainError, match="no captions"):
        features([], tmp_path)
    with pytest.raises(TrainError, match=r"gave \(1, 3\) for 2 texts"):
        features(["a", "b"], tmp_path, lambda t: encode(t[:1]))
    with pytest.raises(TrainError, match="not finite"):
        features(["a"], tmp_path, lambda t: np.full((1, 2), np.nan))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot keep") as caught:
        features(["a"], tmp_path / "file")
    assert "\n" not in str(caught.value)


def ask(folder: str, answers) -> None:
    def slow(texts: Sequence[str]) -> np.ndarray:
        answers.put("encoded")
        time.sleep(0.2)
        return encode(texts)

    answers.put(float(features(["a", "bb"], folder, slow).sum()))


def test_several_processes_compute_once(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=ask, args=(str(tmp_path), answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(60)
    assert got.count("encoded") == 1
    assert [x for x in got if x != "encoded"] == [float(encode(["a", "bb"]).sum())] * 3


_CHILD = """
import sys, time
from pathlib import Path
import retrieval.training.caption_features as module
from tests.retrieval.training.test_caption_features import encode, features
module._CHUNK = 3
def slow(texts):
    time.sleep(0.01)
    return encode(texts)
print("ready", flush=True)
features([f"text {i % 70}" for i in range(100)], sys.argv[1], slow)
"""


@pytest.mark.slow
def test_kill_9_at_any_instant_loses_nothing(tmp_path, monkeypatch, pytestconfig):
    monkeypatch.setattr(module, "_CHUNK", 3)
    rng = np.random.default_rng(0)
    texts = [f"text {i % 70}" for i in range(100)]
    for trial in range(8):
        folder = tmp_path / str(trial)
        command = [sys.executable, "-c", _CHILD, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=pytestconfig.rootpath) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(float(rng.uniform(0, 0.3)))
            child.send_signal(signal.SIGKILL)
        np.testing.assert_array_equal(features(texts, folder), encode(texts))
