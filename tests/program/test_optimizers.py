"""Every optimizer: what it is said to keep is what optax keeps, every line of its step is equal, and its run the reference's."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from jax.tree_util import GetAttrKey

from jaxllm import targets
from jaxllm.check import check, resolve
from jaxllm.program import build, reference, run
from jaxllm.program.transformations import registry
from jaxllm.spec.errors import TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.optimizers import OPTIMIZERS
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict
from tests.test_grid import REQUIRED

# 19 divides by no degree: the vocabulary is padded.
SMALL = ModelConfig(
    name="small", layers=3, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=4, vocab=19, tied=True,
    rope_theta=10000.0, rope_scaling=None, norm_epsilon=1e-5, max_sequence=32, source="test",
)  # fmt: skip

# Large enough for Adafactor to factor all but keys and values, whose 32 columns are too few. 130 needs padding for tensor=4.
WIDE = replace(SMALL, d_model=128, d_ff=192, heads=8, head_dim=16, vocab=130, layers=2)
MODELS = {"adafactor": WIDE, "muon": WIDE}

ELEMENTWISE = [name for name in OPTIMIZERS if name not in MODELS]

# Those that look at whole arrays on every compiler; of the others what they keep differs, and not what is sent.
CELLS = [
    ("sgd", "cpu:8", "data=4,tensor=2,zero=3", "f32"),
    ("momentum", "cpu:8", "pipe=2,data=2,tensor=2,zero=1,microbatches=2", "f32"),
    ("adagrad", "h100:8", "data=4,tensor=2,zero=2", "bf16-master"),
    ("adafactor", "cpu:8", "pipe=2,data=2,tensor=2,zero=3,microbatches=2", "f32"),
    ("adafactor", "h100:8", "replica=2,data=2,tensor=2,zero=2", "bf16-master"),
    ("adafactor", "v5e:2x4", "data=4,tensor=2,zero=3", "bf16-f32"),
    ("lion", "cpu:8", "data=2,tensor=4,zero=1", "f32"),
    ("lion", "v5e:2x4", "data=2,tensor=4,zero=2", "bf16-master"),
    ("muon", "cpu:8", "data=2,tensor=4,zero=3", "f32"),
    ("muon", "h100:8", "data=4,tensor=2,zero=2", "bf16-master"),
    ("muon", "v5e:2x4", "replica=2,data=2,tensor=2,zero=1", "bf16-f32"),
]


def test_both_authors_know_the_same_optimizers() -> None:
    assert set(registry()) == set(OPTIMIZERS) == set(reference.OPTIMIZERS)
    assert set(run.LEARNING_RATES) | set(run.MOVES) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_said_to_be_kept_is_what_optax_keeps(name: str) -> None:
    model = MODELS.get(name, SMALL)
    for layout, precision in ((Layout(), "bf16-master"), (Layout(data=2, zero=1), "f32")):
        workload = Workload(2, 8, precision, name)
        state = build(model, layout, workload, jax.devices()[: layout.devices]).arguments[1]
        leaves = jax.tree_util.tree_leaves_with_path(state[name])
        slots = {key.name for path, _ in leaves for key in path if isinstance(key, GetAttrKey)}
        assert slots - {"count"} == {slot.name for slot in OPTIMIZERS[name].slots}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} <= {"float32"}
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert held == predict(model, layout, workload).line("optimizer").value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_array_is_a_term_of_the_optimizer_line(name: str) -> None:
    found: Ledger = predict(SMALL, Layout.parse("data=2,zero=1"), Workload(2, 8, "bf16-master", name))
    labels = {term.label: term for term in found.line("optimizer").terms}
    for slot in OPTIMIZERS[name].slots:
        assert OPTIMIZERS[name].paper in labels[f"final_norm, {slot.holds}"].source
    assert labels["q, master copy"].value == 4 * 3 * 16 * 16 // 2
    assert labels["step count"].value == 4


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_update_is_the_references(name: str) -> None:
    """Three of them on one device, whose learning rates differ, as a schedule would have it."""
    rng = np.random.default_rng(0)
    draw = lambda: {"embed": rng.normal(size=(8, 4)).astype(np.float32), "layers": {"q": rng.normal(size=(2, 4, 6)).astype(np.float32)}}  # noqa: E731
    ours = theirs = draw()
    state, expected = registry()[name].make(0.0, None).init(ours), reference.begin(name, theirs, {})
    for rate in (0.1, 0.2, 0.3):
        gradients = draw()
        clipped = jax.tree.map(lambda leaf, norm=run._norm(gradients): leaf / max(1.0, norm), gradients)
        updates, state = registry()[name].make(rate, None).update(clipped, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs, expected = reference.update(name, rate, theirs, expected, gradients)
        for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "mesh", "layout", "precision"), CELLS, ids=lambda value: str(value))
def test_every_line_is_equal_and_the_run_is_the_references(name: str, mesh: str, layout: str, precision: str) -> None:
    machine, parsed = Machine.load(mesh), Layout.parse(layout)
    try:
        targets.module(machine.target).devices(machine)
    except TargetError as error:
        if REQUIRED:
            raise
        pytest.skip(f"this machine has no such compiler: {error}")
    model = MODELS.get(name, SMALL)
    workload = resolve(model, parsed, machine, 8, 8, precision, name)
    comparison = check(model, parsed, machine, workload, run=mesh == "cpu:8")
    assert [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"] == []
    assert comparison.unexplained == ()
    if comparison.run is not None:
        assert comparison.run.agrees, comparison.run.errors
        assert comparison.run.max_relative_error > 1e-8


def test_lions_sign_is_its_momentums_from_where_a_run_starts() -> None:
    """Of no element does rounding decide the sign, for a gradient half as large again as the first step's largest."""
    rng = np.random.default_rng(0)
    gradients = {"a": rng.normal(size=(8, 8)), "layers": {"b": rng.normal(size=(2, 8))}}
    shapes = {("mu", "a"): (8, 8), ("mu", "layers.b"): (2, 8)}
    slots = run.random_slots("lion", gradients, shapes, rng, "f32")
    clip = max(1.0, run._norm(gradients))
    for name, leaf in (("a", gradients["a"]), ("layers.b", gradients["layers"]["b"])):
        top = np.abs(leaf).max() / clip
        assert np.all(0.9 * np.abs(slots["mu", name]) > 0.1 * 1.5 * top)
