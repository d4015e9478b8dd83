"""The committed table of experiments/bench_peak.py: the closed form's peak is what it says now, and near what was compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import bench_peak as experiment
from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload, predict

TABLE = common.read_csv(common.COMMITTED / "bench_peak.csv")


def test_at_least_60_layouts_are_within_what_is_promised():
    assert len(TABLE) == len(experiment.cases()) >= 60
    assert {row["model"] for row in TABLE} == {"llama-2-7b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"}
    assert experiment.wrong(TABLE) == []
    assert sum(row["compiled"] is not None for row in TABLE) >= 60


def test_the_closed_form_says_so_now():
    for row, case in zip(TABLE, experiment.cases(), strict=True):
        place = ("model", "mesh", "layout", "sequence", "each", "precision")
        assert [row[name] for name in place] == [getattr(case, name) for name in place]
        workload = Workload(case.batch, case.sequence, case.precision)
        target = Machine.load(case.mesh).target
        now = predict(ModelConfig.load(case.model), Layout.parse(case.layout), workload, target=target)
        assert now.peak == row["predicted"], case


def test_they_differ_in_what_a_layout_can_say():
    text = "\n".join(f"{case.layout},{case.precision}," for case in experiment.cases())
    for part in (
        *(f"zero={stage}," for stage in range(4)), "remat=none,", "remat=selective,", "save=", "sequence=true", "microbatches=4",
        "attention=blockwise", "context=4", "exchange=ulysses", "replica=2", "bf16-master", "bf16-f32",
    ):  # fmt: skip
        assert part in text, part
    quick = experiment.cases(quick=True)
    assert len(quick) == 16 == len({(case.model, case.mesh) for case in quick})


def test_one_is_compiled_again():
    case = experiment.cases()[0]
    row, now = TABLE[0], experiment.row(case)
    # The order of a schedule, and so the peak, may be another in another version of XLA.
    assert now["compiled"] == pytest.approx(row["compiled"], rel=0.1)
    assert now["lines"] == now["equal"] == row["lines"]


def test_what_is_off_is_told():
    row = next(row for row in TABLE if row["compiled"] is not None)
    far = dict(row) | {"predicted": round(1.2 * row["compiled"])}
    assert experiment.wrong([far]) and any("off by +20.0%" in problem for problem in experiment.wrong([far]))
    assert experiment.wrong([dict(row) | {"equal": row["equal"] - 1}])
    # A card with half of what both say is refused by both; one of them alone is wrong.
    half = dict(row) | {"capacity": row["compiled"] // 2}
    assert experiment.fits(half) == (False, False)
    small = dict(row) | {"compiled": row["capacity"] * 2}
    assert any("says it fits" in problem for problem in experiment.wrong([small]))


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "bench_peak.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How far is the closed form's peak memory" in shown
