"""The committed curves keep what is said of them, and the first steps come out the same again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common, curves
from jaxllm.train.text import read_text

COMMITTED = common.read_csv(common.COMMITTED / "curves.csv")


def test_the_curves_are_within_the_limit_at_every_step() -> None:
    assert [row["step"] for row in COMMITTED] == list(range(1, curves.STEPS + 1))
    assert all(abs(row["sharded"] - row["unsharded"]) == pytest.approx(row["apart"]) for row in COMMITTED)
    assert max(row["apart"] for row in COMMITTED) <= 1e-4


def test_the_held_out_loss_is_below_the_entropy_of_byte_pairs() -> None:
    pairs = read_text(str(curves.TEXT), None, 512, 128).pair_entropy
    assert COMMITTED[-1]["held_out"] < pairs < COMMITTED[49]["held_out"]


def test_the_first_steps_again(tmp_path) -> None:
    for row, before in zip(curves.rows(tmp_path, 2), COMMITTED, strict=False):
        assert row["apart"] < 1e-5
        assert row["sharded"] == pytest.approx(before["sharded"], abs=1e-4)


def test_help_names_the_question() -> None:
    command = [sys.executable, str(common.ROOT / "experiments" / "curves.py"), "--help"]
    assert "learn what an unsharded one learns?" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
