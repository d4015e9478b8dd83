"""The committed table of experiments/plan_regret.py: what the closed form picks now, and the bars that its regret meets."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from experiments import common, published
from experiments import plan_regret as experiment

TABLE = common.read_csv(common.COMMITTED / "plan_regret.csv")
GROUPS = experiment.groups()


def test_groups_are_of_one_model_mesh_and_batch():
    for group in GROUPS:
        assert len(group.steps) >= experiment.LEAST
        assert len({(step.source, step.mesh.devices, step.workload) for step in group.steps}) == 1
        assert len({(step.model.layers, step.model.d_model) for step in group.steps}) == 1
        assert len({(f"{step.layout}", step.workload) for step in group.steps}) == len(group.steps)
    # None of them is outside of the calibration, which the page says.
    assert {step.calibration for group in GROUPS for step in group.steps} == {True}
    assert sum(group.where == "several nodes" for group in GROUPS) == 1 and len(GROUPS) == 16


@pytest.mark.parametrize(("group", "row"), list(zip(GROUPS, TABLE, strict=True)))
def test_the_closed_form_picks_it_now(group, row):
    seconds = group.predicted()
    pick, best = group.steps[int(np.argmin(seconds))], group.steps[int(np.argmin(group.measured))]
    assert (row["model"], row["devices"], row["layouts"]) == (pick.model.name, pick.mesh.devices, len(group.steps))
    assert (row["pick"], row["best"]) == (f"{pick.layout}", f"{best.layout}")
    assert row["regret"] == pytest.approx(group.regret(seconds), abs=1e-4)
    assert row["pick_predicted"] == pytest.approx(seconds.min(), abs=1e-4)
    assert row["rule"] == pytest.approx(group.rule(), abs=1e-4) and row["full"] == pytest.approx(group.rule(full=True), abs=1e-4)
    assert row["random"] == pytest.approx(group.random(), abs=1e-4)
    assert row["why"] == experiment.why(best, pick)


def test_the_bars_are_met_and_can_be_missed():
    assert experiment.wrong(TABLE) == [] and experiment.wrong(TABLE, "without") == []
    assert len(experiment.wrong(TABLE, "random")) == 2 and len(experiment.wrong(TABLE, "full")) == 1
    assert {row["regret"] for row in experiment.missed(TABLE)} == {
        row["regret"] for row in TABLE if row["regret"]
    }


def test_a_pick_is_never_better_than_the_best_nor_worse_than_the_worst():
    for group, row in zip(GROUPS, TABLE, strict=True):
        worst = group.measured.max() / group.measured.min() - 1
        for kind in experiment.KINDS:
            assert 0 <= row[kind] <= worst + 1e-4
        assert group.regret(group.measured) == 0 and group.regret(-group.measured) == pytest.approx(worst)
        assert row["full"] <= row["random"]


def test_refitting_leaves_the_group_out(monkeypatch):
    seen: list[published.Step] = []
    monkeypatch.setattr(experiment.Rows, "of", staticmethod(seen.extend))
    monkeypatch.setattr(experiment, "fit", lambda rows, rates, machine: {})
    monkeypatch.setattr(experiment, "with_figures", lambda rates, figures, machine: rates)
    experiment.refitted(GROUPS[0])
    assert len(seen) == 190 - 26 and not any(step in GROUPS[0].steps for step in seen)


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "plan_regret.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How much slower than the best measured layout" in shown
