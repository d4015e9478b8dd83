"""The committed kills keep what is said of them. A kill of its own is in tests/train."""

from __future__ import annotations

import subprocess
import sys

from experiments import common, crashes

COMMITTED = common.read_csv(common.COMMITTED / "crashes.csv")


def test_ten_kills_cost_steps_and_nothing_else() -> None:
    assert len(COMMITTED) == crashes.KILLS == 10
    assert all(row["same_to_the_bit"] == row["steps"] == crashes.STEPS for row in COMMITTED)
    for row, after in zip(COMMITTED, COMMITTED[1:], strict=False):
        assert after["began_after"] == row["checkpoint"]
    # The checkpoint that is under way counts only when it is whole.
    assert all(row["lost"] == max(0, row["last_step"] - row["checkpoint"]) <= 2 * crashes.EVERY for row in COMMITTED)
    assert any(row["lost"] for row in COMMITTED) and any(row["checkpoint"] for row in COMMITTED)


def test_help_names_the_question() -> None:
    command = [sys.executable, str(common.ROOT / "experiments" / "crashes.py"), "--help"]
    assert "What does kill -9 cost?" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
