"""Batches, parameters, evaluation and checkpoints are the same on every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxllm.program import build, reference
from jaxllm.program.build import natural
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.train import checkpoint
from jaxllm.train.batches import evaluation_batches, training_batch
from jaxllm.train.loop import evaluate
from jaxllm.train.text import Text

# 257 divides by no degree: the vocabulary is padded, differently for each tensor degree.
MODEL = ModelConfig(
    name="tiny", layers=5, d_model=16, d_ff=24, heads=4, kv_heads=2, head_dim=4, vocab=257, tied=False,
    rope_theta=10000.0, rope_scaling=None, norm_epsilon=1e-5, max_sequence=32, source="test",
)  # fmt: skip
SEQUENCE = 12
TOKENS = np.random.default_rng(3).integers(0, 256, 2000).astype(np.uint8)
TEXT = Text("text", "bytes", "", 2000, TOKENS, 250)
LAYOUTS = ("data=1", "data=4,tensor=2,zero=3", "replica=2,data=2,tensor=2,zero=1,microbatches=2", "tensor=4", "data=8,zero=2")
RING = "pipe=2,data=2,tensor=2,zero=1,microbatches=4,schedule=interleaved,partition=time"
V = "pipe=2,data=2,zero=3,microbatches=2,schedule=zb-v"
PARTS = "data=2,context=2,zero=3,attention=blockwise"  # each device of a ring has two parts of a sequence


# Large enough that Adafactor factors some of its weights.
WIDE = replace(MODEL, d_model=128, d_ff=144, heads=8, head_dim=16)


def built_for(layout: str, precision: str = "f32", optimizer: str = "adamw"):
    parsed = Layout.parse(layout)
    model = MODEL if optimizer == "adamw" else WIDE
    return build(model, parsed, Workload(16, SEQUENCE, precision, optimizer), jax.devices()[: parsed.devices])


def whole(tree, built):
    """As NumPy arrays in the model's own shapes."""

    def own(leaf, place):
        return np.asarray(leaf) if place is None else np.asarray(natural(np.asarray(leaf), place))

    return {
        jax.tree_util.keystr(path): own(leaf, built.place_of(path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def rows(batch) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.asarray(batch[name]).reshape(-1, SEQUENCE) for name in ("tokens", "targets"))


@pytest.mark.parametrize("layout", (*LAYOUTS, PARTS))
def test_a_batch_depends_on_seed_and_step_alone(layout) -> None:
    built = built_for(layout)
    order = built.positions
    assert (layout == PARTS) == (list(order) != list(range(SEQUENCE)))
    tokens, targets = (part[:, np.argsort(order)] for part in rows(training_batch(TEXT, built, 1, 5)))
    starts = np.random.default_rng([1, 5]).integers(0, 1750 - SEQUENCE, 16)
    assert np.array_equal(tokens, TOKENS[starts[:, None] + np.arange(SEQUENCE)])
    assert np.array_equal(targets, TOKENS[starts[:, None] + np.arange(SEQUENCE) + 1])
    assert tokens.dtype == targets.dtype == np.int32
    assert not np.array_equal(rows(training_batch(TEXT, built, 1, 6))[0], tokens)
    assert not np.array_equal(rows(training_batch(TEXT, built, 2, 5))[0], tokens)


def test_training_never_sees_what_is_held_out() -> None:
    built = built_for("data=8,zero=2")
    marked = Text("text", "bytes", "", 2000, np.r_[np.zeros(1750, np.uint8), np.full(250, 9, np.uint8)], 250)
    assert all(not np.any(np.asarray(training_batch(marked, built, 0, step)["targets"]) == 9) for step in range(200))
    # and the last token of the training part is a target at times
    edge = Text("text", "bytes", "", 2000, np.r_[np.zeros(1749, np.uint8), 9, np.zeros(250, np.uint8)], 250)
    assert any(np.any(np.asarray(training_batch(edge, built, 0, step)["targets"]) == 9) for step in range(200))


def test_evaluation_goes_through_the_held_out_text_once() -> None:
    batches = list(evaluation_batches(TEXT, built_for("data=4,tensor=2,zero=3")))
    count = (250 - 1) // SEQUENCE
    assert sum(targets for targets, _ in batches) == count * SEQUENCE
    tokens, targets = (np.concatenate(part) for part in zip(*(rows(batch) for _, batch in batches), strict=True))
    assert np.array_equal(tokens[:count].ravel(), TOKENS[1750 : 1750 + count * SEQUENCE])
    assert np.array_equal(targets[:count].ravel(), TOKENS[1751 : 1751 + count * SEQUENCE])
    assert np.all(targets[count:] == -1)


@pytest.mark.parametrize("layout", (*LAYOUTS[1:3], RING, V))
def test_parameters_are_the_same_on_every_layout(layout) -> None:
    plain, built = built_for("data=1"), built_for(layout)
    expected, parameters = whole(plain.init_parameters(4), plain), built.init_parameters(4)
    found = whole(parameters, built)
    assert found.keys() == expected.keys()
    for name, drawn in expected.items():  # of 257 rows a device of RING draws an odd part: XLA:CPU rounds its end otherwise
        np.testing.assert_allclose(found[name], drawn, rtol=0, atol=2e-7 * np.abs(drawn).max() * (layout == RING), err_msg=name)
    assert jax.tree.map(lambda leaf: leaf.sharding, parameters) == jax.tree.map(
        lambda leaf: leaf.sharding, built.arguments[0]
    )
    # Padding is zero, as are rows that no stage needs, so that it stays so: no gradient, and decay of nothing.
    assert sum(float(np.abs(leaf).sum()) for leaf in found.values()) == pytest.approx(
        sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(parameters))
    )


@pytest.mark.parametrize("layout", (*LAYOUTS[1:4], V, PARTS))
def test_the_forward_pass_alone_gives_the_loss_of_the_reference(layout) -> None:
    built = built_for(layout)
    parameters, batch = built.init_parameters(0), training_batch(TEXT, built, 0, 0)
    plain = built_for("data=1")
    natural_order = np.argsort(built.positions)
    rows_ = {name: part[:, natural_order] for name, part in zip(("tokens", "targets"), rows(batch), strict=True)}
    expected = jax.jit(partial(reference.loss, MODEL))(plain.init_parameters(0), rows_)
    assert float(built.loss(parameters, batch)) == pytest.approx(float(expected), rel=1e-6)
    assert evaluate(built, parameters, TEXT) == pytest.approx(np.log(257), rel=0.02)  # before training: a guess


@pytest.mark.parametrize(("saved", "loaded", "precision", "optimizer"), [
    (LAYOUTS[1], LAYOUTS[2], "f32", "adamw"), (LAYOUTS[2], "tensor=4", "bf16-master", "adamw"),
    ("data=1", "data=8,zero=2", "bf16-f32", "adamw"), (RING, V, "f32", "adamw"), (V, LAYOUTS[1], "bf16-master", "adamw"),
    ("data=1", RING, "f32", "adamw"), (RING, LAYOUTS[1], "bf16-master", "adafactor"), (LAYOUTS[2], V, "f32", "adafactor"),
    (V, LAYOUTS[1], "f32", "muon"), ("tensor=4", RING, "f32", "sgd"),
    (PARTS, LAYOUTS[2], "f32", "adamw"), ("data=4,zero=1", "data=2,tensor=2", "fp8", "adamw"),
])  # fmt: skip
def test_a_checkpoint_is_taken_up_by_another_layout(tmp_path, saved, loaded, precision, optimizer) -> None:
    built = built_for(saved, precision, optimizer)
    parameters = built.init_parameters(1)
    draw = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(draw.integers(1, 99, leaf.shape).astype(leaf.dtype), leaf.sharding), built.arguments[1]
    )
    with checkpoint.opened(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, 1, built, parameters, state)
        checkpoint.finish(manager)
        assert manager.latest_step() == 1
        other = built_for(loaded, precision, optimizer)
        back = checkpoint.restore(manager, 1, other)
    expected, found = whole((parameters, state), built), whole(back, other)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    for leaf, like in zip(jax.tree.leaves(back), jax.tree.leaves(other.arguments[:2]), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)


def test_a_checkpoint_that_was_damaged_is_told(tmp_path) -> None:
    built = built_for("data=1")
    parameters = built.init_parameters(1)
    state = built.init_optimizer(parameters)
    with checkpoint.opened(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, 3, built, parameters, state)
        checkpoint.finish(manager)
        for file in (tmp_path / "checkpoints" / "3").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(SpecError, match="3' cannot be read .*move it away"):
            checkpoint.restore(manager, 3, built)
