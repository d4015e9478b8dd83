"""Layouts agree with the unsharded reference, and a program with one bug in it does not."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxllm.model import attention, ring
from jaxllm.program import build, collectives, gradient, optimizer, reference
from jaxllm.program import run as runs
from jaxllm.program.run import LEARNING_RATES, RunResult, _errors, random_batch, random_parameters, run
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


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """The 8 tokens here are three blocks of attention, of which the last is filled up by one."""
    monkeypatch.setattr("jaxllm.spec.attention.LONGEST_BLOCK", 3)


def compiled_for(built):
    # The programs are tiny: LLVM's optimisations take longer than all the steps.
    return built.lower().compile(compiler_options={"xla_backend_optimization_level": 0})


def built_for(layout: str, model: ModelConfig = MODEL, precision: str = "f32"):
    parsed = Layout.parse(layout)
    workload = Workload(batch=8, sequence=8, precision=precision)  # one batch for all, so one compiled reference
    return build(model, parsed, workload, jax.devices()[: parsed.devices], learning_rate=LEARNING_RATES["adamw"])


@functools.cache
def clean(layout: str, model: ModelConfig = MODEL, precision: str = "f32"):
    built = built_for(layout, model, precision)
    return built, compiled_for(built)


HYBRID = "replica=2,data=2,tensor=2,zero=2,microbatches=2"
ZERO3 = "replica=2,data=2,tensor=2,zero=3,remat=full,microbatches=2"
MASTER = "data=2,tensor=2,zero=1,microbatches=2"
BLOCKS = "data=2,tensor=4,zero=3,microbatches=2,remat=full,save=attention,sequence=true,attention=blockwise"
RING = "data=2,context=4,zero=3,remat=full,microbatches=2,attention=blockwise"
RING_OF_CUTS = "replica=2,context=2,tensor=2,zero=1,sequence=true,attention=blockwise"
BY_HEADS = "data=2,context=2,zero=2,microbatches=2,exchange=ulysses"
CUT = "data=2,tensor=4,zero=1,microbatches=2,remat=selective,sequence=true"

LAYOUTS = [
    ("data=1,microbatches=4", TIED, "f32"),
    ("data=2,tensor=4,zero=1,microbatches=2", MODEL, "f32"),
    ("data=4,zero=3,microbatches=2", ODD, "f32"),
    (HYBRID, MODEL, "f32"),
    (ZERO3, TIED, "f32"),
    (MASTER, MODEL, "bf16-master"),
    (CUT, MODEL, "f32"),
    ("data=2,tensor=2,zero=3,remat=full,save=qkv+residual,sequence=true", MODEL, "f32"),
    (BLOCKS, MODEL, "f32"),
    ("replica=2,tensor=2,zero=2,attention=blockwise", TIED, "f32"),
    (RING, TIED, "f32"),
    (RING_OF_CUTS, MODEL, "f32"),
    (BY_HEADS, MODEL, "f32"),
    ("data=2,context=2,zero=3,remat=full,exchange=ulysses,attention=blockwise", ODD, "f32"),
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
    def scattered(x, axes, dim):
        names = collectives.present(axes)
        first = lax.axis_index(names) == 0
        return lax.psum_scatter(jnp.where(first, x, 0), names, scatter_dimension=dim, tiled=True)

    return collectives, "scattered_total", scattered


def scattered_to_the_neighbour():
    right = collectives.scattered_total

    def scattered(x, axes, dim):
        return lax.ppermute(right(x, axes, dim), "data", [(0, 1), (1, 0)])

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


def norms_not_summed_over_tensor():
    """What is applied to a part of the positions has a part of the gradient."""
    return mutate_total(lambda x, axes: x.shape in ((8,), (2, 8)) and axes == ("tensor",), first_only)


def positions_in_the_wrong_order():
    right = collectives.scattered_total

    def scattered(x, axes, dim):
        part = right(x, axes, dim)
        return lax.ppermute(part, axes, [(0, 1), (1, 0), (2, 2), (3, 3)]) if axes == ("tensor",) else part

    return collectives, "scattered_total", scattered


def gathered_in_the_wrong_order():
    right = collectives.gathered
    return collectives, "gathered", lambda x, axes, dim: right(lax.ppermute(x, "data", [(0, 1), (1, 0)]), axes, dim)


def no_reduction_over_context():
    def scattered(x, axes, dim):
        first = lax.axis_index("context") == 0
        return lax.psum_scatter(jnp.where(first, x, 0), collectives.present(axes), scatter_dimension=dim, tiled=True)

    return collectives, "scattered_total", scattered


def round_the_wrong_way():
    return collectives, "passed_on", lambda x, axis: lax.ppermute(x, axis, [(i, (i - 1) % 4) for i in range(4)])


def front_and_back_in_the_wrong_order():
    """Each device takes its two parts for what they are not: every query meets the keys that its own device has last."""
    right = ring.pair

    def pair(of, step, number, count):
        i, j = right(of, step, number, count)
        return i, (j + number) % (2 * number)

    return ring, "pair", pair


def heads_of_the_neighbour():
    right = collectives.exchanged
    return collectives, "exchanged", lambda x, axis, given, taken: lax.ppermute(right(x, axis, given, taken), axis, [(0, 1), (1, 0)])


def diagonal_blocks_skipped():
    """Every query meets the keys of the blocks before its own, and not those of its own block."""
    right = attention.lower_triangle

    def below(step, start, number):
        keep = lambda old, new, i, j: jax.tree.map(lambda a, b: jnp.where(i == j, a, b), old, new)  # noqa: E731
        return right(lambda carry, i, j: keep(carry, step(carry, i, j), i, j), start, number)

    return attention, "lower_triangle", below


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
    (norms_not_summed_over_tensor, CUT, ("gradient_norm/1", "change/layers.mlp_norm")),
    (positions_in_the_wrong_order, CUT, ("loss/1", "change/layers.q")),
    (no_reduction_over_context, RING, ("gradient_norm/1", "change/layers.q")),
    (round_the_wrong_way, RING, ("gradient_norm/1", "change/layers.q")),
    (front_and_back_in_the_wrong_order, RING, ("loss/1", "change/layers.q")),
    (heads_of_the_neighbour, BY_HEADS, ("loss/1", "change/layers.q")),
    (diagonal_blocks_skipped, BLOCKS, ("loss/1", "change/layers.q")),
    (master_copy_not_updated, MASTER, ("change/head", "parameters/head")),
    # In bf16 the tolerance is wide; what a wrong collective does is wider.
    (no_reduction_over_data, MASTER, ("gradient_norm/1", "change/layers.q")),
    (no_all_reduce_over_tensor_backward, MASTER, ("gradient_norm/1", "change/embed")),
]


@pytest.mark.parametrize(("mutation", "layout", "shown"), MUTATIONS, ids=[f"{row[0].__name__}-{row[1]}" for row in MUTATIONS])
def test_mutation_disagrees(mutation, layout, shown, monkeypatch):
    precision, model = ("bf16-master" if layout == MASTER else "f32"), (TIED if layout in (ZERO3, RING) else MODEL)
    built, _ = clean(layout, model, precision)
    monkeypatch.setattr(*mutation())
    mutant = compiled_for(built_for(layout, model, precision))
    monkeypatch.undo()
    result = run(built, mutant)
    assert not result.agrees
    # Far outside the tolerance, so that no change of rounding hides it.
    for name in shown:
        assert result.errors[name] > 0.01, (name, result.errors[name])


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "bf16"), ("momentum", "bf16"), ("sgd", "f32"), ("lion", "f32"), ("lion", "bf16"), ("lion", "bf16-moments")])
def test_what_rounding_explains_hides_no_mutation(optimizer, precision, monkeypatch):
    """Parameters in bf16, small moves, and a momentum that is far from zero: every gradient shows all the same."""

    def made():
        parsed = Layout.parse(HYBRID)
        work = Workload(batch=8, sequence=8, precision=precision, optimizer=optimizer)
        rate = runs.learning_rate(optimizer, MODEL)
        return build(MODEL, parsed, work, jax.devices()[: parsed.devices], learning_rate=rate)

    monkeypatch.setattr(*no_reduction_over_data())
    mutant = compiled_for(made())
    monkeypatch.undo()
    result = run(made(), mutant)
    gradients = [error for name, error in result.errors.items() if name.startswith("gradient/")]
    assert not result.agrees and min(gradients) > 0.2


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
    """Where an array of (2, 3) is that is without its padding of that shape."""
    return {"a": Placement((2, 3), logical, False, None, None, False)}


def test_every_replica_is_compared():
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    wrong = expected.copy()
    wrong[1, 0] += 0.5
    places = held_as(2, 3)
    assert _errors(places, "kind", {"a": replicated([expected, expected])}, {"a": expected}) == {"kind/a": 0}
    assert _errors(places, "kind", {"a": replicated([expected, wrong])}, {"a": expected}) == {"kind/a": pytest.approx(0.1)}


def test_what_updates_round_away_is_no_error():
    """Half of the last bit of what is held, in each of three; of what begins at 0, and of what moves further, all counts."""
    start = np.array([[1, 1, 1], [0, 1, 1]], np.float32)
    moved = np.full((2, 3), 1e-6, np.float32)
    bit = 2.0**-23
    held = start + moved + bit * np.array([[0, 1, -1], [0, 0, 0]], np.float32)
    places = held_as(2, 3)
    assert _errors(places, "kind", {"a": replicated([held, held])}, {"a": moved}, {"a": start})["kind/a"] < 1e-6
    held[0, 0] += 8 * bit
    assert _errors(places, "kind", {"a": replicated([held, held])}, {"a": moved}, {"a": start})["kind/a"] > 0.7
    held[0, 0], held[1, 0] = 1, 2e-6
    assert _errors(places, "kind", {"a": replicated([held, held])}, {"a": moved}, {"a": start})["kind/a"] == pytest.approx(1)


def test_a_tensor_has_a_size_as_a_whole(monkeypatch):
    monkeypatch.setattr(runs, "MANY", 6)
    expected = np.array([[1, -2, 3], [4, 5, -6]], np.float32)
    noise = np.array([[2, 1, 0], [0, 0, 0]], np.float32)  # at right angles

    def size(found):
        return _errors(held_as(2, 3), "kind", {"a": replicated([expected, found])}, {"a": expected}, measure=runs._size)["kind/a"]

    assert size(expected + noise) == pytest.approx(0, abs=1e-7) and size(1.25 * expected) == pytest.approx(0.25)
    monkeypatch.setattr(runs, "MANY", 7)
    assert size(2 * expected) == 0


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
