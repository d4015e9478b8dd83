"""The committed tables of experiments/layer_imbalance.py are what the closed form says now, and a block is a block."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import layer_imbalance as experiment

TABLE = common.read_csv(common.COMMITTED / "layer_imbalance.csv")
THIRD = common.read_csv(common.COMMITTED / "layer_imbalance_third.csv")


def test_what_is_committed_is_what_is_said_now():
    assert TABLE == list(experiment.rows())


def test_a_third_block_adds_what_a_block_has_in_every_layout():
    assert experiment.wrong(THIRD) == []
    assert {row["layout"] for row in THIRD} == set(experiment.LAYOUTS)
    for text in experiment.LAYOUTS:
        mine = {row["line"]: row["third"] for row in THIRD if row["layout"] == text}
        assert set(mine) == {"parameters", "gradients", "optimizer", "residuals", "matmul/forward", "matmul/recompute", "matmul/backward"}
        assert all(mine[line] > 0 for line in mine if line != "matmul/recompute")
        assert (mine["matmul/recompute"] > 0) == ("remat=full" in text)


@pytest.mark.parametrize("change", [{"third": 1}, {"equal": 1}])
def test_what_differs_fails(change):
    assert experiment.wrong([THIRD[0] | change])


def test_each_remedy_is_in_the_layout_behind_it():
    """What is said to help is what the next layout has, of those that have the same model and length."""
    mine = {row["layout"]: row for row in TABLE if (row["model"], row["tokens"]) == ("llama-2-7b", 4096)}
    assert "zero=1 or more" in mine[experiment.LAYOUTS[1]]["advice"]
    assert "full" in mine[experiment.LAYOUTS[2]]["advice"]
    held = [mine[text]["held"] for text in experiment.LAYOUTS]
    assert held == sorted(held, reverse=True)


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "layer_imbalance.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How uneven" in shown
