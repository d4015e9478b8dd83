"""run: takes real steps with a compiled program and holds every shard against the unsharded reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import repeat
from typing import Any

import jax
import numpy as np
import optax

from jaxllm.program.build import Built, arranged
from jaxllm.program.reference import B1, Tree, loss_and_gradients, reference_steps
from jaxllm.program.sharding import Placement, is_placement
from jaxllm.report.compare import RunResult
from jaxllm.spec.model import ModelConfig

# What `build` should be given when the program is to be run: at the rates of real training three steps move a
# parameter by so little that its own f32 rounding, 6e-8 of it, is more than TOLERANCE of the move.
LEARNING_RATE = 5e-2

# Largest max|a - b| / max|b| of a tensor, by the narrowest dtype. f32 is the contract (docs/design.md, truth);
# measured: up to 2.3e-6 on llama-tiny (16 layers). bf16 keeps 8 bits, so that each value on the way is up to
# 2^-9 = 0.002 off; after two to sixteen layers the worst element is measured 0.013 to 0.031 off.
TOLERANCE = {"f32": 1e-5, "bf16": 0.1}

# A tensor whose largest element is a smaller share of the largest of all tensors is zero but for rounding. The gradient
# of a key's bias is: it adds the same to all scores of a query, which softmax does not see. Measured: 5e-9 of the
# largest on gpt-tiny, where the next smallest gradient is 7e-3.
ROUNDING = 1e-6


def run(built: Built, compiled: Callable[..., Any], *, steps: int = 3, seed: int = 0) -> RunResult:
    """Takes `steps` steps with `compiled`, the executable of built.step, on the devices of built.mesh.

    Parameters, optimizer state and batches are random, made on the host from the seed. The program returns no gradients:
    they are what the first step adds to AdamW's first moment. Raises whatever the program raises.
    """
    abstract, _, rows = built.arguments
    workload = built.workload
    held = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(abstract))
    start, moments, batches, reference = _reference(
        built.model, workload.batch, workload.sequence, held, built.learning_rate, steps, seed
    )
    _, first, _ = reference[0]
    clipped = jax.tree.map(lambda gradient: gradient / max(1.0, _norm(first)), first)
    added, decayed = jax.tree.map(lambda g: (1 - B1) * g, clipped), jax.tree.map(lambda m: B1 * m, moments[0])

    errors: dict[str, float] = {}
    with jax.set_mesh(built.mesh):
        parameters = _to_mesh(built, start, abstract)
        # (B, T) -> (microbatches, B/microbatches, T)
        split = [jax.tree.map(lambda x, leaf: x.reshape(leaf.shape), batch, rows) for batch in batches]
        on_mesh = [jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, rows)) for batch in split]
        state = built.init_optimizer(parameters)
        for name, moment in zip(("mu", "nu"), moments, strict=True):
            state = optax.tree.set(state, **{name: _to_mesh(built, moment, optax.tree.get(state, name))})
        metrics = []
        for batch in on_mesh:
            parameters, state, metric = compiled(parameters, state, batch)
            metrics.append({name: float(value) for name, value in metric.items()})
            errors = errors or _errors(built, "gradient", optax.tree.get(state, "mu"), added, decayed)

    dtypes = workload.dtypes
    narrowest = "bf16" if "bf16" in (dtypes.parameters, dtypes.compute, dtypes.gradients) else "f32"
    for i, (metric, (loss, grads, _)) in enumerate(zip(metrics, reference, strict=True), 1):
        norm = _norm(grads)
        errors[f"loss/{i}"] = abs(metric["loss"] - loss) / loss
        errors[f"gradient_norm/{i}"] = abs(metric["gradient_norm"] - norm) / norm
    _, _, last = reference[-1]
    change = jax.tree.map(np.subtract, last, start)
    errors |= _errors(built, "change", state.get("master", parameters), change, start)
    if "master" in state:
        errors |= _errors(built, "parameters", parameters, last)
    return RunResult(
        steps=steps,
        losses=tuple(metric["loss"] for metric in metrics),
        reference_losses=tuple(loss for loss, _, _ in reference),
        errors=errors,
        tolerance=TOLERANCE[narrowest],
    )


@lru_cache(maxsize=8)  # of one model many layouts are run
def _reference(
    model: ModelConfig, batch: int, sequence: int, dtypes: tuple[str, ...], learning_rate: float, steps: int, seed: int
) -> tuple[Tree, tuple[Tree, Tree], list[dict[str, np.ndarray]], list[tuple[float, Tree, Tree]]]:
    """Where training starts (parameters that the mesh holds in `dtypes`, moments), the batches, and the reference's steps."""
    rng = np.random.default_rng(seed)
    full = random_parameters(model, rng)
    leaves, shape = jax.tree.flatten(full)
    # The reference starts from what the mesh holds, rounded to its dtype.
    held = [leaf.astype(dtype).astype(np.float32) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    start = jax.tree.unflatten(shape, held)
    batches = [random_batch(model, batch, sequence, rng) for _ in range(steps)]
    moments = random_moments(loss_and_gradients(model, start, batches[0])[1], rng)
    reference = reference_steps(model, start, moments, batches, learning_rates=repeat(learning_rate))
    return start, moments, batches, list(reference)


def random_parameters(config: ModelConfig, rng: np.random.Generator) -> Tree:
    """Full parameters without padding, f32: matrices normal, scaled by their inputs; norm weights around 0.4, biases
    around 0.

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

    def bias(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    if config.family == "gpt":
        layers = {
            "attention_norm": norm(L, D), "attention_norm_bias": bias(L, D), "q": matrix(L, D, N), "q_bias": bias(L, N),
            "k": matrix(L, D, N), "k_bias": bias(L, N), "v": matrix(L, D, N), "v_bias": bias(L, N),
            "o": matrix(L, N, D), "o_bias": bias(L, D), "mlp_norm": norm(L, D), "mlp_norm_bias": bias(L, D),
            "up": matrix(L, D, F), "up_bias": bias(L, F), "down": matrix(L, F, D), "down_bias": bias(L, D),
        }  # fmt: skip
        ends = {"positions": matrix(D, config.max_sequence).T.copy(), "final_norm_bias": bias(D)}
    else:
        layers = {
            "attention_norm": norm(L, D), "q": matrix(L, D, N), "k": matrix(L, D, K), "v": matrix(L, D, K),
            "o": matrix(L, N, D), "mlp_norm": norm(L, D), "gate": matrix(L, D, F), "up": matrix(L, D, F),
            "down": matrix(L, F, D),
        }  # fmt: skip
        ends = {}
    tree = {"embed": matrix(D, V).T.copy(), "layers": layers, "final_norm": norm(D)} | ends
    return tree if config.tied else tree | {"head": matrix(D, V, scale=1 / around)}


def random_moments(gradients: Tree, rng: np.random.Generator) -> tuple[Tree, Tree]:
    """AdamW's m and v as if training were under way, in proportion to the largest gradient of each tensor.

    From v = 0 the first update is the sign of each gradient: where that is near 0, f32 rounding decides the sign, and
    no two programs agree (measured: 5e-4 apart). A v of this size makes every update a smooth function of the
    gradient. Random moments also show a slice of the optimizer's state that went to the wrong device.
    """
    clip = max(1.0, _norm(gradients))
    largest = jax.tree.map(lambda top: top / clip, _largest(gradients))

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


def _largest(tree: Tree) -> Tree:
    """The largest absolute element of each tensor; of all tensors, for one that holds nothing but rounding."""
    each = jax.tree.map(lambda leaf: np.max(np.abs(leaf)), tree)
    most = np.max(jax.tree.leaves(each))
    return jax.tree.map(lambda top: most if top < ROUNDING * most else top, each)


def _to_mesh(built: Built, tree: Tree, like: Tree) -> Tree:
    """Host arrays of the model's own parameters, or what is shaped like them, in the shapes, dtypes and shardings of
    the leaves of `like`."""

    def put(x: np.ndarray, place: Placement, leaf: Any) -> jax.Array:
        return jax.device_put(arranged(x, place, leaf), leaf.sharding)

    return jax.tree.map(put, tree, built.places, like)


def _errors(built: Built, kind: str, tree: Tree, expected: Tree, start: Tree | None = None) -> dict[str, float]:
    """max|a - b| / max|b| of each tensor a, less its `start`, over the shards of all devices, replicas included.

    A tensor that is zero but for ROUNDING is measured by the largest of all.
    """
    errors = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    zeros = jax.tree.map(np.zeros_like, expected)
    starts = jax.tree.leaves(zeros if start is None else start)
    places = jax.tree.leaves(built.places, is_leaf=is_placement)
    pairs = zip(leaves, jax.tree.leaves(expected), jax.tree.leaves(_largest(expected)), starts, places, strict=True)
    for (path, a), b, largest, origin, place in pairs:
        like = jax.ShapeDtypeStruct(a.shape, np.float32)
        b, origin = arranged(b, place, like), arranged(origin, place, like)
        worst = [
            np.max(np.abs(np.asarray(shard.data).astype(np.float32) - origin[shard.index] - b[shard.index]))
            for shard in a.addressable_shards
        ]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        errors[f"{kind}/{name}"] = float(np.max(worst) / largest)  # np.max, as max() would drop a NaN
    return errors
