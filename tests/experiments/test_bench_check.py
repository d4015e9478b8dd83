"""The committed times are of the checks that the script takes apart, and their parts add up."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import bench_check, common

COMMITTED = common.read_csv(common.COMMITTED / "bench_check.csv")


def test_the_parts_of_a_check_add_up_to_its_time() -> None:
    assert [row["check"] for row in COMMITTED] == [bench_check.HELP, *bench_check.CHECKS]
    assert list(COMMITTED[0]) == list(bench_check.COLUMNS)
    for row in COMMITTED[1:]:
        # Medians, each of its own three runs.
        assert sum(row[part] for part in bench_check.PARTS) == pytest.approx(row["wall"], rel=0.05)


def test_a_command_is_timed_with_its_memory() -> None:
    # from a small process, as the experiment is: Linux counts the memory of whoever starts a process as the process's own
    code = "from experiments import bench_check as b; row = b.measured(b.HELP); print(row['wall'], row['peak_gb'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True, check=True)
    wall, peak = map(float, done.stdout.split())
    assert 0 < wall < 60 and 0.005 < peak < 1


def test_help_names_the_question() -> None:
    command = [sys.executable, str(common.ROOT / "experiments" / "bench_check.py"), "--help"]
    assert "Where does the time of a check go?" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
