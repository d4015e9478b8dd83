"""The committed table of experiments/zero_table.py is what the formulas and the closed form say now: Table 1, cell by cell."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import zero_table as experiment

TABLE = common.read_csv(common.COMMITTED / "zero_table.csv")


def test_all_54_cells_are_within_one_unit_of_what_is_printed():
    assert len(TABLE) == 54
    assert [problem for row in TABLE for problem in experiment.wrong(row)] == []


def test_what_is_committed_is_what_is_said_now(monkeypatch):
    monkeypatch.setattr(experiment, "COMPILED", ("", 0))
    known = ("model", "ranks", "stage", "formula", "predicted")
    assert [[row[name] for name in known] for row in TABLE] == [[row[name] for name in known] for row in experiment.rows(False)]


def test_each_stage_was_compiled_with_every_line_equal():
    compiled = [row for row in TABLE if row["compiled"] is not None]
    assert [(row["model"], row["ranks"], row["stage"]) for row in compiled] == [(*experiment.COMPILED, z) for z in (1, 2, 3)]
    assert all(row["lines"] == row["equal"] >= 11 and row["compiled"] == row["predicted"] for row in compiled)


@pytest.mark.parametrize("column", ["formula", "predicted", "compiled"])
def test_two_units_off_fail(column):
    row = next(row for row in TABLE if row["compiled"] is not None)
    assert experiment.wrong(dict(row) | {column: float(row["printed"]) + 2 * experiment.unit(row["printed"])})


def test_units():
    assert [experiment.unit(printed) for printed in ("120", "41.3", "0.47", 15.6)] == [1, 0.1, 0.01, 0.1]


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "zero_table.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "54 cells" in shown
