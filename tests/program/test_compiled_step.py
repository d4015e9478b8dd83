"""The step through all three compilers: what a mistake in the sharding would change, and no loss would show."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from jaxllm.check import build, check, measure, resolve
from jaxllm.report.compare import Comparison
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.targets.compiler import compile

# Small, but more layers than anything else, so that a reduction in the wrong loop cannot hide.
SMALL = dataclasses.replace(ModelConfig.load("llama-tiny"), name="small", layers=5, max_sequence=64)
MESHES = {"cpu": "cpu:8", "gpu": "h100:8", "tpu": "v5e:2x4"}


@cache
def measured(target: str, layout: str, model: ModelConfig = SMALL) -> Ledger:
    mesh, parsed = Machine.load(MESHES[target]), Layout.parse(layout)
    precision = "f32" if target == "cpu" else "bf16-f32"
    workload = resolve(model, parsed, mesh, None, None, precision)
    return measure(compile(build(model, parsed, mesh, workload)))


def checked(layout: str, model: ModelConfig, mesh: str = "cpu:8", precision: str = "f32", **options: object) -> Comparison:
    parsed, machine = Layout.parse(layout), Machine.load(mesh)
    workload = resolve(model, parsed, machine, None, None, precision, **options)
    return check(model, parsed, machine, workload)


def differences(comparison: Comparison) -> list[str]:
    bad = [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"]
    return bad + list(comparison.unexplained)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_zero_1_and_2_differ_by_the_gradients_alive_after_the_backward_pass(target: str) -> None:
    # Large enough that accumulators are most of the peak.
    large = dataclasses.replace(SMALL, layers=16, d_model=512, d_ff=2048, head_dim=64)
    one, two = (measured(target, f"data=8,zero={stage},microbatches=2,remat=full", large) for stage in (1, 2))
    elements = large.parameters
    assert one.line("gradients").value == 4 * elements
    assert two.line("gradients").value == 4 * elements // 8
    for name in ("parameters", "optimizer", "batch", "residuals"):
        assert one.line(name).value == two.line(name).value
    # Whole accumulators against slices of an eighth, in the compiler's own buffers
    assert one.peak - two.peak > 0.9 * 4 * elements * 7 / 8


@pytest.mark.parametrize("target", MESHES)
def test_a_block_has_megatrons_two_sums_each_way(target: str) -> None:
    found = measured(target, "data=4,tensor=2,zero=2,remat=full,microbatches=3")
    dtype = "f32" if target == "cpu" else "bf16"
    ends = 1 + (3 if target == "cpu" else 0)  # embedding; in f32 the three sums of the loss are on the same line
    lines = {line.phase: line.count for line in found.lines if line.name == "all-reduce" and line.axes == ("tensor",) and line.dtype == dtype}
    assert lines == {
        "forward": 3 * (2 * SMALL.layers + ends),
        "recompute": 3 * SMALL.layers,
        "backward": 3 * (2 * SMALL.layers + 1),
    }


@pytest.mark.parametrize("target", MESHES)
def test_no_matmul_is_computed_twice_without_remat(target: str) -> None:
    found = measured(target, "data=8,zero=3")
    assert [line.phase for line in found.section("flops")] == ["forward", "backward"]


def test_every_term_of_the_compiled_ledger_names_its_source() -> None:
    found = measured("cpu", "data=4,tensor=2,zero=3")
    for line in (*found.section("flops"), *found.section("collectives")):
        assert line.terms
        assert all(".py:" in term.source for term in line.terms), line.label


@pytest.mark.parametrize(
    ("layout", "mesh", "change"),
    [
        ("tensor=4", "cpu:4", {"kv_heads": 2}),
        ("data=2,tensor=4,zero=3,microbatches=2", "cpu:8", {"kv_heads": 1, "tied": True}),
        ("replica=2,tensor=4,zero=1", "cpu:8", {"kv_heads": 2, "vocab": 509}),
        ("data=3,zero=2", "cpu:3", {}),
        ("data=3,zero=3,microbatches=2", "cpu:3", {"d_model": 96, "head_dim": 6, "vocab": 500}),
        ("data=5,zero=1,remat=full", "cpu:5", {"d_ff": 320, "tied": True}),
        ("data=2,tensor=2,zero=3,remat=full", "cpu:4", {"vocab": 511, "tied": True}),
        ("data=1", "cpu:1", {}),
        ("data=1,zero=3,microbatches=3", "cpu:1", {"tied": True}),
        ("data=7", "cpu:7", {"layers": 1}),
    ],
    ids=str,
)
def test_odd_degrees_heads_and_vocabularies(layout: str, mesh: str, change: dict) -> None:
    assert differences(checked(layout, dataclasses.replace(SMALL, **change), mesh)) == []


def test_padding_and_replicated_heads_on_tpu() -> None:
    odd = dataclasses.replace(SMALL, kv_heads=2, vocab=509)
    assert differences(checked("data=2,tensor=4,zero=3", odd, "v5e:2x4", "bf16-f32")) == []


def test_the_dtype_of_gradients_is_a_field_of_its_own() -> None:
    comparison = checked("data=8,zero=2", SMALL, "h100:8", "bf16-f32", gradient_dtype="bf16")
    assert differences(comparison) == []
    assert {row.dtype for row in comparison.rows if row.name == "reduce-scatter"} == {"bf16"}


def test_plain_autodiff_is_measured_beside_what_is_known_of_it() -> None:
    comparison = checked("data=4,tensor=2,zero=3,remat=jax", SMALL)
    assert comparison.agrees
    status = {row.label: row.status for row in comparison.rows}
    assert status["parameters"] == status["gradients"] == "equal"
    assert status["residuals"] == status["matmul/forward"] == "not comparable"
    unknown = [row for row in comparison.rows if row.status == "not comparable"]
    assert all(row.predicted is None and row.compiled > 0 for row in unknown)


def test_a_program_that_libtpu_refuses_for_memory_is_an_answer() -> None:
    model, layout, mesh = ModelConfig.load("llama-3.2-1b"), Layout.parse("data=1,remat=full"), Machine.load("v5e:1x1")
    comparison = check(model, layout, mesh, Workload(64, 2048, "bf16-f32"))
    assert differences(comparison) == []
    assert not comparison.fits
    assert "15.75G" in comparison.peak.refused
