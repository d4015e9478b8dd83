"""The committed table of experiments/stage_imbalance.py is what the closed form and a compile say now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import stage_imbalance as experiment
from jaxllm.spec.layout import PARTITIONS, Layout

TABLE = common.read_csv(common.COMMITTED / "stage_imbalance.csv")
UNSTABLE = ("peak_compiled",)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("case", experiment.CASES, ids=str)
def test_the_rows_are_what_the_closed_form_says_and_what_was_compiled(case, partition):
    rows = experiment.of(TABLE, case.model, partition)
    own = experiment.shares(case, partition)
    assert [{name: row[name] for name in own[0]} for row in rows] == own
    assert [experiment.wrong(row) for row in rows] == [[]] * Layout.parse(case.layout).pipe
    assert all((row["lines"] is not None) == (case == experiment.COMPILED) for row in rows)
    # One program: what a stage needs and what it allocates for others is the same sum everywhere.
    assert len({row["needed"] + row["uniform"] for row in rows}) == 1
    assert sum(row["time"] for row in rows) == pytest.approx(len(rows), abs=1e-4)


def test_sharing_out_by_time_helps_time_and_by_memory_helps_memory():
    for case in experiment.CASES:
        most = {
            partition: {kind: max(row[kind] for row in experiment.of(TABLE, case.model, partition)) for kind in ("time", "memory")}
            for partition in PARTITIONS
        }
        assert most["time"]["time"] <= min(most["even"]["time"], most["memory"]["time"])
        assert most["memory"]["memory"] <= min(most["even"]["memory"], most["time"]["memory"])


def test_one_program_holds_the_least_where_layers_are_shared_out_evenly():
    for case in experiment.CASES:
        peaks = {partition: experiment.of(TABLE, case.model, partition)[0]["peak"] for partition in PARTITIONS}
        assert peaks["even"] == min(peaks.values())


def test_quick_compiles_what_is_committed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage_imbalance", "--quick", "--out", str(tmp_path)])
    assert experiment.main() == 0
    assert "1 to 6" in capsys.readouterr().out
    now = common.read_csv(tmp_path / "stage_imbalance.csv")
    rows = experiment.of(TABLE, experiment.COMPILED.model, "even")
    stable = lambda row: {k: v for k, v in row.items() if k not in UNSTABLE}  # noqa: E731
    assert list(map(stable, now)) == list(map(stable, rows))


def test_what_is_off_by_one_fails():
    row = next(row for row in TABLE if row["lines"])
    for key in ("needed_compiled", "uniform_compiled", "equal"):
        assert experiment.wrong(dict(row) | {key: row[key] + 1})


def test_spans():
    assert (experiment.span([3]), experiment.span([1, 2, 3]), experiment.span([0, 3])) == ("3", "1 to 3", "0, 3")


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "stage_imbalance.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How uneven are the stages of a pipeline" in shown
