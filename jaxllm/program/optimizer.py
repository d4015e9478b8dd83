"""The optimizer under the precisions and ZeRO stages: a clipped update, by one of jaxllm/program/transformations.

Runs in explicit-sharding mode: arrays are global and their types carry their specs, so that `jax.reshard` is the whole
of ZeRO's update: a slice of the parameters in, an all-gather out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.program import offload
from jaxllm.program.sharding import DTYPES, axes
from jaxllm.program.transformations import registry
from jaxllm.spec.layout import Layout
from jaxllm.spec.workload import Workload

Tree = Any

CLIP_NORM = 1.0
# Of a scaled loss: the first factor, and steps of finite gradients until it doubles; as torch.amp.GradScaler has them.
SCALE, GROW = 2.0**16, 2000
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


def init(parameters: Tree, workload: Workload, places: Tree) -> Tree:
    """Optimizer state for parameters that are sliced as the state is: optax's, the number of updates where optax's has none,
    perhaps a master copy, and where the loss is scaled its factor and the steps since that changed."""
    wide = jax.tree.map(lambda parameter: parameter.astype(jnp.float32), parameters)
    name = workload.optimizer
    dtypes = workload.dtypes
    state = {name: _cast(registry()[name].make(0.0, places).init(wide), DTYPES[dtypes.state])}
    if not optax.tree.get_all_with_path(state, "count"):
        state["count"] = jnp.zeros([], jnp.int32)
    if dtypes.scaled:
        state |= {"scale": jnp.float32(SCALE), "finite": jnp.zeros([], jnp.int32)}
    return state | {"master": wide} if dtypes.master else state


def update(
    parameters: Tree,
    state: Tree,
    gradients: Tree,
    norm: jax.Array,
    *,
    layout: Layout,
    workload: Workload,
    places: Tree,
    held: Tree,
    sliced: Tree,
    learning_rate: float,
    warmup: int,
) -> tuple[Tree, Tree]:
    """One clipped update. `held` and `sliced` are the specs of parameters between steps and of the state.

    Where the loss is scaled so are the gradients, but not their norm. Where that is not finite nothing changes but the
    factor.
    """
    # optax.clip_by_global_norm, with the norm that the gradient's shard_map already summed over the mesh.
    clip = jnp.minimum(1.0, CLIP_NORM / jnp.maximum(norm, 1e-30))
    if "scale" in state:
        clip = clip / state["scale"]
    # From the optimizer's own count: a schedule of optax's would keep a second one.
    count = optax.tree.get(state, "count")
    name = workload.optimizer
    numbers = Numbers(clip, rate(learning_rate, warmup, count), jnp.isfinite(norm) if "scale" in state else None)
    updated = partial(_updated, name, places)
    master = state.get("master")
    if not layout.state_on_host:
        weights = master or jax.tree.map(jax.reshard, parameters, sliced)
        current, after = updated(weights, state[name], gradients, numbers)
        master = master and current
        # Cast before the gather, so that what is sent is what is held.
        new = jax.tree.map(lambda parameter, value: value.astype(parameter.dtype), parameters, current)
    else:
        # Where parameters are in host memory too, they are sliced as the state is.
        pieces = parameters if layout.parameters_on_host else jax.tree.map(jax.reshard, parameters, sliced)
        new, after, master = offload.streamed(updated, pieces, state[name], master, gradients, numbers, sliced)
    more = {"count": numbers.keep(count + 1, count)} if "count" in state else {}
    if numbers.finite is not None:
        more |= _scale(state, numbers.finite)
    if held != sliced:  # ZeRO 1 and 2
        new = _gather(parameters, new, held, sliced)
    return new, {name: after} | more | ({"master": master} if workload.dtypes.master else {})


class Numbers(NamedTuple):
    """What is the same for all weights in an update: the factor of gradients, the learning rate, and of a scaled loss
    whether its gradients are finite."""

    clip: jax.Array
    rate: Any
    finite: jax.Array | None

    def keep(self, new: Tree, old: Tree) -> Tree:
        """The new arrays, or the old ones where the gradients are not finite."""
        return new if self.finite is None else jax.tree.map(partial(jnp.where, self.finite), new, old)


def _updated(name: str, places: Tree, current: Tree, kept: Tree, gradients: Tree, numbers: Numbers) -> tuple[Tree, Tree]:
    """Weights and an optimizer's state of them after an update."""
    gradients = jax.tree.map(lambda gradient: gradient.astype(jnp.float32) * numbers.clip, gradients)
    transformation = registry()[name].make(numbers.rate, places)
    updates, after = transformation.update(gradients, _cast(kept, jnp.float32), current)
    after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, kept)
    return numbers.keep(optax.apply_updates(current, updates), current), numbers.keep(after, kept)


def _scale(state: Tree, finite: jax.Array) -> Tree:
    """The factor of the next step's loss: twice as much after GROW steps of finite gradients, else half."""
    steps = jnp.where(finite, state["finite"] + 1, 0)
    grow = steps == GROW
    scale = jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5) * state["scale"]
    return {"scale": scale, "finite": jnp.where(grow, 0, steps)}


def _cast(tree: Tree, dtype: Any) -> Tree:
    """Its arrays of floats in that dtype; counts as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


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
        lacking = [axis for axis in axes(had) if axis not in axes(has)]
        if lacking:
            piece = lax.all_gather(piece, tuple(lacking), axis=dim - stacked, tiled=True)
    return piece
