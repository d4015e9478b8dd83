"""AdamW (Loshchilov and Hutter 2019) from optax, under the precisions and ZeRO stages.

Runs in explicit-sharding mode: arrays are global and their types carry their specs, so that `jax.reshard` is the whole
of ZeRO's update: a slice of the parameters in, an all-gather out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.spec.workload import Workload

Tree = Any

CLIP_NORM = 1.0
LEARNING_RATE = 3e-4


def rate(peak: float, warmup: int, count: Any) -> Any:
    """The learning rate of the update after `count` others; `peak` throughout when warmup is 0.

    Else it rises over `warmup` updates to the peak, and falls with the inverse square root of their number (Vaswani et
    al. 2017, section 5.3), so that no end has to be known.
    """
    if not warmup:
        return peak
    number = count + 1
    return peak * jnp.minimum(number / warmup, jnp.sqrt(warmup / number))


def transformation(learning_rate: Any) -> optax.GradientTransformation:
    """AdamW with the betas, epsilon and decay of Llama 2 (Touvron et al. 2023b, section 2.2)."""
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1)


def init(parameters: Tree, workload: Workload, learning_rate: float) -> Tree:
    """Optimizer state for parameters that are sliced as the state is: m and v in f32, the count, perhaps a master."""
    wide = jax.tree.map(lambda parameter: parameter.astype(jnp.float32), parameters)
    state = {"adamw": transformation(learning_rate).init(wide)}
    return state | {"master": wide} if workload.dtypes.master else state


def update(
    parameters: Tree,
    state: Tree,
    gradients: Tree,
    norm: jax.Array,
    *,
    workload: Workload,
    held: Tree,
    sliced: Tree,
    learning_rate: float,
    warmup: int,
) -> tuple[Tree, Tree]:
    """One clipped AdamW update. `held` and `sliced` are the specs of parameters between steps and of the state."""
    # optax.clip_by_global_norm, with the norm that the gradient's shard_map already summed over the mesh.
    clip = jnp.minimum(1.0, CLIP_NORM / jnp.maximum(norm, 1e-30))
    gradients = jax.tree.map(lambda gradient: gradient.astype(jnp.float32) * clip, gradients)
    current = state.get("master") or jax.tree.map(jax.reshard, parameters, sliced)
    # From Adam's own count: a schedule of optax's would keep a second one.
    current_rate = rate(learning_rate, warmup, optax.tree.get(state["adamw"], "count"))
    updates, adamw = transformation(current_rate).update(gradients, state["adamw"], current)
    current = optax.apply_updates(current, updates)
    # Cast before the gather, so that what is sent is what is held.
    new = jax.tree.map(lambda parameter, value: value.astype(parameter.dtype), parameters, current)
    if held != sliced:  # ZeRO 1 and 2
        new = _gather(parameters, new, held, sliced)
    return new, {"adamw": adamw} | ({"master": current} if workload.dtypes.master else {})


def _gather(parameters: Tree, new: Tree, held: Tree, sliced: Tree) -> Tree:
    """The new slices, gathered into the place of the old parameters; what is stacked row by row.

    XLA:GPU would transpose a gather of the whole stack along an inner dim, and keep it beside what it replaces. Each
    device goes through the rows that it holds, which in a pipeline are those of its stage.
    """

    def row(old: jax.Array, piece: jax.Array, index: Any, before: PartitionSpec, after: PartitionSpec) -> jax.Array:
        return lax.dynamic_update_index_in_dim(old, _whole(piece, before, after, stacked=1), index, 0)

    def local(parameters: Tree, new: Tree) -> Tree:
        def replace(layers: Tree, at: tuple[jax.Array, Tree]) -> tuple[Tree, None]:
            index, slices = at
            write = lambda old, piece, *specs: row(old, piece, index, *specs)  # noqa: E731
            return jax.tree.map(write, layers, slices, sliced["layers"], held["layers"]), None

        depth = jax.tree.leaves(new["layers"])[0].shape[0]
        layers, _ = lax.scan(replace, parameters["layers"], (jnp.arange(depth), new["layers"]))
        outer = {key: _whole(piece, sliced[key], held[key]) for key, piece in new.items() if key != "layers"}
        return outer | {"layers": layers}

    # Unchecked: the types of a manual program have no way to say that what was gathered is the same on all devices.
    return jax.shard_map(local, in_specs=(held, sliced), out_specs=held, check_vma=False)(parameters, new)


def _whole(piece: jax.Array, before: PartitionSpec, after: PartitionSpec, stacked: int = 0) -> jax.Array:
    """A slice of the spec `before`, gathered over the axes that `after` lacks."""
    for dim, (had, has) in enumerate(zip(before, (*after, *[None] * (len(before) - len(after))), strict=True)):
        lacking = [axis for axis in _axes(had) if axis not in _axes(has)]
        if lacking:
            piece = lax.all_gather(piece, tuple(lacking), axis=dim - stacked, tiled=True)
    return piece


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
