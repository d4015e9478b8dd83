"""The committed table of experiments/pipeline_schedules.py is what the schedules are counted to, and what was compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import pipeline_schedules as experiment
from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.schedules import make, names
from jaxllm.schedules.closed_forms import closed_bubble
from jaxllm.schedules.times import Times

TABLE = common.read_csv(common.COMMITTED / "pipeline_schedules.csv")


def test_the_table_has_every_schedule_by_discovery():
    cells = [(name, count) for name in names() for count in experiment.MICROBATCHES]
    assert [(row["schedule"], row["microbatches"]) for row in TABLE] == cells
    assert set(experiment.LOOKS) == set(names())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['schedule']} {row['microbatches']}")
def test_a_row_is_what_is_counted_and_what_was_compiled(row):
    own = experiment.counted(row["schedule"], row["microbatches"])
    assert {name: row[name] for name in own} == own
    assert experiment.wrong(row) == []
    assert row["lines"] >= 14


def test_a_slot_of_the_stash_is_what_the_layers_of_a_chunk_save_without_a_pipeline():
    model = ModelConfig.load(experiment.MODEL)
    ledger = predict(model, Layout(), Workload(1, experiment.SEQUENCE, "f32"))
    saved = ledger.line("residuals").value // model.layers
    for row in TABLE:
        layers = model.layers // (row["stages"] * row["chunks"])
        assert row["stash_compiled"] == row["stash_slots"] * layers * saved


def test_the_stash_grows_only_where_all_microbatches_go_forward_first():
    kinds = experiment.growing(TABLE, "stash_compiled")
    assert sorted(kinds["linear"]) == ["circular", "gpipe"] and not kinds["else"]
    assert {"1f1b", "zb-h1", "zb-h2", "zb-v"} <= set(kinds["flat"])


def test_neighbours_that_wait_for_each_other_cost_nothing_where_all_cells_of_a_tick_are_alike():
    for name in ("gpipe", "circular"):
        schedule = make(name, 4, 8)
        assert experiment.in_step(schedule, Times()) == pytest.approx(closed_bubble(schedule))
    # Of two stages one runs F while the other runs BW, twice as long; at both ends they do the same or nothing.
    # m = 3: F0; F1 beside F0; then BW0, F1, BW1 and so on, one at a time against one of the other stage.
    schedule = make("1f1b", 2, 3)
    ticks = [[str(cell or ".") for cell in row] for row in schedule.table]
    lasts = [max(2.0 if cell.startswith("BW") else 1.0 if cell != "." else 0.0 for cell in row) for row in ticks]
    assert experiment.in_step(schedule, Times()) == pytest.approx((sum(lasts) - 9) / sum(lasts))


def test_quick_compiles_what_is_committed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline_schedules", "--quick", "--out", str(tmp_path)])
    assert experiment.main() == 0
    assert "29 of 29 lines are equal in 2 programs" in capsys.readouterr().out
    now = common.read_csv(tmp_path / "pipeline_schedules.csv")
    chosen = (*experiment.QUICK,)
    assert now == [row for row in TABLE if row["schedule"] in chosen and row["microbatches"] == experiment.MICROBATCHES[0]]
    assert (tmp_path / "pipeline_schedules.png").stat().st_size > 10_000


@pytest.mark.parametrize("key", ["ticks_compiled", "stash_compiled", "weight_stash_compiled", "inbox_compiled", "equal"])
def test_what_is_off_by_one_fails(key, tmp_path, monkeypatch, capsys):
    table = [dict(TABLE[0]) | {key: TABLE[0][key] + 1}]
    monkeypatch.setattr(experiment, "rows", lambda quick: table)
    monkeypatch.setattr(experiment, "draw", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["pipeline_schedules", "--out", str(tmp_path)])
    assert experiment.main() == 1
    assert f"1f1b, 8 microbatches: {'lines' if key == 'equal' else key.removesuffix('_compiled')}" in capsys.readouterr().err


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "pipeline_schedules.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "What does each pipeline schedule idle and keep, counted, simulated and compiled?" in shown
