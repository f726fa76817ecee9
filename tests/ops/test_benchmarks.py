# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic, not the machine's speed."""

import json

import pytest
import torch

from benchmarks import harness, sweep, timing
from benchmarks.apart import Apart


def case() -> harness.Case:
    ways = {"slow": lambda: torch.ones(400, 400) @ torch.ones(400, 400), "quick": lambda: None}
    return harness.Case("op", "tiny", ways, bytes=1e6, flops=2e6, bars={("quick", "slow"): 1.0, ("slow", "quick"): 1e9})


def test_rows_relate_to_baseline_and_peaks():
    peak = timing.Peaks(copy=1e9, gemm={"float32": 1e9})
    assert harness.least_seconds(case(), "slow", peak) == 2e-3  # flops bind, 1e6 bytes take 1e-3
    slow, quick = harness.rows_of(case(), peak, budget=1, rounds=5)
    assert slow.ratio == 1 and quick.ratio == pytest.approx(slow.ms / quick.ms)
    assert slow.share_of_roofline == pytest.approx(2.0 / slow.ms)
    assert slow.p10 <= slow.ms <= slow.p90
    met, missed = harness.bars_of(case(), [slow, quick])
    assert met.startswith("met") and missed.startswith("MISSED")


def test_results_are_written(tmp_path):
    peak = timing.Peaks(copy=1e9, gemm={"float32": 1e9})
    rows = harness.rows_of(case(), peak, budget=1, rounds=3)
    harness.write(tmp_path / "out", harness.machine(2), peak, [(case(), rows, ["met"])])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["way"] for row in record["rows"]] == ["slow", "quick"]
    assert "| slow |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("op", sweep.DRAWS)
def test_problems_of_the_sweep_run(op):
    for seed in range(3):
        problem = sweep.DRAWS[op](sweep.Draw(seed))
        results = [run() for run in (problem.ours, *problem.theirs)]
        shapes = [[t.shape for t in (each if isinstance(each, tuple) else (each,))] for each in results if each is not None]
        assert all(shape == shapes[0] for shape in shapes), problem.name


def test_sweep_tells_losses(monkeypatch, capsys):
    slow, quick = case().ways.values()
    monkeypatch.setattr(sweep, "DRAWS", {"op": lambda draw: sweep.Problem("tiny", slow, (quick,))})
    assert not sweep.sweep("op", 2, 0, 1e-3, 5)
    assert "2 of 2 slower" in capsys.readouterr().out


def test_ways_apart_keep_their_state_and_raise_here():
    run = Apart(Counter, {1: "one"}, threads=1, keep_freed=False)
    assert run(1) == ("one", 1, 1) and run(1) == ("one", 2, 1)
    with pytest.raises(KeyError):
        run(2)
    assert run.peak_memory() > 50e6
    run.close()


class Counter:
    def __init__(self, names: dict[int, str]) -> None:
        self.names, self.calls = names, 0

    def __call__(self, key: int) -> tuple[str, int, int]:
        self.calls += 1
        return self.names[key], self.calls, torch.get_num_threads()
