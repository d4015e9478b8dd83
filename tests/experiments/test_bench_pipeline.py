"""Each case computes the same, its work is the ledger's, and what is committed is of the cases that the script takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import bench_pipeline as experiment
from experiments import common
from experiments.bench_step import Taken
from jaxllm.theory import predict

TABLE = common.read_csv(common.COMMITTED / "bench_pipeline.csv")


def test_quick_takes_steps_of_the_same_loss(tmp_path, monkeypatch, capsys):
    # A pair whose first losses differ raises: one layout is not timed against another that computes something else.
    monkeypatch.setattr(sys, "argv", ["bench_pipeline", "--quick", "--pairs", "1", "--out", str(tmp_path)])
    assert experiment.main() == 0
    assert "the wall time follows the work within 15 %" in capsys.readouterr().out
    (row,) = common.read_csv(tmp_path / "bench_pipeline.csv")
    assert row["case"] == "zb-h1, m=8" and row["work"] == 1
    assert row["equal"] == row["lines"] > 0
    assert (tmp_path / "bench_pipeline.png").stat().st_size > 10_000


def test_cases_are_of_the_same_work_or_of_other_work_and_take_the_same_tokens():
    for case, row in zip(experiment.CASES, TABLE, strict=True):
        assert case.workload.batch == case.times * experiment.SEQUENCES
        flops = sum(
            sum(line.stages) if line.stages else experiment.DEVICES * line.value
            for line in predict(experiment.MODEL, case.layout, case.workload).section("flops")
        )
        assert row["flops"] == flops
        assert row["work"] == case.times if case.remat == "none" else 1.2 < row["work"] < 1.3
    # Spans that differ, at the same work: what wall time would show of bubbles is not small.
    same = [row["span"] for row in TABLE if row["work"] == 1]
    assert max(same) / min(same) > 1.5


def test_the_median_of_seconds_over_work_counts():
    base = Taken(2.0, 4.0, 1.0)
    taken = [(Taken(seconds, 2 * seconds, 1.0), base) for seconds in (3.0, 4.0, 8.0)]
    found = experiment.summary(taken, 2.0)
    assert (found["wall"], found["ratio"], found["least"], found["most"], found["processor"]) == (2.0, 1.0, 0.75, 2.0, 1.0)
    rows = [{"case": "a", "ratio": 1.15}, {"case": "b", "ratio": 0.84}, {"case": "c", "ratio": 1.16}]
    assert experiment.outside(rows) == ["b", "c"]


def test_what_is_committed():
    assert [row["case"] for row in TABLE] == [str(case) for case in experiment.CASES]
    assert all(row["pairs"] >= 5 and row["model"] == experiment.MODEL.name for row in TABLE)
    assert all(row["equal"] == row["lines"] > 0 for row in TABLE)
    assert experiment.outside(TABLE) == []
    assert (common.COMMITTED / "bench_pipeline.png").stat().st_size > 10_000


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "bench_pipeline.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "What does a pipeline's step take on an emulated mesh" in shown
