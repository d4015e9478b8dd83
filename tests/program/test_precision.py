"""Precisions in 16 bits: every line equal, the run near the reference; a scaled loss grows, shrinks, and skips what overflows."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import optax
import pytest

from jaxllm import ModelConfig, build, predict
from jaxllm.check import check
from jaxllm.program import optimizer
from jaxllm.program.run import TOLERANCE, learning_rate, random_batch
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.workload import Workload
from tests.program.test_run import MODEL, compiled_for

LAYOUT = "data=2,tensor=2,zero=2,microbatches=2"
CELLS = [
    ("bf16", "cpu:4", LAYOUT), ("bf16-moments", "cpu:4", "data=2,tensor=2,zero=1,sequence=true"), ("f16-master", "cpu:4", LAYOUT),
    ("f16-master", "cpu:4", "pipe=2,data=2,zero=1,microbatches=2"), ("bf16", "h100:4", LAYOUT), ("f16-master", "h100:4", LAYOUT),
    ("f16-master", "v5e:2x2", LAYOUT),
]  # fmt: skip


@pytest.mark.parametrize(("precision", "mesh", "text"), CELLS)
def test_every_line_is_equal_and_the_run_is_near_the_reference(precision, mesh, text):
    layout, machine = Layout.parse(text), Machine.load(mesh)
    found = check(MODEL, layout, machine, Workload(8, 8, precision), run=machine.target == "cpu")
    assert [row.label for row in found.rows if row.status != "equal"] == [] and not found.unexplained
    if machine.target == "cpu":
        narrowest = "f16" if precision == "f16-master" else "bf16"
        assert found.run.tolerance == TOLERANCE[narrowest] and found.run.agrees, found.run.errors
        assert found.run.max_relative_error > 1e-5  # it is not f32


@pytest.mark.parametrize(
    ("precision", "parameters", "gradients", "state", "scalars"),
    [("bf16", 2, 2, 2 + 2, 4), ("bf16-moments", 2, 4, 4 + 2 + 2, 4), ("f16-master", 2, 2, 4 + 4 + 4, 12), ("f32", 4, 4, 8, 4)],
)
def test_bytes_of_a_weight(precision, parameters, gradients, state, scalars):
    model = ModelConfig.load("llama-tiny")
    found = predict(model, Layout(), Workload(1, 64, precision))
    each = {"parameters": parameters, "gradients": gradients, "optimizer": state}
    assert {name: found.line(name).value for name in each} == {
        name: size * model.parameters + (scalars if name == "optimizer" else 0) for name, size in each.items()
    }


# ---------------------------------------------------------------- the scaled loss


@cache
def step():
    layout = Layout.parse("data=2,tensor=2,zero=1")
    workload = Workload(4, 8, "f16-master")
    built = build(
        MODEL, layout, Machine.load("cpu:4"), workload, learning_rate=learning_rate("adamw", MODEL)
    )
    batch = random_batch(MODEL, 4, 8, np.random.default_rng(0))
    rows = jax.tree.map(lambda x, leaf: jax.device_put(x.reshape(leaf.shape), leaf.sharding), batch, built.arguments[2])
    return built, compiled_for(built), rows


def taken(scale: float, finite: int):
    """Parameters before, and parameters, state and metrics after a step with that factor and so many finite steps behind."""
    built, compiled, rows = step()
    with jax.set_mesh(built.mesh):
        parameters = built.init_parameters(0)
        state = built.init_optimizer(parameters)
        put = lambda value, name: jax.device_put(value, state[name].sharding)  # noqa: E731
        state |= {"scale": put(np.float32(scale), "scale"), "finite": put(np.int32(finite), "finite")}
        before = jax.tree.map(np.asarray, (parameters, state["master"]))
        parameters, state, metrics = compiled(parameters, state, rows)
    return before, (jax.tree.map(np.asarray, (parameters, state["master"]))), state, metrics


def test_a_step_that_overflows_changes_nothing_but_halves_the_factor():
    before, after, state, metrics = taken(2.0**40, 7)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (float(state["scale"]), int(state["finite"]), int(optax.tree.get(state, "count"))) == (2.0**39, 0, 0)
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(optax.tree.get(state, "mu")))
    assert not np.isfinite(metrics["gradient_norm"])


def test_the_factor_doubles_after_so_many_finite_steps_and_changes_no_gradient():
    before, after, state, first = taken(2.0**4, optimizer.GROW - 1)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert (float(state["scale"]), int(state["finite"]), int(optax.tree.get(state, "count"))) == (2.0**5, 0, 1)
    _, _, state, other = taken(2.0**7, 0)
    assert (float(state["scale"]), int(state["finite"])) == (2.0**7, 1)
    # A power of two changes no digit but of what is too small for f16: that is what a larger factor is for.
    for name in ("loss", "gradient_norm"):
        assert float(first[name]) == pytest.approx(float(other[name]), rel=1e-2)
