"""The committed table of experiments/played.py is what the closed form says now, and its parts add up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import played as experiment

TABLE = common.read_csv(common.COMMITTED / "played.csv")


def test_a_row_is_what_the_closed_form_says_now():
    now = [experiment.closed(step) for step in experiment.STEPS]
    assert [{name: row[name] for name in now[0]} for row in TABLE] == now


@pytest.mark.parametrize("which", ["closed", "played"])
def test_the_parts_add_up(which):
    for row in TABLE:
        total = sum(row[f"{part}_{which}"] for part in experiment.PARTS)
        assert total == pytest.approx(row[which], abs=0.05)  # seven parts and their sum, each rounded to 0.01 ms


def test_without_a_pipeline_both_multiply_alike():
    """To what XLA:GPU makes of several products, and of attention block by block."""
    for row in TABLE:
        if row["bubble_closed"] == 0 and "blockwise" not in row["layout"]:
            # XLA:TPU has 3.5 % more: products that it takes apart are padded each.
            off = 0.05 if "v5p" in row["mesh"] else 0.005
            assert row["products_played"] == pytest.approx(row["products_closed"], rel=off)


def test_what_could_not_be_played_fails():
    assert experiment.wrong(TABLE) == []
    bad = [dict(row) | {"not_played": "f takes no time"} for row in TABLE]
    assert experiment.wrong(bad)[0].endswith(": f takes no time")


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "played.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Where does the time of a compiled step differ" in shown
