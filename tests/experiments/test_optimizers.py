"""The committed table of experiments/optimizers.py is what the closed form says now, and what was compiled is equal."""

from __future__ import annotations

import subprocess
import sys

from experiments import common
from experiments import optimizers as experiment
from jaxllm.spec.optimizers import OPTIMIZERS

TABLE = common.read_csv(common.COMMITTED / "optimizers.csv")
COMPILED = ("_compiled", "lines", "equal")


def test_a_row_is_what_the_closed_form_says_now():
    now = [experiment.row(optimizer, zero) for optimizer in OPTIMIZERS for zero in experiment.STAGES]
    own = [name for name in now[0] if not name.endswith(COMPILED)]
    assert [{name: row[name] for name in own} for row in TABLE] == [{name: row[name] for name in own} for row in now]


def test_what_was_compiled_is_equal():
    found = [row for row in TABLE if row["lines"]]
    assert {row["name"] for row in found} == set(OPTIMIZERS)
    for row in found:
        assert row["lines"] == row["equal"] > 0
        assert all(row[name] == row[f"{name}_compiled"] for name in experiment.HELD)


def test_adafactor_keeps_next_to_nothing_and_adam_twice_the_parameters():
    kept = {row["name"]: row["kept"] - 4 for row in TABLE}  # without the master copy
    assert kept["sgd"] < 0.001 < kept["adafactor"] < 0.01
    assert [round(kept[name], 2) for name in ("momentum", "lion", "adam", "adamw")] == [4, 4, 8, 8]
    assert 4 < kept["muon"] < 4.2


def test_a_line_that_is_not_equal_fails():
    assert experiment.wrong(TABLE) == []
    bad = [dict(row) | {"equal": 1} for row in TABLE]
    assert len(experiment.wrong(bad)) == sum(row["lines"] is not None for row in TABLE)


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "optimizers.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "What does training store" in shown
