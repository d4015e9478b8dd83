"""The search keeps what sorting all layouts would: the best, the front, and the best of each choice."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload
from jaxllm.plan.changes import changes, larger, sized
from jaxllm.plan.conditions import parse
from jaxllm.plan.cost import costs, smaller
from jaxllm.plan.plan import Plan, plan
from jaxllm.plan.reasons import choices, reasons, slower
from jaxllm.plan.score import peaks, seconds, symbols
from jaxllm.plan.search import Scored, search
from jaxllm.plan.space import Space
from jaxllm.plan.why import explain
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError
from jaxllm.theory.rates import Rates

MODEL = ModelConfig.load("llama-2-7b")
WORK = Workload(64, 4096, "bf16-f32")


@cache
def planned(mesh: str = "rtx4090:8", fix: str = "", **options) -> Plan:
    return plan(MODEL, Machine.load(mesh), WORK, conditions=parse(fix) if fix else (), **options)


@cache
def everything() -> list[tuple[Scored, bool]]:
    """All layouts of the plan, and whether they fit."""
    mesh = Machine.load("rtx4090:8")
    rates, found = Rates.of(mesh, WORK), []
    for block in Space.of(MODEL, mesh, WORK).blocks():
        s = symbols(block, MODEL, WORK)
        peak, (time, _) = peaks(block, s, MODEL.layers, "gpu"), seconds(block, s, rates)
        for index in zip(*np.nonzero(block.allowed & ~np.isnan(time)), strict=True):
            found.append(((int(peak[index]), float(time[index]), block, index), peak[index] <= mesh.capacity))
    return found


def test_counts_and_the_best_are_those_of_all_layouts():
    found, each = planned().found, everything()
    fits = sorted((time, peak) for (peak, time, *_), ok in each if ok)
    assert (found.scored, found.fits) == (len(each), len(fits))
    assert [(scored.seconds, scored.peak) for scored in found.best] == fits[:10]
    assert found.least.peak == min(peak for (peak, *_), _ in each)
    assert planned().near == sum(time <= found.front[0].interval[1] for time, _ in fits) > 10


def test_the_front_is_what_nothing_beats():
    fits = sorted((peak, time) for (peak, time, *_), ok in everything() if ok)
    front, least = [], np.inf
    for peak, time in fits:
        if time < least:
            front.append((time, peak))
            least = time
    assert [(scored.seconds, scored.peak) for scored in planned().found.front] == front[::-1]
    assert len(front) > 5


def test_a_choice_has_the_best_of_its_layouts():
    found = planned().found.choices
    for name, value, of in (
        ("zero", 2, lambda layout: layout.zero), ("tensor", 4, lambda layout: layout.tensor),
        ("schedule", "zb-h1", lambda layout: layout.schedule), ("remat", "full", lambda layout: layout.remat),
        ("offload", "optimizer", lambda layout: layout.offload), ("pipe", 2, lambda layout: layout.pipe),
    ):  # fmt: skip
        mine = [(peak, time, ok) for (peak, time, block, index), ok in everything() if of(block.layout(index)) == value]
        choice = found[name, value]
        assert (choice.scored, choice.fits, choice.least) == (len(mine), sum(ok for *_, ok in mine), min(peak for peak, *_ in mine))
        assert choice.seconds == min((time for _, time, ok in mine if ok), default=np.inf)


def test_by_memory_the_smallest_is_first():
    smallest = planned(objective="memory").best
    assert [scored.peak for scored in smallest] == sorted(scored.peak for scored in smallest)
    assert smallest[0].peak == planned().found.front[-1].peak


def test_conditions_are_met_and_cost_time():
    found = planned(fix="tensor=2|4,zero>=1,pipe=1,remat=full").best
    for scored in found:
        layout = scored.layout
        assert layout.tensor in (2, 4) and layout.zero >= 1 and layout.pipe == 1 and layout.remat == "full"
    assert found[0].seconds > planned().best[0].seconds


def test_regions_are_out_for_a_reason():
    found = planned("h100:4x8")
    said = {(each.name, each.value): each.sentence for each in reasons(found)}
    assert "leaves the node of 8 devices" in said["tensor", 32]
    tight = planned(fix="attention=cudnn,pipe=1,offload=none,tensor<=2")
    said = {(each.name, each.value): each.sentence for each in reasons(tight)}
    lacking = [choice for choice in tight.found.choices.values() if not choice.fits]
    assert {("zero", 0), ("zero", 1)} <= {(choice.name, choice.value) for choice in lacking}
    for choice in lacking:
        assert said[choice.name, choice.value] == f"needs {human(int(choice.least))} at least, of 23.2 GB"
    assert "Pallas" in {(each.name, each.value): each.sentence for each in reasons(planned())}["attention", "splash"]
    best = [choice for each in choices(planned()).values() for choice in each if slower(planned(), choice) == "best"]
    assert {"zero", "remat", "pipe"} <= {choice.name for choice in best}


# ---------------------------------------------------------------- why


def test_why_a_layout_is_out_and_the_fewest_changes_that_fit():
    layout = Layout.parse("data=8")
    why = explain(planned(origin=layout), layout)
    assert not why.fits and why.asked.peak > 20 * why.plan.mesh.capacity
    what, scored = why.changes[0]
    assert what == "zero=3, remat=full, microbatches=8" and scored.peak <= why.plan.mesh.capacity
    # nothing with fewer changes fits, by sorting all
    def changed(each: Layout) -> int:
        names = ("zero", "remat", "offload", "attention", "microbatches", "sequence", "schedule")
        degrees = sum(getattr(each, name) != getattr(layout, name) for name in ("pipe", "replica", "data", "context", "tensor"))
        return sum(getattr(each, name) != getattr(layout, name) for name in names) + max(degrees - 1, 0)

    assert not any(ok and changed(block.layout(index)) < 3 for (_, _, block, index), ok in everything() if block.pipe == 1)


def test_why_a_layout_is_slower_and_one_change_that_helps():
    layout = Layout.parse("data=4,tensor=2,zero=3,remat=full,attention=cudnn,offload=optimizer,microbatches=8")
    why = explain(planned(origin=layout), layout)
    assert why.fits and why.faster > 0 and why.asked.seconds > why.best.seconds
    times = [scored.seconds for _, scored in why.changes]
    assert all(time < why.asked.seconds for time in times)
    assert "remat=none" in [what for what, _ in why.changes]
    assert "--fix tensor=2|4 excludes it" in explain(planned(fix="tensor=2|4,zero>=1,pipe=1,remat=full"), layout.parse("data=8")).refused
    refused = explain(planned(), Layout.parse("data=3"))
    assert "needs 3 devices" in refused.refused and refused.to_json()["asked"] is None


# ---------------------------------------------------------------- when nothing fits, and what a dollar buys


def test_what_would_fit():
    nothing = planned("rtx4090:2", fix="zero=0,offload=none")
    assert not nothing.best and nothing.found.least.peak > nothing.mesh.capacity
    said = changes(nothing)
    assert [sentence.partition(":")[0] for sentence in said] == ["without --fix offload=none", "on rtx4090"]
    assert said[1].startswith("on rtx4090:8: ")


@pytest.mark.parametrize(
    ("mesh", "up", "down"),
    [
        ("h100:2x8", ["h100:32", "h100:64"], ["h100:8", "h100:4", "h100:2", "h100:1"]),
        ("v5e:4x4", ["v5e:4x8", "v5e:8x8"], ["v5e:2x4", "v5e:2x2", "v5e:1x1"]),
    ],
)
def test_meshes_of_other_sizes(mesh: str, up: list[str], down: list[str]):
    known = Machine.load(mesh)
    assert [found.text for found in larger(known)][:2] == up
    assert [found.text for found in smaller(known)][:4] == down
    assert all(found.devices <= 4 for found in sized(known, 1, 4))


def test_a_dollar_trains_more_where_less_is_waited_for():
    found = planned("h100:2x8", price=2.0)
    rows = costs(found)
    assert [row.mesh.text for row in rows][:2] == ["h100:2x8", "h100:8"]
    for row in rows:
        tokens = WORK.batch * WORK.sequence
        assert row.tokens_per_dollar == pytest.approx(tokens * 3600 / (row.best.seconds * 2.0 * row.mesh.devices))
    assert costs(planned()) == ()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("mesh", "work", "fix", "reason"),
    [
        ("h100:8", Workload(3, 4096, "bf16-f32"), "data=8", "data=8 leaves no layout"),
        ("h100:8", WORK, "tensor=3", "tensor=3 leaves no layout of llama-2-7b on h100:8: what there is of tensor is 1, 2, 4, 8."),
        ("h100:8", WORK, "attention=splash", "no step can hold the Pallas kernel"),
        ("h100:8", WORK, "pipe=8,tensor=8", "--fix pipe=8 leaves no layout of llama-2-7b on h100:8 beside tensor=8"),
        ("h100:8", WORK, "pipe=4,tensor=2,schedule=zb-v,microbatches=5", "leaves no layout"),
        ("rtx4090:16", WORK, "", "no figure links.between_nodes"),
        ("cpu:8", WORK, "", "no figure peak.bf16"),
    ],
)
def test_nothing_to_search(mesh, work, fix, reason):
    with pytest.raises(SpecError, match=".*") as told:
        plan(MODEL, Machine.load(mesh), work, conditions=parse(fix) if fix else ())
    assert reason in str(told.value)


def test_a_batch_that_nothing_divides():
    with pytest.raises(SpecError) as told:
        plan(ModelConfig.load("llama-3-8b"), Machine.load("h100:37x8"), Workload(7, 4096, "bf16-f32"))
    assert "batch 7 cannot be shared out over the 296 devices of h100:37x8" in str(told.value)
    assert "a batch that 37 divides, as 37" in str(told.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no condition"),
        ("tensor", "is no condition"),
        ("tensor=4,tensor=8", "tensor=4 and tensor=8 exclude each other"),
        ("tensor<=4,tensor>=8", "exclude each other"),
        ("tensor=x", "no whole number from 1"),
        ("zero=4", "no whole number from 0 to 3"),
        ("tenser=4", "did you mean 'tensor'?"),
        ("remat=ful", "did you mean 'full'?"),
        ("remat<=full", "bounds what is no single number"),
        ("zero<=1|2", "bounds what is no single number"),
        ("schedule=1f2b", "did you mean '1f1b'?"),
        ("sequence=yes", "known: false, true"),
    ],
)
def test_conditions_that_are_none(text, reason):
    with pytest.raises(SpecError) as told:
        parse(text)
    assert reason in str(told.value)


def test_conditions_that_leave_something_together():
    assert [str(each) for each in parse("tensor>=2, tensor<=8,zero=1|3")] == ["tensor>=2", "tensor<=8", "zero=1|3"]
    assert search(Space.of(MODEL, Machine.load("h100:8"), WORK, parse("tensor>=2,tensor<=2")), 1).best[0].layout.tensor == 2


def test_what_is_not_searched_may_be_faster_and_is_told_so(capsys):
    """126 layers over 16 stages in four chunks each: only a partition that is not even has them."""
    from rich.console import Console

    from jaxllm.plan.why import print_why

    model, mesh, work = ModelConfig.load("llama-3.1-405b"), Machine.load("h100:64x8"), Workload(64, 8192, "bf16-master")
    layout = Layout.parse("pipe=16,data=4,tensor=8,zero=1,sequence=true,attention=cudnn,microbatches=16,schedule=interleaved,virtual=4,partition=time,remat=full")
    found = plan(model, mesh, work, conditions=parse("pipe=16,tensor=8,attention=cudnn,remat=full,save=none"))
    why = explain(found, layout)
    assert why.asked.seconds < 0.9 * why.best.seconds
    print_why(why, Console(width=200))
    assert "partition=time is not searched" in capsys.readouterr().out
    with pytest.raises(SpecError, match="shares layers out evenly"):
        parse("partition=time")
