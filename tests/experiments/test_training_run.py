"""The committed table of experiments/training_run.py: table 4 of the paper, what is predicted of it, and what a plan finds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import training_run as experiment
from jaxllm import ModelConfig

TABLE = common.read_csv(common.COMMITTED / "training_run.csv")
CASES = [(run, zero) for run in experiment.RUNS for zero in run.zeros]


def row_of(run: experiment.Run, zero: int) -> common.Row:
    return TABLE[CASES.index((run, zero))]


def test_the_configurations_are_those_of_the_paper():
    """Llama Team 2024, arXiv:2407.21783, table 4: GPUs, TP, CP, PP, DP, sequence, batch of a data rank, TFLOP/s, MFU."""
    assert [
        (r.devices, r.tensor, r.context, r.pipe, r.data, r.sequence, r.each, r.tflops, r.mfu) for r in experiment.RUNS
    ] == [
        (8192, 8, 1, 16, 64, 8192, 32, 430, 43),
        (16384, 8, 1, 16, 128, 8192, 16, 400, 41),
        (16384, 8, 16, 16, 8, 131072, 16, 380, 38),
    ]
    assert {run.tokens for run in experiment.RUNS} == {2**24}  # 16M
    peak = experiment.RUNS[0].mesh.machine.peak_flops["bf16"]
    for run in experiment.RUNS:
        assert abs(100 * run.tflops * experiment.TERA / peak - run.mfu) < 1
        for zero in run.zeros:
            assert run.split(zero).devices == run.devices


def test_published_seconds_are_tokens_by_flops():
    """6 P for each token and attention of the mask or of all pairs, at the published rate."""
    parameters = ModelConfig.load(experiment.MODEL).parameters
    for run, (most, least) in zip(experiment.RUNS, ((12.5, 12.02), (6.72, 6.46), (15.28, 10.9)), strict=True):
        assert run.measured(causal=False) == pytest.approx(most, rel=1e-3)
        assert run.measured(causal=True) == pytest.approx(least, rel=1e-3)
        alone = 6 * parameters * run.tokens / (run.devices * run.tflops * experiment.TERA)
        assert 0.98 * alone < run.measured(causal=True) < run.measured(causal=False)


@pytest.mark.parametrize("case", (2, 4))
def test_the_closed_form_says_so_now(case):
    run, zero = CASES[case]
    own = experiment.step(run, zero)
    assert own == pytest.approx({name: TABLE[case][name] for name in own})


def test_a_plan_finds_it_now():
    run, zero = CASES[4]
    row = row_of(run, zero)
    own = experiment.planned(run, row["seconds"])
    assert own == pytest.approx({name: row[name] for name in own})


def test_the_table_has_every_case_and_its_parts_add_up():
    assert len(TABLE) == len(CASES) == 5
    for (run, zero), row in zip(CASES, TABLE, strict=True):
        assert row["layout"] == f"{run.split(zero)}" and row["tokens"] == run.tokens
        parts = sum(row[name] for name in experiment.BARS)
        assert parts == pytest.approx(row["seconds"], abs=0.01)  # of seconds with three decimals
        assert row["low"] < row["seconds"] < row["high"]
        assert row["fits"] == ("yes" if row["peak"] <= row["capacity"] else "no")
        assert row["days"] == pytest.approx(experiment.TOKENS / 2**24 * row["seconds"] / 86400, abs=0.05)  # one decimal
        # Of a plan: all that it names fit, and the best is no slower than the best of some of them.
        assert max(row["best_peak"], row["same_peak"]) <= row["capacity"] and row["best_seconds"] <= row["same_seconds"]
        assert row["fit"] < row["scored"]


def test_steps_that_reduce_once_lie_within_the_interval():
    assert experiment.wrong(TABLE) == []
    assert len(experiment.wrong([row | {"low": 1.5 * row["measured"]} for row in TABLE])) == 2
    assert len(experiment.wrong([row | {"high": 0.5 * row["measured"]} for row in TABLE])) == 2
    assert len(experiment.wrong([row | {"zero": 1} for row in TABLE])) == 3


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "training_run.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How fast is the step that Llama 3 405B was trained with" in shown
