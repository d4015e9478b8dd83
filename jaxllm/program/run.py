"""run: takes real steps with a compiled program and holds every shard against the unsharded reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any

import jax
import numpy as np

from jaxllm.program.build import Built, arranged
from jaxllm.program.reference import (
    Slots, Tree, begin, in_8_bits, loss_and_gradients, reference_steps, slots_of, update,
)  # fmt: skip
from jaxllm.program.sharding import Placement, is_placement
from jaxllm.report.compare import RunResult
from jaxllm.spec.fp8 import FORMATS, HISTORY
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.optimizers import OPTIMIZERS

# What `build` should be given when the program is to be run, by optimizer: at the rates of real training three steps move
# a parameter by so little that its own f32 rounding, 6e-8 of it, is more than TOLERANCE of the move.
LEARNING_RATES = {"adafactor": 5e-2, "adagrad": 2e-2, "adam": 5e-2, "adamw": 5e-2, "lion": 2e-2, "muon": 0.2}
# Of those whose update is the clipped gradient itself, of norm 1: the root mean square of an element's move, as small as
# rounding lets it be, for a loss that jumps makes much of it: at 1e-2 llama-tiny's third loss is above its first.
MOVES = {"sgd": 3e-3, "momentum": 1e-3}

# (held, origin, moved, whole, largest) -> how far what is held is from where a tensor has moved from its origin; of a shard
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Any], Any]

UPDATES = 10  # that are over when a run begins, for an optimizer whose first updates are not like the others


def learning_rate(optimizer: str, model: ModelConfig, *, fp8: bool = False) -> float:
    """What `build` should be given when the program is to be run. With products in 8 bits a tenth: what their rounding has
    decided in one step is in the parameters of the next, and a large move makes more of it (sgd was 1.7 off)."""
    rate = LEARNING_RATES[optimizer] if optimizer in LEARNING_RATES else MOVES[optimizer] * model.parameters**0.5
    return rate / 10 if fp8 else rate


# Largest max|a - b| / max|b| of a tensor, by the narrowest dtype. f32 is the contract (docs/design.md, truth);
# measured: up to 2.3e-6 on llama-tiny (16 layers). bf16 keeps 8 bits, so that each value on the way is up to
# 2^-9 = 0.002 off; after two to sixteen layers the worst element is measured 0.013 to 0.031 off. f16 keeps 11.
# With products in 8 bits, of which 4 are kept, a change in the last bit of an f32 decides how some elements are rounded,
# and those decide how others are: measured, parameters that are 1e-6 off have gradients that are 0.16 off (docs/fp8.md).
TOLERANCE = {"fp8": 0.5, "bf16": 0.1, "f16": 0.1 / 8, "f32": 1e-5}

# Where elements may be so far off, a tensor that is too large or too small as a whole would not show: the largest
# |<a - b, b>| / <b, b>, in which rounding evens out. Measured on llama-tiny and gpt-tiny over six layouts and all optimizers:
# up to 0.10 in fp8, 0.012 in bf16. f16 keeps three bits more.
SIZES = {"fp8": 0.2, "bf16": 0.05, "f16": 0.05 / 8}
MANY = 1000  # elements of a shard in which rounding evens out

# The factor of a scaled loss in a run: its gradients are of order 1, and times the first factor of training they overflow.
SCALE = 2.0**8

# A tensor whose largest element is a smaller share of the largest of all tensors is zero but for rounding. The gradient
# of a key's bias is: it adds the same to all scores of a query, which softmax does not see. Measured: 5e-9 of the
# largest on gpt-tiny, where the next smallest gradient is 7e-3.
ROUNDING = 1e-6


def run(built: Built, compiled: Callable[..., Any], *, steps: int = 3, seed: int = 0) -> RunResult:
    """Takes `steps` steps with `compiled`, the executable of built.step, on the devices of built.mesh.

    Parameters, optimizer state and batches are random, made on the host from the seed. The program returns no gradients:
    they are what the first step adds to the optimizer's state, or to the parameters where it keeps nothing. Raises
    whatever the program raises.
    """
    abstract, _, rows = built.arguments
    workload = built.workload
    held = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(abstract))
    known = _reference(
        built.model, workload.batch, workload.sequence, held, workload.optimizer, built.learning_rate, steps, seed,
        workload.dtypes.fp8, workload.dtypes.state,
    )  # fmt: skip
    start, reference = known.start, known.steps

    dtypes = workload.dtypes
    used = (dtypes.parameters, dtypes.compute, dtypes.gradients, dtypes.state, *(["fp8"] if dtypes.fp8 else []))
    narrowest = next(dtype for dtype in TOLERANCE if dtype in used)
    errors: dict[str, float] = {}
    sizes: dict[str, float] = {}
    with jax.set_mesh(built.mesh):
        parameters = _to_mesh(built, start, abstract)
        # (B, T) -> (microbatches, B/microbatches, T)
        split = [jax.tree.map(lambda x, leaf: x[:, built.positions].reshape(leaf.shape), batch, rows) for batch in known.batches]
        on_mesh = [jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, rows)) for batch in split]
        state = _filled(built, built.init_optimizer(parameters), known.slots)
        if "scale" in state:
            state["scale"] = jax.device_put(np.float32(SCALE), state["scale"].sharding)
        if known.amaxes is not None:
            state["amax"] = jax.device_put(known.amaxes, state["amax"].sharding)
        metrics = []
        for batch in on_mesh:
            parameters, state, metric = compiled(parameters, state, batch)
            metrics.append({name: float(value) for name, value in metric.items()})
            if not errors:
                errors = _gradient_errors(built, parameters, state, known)
                sizes = _gradient_errors(built, parameters, state, known, _size) if narrowest in SIZES else {}
                if known.amaxes is not None:  # of the first step, before what rounding decided is in the parameters
                    errors |= _amax_errors(state["amax"], reference[0][3])

    for i, (metric, (loss, grads, *_)) in enumerate(zip(metrics, reference, strict=True), 1):
        norm = _norm(grads)
        errors[f"loss/{i}"] = abs(metric["loss"] - loss) / loss
        errors[f"gradient_norm/{i}"] = abs(metric["gradient_norm"] - norm) / norm
    last = reference[-1][2]
    change = jax.tree.map(np.subtract, last, start)
    held = state.get("master", parameters)
    errors |= _errors(built.places, "change", held, change, start)
    if narrowest in SIZES:
        sizes |= _errors(built.places, "change", held, change, start, measure=_size)
    if "master" in state:
        errors |= _errors(built.places, "parameters", parameters, last)
    return RunResult(
        steps=steps,
        losses=tuple(metric["loss"] for metric in metrics),
        reference_losses=tuple(loss for loss, *_ in reference),
        errors=errors,
        tolerance=TOLERANCE[narrowest],
        sizes=sizes,
        size_tolerance=SIZES.get(narrowest, 0.0),
    )


@dataclass(frozen=True)
class _Known:
    """The reference's side of a run.

    start    parameters before the first step, in f32: those that the mesh holds
    slots    the optimizer's arrays before it
    amaxes   those of the steps before it, where products are in 8 bits
    batches  one for each step
    steps    (loss, gradients before clipping, parameters after the step, amaxes after it) of each
    still    the optimizer's arrays, and under "" the parameters, after a first step whose gradients are zero
    moved    the same after the first step, less `still`: what the gradients add
    """

    start: Tree
    slots: Slots
    amaxes: np.ndarray | None
    batches: list[dict[str, np.ndarray]]
    steps: list[tuple[float, Tree, Tree, np.ndarray | None]]
    still: Slots
    moved: Slots


@lru_cache(maxsize=8)  # of one model many layouts are run
def _reference(
    model: ModelConfig, batch: int, sequence: int, dtypes: tuple[str, ...], optimizer: str, learning_rate: float, steps: int,
    seed: int, fp8: bool, dtype: str,
) -> _Known:  # fmt: skip
    """The reference's side, for parameters that the mesh holds in `dtypes`, and optimizer's arrays that it holds in `dtype`."""
    rng = np.random.default_rng(seed)
    full = random_parameters(model, rng)
    leaves, shape = jax.tree.flatten(full)
    # The reference starts from what the mesh holds, rounded to its dtype.
    held = [leaf.astype(dtype).astype(np.float32) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    start = jax.tree.unflatten(shape, held)
    batches = [random_batch(model, batch, sequence, rng) for _ in range(steps)]
    amaxes = random_amaxes(in_8_bits(model, start, batches[0], None)[2], rng) if fp8 else None
    first = in_8_bits(model, start, batches[0], amaxes) if fp8 else loss_and_gradients(model, start, batches[0])
    gradients = first[1]
    shapes = {key: leaf.shape for key, leaf in slots_of(begin(optimizer, start, {})).items()}
    slots = random_slots(optimizer, gradients, shapes, rng, dtype)
    found = reference_steps(
        model, start, batches, learning_rates=repeat(learning_rate), optimizer=optimizer, slots=slots,
        amaxes=amaxes, first=first,
    )  # fmt: skip

    def after(gradients: Tree) -> Slots:
        parameters, state = update(optimizer, learning_rate, start, begin(optimizer, start, slots), gradients)
        return slots_of(state) | {("", name): np.asarray(leaf) for name, leaf in _named(parameters).items()}

    still, whole = after(jax.tree.map(np.zeros_like, start)), after(jax.tree.map(np.asarray, gradients))
    return _Known(start, slots, amaxes, batches, list(found), still, {key: whole[key] - still[key] for key in whole})


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


def random_slots(
    optimizer: str, gradients: Tree, shapes: dict[tuple[str, str], tuple[int, ...]], rng: np.random.Generator, dtype: str
) -> Slots:
    """An optimizer's arrays as if training were under way, in proportion to the largest gradient of each tensor.

    From v = 0 the first update of Adam is the sign of each gradient: where that is near 0, f32 rounding decides the sign,
    and no two programs agree (measured: 5e-4 apart). A v of this size makes every update a smooth function of the
    gradient. Random arrays also show a slice of the state that went to the wrong device.

    Lion's update is a sign at any time, of 0.9 m + 0.1 g, so its m is kept far from 0: then it decides the sign, and the
    gradient shows in m; of which it is so little that in bf16 m must not be further away than it needs to be. Adafactor's first update forgets what v was, so that some are over. Muon makes all singular values
    of a momentum about alike, and the least of any others would be rounding: they are alike from the beginning.
    """
    clip = max(1.0, _norm(gradients))
    largest = _named(jax.tree.map(lambda top: top / clip, _largest(gradients)))

    nearest = 0.2 if dtype == "bf16" else 0.4

    def drawn(degree: int, shape: tuple[int, ...]) -> np.ndarray:
        if optimizer == "lion":
            return rng.choice((-1, 1), shape) * rng.uniform(nearest, 2 * nearest, shape)
        if optimizer == "muon" and len(shape) == 3:
            tall = np.linalg.qr(rng.normal(size=(shape[0], max(shape[1:]), min(shape[1:])))).Q
            return 0.3 * max(shape[1:]) ** 0.5 * (tall if shape[1] >= shape[2] else tall.swapaxes(1, 2))
        return rng.normal(0, 0.02, shape) if degree == 1 else rng.uniform(0.05, 0.15, shape)

    slots = {
        (slot.name, name): (largest[name] ** slot.degree * drawn(slot.degree, shapes[slot.name, name])).astype(np.float32)
        for slot in OPTIMIZERS[optimizer].slots
        for name in largest
        if shapes.get((slot.name, name), (1,))[-1] > 1  # else it has none
    }
    return slots | ({("count", ""): np.int32(UPDATES)} if optimizer == "adafactor" else {})


def random_amaxes(amaxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Amaxes of the steps before (L, P, 3, H) as if training were under way, in proportion to those of a step (L, P, 3).

    The oldest is the largest, so that the scale is another one when it has been dropped. The others are smaller than those of
    the steps to come, so that some of what is quantized then is beyond the largest number.
    """
    history = amaxes[..., None] * rng.uniform(0.5, 0.9, (*amaxes.shape, HISTORY))
    history[..., -1] = 1.2 * amaxes
    return history.astype(np.float32)


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


