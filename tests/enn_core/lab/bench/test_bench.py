"""The bench: fair to every rule, chooses rates on validation images, resumes from what is there."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_cases import conv, digits, made, normed
from torch import nn

from enn_core.cuts import measure
from enn_core.lab.bench import bench as core
from enn_core.lab.bench import one_run as runs
from enn_core.lab.bench.bench import bench, trainable
from enn_core.lab.bench.measures import SavedMemory, about_weights
from enn_core.lab.bench.one_run import Cell, Method, Run, execute, prepare
from enn_core.lab.bench.plan import missing, neighbour
from enn_core.lab.bench.report import contrasts, table
from enn_core.lab.bench.statistics import interval, paired, spread
from enn_core.lab.bench.store import Store
from enn_core.lab.bench.suites import FULL, LARGE, METHODS, QUICK, Suite
from enn_core.lab.classify.networks import build_network
from enn_core.rules import RULES

CELL = Cell("digits", 200, 100, "mlp:3x16", steps=12, batch=20)
ADAMW = Method("backprop-adamw", "backprop-adamw", (1e-3, 1e-2))
ENN = Method("enn", "enn", (1e-3, 1e-2))
FEW = Suite((CELL,), (ADAMW, ENN), (0, 1))


# --- choosing rates -----------------------------------------------------------------------------


def imagined(errors: dict[float, float], cell: Cell = CELL) -> Any:
    """Runs a method by table look-up: valid errors by rate; returns (choice, rates in order)."""
    rows: dict[str, Any] = {}
    order: list[float] = []
    cell = replace(cell, choosing=(0, 1))
    method = replace(ADAMW, grid=(2e-3, 5e-3, 1e-2))
    for _ in range(100):
        todo, choice = missing(cell, method, (0, 1, 2), rows)
        if not todo:
            return choice, order, rows
        run = todo[0]
        assert run.key not in rows
        if run.lr not in order:
            order.append(run.lr)
        rows[run.key] = {"valid_error": errors.get(run.lr, 50.0) + run.seed, "refit": run.refit}
    raise AssertionError("it never ends")


def test_best_rate_inside_the_grid_is_taken() -> None:
    choice, order, rows = imagined({5e-3: 10})
    assert (choice.lr, choice.at_edge) == (5e-3, False)
    assert order == [2e-3, 5e-3, 1e-2]
    assert len(rows) == 3 * 2 + 1  # the third seed at the best rate alone


def test_grid_grows_while_the_best_rate_is_at_an_edge() -> None:
    choice, order, _ = imagined({2e-3: 12, 1e-3: 11, 5e-4: 13})
    assert (choice.lr, choice.at_edge) == (1e-3, False)
    assert order == [2e-3, 5e-3, 1e-2, 1e-3, 5e-4]
    choice, order, _ = imagined({1e-2: 12, 2e-2: 11})
    assert (choice.lr, choice.tried) == (2e-2, (2e-3, 5e-3, 1e-2, 2e-2, 5e-2))


def test_grid_stops_growing_and_says_so() -> None:
    choice, order, _ = imagined({lr: -100 * lr for lr in (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2)})
    assert (choice.lr, choice.at_edge) == (0.1, True)
    assert max(order) == 0.1


def test_refit_runs_report_but_do_not_choose() -> None:
    _, _, rows = imagined({5e-3: 10}, replace(CELL, refit=True))
    assert sum(row["refit"] for row in rows.values()) == 3
    assert len(rows) == 3 * 2 + 3


@given(st.integers(-20, 20), st.integers(-6, 6))
def test_neighbours_are_of_the_series(place: int, steps: int) -> None:
    lr = neighbour(1.0, place)
    assert neighbour(neighbour(lr, steps), -steps) == lr
    assert neighbour(lr, 3) == pytest.approx(10 * lr)
    assert neighbour(lr, 1) > lr


def test_neighbour_of_another_rate() -> None:
    with pytest.raises(ValueError, match=r"0\.003 is not of the series"):
        neighbour(3e-3, 1)


def test_grids_of_the_suites_are_of_the_series_and_cover_all_rules() -> None:
    for method in (*FULL.methods, *QUICK.methods):
        for lr, after in zip(method.grid, method.grid[1:], strict=False):
            assert neighbour(lr, 1) == after
    for suite in (FULL, QUICK):
        assert {method.rule for method in suite.methods} == set(RULES)
        assert len({method.label for method in suite.methods}) == len(suite.methods)
    assert len(FULL.seeds) >= 5


# --- runs ---------------------------------------------------------------------------------------


def test_rules_start_from_the_same_weights_and_see_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = digits()[0][:10]
    starts = [prepare(Run(CELL, method, 1e-3, 3), None)[0].scores(x) for method in (ADAMW, ENN)]
    torch.testing.assert_close(*starts, rtol=1e-4, atol=1e-5)
    seen: list[list[float]] = []
    real = runs.make_rule

    def watching(*args: Any, **options: Any) -> Any:
        rule = real(*args, **options)
        step, mine = rule.step, []
        seen.append(mine)
        rule.step = lambda x, y: mine.append(float(x.sum() + y.sum())) or step(x, y)
        return rule

    monkeypatch.setattr(runs, "make_rule", watching)
    for method in (ADAMW, ENN):
        execute(Run(CELL, method, 1e-3, 3))
    assert seen[0] == seen[1]
    assert len(seen[0]) == CELL.steps


def test_a_run_repeats_itself_and_describes_itself() -> None:
    one, two = (execute(Run(CELL, ENN, 1e-2, 1)) for _ in range(2))
    same = ("test_error", "valid_error", "loss", "saved_mb", "condition", "drift", "key")
    assert [one[name] for name in same] == [two[name] for name in same]
    assert one["drift"] < 1e-3
    assert one["stored"] > one["fused"] == 64 * 16 + 16 + 16 * 16 + 16 + 160 + 10
    assert {"command", "commit", "machine", "date", "torch"} <= set(one)
    json.dumps(one)


def test_refit_trains_on_the_validation_images_too() -> None:
    cell = replace(CELL, refit=True, train=100, valid=60, steps=3)
    row = execute(Run(cell, ADAMW, 1e-2, 0, refit=True))
    assert (row["train"], row["valid_error"], row["cell"]) == (160, None, "digits-160/mlp:3x16")
    assert execute(Run(cell, ADAMW, 1e-2, 0))["train"] == 100


def test_images_are_averaged_down_to_the_side_of_a_cell() -> None:
    cell = replace(CELL, side=4, refit=True)
    _, whole = prepare(Run(CELL, ADAMW, 1e-2, 0), None)
    _, small = prepare(Run(cell, ADAMW, 1e-2, 0), None)
    _, joined = prepare(Run(cell, ADAMW, 1e-2, 0, refit=True), None)
    for part in ("train_x", "valid_x", "test_x"):
        before, after = getattr(whole, part), getattr(small, part)
        means = before.reshape(len(before), 1, 4, 2, 4, 2).mean((3, 5))
        torch.testing.assert_close(after, means)
    assert small.shape == joined.shape == (1, 4, 4)
    assert joined.valid_x.shape == (0, 1, 4, 4)
    assert cell.name == "digits-300-4px/mlp:3x16"
    assert Run(cell, ADAMW, 1e-2, 0).key != Run(CELL, ADAMW, 1e-2, 0).key


def test_a_diverging_run_counts_as_chance() -> None:
    row = execute(Run(replace(CELL, steps=40), Method("s", "backprop-sgd", (1.0,)), 1e9, 0))
    assert row["diverged"]
    assert row["test_error"] == pytest.approx(90)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cell_for_cuda_says_that_there_is_none() -> None:
    cell, method = LARGE.pairs[0]
    with pytest.raises(ValueError, match="cifar10-50000/resnet18 needs a CUDA device"):
        prepare(Run(cell, method, 1e-2, 0), None)


# --- measures -----------------------------------------------------------------------------------


def test_saved_memory_of_one_block_is_what_cuts_measure() -> None:
    x, y = digits()[0][:32].clone(), digits()[1][:32].clone()
    for model in (normed(), conv()):
        rule = made("backprop-adamw", model, 5)
        memory = SavedMemory()
        fixed = [*rule.network().state_dict().values(), x]
        with memory.watch(fixed):
            rule.step(x, y)
        whole = measure([rule.network().train()], x, repeats=0)[0]
        loss = 4 * 32 * 10 + 8 * 32 + 4  # log-probabilities, labels, total weight
        assert memory.peak == whole.saved + loss


def test_saved_memory_of_local_rules_is_one_block_s_and_without_gradient_none() -> None:
    x, y = digits()[0][:32].clone(), digits()[1][:32].clone()
    peaks = {}
    for name, arch in (("backprop-adamw", "vit-tiny"), ("dgl", "vit-tiny"), ("loco", "mlp")):
        rule = made(name, build_network(arch, (1, 8, 8), 10), 5)
        memory = SavedMemory()
        with memory.watch([*rule.network().state_dict().values(), x]):
            rule.step(x, y)
        assert memory._now == 0  # all of it was let go
        peaks[name] = memory.peak
    assert peaks["loco"] == 0 < peaks["dgl"] < 0.5 * peaks["backprop-adamw"]


def test_condition_of_known_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[range(4), range(4)] = torch.tensor([8.0, 4.0, 2.0, 1.0])
        model[3].weight.copy_(torch.eye(10, 4) * 3)
    report = about_weights(made("backprop-adamw", model, 5))
    assert report["condition"] == pytest.approx(8)  # the upper of 1 and 8
    assert report["drift"] is None
    assert report["stored"] == report["fused"] == report["trainable"] == 64 * 4 + 4 + 40 + 10


# --- statistics ---------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=2, max_size=45))
def test_intervals_are_student_s(values: list[float]) -> None:
    from scipy import stats

    mean, error = sum(values) / len(values), stdev(values) / len(values) ** 0.5
    low, high = interval(values) or (0, 0)
    t = stats.t.ppf(0.975, len(values) - 1)
    assert (low, high) == pytest.approx((mean - t * error, mean + t * error), rel=2e-3, abs=0.05)
    assert spread(values) == stdev(values)


def test_pairs_are_over_common_seeds() -> None:
    mean, limits = paired({0: 5.0, 1: 7.0, 2: 100.0}, {0: 6.0, 1: 9.0, 3: 0.0}) or (0, None)
    assert mean == -1.5
    assert limits == pytest.approx((-1.5 - 12.706 * 0.5, -1.5 + 12.706 * 0.5))
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 1.0}, {0: 3.0}) == (-2.0, None)


# --- the whole ----------------------------------------------------------------------------------


def test_bench_writes_tables_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    real = core.execute

    def counting(run: Run, root: Path | None = None) -> dict[str, Any]:
        ran.append(run.key)
        return real(run, root)

    monkeypatch.setattr(core, "execute", counting)
    suite = replace(FEW, methods=(ADAMW, ENN))
    calls: list[tuple[int, int]] = []
    lines, left_out = bench(
        suite, tmp_path, progress=lambda stage, done, total, note: calls.append((done, total))
    )
    assert not left_out
    assert len(ran) == len(set(ran))
    assert calls[-1][0] == calls[-1][1] == len(ran)
    assert [line["method"] for line in lines] == ["backprop-adamw", "enn"]
    assert all(line["seeds"] == 2 for line in lines)
    assert lines[0]["difference"] is None
    assert lines[1]["difference"] == pytest.approx(
        lines[1]["test_error"] - lines[0]["test_error"], abs=0.02
    )
    with (tmp_path / "table.csv").open() as file:
        stored = list(csv.DictReader(file))
    assert [row["method"] for row in stored] == ["backprop-adamw", "enn"]
    assert float(stored[1]["test_error"]) == lines[1]["test_error"]
    with (tmp_path / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(ran)
    assert (tmp_path / "table.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "overview.png").read_bytes()[1:4] == b"PNG"

    count = len(ran)
    assert bench(suite, tmp_path) == (lines, {})
    assert len(ran) == count
    wider = replace(suite, seeds=(0, 1, 2))
    bench(wider, tmp_path, pairs=[(CELL, ADAMW)])
    assert len(ran) == count + 1
    assert table(wider, Store(tmp_path / "runs.jsonl").rows)[0]["seeds"] == 3


def test_contrasts_are_between_methods_at_their_best_rates() -> None:
    cell = replace(CELL, choosing=(0,))
    suite = Suite((cell,), (ADAMW, ENN, replace(ENN, label="muon", rule="muon")), (0, 1, 2))
    rows = {}
    for method, best, errors in (
        (suite.methods[1], 5e-3, (5, 6, 9)),
        (suite.methods[2], 5e-3, (7, 7, 8)),
    ):
        for lr in (1e-3, 2e-3, 5e-3, 1e-2):
            for seed, error in enumerate(errors):
                wrong = error if lr == best else 80.0
                run = Run(cell, replace(method, grid=(2e-3, 5e-3, 1e-2)), lr, seed)
                rows[run.key] = {"seed": seed, "valid_error": wrong, "test_error": wrong}
    suite = replace(
        suite, methods=tuple(replace(m, grid=(2e-3, 5e-3, 1e-2)) for m in suite.methods)
    )
    (row,) = contrasts(suite, rows)
    assert (row["method"], row["against"], row["seeds"]) == ("enn", "muon", 3)
    assert row["difference"] == pytest.approx(-2 / 3, abs=1e-3)
    assert row["low"] < row["difference"] < row["high"]


def test_other_heads_are_tried_where_a_cell_asks_for_them() -> None:
    for cell in FULL.cells:
        tried = {method.label for one, method in FULL.pairs if one == cell}
        assert ("dgl, mlp heads" in tried) == cell.heads
        assert set(RULES) <= tried
    assert any(cell.heads for cell in FULL.cells)


def test_two_benches_do_not_write_to_one_folder(tmp_path: Path) -> None:
    def second(*_: object) -> None:
        with pytest.raises(ValueError, match="another bench writes to") as caught:
            bench(FEW, tmp_path)
        assert "\n" not in str(caught.value)
        seen.append(True)

    seen: list[bool] = []
    bench(FEW, tmp_path, pairs=[], progress=second)
    assert seen
    bench(FEW, tmp_path, pairs=[])


@pytest.mark.slow
def test_runs_are_shared_over_processes(tmp_path: Path) -> None:
    suite = replace(FEW, methods=(replace(ADAMW, grid=(1e-2, 2e-2, 5e-2)),))
    parallel = bench(suite, tmp_path / "two", workers=2).table
    alone = bench(suite, tmp_path / "one", workers=1).table
    for a, b in zip(parallel, alone, strict=True):
        assert [a[k] for k in ("lr", "test_error", "sd")] == [
            b[k] for k in ("lr", "test_error", "sd")
        ]


_LONG = """
import sys
from dataclasses import replace
from pathlib import Path
from enn_core.lab.bench.bench import bench
from enn_core.lab.bench.suites import QUICK

