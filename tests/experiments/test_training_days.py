"""The committed table of experiments/training_days.py is what the script says now, and published days are met."""

from __future__ import annotations

import subprocess
import sys

from experiments import common
from experiments import training_days as experiment

TABLE = common.read_csv(common.COMMITTED / "training_days.csv")


def test_what_is_committed_is_what_is_said_now(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training_days", "--out", str(tmp_path)])
    assert experiment.main() == 0
    assert common.read_csv(tmp_path / "training_days.csv") == TABLE
    assert (tmp_path / "training_days.png").stat().st_size > 10_000
    assert "megatron-1t" in capsys.readouterr().out


def test_published_days_are_met_by_the_rule_and_the_exact_count_is_lower():
    published = [row for row in TABLE if row["published"]]
    assert [round(row["thumb"]) for row in published] == [34, 84] == [row["published"] for row in published]
    assert all(0.9 < row["exact"] / row["thumb"] < 0.96 for row in published)


def test_the_tensor_rate_halves_the_days():
    cards = [row for row in TABLE if row["model"] == "llama-2-7b"]
    for slow, fast in zip(cards[:2], cards[2:], strict=True):
        assert (slow["rate"], fast["rate"], slow["remat"]) == (82.58, 165.2, fast["remat"])
        assert abs(slow["exact"] / fast["exact"] - 2) < 0.002


def test_a_day_off_fails():
    assert experiment.wrong(TABLE) == []
    assert len(experiment.wrong([dict(row) | {"thumb": row["thumb"] + 1.5} for row in TABLE])) == 2


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "training_days.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How many days does training take" in shown
