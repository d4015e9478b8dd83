"""The committed table of experiments/bench_plan.py meets what is asked of a plan, and its scores are those of a search."""

from __future__ import annotations

import json
import subprocess
import sys

from experiments import bench_plan as experiment
from experiments import common

TABLE = {row["search"]: row for row in common.read_csv(common.COMMITTED / "bench_plan.csv")}


def test_a_million_layouts_a_second_and_the_largest_search_in_three_seconds():
    assert set(TABLE) == set(experiment.SEARCHES)
    for row in TABLE.values():
        assert row["per_second"] >= 1_000_000
        assert row["per_second"] > 1000 * row["alone_per_second"]
    assert TABLE["llama-3.1-405b, h100:2048x8"]["wall"] < 3


def test_the_layouts_are_those_of_a_search_and_no_jax_is_imported():
    name = "llama-3-70b, v5p:8x16x16"
    asked = [sys.executable, "-c", experiment.SCORE, json.dumps(experiment.SEARCHES[name]), "1"]
    found = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True, cwd=common.ROOT).stdout)
    assert found["scored"] == TABLE[name]["scored"]


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "bench_plan.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How many layouts a second" in shown