if __name__ == "__main__":
    cells = tuple(replace(cell, steps=100_000) for cell in QUICK.cells)
    bench(replace(QUICK, cells=cells), Path(sys.argv[1]), workers=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_bench_leaves_no_processes(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(_LONG)
    main = subprocess.Popen([sys.executable, tmp_path / "long.py", tmp_path])
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
    workers: list[str] = []

    def until(state: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 120
        while not state() and time.monotonic() < deadline:
            time.sleep(0.5)
        return state()

    def working() -> bool:
        workers[:] = children.read_text().split()
        return sum("spawn_main" in _command(pid) for pid in workers) == 2

    try:
        assert until(working)
        time.sleep(10)  # until they are in a run
    finally:
        main.kill()
        main.wait()
    assert until(lambda: not any("spawn_main" in _command(pid) for pid in workers))


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_line_cut_off_by_a_kill_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    store = Store(file)
    store.add({"key": "a", "x": 1})
    store.add({"key": "b", "x": 2})
    file.write_bytes(file.read_bytes()[:-5])
    store = Store(file)
    assert set(store.rows) == {"a"}
    store.add({"key": "c", "x": 3})
    assert set(Store(file).rows) == {"a", "c"}
    whole = file.read_text()
    file.write_text(whole.replace('"x": 3', '"x": 7'))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged.*remove the line"):
        Store(file)
    file.write_text('{"key": "old", "x": 5}\n' + whole)  # of a version without digests
    assert Store(file).rows["old"] == {"key": "old", "x": 5}
    file.write_text("hello\n" + whole)
    with pytest.raises(ValueError, match=r"line 1 of .* is no run"):
        Store(file)


def test_rules_that_cannot_train_a_network_are_left_out_with_the_reason() -> None:
    cell = replace(CELL, arch="resnet-small")
    able, reasons = trainable([(cell, method) for method in METHODS], None)
    assert {"enn", "dgl", "muon"} <= {method.label for _, method in able}
    left_out = {method for _, method in reasons}
    assert left_out == {"forward-forward", "dfa", "node-perturbation", "loco", "loco-mean"}
    assert all("\n" not in reason for reason in reasons.values())
    able, reasons = trainable([(CELL, method) for method in METHODS], None)
    assert set(dict.fromkeys(m for _, m in reasons)) <= {"local-enn", "dgl", "predsim"}


@pytest.mark.slow
@pytest.mark.parametrize("suite", [FULL, QUICK], ids=["full", "quick"])
def test_every_rule_trains_a_network_of_the_suite(suite: Suite) -> None:
    digits_only = [(c, m) for c, m in suite.pairs if c.data == "digits" and c.train == 400]
    able, _ = trainable(digits_only, None)
    assert {method.rule for _, method in able} == set(RULES)
