"""The committed table of experiments/offload.py is what the estimator's formulas and the closed form say now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import offload as experiment

TABLE = common.read_csv(common.COMMITTED / "offload.csv")


def test_all_rows_follow_from_closed_forms():
    assert len(TABLE) == len(experiment.PRINTED) == 8
    assert [problem for row in TABLE for problem in experiment.wrong(row)] == []


def test_the_weights_are_those_of_t5_3b():
    # Hugging Face counts 2,851,598,336; the estimator prints both in millions.
    assert (experiment.WEIGHTS, experiment.LARGEST // 10**6) == (2_851_598_336, 32)


def test_what_is_committed_is_what_is_said_now():
    known = [name for name in TABLE[0] if name.split("_")[-1] in ("stage", "offload", "init", "formula", "predicted")]
    assert [[row[name] for name in known] for row in TABLE] == [
        [row[name] for name in known] for row in experiment.rows(False, compiled=False)
    ]


def test_each_layout_was_compiled_with_every_line_equal():
    for row in TABLE:
        assert row["lines"] == row["equal"] >= 11
        assert all(row[f"{name}_compiled"] == row[f"{name}_predicted"] for name in ("card", "host", "moved"))


@pytest.mark.parametrize("where", ["card", "host"])
def test_two_units_off_fail(where):
    row = dict(TABLE[4])
    assert experiment.wrong(row | {f"{where}_printed": row[f"{where}_formula"] + 2 * experiment.UNIT})
    assert experiment.wrong(row | {"equal": row["equal"] - 1})


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "offload.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "DeepSpeed's estimators" in shown