def _largest(tree: Tree, degree: int = 1) -> Tree:
    """The largest absolute element of each tensor; of all tensors, for one that holds nothing but rounding. `degree` is
    that of the tensors in the gradient."""
    each = jax.tree.map(lambda leaf: np.max(np.abs(leaf)), tree)
    most = np.max(jax.tree.leaves(each))
    return jax.tree.map(lambda top: most if top < ROUNDING**degree * most else top, each)


def _named(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by their path: `layers.q`."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def _slot_of(path: tuple[Any, ...]) -> tuple[str, str]:
    """The name in optax, and that of the parameter, of an array at a path in the state on the mesh."""
    last = max((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)), default=-1)
    return path[last].name if last >= 0 else "", jax.tree_util.keystr(path[last + 1 :], simple=True, separator=".")


def _filled(built: Built, state: Tree, slots: Slots) -> Tree:
    """The state on the mesh with these arrays in it."""

    def put(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if (key := _slot_of(path)) not in slots:
            return leaf
        place = built.place_of(path)
        return jax.device_put(slots[key] if place is None else arranged(slots[key], place, leaf), leaf.sharding)

    return jax.tree_util.tree_map_with_path(put, state)


def _gradient_errors(
    built: Built, parameters: Tree, state: Tree, known: _Known, measure: Measure | None = None
) -> dict[str, float]:
    """Errors of what the first step's gradients added, where they show with the least power: in the optimizer's arrays of
    the least degree, or in the parameters where it keeps none."""
    slots = built.workload.keeps.slots
    degree = min((slot.degree for slot in slots), default=1)
    names = [slot.name for slot in slots if slot.degree == degree] or [""]
    paths = jax.tree_util.tree_leaves_with_path(state)
    found = {_slot_of(path): leaf for path, leaf in paths}
    places = {_slot_of(path): built.place_of(path) for path, leaf in paths}
    found |= {("", name): leaf for name, leaf in _named(state.get("master", parameters)).items()}
    places |= {("", name): place for name, place in _named(built.places, is_placement).items()}
    errors: dict[str, float] = {}
    for slot in names:
        # An optimizer that has no array of some weight has one element in its place.
        moved = {name: leaf for (one, name), leaf in known.moved.items() if one == slot and leaf.shape[-1] > 1}
        tree, still = ({name: each[slot, name] for name in moved} for each in (found, known.still))
        if not moved:
            continue
        these = _errors({name: places[slot, name] for name in moved}, "gradient", tree, moved, still, degree, measure)
        errors |= {name: float(np.maximum(error, errors.get(name, 0.0))) for name, error in these.items()}
    return errors


def _amax_errors(amaxes: jax.Array, expected: np.ndarray) -> dict[str, float]:
    """The largest relative error of any amax (L, P, 3, H) on any device, by what it is of."""
    worst = [np.abs(np.asarray(shard.data) / expected - 1).max((0, 1, 3)) for shard in amaxes.addressable_shards]
    return {f"amax/{tensor}": float(error) for tensor, error in zip(FORMATS, np.max(worst, axis=0), strict=True)}


def _to_mesh(built: Built, tree: Tree, like: Tree) -> Tree:
    """Host arrays of the model's own parameters, or what is shaped like them, in the shapes, dtypes and shardings of
    the leaves of `like`."""

    def put(x: np.ndarray, place: Placement, leaf: Any) -> jax.Array:
        return jax.device_put(arranged(x, place, leaf), leaf.sharding)

    return jax.tree.map(put, tree, built.places, like)


def _errors(
    places: Tree, kind: str, tree: Tree, expected: Tree, start: Tree | None = None, degree: int = 1, measure: Measure | None = None
) -> dict[str, float]:
    """How far each tensor a, less its `start`, is from b, by a measure, over the shards of all devices, replicas included.

    The measure is max|a - b| / max|b| where none is given. A tensor that is zero but for ROUNDING is measured by the largest
    of all.
    """
    errors = {}
    zeros = jax.tree.map(np.zeros_like, expected)
    starts = jax.tree.leaves(zeros if start is None else start)
    largest_of = jax.tree.leaves(_largest(expected, degree))
    pairs = zip(
        _named(tree).items(), jax.tree.leaves(expected), largest_of, starts, jax.tree.leaves(places, is_leaf=is_placement),
        strict=True,
    )  # fmt: skip
    for (name, a), b, largest, origin, place in pairs:
        like = jax.ShapeDtypeStruct(a.shape, np.float32)
        b, origin = arranged(b, place, like), arranged(origin, place, like)
        shards = [(np.asarray(shard.data), origin[shard.index], b[shard.index]) for shard in a.addressable_shards]
        worst = [(measure or _off)(*shard, b, largest) for shard in shards]
        errors[f"{kind}/{name}"] = float(np.max(worst))  # np.max, as max() would drop a NaN
    return errors


def _off(held: np.ndarray, origin: np.ndarray, moved: np.ndarray, whole: np.ndarray, largest: Any) -> Any:
    """max|a - b| / max|b|: the most by which what is held is not `moved` from its origin."""
    return np.max(np.abs(_apart(held, origin, moved))) / largest


def _size(held: np.ndarray, origin: np.ndarray, moved: np.ndarray, whole: np.ndarray, largest: Any) -> Any:
    """|<a - b, b>| / <b, b>: whether it is as large as it should be, whatever rounding does to its elements, if they are MANY;
    else 0. What is 0 here or everywhere but for rounding is measured by the mean of the whole tensor, or the largest of all."""
    if held.size < MANY:
        return 0.0
    mean = np.mean(np.square(whole, dtype=np.float64)) if np.max(np.abs(whole)) >= largest else float(largest) ** 2
    off = np.vdot(_apart(held, origin, moved).astype(np.float64), moved)
    return np.abs(off) / np.maximum(np.vdot(moved, moved), moved.size * mean)


def _apart(held: np.ndarray, origin: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """How far what is held is from where it should be, beyond what its own rounding explains: each of a run's three updates
    rounds what is not 0 by half of its last bit."""
    apart = held.astype(np.float32) - origin - moved
    rounding = 1.5 * np.spacing(np.abs(held)).astype(np.float32) * (origin != 0)
    return np.sign(apart) * np.maximum(np.abs(apart) - rounding, 0)  # keeps a NaN
