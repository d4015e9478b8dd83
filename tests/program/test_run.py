"""Layouts agree with the unsharded reference, and a program with one bug in it does not."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxllm.program import build, collectives, gradient, optimizer, reference
from jaxllm.program.run import LEARNING_RATE, RunResult, _errors, random_batch, random_parameters, run
from jaxllm.program.sharding import Placement
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

# 17 divides by no degree: the vocabulary is padded. Two key/value heads are fewer than tensor=4.
MODEL = ModelConfig(
    name="tiny", layers=2, d_model=8, d_ff=12, heads=4, kv_heads=2, head_dim=4, vocab=17, tied=False,
    rope_theta=10000.0, rope_scaling=None, norm_epsilon=1e-5, max_sequence=32, source="test",
)  # fmt: skip
TIED = replace(MODEL, tied=True)
ODD = replace(MODEL, d_model=10, d_ff=9, vocab=19)  # ZeRO over 4 finds no dim of the norms that divides


def compiled_for(built):
    # The programs are tiny: LLVM's optimisations take longer than all the steps.
    return built.lower().compile(compiler_options={"xla_backend_optimization_level": 0})


def built_for(layout: str, model: ModelConfig = MODEL, precision: str = "f32"):
    parsed = Layout.parse(layout)
    workload = Workload(batch=8, sequence=8, precision=precision)  # one batch for all, so one compiled reference
    return build(model, parsed, workload, jax.devices()[: parsed.devices], learning_rate=LEARNING_RATE)


@functools.cache
def clean(layout: str, model: ModelConfig = MODEL, precision: str = "f32"):
    built = built_for(layout, model, precision)
    return built, compiled_for(built)


HYBRID = "replica=2,data=2,tensor=2,zero=2,microbatches=2"
ZERO3 = "replica=2,data=2,tensor=2,zero=3,remat=full,microbatches=2"
MASTER = "data=2,tensor=2,zero=1,microbatches=2"

LAYOUTS = [
    ("data=1,microbatches=4", TIED, "f32"),
    ("data=2,tensor=4,zero=1,microbatches=2", MODEL, "f32"),
    ("data=4,zero=3,microbatches=2", ODD, "f32"),
    (HYBRID, MODEL, "f32"),
    (ZERO3, TIED, "f32"),
    (MASTER, MODEL, "bf16-master"),
]


@pytest.mark.parametrize(("layout", "model", "precision"), LAYOUTS, ids=[f"{x}-{z}" for x, _, z in LAYOUTS])
def test_layout_agrees(layout, model, precision):
    result = run(*clean(layout, model, precision))
    assert result.agrees, result.errors
    assert result.tolerance == (1e-5 if precision == "f32" else 0.1)
    assert len(result.losses) == result.steps == 3
    np.testing.assert_allclose(result.losses, result.reference_losses, rtol=1e-5 if precision == "f32" else 1e-2)
    # Nothing is compared with itself: f32 sums in another order differ somewhere.
    assert result.max_relative_error > 1e-8
    tensors = 11 if model.tied else 12
    kinds = [name.split("/")[0] for name in result.errors]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "loss": 3, "gradient_norm": 3, "gradient": tensors, "change": tensors,
    } | ({"parameters": tensors} if precision == "bf16-master" else {})  # fmt: skip


# ---------------------------------------------------------------- one bug each


def first_only(x, axes):
    """x on the first device along the axes, zero elsewhere: its sum is what one device has, as if never reduced."""
    first = functools.reduce(jnp.logical_and, [lax.axis_index(axis) == 0 for axis in axes])
    return lax.psum(jnp.where(first, x, 0), tuple(axes))


def mutate_total(condition, wrong):
    """collectives.total, with `wrong` in its place where the condition on the array and the axes holds."""
    right = collectives.total

    def total(x, axes):
        names = collectives.present(axes)
        return wrong(x, names) if names and condition(x, names) else right(x, names)

    return collectives, "total", total


def reduced_over_tensor_instead_of_replica():
    def wrong(x, axes):
        summed = lax.psum(lax.pcast(x, "tensor", to="varying") if "tensor" not in varying(x) else x, "tensor")
        result = first_only(summed, axes)
        return lax.pcast(result, "tensor", to="varying") if "tensor" in varying(x) else result

    return mutate_total(lambda x, axes: x.ndim and axes == ("replica",), wrong)


def varying(x):
    return jax.typeof(x).manual_axis_type.varying


def no_reduction_over_data():
    def scattered(x, axis, dim):
        first = lax.axis_index(axis) == 0
        return lax.psum_scatter(jnp.where(first, x, 0), axis, scatter_dimension=dim, tiled=True)

    return collectives, "scattered_total", scattered


def scattered_to_the_neighbour():
    right = collectives.scattered_total

    def scattered(x, axis, dim):
        return lax.ppermute(right(x, axis, dim), axis, [(0, 1), (1, 0)])

    return collectives, "scattered_total", scattered


def no_all_reduce_over_tensor_forward():
    return mutate_total(lambda x, axes: x.ndim == 3 and axes == ("tensor",), first_only)


def no_all_reduce_over_tensor_backward():
    right = collectives.vary

    def vary(x, axes):
        y = right(x, axes)
        if collectives.present(axes) != ("tensor",) or x.ndim != 3:
            return y
        return jnp.where(lax.axis_index("tensor") == 0, y, lax.stop_gradient(y))

    return collectives, "vary", vary


def mean_of_means():
    """Divides by the largest number of targets of a device times the devices, not by the number of all targets."""
    calls = []

    def token_count(x, axes):  # the first of two scalars summed over the batch; the second is the loss
        calls.append(x.ndim == 0 and axes == ("replica", "data"))
        return calls[-1] and sum(calls) == 1

    return mutate_total(token_count, lambda x, axes: lax.pmax(x, axes) * 4)


def microbatches_overwrite():
    def accumulate(accumulated, gradients, place, *, index, layout):
        gradients = gradient.reduce_each(gradients, place, accumulated.dtype, layout, layer=True)
        return lax.dynamic_update_index_in_dim(accumulated, gradients, index, 0)

    return gradient, "accumulate_layer", accumulate


def not_clipped():
    return optimizer, "CLIP_NORM", 1e9


def master_copy_not_updated():
    right = optimizer.update

    def update(parameters, state, *rest, **more):
        new, after = right(parameters, state, *rest, **more)
        return new, after | {"master": state["master"]}

    return optimizer, "update", update


def gathered_in_the_wrong_order():
    right = collectives.gathered
    return collectives, "gathered", lambda x, axis, dim: right(lax.ppermute(x, axis, [(0, 1), (1, 0)]), axis, dim)


# What is wrong, with what, and the errors that must show it.
MUTATIONS = [
    (reduced_over_tensor_instead_of_replica, HYBRID, ("gradient_norm/1", "change/layers.q")),
    (no_reduction_over_data, HYBRID, ("gradient_norm/1", "change/layers.q")),
    (scattered_to_the_neighbour, HYBRID, ("change/embed", "change/layers.down")),
    (no_all_reduce_over_tensor_forward, HYBRID, ("loss/1", "gradient_norm/1")),
    (no_all_reduce_over_tensor_backward, HYBRID, ("gradient_norm/1", "change/embed")),
    (mean_of_means, HYBRID, ("loss/1", "gradient_norm/1")),
    (microbatches_overwrite, HYBRID, ("gradient_norm/1", "change/layers.gate")),
    (not_clipped, HYBRID, ("change/head",)),
    (gathered_in_the_wrong_order, ZERO3, ("loss/1", "gradient_norm/1")),
    (master_copy_not_updated, MASTER, ("change/head", "parameters/head")),
    # In bf16 the tolerance is wide; what a wrong collective does is wider.
    (no_reduction_over_data, MASTER, ("gradient_norm/1", "change/layers.q")),
    (no_all_reduce_over_tensor_backward, MASTER, ("gradient_norm/1", "change/embed")),
]


@pytest.mark.parametrize(("mutation", "layout", "shown"), MUTATIONS, ids=[f"{row[0].__name__}-{row[1]}" for row in MUTATIONS])
def test_mutation_disagrees(mutation, layout, shown, monkeypatch):
    precision, model = ("bf16-master" if layout == MASTER else "f32"), (TIED if layout == ZERO3 else MODEL)
    built, _ = clean(layout, model, precision)
    monkeypatch.setattr(*mutation())
    mutant = compiled_for(built_for(layout, model, precision))
    monkeypatch.undo()
    result = run(built, mutant)
    assert not result.agrees
    # Far outside the tolerance, so that no change of rounding hides it.
    for name in shown:
        assert result.errors[name] > 0.01, (name, result.errors[name])


def test_a_first_moment_that_is_not_the_references_disagrees():
    """Neither loss nor norm nor the parameters after one step would show it."""
    built, compiled = clean(HYBRID)

    def wrong(*arguments):
        parameters, state, metric = compiled(*arguments)
        larger = jax.tree.map(lambda moment: 1.01 * moment, optax.tree.get(state, "mu"))
        return parameters, optax.tree.set(state, mu=larger), metric

    result = run(built, wrong, steps=1)
    assert not result.agrees
    bad = {name.split("/")[0] for name, error in result.errors.items() if error > result.tolerance}
    assert bad == {"gradient"}


# ---------------------------------------------------------------- the comparison itself


def replicated(values):
    """An array (2, 3) whose replicas on two devices hold these values, equal or not."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    parts = [jax.device_put(np.float32(value), device) for value, device in zip(values, mesh.devices, strict=True)]
    return jax.make_array_from_single_device_arrays((2, 3), sharding, parts)


