"""The plain step computes what ours does, and what is committed keeps within its limit."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from experiments import bench_step, common
from jaxllm.program.reference import loss_and_gradients
from jaxllm.program.run import LEARNING_RATES, random_batch, random_parameters, random_slots
from jaxllm.spec.layout import Layout
from jaxllm.spec.workload import Workload

# Degrees of 8 divide every dim; grouped heads, as bench_step's model has none.
MODEL = replace(bench_step.MODEL, layers=2, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=4, vocab=32)
WORKLOAD = Workload(batch=8, sequence=8, precision="f32")
TOLERANCE = 1e-5
RATE = LEARNING_RATES["adamw"]


@pytest.fixture(scope="module")
def start():
    """Parameters, a batch, and moments with which an update is a smooth function of the gradient."""
    rng = np.random.default_rng(0)
    parameters = random_parameters(MODEL, rng)
    batch = random_batch(MODEL, WORKLOAD.batch, WORKLOAD.sequence, rng)
    gradients = loss_and_gradients(MODEL, parameters, batch)[1]
    paths, tree = jax.tree_util.tree_flatten_with_path(gradients)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    shapes = {(slot, name): leaf.shape for slot in ("mu", "nu") for name, leaf in leaves.items()}
    slots = random_slots("adamw", gradients, shapes, rng, "f32")
    return parameters, batch, {slot: jax.tree.unflatten(tree, [slots[slot, name] for name in leaves]) for slot in ("mu", "nu")}


def with_moments(runner, moments):
    parameters, state = runner.state
    for name, moment in moments.items():
        on_mesh = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), moment, optax.tree.get(state, name))
        state = optax.tree.set(state, **{name: on_mesh})
    runner.state = (parameters, state)
    return runner


@pytest.mark.parametrize("text", bench_step.LAYOUTS)
def test_the_plain_step_is_ours_in_loss_parameters_and_slices(text, start):
    parameters, batch, moments = start
    layout = Layout.parse(text)
    ours = with_moments(bench_step.ours(MODEL, layout, WORKLOAD, parameters, batch, RATE), moments)
    plain = with_moments(bench_step.plain(MODEL, layout, parameters, batch, RATE), moments)

    assert ours.take().loss == pytest.approx(plain.take().loss, rel=TOLERANCE)
    left, right = ours.state[0], plain.state[0]
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b, before in zip(*map(jax.tree.leaves, (left, right, parameters)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        change = np.asarray(b) - before
        assert np.max(np.abs(np.asarray(a) - before - change)) <= TOLERANCE * np.max(np.abs(change))
    for name in ("mu", "nu"):
        for a, b in zip(*(jax.tree.leaves(optax.tree.get(x.state[1], name)) for x in (ours, plain)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_plain_step_is_written_in_an_afternoon():
    assert len((common.ROOT / "experiments" / "plain_step.py").read_text().splitlines()) <= 80


class Steady:
    """A step that takes so many seconds by its own account."""

    def __init__(self, seconds, loss=1.0):
        self.taken, self.order = bench_step.Taken(seconds, 2 * seconds, loss), []

    def take(self):
        self.order.append(self)
        return self.taken


def test_pairs_alternate_and_the_first_ones_do_not_count():
    slow, fast = Steady(3.0), Steady(2.0)
    slow.order = fast.order
    taken = bench_step.pairs(slow, fast, 4)
    assert len(taken) == 4
    assert fast.order[:4] == [slow, fast, fast, slow]
    found = bench_step.summary([*taken, (slow.taken, slow.taken)])
    assert (found["ratio"], found["least"], found["most"], found["processor_ratio"]) == (1.5, 1.0, 1.5, 1.5)


def test_steps_that_compute_something_else_are_not_timed():
    with pytest.raises(ValueError, match="their losses are 1.0 and 2.0"):
        bench_step.pairs(Steady(1.0), Steady(1.0, loss=2.0), 1)


def test_what_is_committed_keeps_within_the_limit():
    table = common.read_csv(common.COMMITTED / "bench_step.csv")
    assert [row["layout"] for row in table] == list(bench_step.LAYOUTS)
    assert all(row["pairs"] >= 20 and row["model"] == bench_step.MODEL.name for row in table)
    over = {row["layout"]: row["ratio"] for row in table if row["ratio"] > bench_step.LIMIT}
    assert not over
    assert (common.COMMITTED / "bench_step.png").stat().st_size > 10_000
