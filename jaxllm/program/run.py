"""run: takes real steps with a compiled program and holds every shard against the unsharded reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import jax
import numpy as np
import optax

from jaxllm.program.build import Built
from jaxllm.program.reference import Tree, loss_and_gradients, reference_steps
from jaxllm.report.compare import RunResult
from jaxllm.spec.model import ModelConfig

# What `build` should be given when the program is to be run: at the rates of real training three steps move a
# parameter by so little that its own f32 rounding, 6e-8 of it, is more than TOLERANCE of the move.
LEARNING_RATE = 5e-2

# Largest max|a - b| / max|b| of a tensor, by the narrowest dtype. f32 is the contract (docs/design.md, truth);
# measured: up to 2.3e-6 on llama-tiny (16 layers). bf16 keeps 8 bits, so that each value on the way is up to
# 2^-9 = 0.002 off; after two to sixteen layers the worst element is measured 0.013 to 0.031 off.
TOLERANCE = {"f32": 1e-5, "bf16": 0.1}


def run(built: Built, compiled: Callable[..., Any], *, steps: int = 3, seed: int = 0) -> RunResult:
    """Takes `steps` steps with `compiled`, the executable of built.step, on the devices of built.mesh.

    Parameters, optimizer state and batches are random, made on the host from the seed. `built.gradients` is compiled
    too, for the program itself returns no gradients. Raises whatever the program raises.
    """
    rng = np.random.default_rng(seed)
    abstract, _, rows = built.arguments
    start = jax.tree.map(
        # The reference starts from what the mesh holds, rounded to its dtype.
        lambda host, leaf: host.astype(leaf.dtype).astype(np.float32), random_parameters(built.model, rng), abstract
    )
    batches = [random_batch(built.model, built.workload.batch, built.workload.sequence, rng) for _ in range(steps)]
    moments = random_moments(loss_and_gradients(built.model, start, batches[0])[1], rng)
    reference = list(reference_steps(built.model, start, moments, batches, learning_rates=repeat(built.learning_rate)))

    with jax.set_mesh(built.mesh):
        parameters = _to_mesh(start, abstract)
        # (B, T) -> (microbatches, B/microbatches, T)
        split = [jax.tree.map(lambda x, leaf: x.reshape(leaf.shape), batch, rows) for batch in batches]
        on_mesh = [_to_mesh(batch, rows) for batch in split]
        _, gradients = built.gradients(parameters, on_mesh[0])
        state = built.init_optimizer(parameters)
        for name, moment in zip(("mu", "nu"), moments, strict=True):
            state = optax.tree.set(state, **{name: _to_mesh(moment, optax.tree.get(state, name))})
        metrics = []
        for batch in on_mesh:
            parameters, state, metric = compiled(parameters, state, batch)
            metrics.append({name: float(value) for name, value in metric.items()})

    dtypes = built.workload.dtypes
    narrowest = "bf16" if "bf16" in (dtypes.parameters, dtypes.compute, dtypes.gradients) else "f32"
    errors: dict[str, float] = {}
    for i, (metric, (loss, grads, _)) in enumerate(zip(metrics, reference, strict=True), 1):
        norm = _norm(grads)
        errors[f"loss/{i}"] = abs(metric["loss"] - loss) / loss
        errors[f"gradient_norm/{i}"] = abs(metric["gradient_norm"] - norm) / norm
    _, first_gradients, _ = reference[0]
    _, _, last = reference[-1]
    change = jax.tree.map(np.subtract, last, start)
    errors |= _errors("gradient", gradients, first_gradients)
    errors |= _errors("change", state.get("master", parameters), change, start)
    if "master" in state:
        errors |= _errors("parameters", parameters, last)
    return RunResult(
        steps=steps,
        losses=tuple(metric["loss"] for metric in metrics),
        reference_losses=tuple(loss for loss, _, _ in reference),
        errors=errors,
        tolerance=TOLERANCE[narrowest],
    )


def random_parameters(config: ModelConfig, rng: np.random.Generator) -> Tree:
    """Full parameters without padding, f32: matrices normal, scaled by their inputs; norm weights around 0.4.

    Smaller than 1 so that their rounding in f32 is small beside their change; the head makes up for it, so that
    logits are of order 1 and the gradients' norm is above 1: clipping takes part.
    """
    L, D, F, V = config.layers, config.d_model, config.d_ff, config.vocab
    N, K = config.heads * config.head_dim, config.kv_heads * config.head_dim
    around = 0.4

    def matrix(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale * shape[-2] ** -0.5).astype(np.float32)

    def norm(*shape: int) -> np.ndarray:
        return (around * rng.uniform(0.7, 1.3, shape)).astype(np.float32)

    layers = {
        "attention_norm": norm(L, D), "q": matrix(L, D, N), "k": matrix(L, D, K), "v": matrix(L, D, K),
        "o": matrix(L, N, D), "mlp_norm": norm(L, D), "gate": matrix(L, D, F), "up": matrix(L, D, F),
        "down": matrix(L, F, D),
    }  # fmt: skip
    tree = {"embed": matrix(D, V).T.copy(), "layers": layers, "final_norm": norm(D)}
    return tree if config.tied else tree | {"head": matrix(D, V, scale=1 / around)}


def random_moments(gradients: Tree, rng: np.random.Generator) -> tuple[Tree, Tree]:
    """AdamW's m and v as if training were under way, in proportion to the largest gradient of each tensor.

    From v = 0 the first update is the sign of each gradient: where that is near 0, f32 rounding decides the sign, and
    no two programs agree (measured: 5e-4 apart). A v of this size makes every update a smooth function of the
    gradient. Random moments also show a slice of the optimizer's state that went to the wrong device.
    """
    clip = max(1.0, _norm(gradients))
    largest = jax.tree.map(lambda leaf: np.max(np.abs(leaf)) / clip, gradients)

    def scaled(draw: Callable[[tuple[int, ...]], np.ndarray], power: int) -> Tree:
        return jax.tree.map(lambda leaf, top: (top**power * draw(leaf.shape)).astype(np.float32), gradients, largest)

    return scaled(lambda shape: rng.normal(0, 0.02, shape), 1), scaled(lambda shape: rng.uniform(0.05, 0.15, shape), 2)


def random_batch(config: ModelConfig, batch: int, sequence: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """tokens and targets, int32 (B, T). Each sequence keeps another number of targets, the first none (if B > 1).

    So devices and microbatches hold unequal numbers of targets: a mean of their means is not the mean.
    """
    tokens, targets = rng.integers(0, config.vocab, (2, batch, sequence), dtype=np.int32)
    kept = rng.integers(1, sequence + 1, batch)
    kept[: batch - 1][:1] = 0
    order = rng.permuted(np.tile(np.arange(sequence), (batch, 1)), axis=1)
    return {"tokens": tokens, "targets": np.where(order < kept[:, None], targets, np.int32(-1))}


def _norm(tree: Tree) -> float:
    """The global L2 norm, summed in f64."""
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


def _to_mesh(tree: Tree, like: Tree) -> Tree:
    """Host arrays, padded with zeros, in the shapes, dtypes and shardings of the leaves of `like`."""

    def put(x: np.ndarray, leaf: Any) -> jax.Array:
        return jax.device_put(_padded(x, leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(put, tree, like)


def _padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(x, [(0, held - size) for held, size in zip(shape, x.shape, strict=True)])


def _errors(kind: str, tree: Tree, expected: Tree, start: Tree | None = None) -> dict[str, float]:
    """max|a - b| / max|b| of each tensor a, less its `start`, over the shards of all devices, replicas included."""
    errors = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    zeros = jax.tree.map(np.zeros_like, expected)
    starts = jax.tree.leaves(zeros if start is None else start)
    for (path, a), b, origin in zip(leaves, jax.tree.leaves(expected), starts, strict=True):
        b, origin = _padded(b, a.shape), _padded(origin, a.shape)
        worst = [
            np.max(np.abs(np.asarray(shard.data).astype(np.float32) - origin[shard.index] - b[shard.index]))
            for shard in a.addressable_shards
        ]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        errors[f"{kind}/{name}"] = float(np.max(worst) / np.max(np.abs(b)))  # np.max, as max() would drop a NaN
    return errors