def held_as(*logical):
    """What _errors asks of a program: that its one array of (2, 3) is without its padding of that shape."""
    return SimpleNamespace(places={"a": Placement((2, 3), logical, False, None, None, False)})


def test_every_replica_is_compared():
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    wrong = expected.copy()
    wrong[1, 0] += 0.5
    built = held_as(2, 3)
    assert _errors(built, "kind", {"a": replicated([expected, expected])}, {"a": expected}) == {"kind/a": 0}
    assert _errors(built, "kind", {"a": replicated([expected, wrong])}, {"a": expected}) == {"kind/a": pytest.approx(0.1)}


def test_padding_has_to_stay_zero():
    expected = np.ones((2, 2), np.float32)
    held = np.array([[1, 1, 0], [1, 1, 0.25]])
    assert _errors(held_as(2, 2), "kind", {"a": replicated([held, held])}, {"a": expected}) == {"kind/a": 0.25}


def test_nan_never_agrees():
    result = RunResult(3, (), (), {"loss/1": 0.0, "change/a": float("nan"), "change/b": 0.0}, tolerance=1e-5)
    assert np.isnan(result.max_relative_error)
    assert not result.agrees
    assert RunResult(3, (), (), {"loss/1": 1e-5}, tolerance=1e-5).agrees
    assert not RunResult(3, (), (), {"loss/1": 1.1e-5}, tolerance=1e-5).agrees


