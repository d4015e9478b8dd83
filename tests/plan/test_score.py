"""The score of a layout among a million is what `predict` and `step_time` say of it alone; and every layout is among them."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload, predict
from jaxllm.plan.conditions import parse
from jaxllm.plan.score import peaks, seconds, symbols
from jaxllm.plan.space import PLACEMENTS, Space, divisors
from jaxllm.schedules import make
from jaxllm.schedules.named import registry
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.validate import validate, validate_target
from jaxllm.theory.partition import stages_of
from jaxllm.theory.rates import Rates
from jaxllm.theory.time import step_time

CASES = {
    "nodes": ("llama-3-8b", "h100:2x8", Workload(64, 2048, "bf16-f32")),
    "calibrated": ("llama-tiny", "a100-80:8", Workload(16, 128, "bf16-master")),
    "tied, heads that do not divide": ("gpt2", "h100:8", Workload(48, 1024, "bf16-f32")),
    "torus": ("llama-3-8b", "v5p:2x2x4", Workload(32, 4096, "bf16-f32")),
    "muon, layers that do not divide": ("llama-3.1-405b", "h100:4x8", Workload(32, 8192, "bf16-f32", "muon")),
    "8 bits": ("llama-tiny", "h100:8", Workload(16, 128, "fp8", "sgd")),
}
EACH = 4  # layouts of a block that are scored alone


@cache
def space(case: str, fix: str = "") -> Space:
    model, mesh, work = CASES[case]
    return Space.of(ModelConfig.load(model), Machine.load(mesh), work, parse(fix) if fix else ())


@pytest.mark.parametrize("case", CASES)
def test_a_score_is_what_predict_and_step_time_say_of_the_layout_alone(case: str) -> None:
    of, rng, compared, timed = space(case), random.Random(case), 0, 0
    model, mesh, work = of.model, of.mesh, of.workload
    rates = Rates.of(mesh, work)
    for block in of.blocks():
        s = symbols(block, model, work)
        peak, (time, waits) = peaks(block, s, model.layers, mesh.target), seconds(block, s, rates)
        assert peak.shape == time.shape == waits.shape == block.shape
        places = np.flatnonzero(block.allowed & ~np.isnan(time))
        for place in rng.sample(places.tolist(), min(EACH, len(places))):
            index = np.unravel_index(place, block.shape)
            layout = block.layout(index)
            assert peak[index] == predict(model, layout, work, target=mesh.target).peak, layout
            alone = step_time(model, layout, mesh, work)
            assert time[index] == pytest.approx(float(alone.seconds), rel=1e-12), layout
            assert waits[index] == pytest.approx(float(alone.waits), rel=1e-9, abs=1e-15), layout
            compared, timed = compared + 1, timed + (layout.pipe > 1)
    assert compared >= 4 and (timed >= 6 or work.dtypes.fp8)


def test_what_has_no_closed_form_is_left_out_and_nothing_else() -> None:
    """Of zb-v with few microbatches, and of groups of an interleaved schedule that are far from full."""
    of = space("tied, heads that do not divide")
    rates, found = Rates.of(of.mesh, of.workload), set()
    for block in of.blocks():
        time, _ = seconds(block, symbols(block, of.model, of.workload), rates)
        for index in zip(*np.nonzero(block.allowed & np.isnan(time)), strict=True):
            layout = block.layout(index)
            found.add((layout.schedule, layout.pipe, layout.microbatches))
    assert found and {schedule for schedule, *_ in found} <= {"zb-v", "interleaved"}
    assert all(pipe <= m < 2 * pipe - 1 for schedule, pipe, m in found if schedule == "zb-v")


@pytest.mark.parametrize("case", ["calibrated", "torus"])
def test_every_layout_that_the_nouns_allow_is_there_once(case: str) -> None:
    """All combinations of a few values of each choice, by the nouns' own rules, but for those that are the same program."""
    of = space(case, "context<=2,tensor<=2,microbatches<=8,virtual<=2,offload=none,save=none,attention=xla|blockwise")
    mesh, work, model = of.mesh, of.workload, of.model
    found = [
        f"{block.layout(index)}" for block in of.blocks() for index in zip(*np.nonzero(block.allowed), strict=True)
    ]
    assert len(found) == len(set(found))
    expected = set()
    degrees = divisors(mesh.devices)
    for pipe, replica, context, tensor in itertools.product(degrees, degrees, (1, 2), (1, 2)):
        data, rest = divmod(mesh.devices, pipe * replica * context * tensor)
        if rest or not data:
            continue
        named = [("", 0)] if pipe == 1 else [(name, 2 * (one.chunks[1] is None)) for name, one in registry().items()]
        for (schedule, virtual), zero, remat, cut, attention, exchange, m in itertools.product(
            named, range(4), ("none", "selective", "full"), (False, True), ("xla", "blockwise"), ("ring", "ulysses"), (1, 2, 4, 8)
        ):
            same = (
                (zero and data * context == 1)
                or (replica > 1 and not zero)
                or (remat == "selective" and attention != "xla")
                or (context == 1 and exchange == "ulysses")
            )
            if same:
                continue
            try:
                layout = Layout(
                    pipe, replica, data, context, tensor, zero, remat, sequence=cut, attention=attention, exchange=exchange,
                    microbatches=m, schedule=schedule, virtual=virtual,
                )  # fmt: skip
                validate(model, layout, mesh.devices, work)
                validate_target(mesh.target, layout, work)
                stages_of(model, layout, work)
            except (SpecError, TargetError):
                continue
            expected.add(f"{layout}")
    assert set(found) == expected


def test_placements_are_those_of_the_tables() -> None:
    for name, named in registry().items():
        assert make(name, 4, 8, max(2, named.chunks[0]) if named.chunks[1] != 1 else 1).placement == PLACEMENTS.get(name, "ring")


@pytest.mark.parametrize("number", [1, 2, 12, 97, 126, 16384])
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
