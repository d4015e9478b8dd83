"""The committed table of experiments/activation_memory.py is what formulas and closed form say now, and meets the figures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import activation_memory as experiment
from experiments import common

TABLE = common.read_csv(common.COMMITTED / "activation_memory.csv")


def test_figures_are_met_and_compiled_lines_are_equal():
    assert [problem for row in TABLE for problem in experiment.wrong(row)] == []
    assert sum(row["figure_7"] is not None for row in TABLE) == 16
    assert sum(row["figure_1"] is not None for row in TABLE) == 8
    compiled = [row for row in TABLE if row["compiled"] is not None]
    assert [row["scheme"] for row in compiled] == list(experiment.SCHEMES)
    assert all(row["lines"] == row["equal"] >= 11 for row in compiled)


def test_what_is_committed_is_what_is_said_now(monkeypatch):
    monkeypatch.setattr(experiment, "compiled", lambda scheme: {"compiled": None, "lines": None, "equal": None})
    now = list(experiment.rows(False))
    for row, new in zip(TABLE, now, strict=True):
        known = [name for name in row if name not in ("compiled", "lines", "equal")]
        assert {name: row[name] for name in known} == {name: new[name] for name in known}


def test_a_layer_here_saves_what_the_page_says():
    for case in experiment.CASES:
        s, h, a, t, b = experiment.SEQUENCE, case.config.d_model, case.config.heads, experiment.TENSOR, case.micro
        squares = 2 * a * s / (h * t)
        here = {"tensor": 4 + 16 / t + squares, "sequence": 20 / t + squares, "selective": 4 + 16 / t, "both": 20 / t, "full": 2}
        assert {scheme: experiment.predicted(case, scheme) for scheme in here} == {
            scheme: pytest.approx(s * b * h * each, rel=1e-12) for scheme, each in here.items()
        }


def test_what_is_off_fails():
    row = next(row for row in TABLE if row["compiled"] is not None and row["scheme"] == "both")
    changes = ({"compiled": row["compiled"] + 1}, {"equal": row["equal"] - 1}, {"share": row["share"] + 0.3}, {"in_flight": 1.0})
    for change in changes:
        assert experiment.wrong(dict(row) | change)


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "activation_memory.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "sequence parallelism and selective recomputation" in shown