def test_batch_is_masked_unevenly():
    batch = random_batch(MODEL, 8, 16, np.random.default_rng(3))
    kept = (batch["targets"] >= 0).sum(axis=1)
    assert kept[0] == 0
    assert len(set(kept)) > 4
    assert batch["targets"].min() == -1
    assert {batch["tokens"].dtype, batch["targets"].dtype} == {np.dtype(np.int32)}
    assert 0 <= batch["tokens"].min() and batch["tokens"].max() < MODEL.vocab
    assert (random_batch(MODEL, 1, 16, np.random.default_rng(3))["targets"] >= 0).any()


def test_clipping_is_at_work():
    """The parameters that run() starts from have gradients of a norm above 1, or not_clipped would prove nothing."""
    rng = np.random.default_rng(0)
    parameters = random_parameters(MODEL, rng)
    batch = random_batch(MODEL, 8, 8, rng)
    _, gradients = reference.loss_and_gradients(MODEL, parameters, batch)
    assert np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients))) > 1.2


def test_the_learning_rate_rises_and_falls_with_the_inverse_square_root():
    from jaxllm.program.optimizer import rate

    assert rate(0.5, 0, 7) == 0.5
    rates = [float(rate(1.0, 4, count)) for count in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[15] == pytest.approx(0.5) and rates[8] == pytest.approx(2 / 3)
