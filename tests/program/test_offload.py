"""State in host memory: its bytes and copies by closed form and on both compilers, and a run equal to the reference."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm import predict
from jaxllm.check import check
from jaxllm.program import build, offload
from jaxllm.program.run import learning_rate, run
from jaxllm.report.compare import Comparison
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import TRANSFERS, Ledger
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from tests.program.test_run import MODEL, compiled_for

TINY = ModelConfig.load("llama-tiny")


def ledger(text: str, precision: str = "f32", model: ModelConfig = TINY, optimizer: str = "adamw") -> Ledger:
    layout = Layout.parse(text)
    return predict(model, layout, Workload(layout.replica * layout.data * layout.microbatches, 64, precision, optimizer))


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize(("precision", "size"), [("f32", 8), ("bf16-f32", 8), ("bf16-master", 12), ("f16-master", 12)])
@pytest.mark.parametrize("zero", range(4))
def test_host_bytes_are_the_optimizers_for_each_stage_and_precision(zero: int, precision: str, size: int) -> None:
    found, kept = (ledger(f"data=8,zero={zero}{more}", precision) for more in (",offload=optimizer", ""))
    # All of llama-tiny divides by 8.
    host = size * TINY.parameters // (8 if zero else 1)
    assert found.line("host").value == host == found.line("copy-to-host").value == found.line("copy-to-device").value
    scalars = 12 if precision == "f16-master" else 4
    assert (found.line("optimizer").value, kept.line("optimizer").value) == (scalars, host + scalars)
    for name in ("parameters", "gradients", "residuals", "batch"):
        assert found.line(name).value == kept.line(name).value
    assert kept.peak - found.peak == host
    assert kept.line("host").value == 0 and kept.section("transfers") == ()


@pytest.mark.parametrize(
    "layout",
    [
        "tensor=4", "data=2,tensor=4,zero=1", "pipe=2,data=2,tensor=2,zero=2,microbatches=2",
        "replica=2,context=2,zero=3,exchange=ulysses",
    ],
)  # fmt: skip
def test_nothing_is_lost_between_the_memories(layout: str) -> None:
    model = MODEL  # whose vocabulary is padded
    found, kept = (ledger(layout + more, "bf16-master", model) for more in (",offload=optimizer", ""))
    stages = range(Layout.parse(layout).pipe)
    held = [[sum(line.on_stage(stage) for line in each.section("memory")) for stage in stages] for each in (found, kept)]
    assert held[0] == held[1]
    assert found.line("host").stages == ()  # room for all stages on each


@pytest.mark.parametrize(("precision", "update"), [("f32", 1), ("bf16-master", 0)])
def test_parameters_come_for_each_use_and_for_an_update_without_a_master_copy(precision: str, update: int) -> None:
    found = ledger("data=8,zero=3,microbatches=3,offload=optimizer+parameters", precision)
    size = {"f32": 4, "bf16-master": 2}[precision]
    once = 2 * TINY.vocab * TINY.d_model + TINY.d_model + 2 * TINY.layers * TINY.d_model  # embedding, head, and norms
    state = (8 if update else 12) * TINY.parameters // 8
    there = size * ((3 * 2 + update) * (TINY.parameters - once) + once) // 8
    assert found.total("transfers", "copy-to-device") == there + state
    assert found.total("transfers", "copy-to-host") == size * TINY.parameters // 8 + state
    assert found.line("host").value == size * TINY.parameters // 8 + state
    assert found.line("parameters").value == 0


def test_momentum_has_half_of_adams_bytes() -> None:
    one, two = (ledger("offload=optimizer", optimizer=name).line("host").value for name in ("momentum", "adamw"))
    assert 2 * one == two


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("layout", "precision", "optimizer", "says"),
    [
        ("offload=disk", "f32", "adamw", "nothing named 'disk'; known: optimizer, parameters, input"),
        ("offload=parameters", "f32", "adamw", r"write offload=optimizer\+parameters"),
        ("offload=optimizer", "f32", "muon", "looks at whole matrices"),
        ("offload=optimizer", "f32", "adafactor", "looks at whole matrices"),
        ("offload=optimizer", "f32", "sgd", "keeps nothing of a weight"),
        ("data=8,zero=2,offload=optimizer+parameters", "f32", "adamw", "zero=2 gathers whole parameters"),
        ("pipe=2,offload=optimizer+parameters", "f32", "adamw", "pipe=2"),
        ("remat=jax,offload=optimizer+parameters", "f32", "adamw", "remat=jax"),
    ],
)
def test_what_makes_no_sense_is_refused(layout: str, precision: str, optimizer: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as error:
        ledger(layout, precision, optimizer=optimizer)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(("mesh", "target"), [("cpu:8", ""), ("h100:8", "cpu")])
def test_a_cpu_is_refused(mesh: str, target: str) -> None:
    layout = Layout.parse("data=8,offload=optimizer")
    with pytest.raises(SpecError, match="the memory of a cpu is its host's"):
        check(TINY, layout, Machine.load(mesh), Workload(8, 16), target=target)


# ---------------------------------------------------------------- what the program computes


@pytest.mark.parametrize(
    ("layout", "precision", "optimizer"),
    [
        ("data=2,tensor=4,zero=2,offload=optimizer", "f32", "adamw"),
        ("data=4,tensor=2,zero=3,remat=full,microbatches=2,offload=optimizer+parameters", "f32", "adamw"),
        ("pipe=2,data=2,zero=1,microbatches=2,offload=optimizer", "f32", "momentum"),
        ("data=2,tensor=2,zero=1,offload=optimizer", "f16-master", "adamw"),
    ],
)
def test_the_streamed_update_equals_the_reference(layout: str, precision: str, optimizer: str) -> None:
    # Emulated devices tell their memory from their host's by name alone, and so run the same program.
    parsed = Layout.parse(layout)
    workload = Workload(8, 8, precision, optimizer)
    rate = learning_rate(optimizer, MODEL)
    built = build(MODEL, parsed, workload, jax.devices()[: parsed.devices], learning_rate=rate)
    parameters, state, _ = built.arguments
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.shape}  # noqa: E731
    assert kinds(state) == {"pinned_host"}
    assert (kinds(parameters) == {"pinned_host"}) is parsed.parameters_on_host
    found = run(built, compiled_for(built))
    assert found.agrees, found.errors
    if precision == "f32":
        assert 0 < found.max_relative_error <= 1e-5


def test_a_layer_that_is_left_out_of_the_update_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = jax.lax.fori_loop
    monkeypatch.setattr(offload.lax, "fori_loop", lambda first, last, *more: loop(first, last - 1, *more))
    built = build(MODEL, Layout.parse("data=2,offload=optimizer"), Workload(8, 8), jax.devices()[:2], learning_rate=1e-3)
    assert not run(built, compiled_for(built)).agrees


def test_a_step_whose_gradients_overflow_changes_nothing_in_host_memory() -> None:
    built = build(MODEL, Layout.parse("data=2,offload=optimizer"), Workload(8, 8, "f16-master"), jax.devices()[:2])
    with jax.set_mesh(built.mesh):
        parameters = built.init_parameters(0)
        state = built.init_optimizer(parameters)
        state["scale"] = jax.device_put(np.float32(2.0**40), state["scale"].sharding)
        rows = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, np.int32), leaf.sharding), built.arguments[2])
        before = jax.tree.map(np.asarray, (parameters, state["master"], state["adamw"]))
        after, new, _ = compiled_for(built)(parameters, state, rows)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, (after, new["master"], new["adamw"]))))
    assert float(new["scale"]) == 2.0**39


# ---------------------------------------------------------------- what the compilers make of it


# Of so many layers that a TPU has a loop: one that turns but twice is none there, and the backward pass then finds what came
# for the forward pass. The grid has XLA:GPU.
FOUR = replace(TINY, layers=4, vocab=64)


def compared(layout: str) -> Comparison:
    return check(FOUR, Layout.parse(layout), Machine.load("v5e:2x4"), Workload(8, 16, "bf16-master"))


def test_every_byte_is_where_it_is_said_to_be() -> None:
    found = compared("data=4,tensor=2,zero=3,offload=optimizer+parameters")
    assert [row.label for row in found.rows if row.status != "equal"] == [] and not found.unexplained
    lines = {row.label: row for row in found.rows}
    assert lines["parameters"].compiled == 0 and lines["optimizer"].compiled == 4
    assert lines["host"].compiled > 0 and not any(term.label == "temporaries" for term in lines["host"].compiled_terms)
    there, back = (sum(row.compiled for row in found.rows if row.name == name) for name in TRANSFERS)
    assert there > back == lines["host"].compiled


def test_state_that_is_left_on_the_device_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "offloaded", lambda state: state)
    found = compared("data=8,zero=1,offload=optimizer")
    differ = {row.label for row in found.rows if row.status == "differs"}
    assert differ == {"optimizer", "host", "copy-to-device/f32", "copy-to-host/f32"}
