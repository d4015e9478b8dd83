"""Adafactor (Shazeer and Stern 2018) with optax's state, for weights that are stacked, sliced and padded.

optax.adafactor would factor the two largest dims of a stack of layers, take all layers for one block, and count rows that
pad the vocabulary. Here each layer is a block of its own and means are of what is real. A mean over dims that are sliced is
a sum on each device and one all-reduce over all that slices them, so that a manual program is what an update is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxllm.program.collectives import total
from jaxllm.program.sharding import Placement, axes, is_placement
from jaxllm.program.transformations import Transformation
from jaxllm.spec.optimizers import FACTORED

Tree = Any

# Algorithms 4 to 6: the power of the decay 1 - t^-0.8, both epsilons, and the threshold of an update's root mean square.
DECAY, SQUARES, SMALLEST, THRESHOLD = 0.8, 1e-30, 1e-3, 1.0


class State(NamedTuple):
    """As optax's FactoredState: of each weight two vectors a layer or a whole array, and one element where there is none."""

    count: jax.Array
    v_row: Tree
    v_col: Tree
    v: Tree


def adafactor(rate: Any, places: Tree) -> optax.GradientTransformation:
    """The transformation for parameters that are placed so."""
    each, shape = jax.tree.flatten(places, is_leaf=is_placement)

    def over(function: Callable[..., tuple[Any, ...]], *trees: Tree) -> list[Tree]:
        """The results of a function of each weight's place and leaves, as one tree each."""
        found = [function(*of_one) for of_one in zip(each, *(shape.flatten_up_to(tree) for tree in trees), strict=True)]
        return [jax.tree.unflatten(shape, leaves) for leaves in zip(*found, strict=True)]

    def init(parameters: Tree) -> State:
        return State(jnp.zeros([], jnp.int32), *over(_begin, parameters))

    def update(gradients: Tree, state: State, parameters: Tree) -> tuple[Tree, State]:
        decay = 1 - (state.count + 1).astype(jnp.float32) ** -DECAY
        kept = (state.v_row, state.v_col, state.v)
        weights, *slots = (jax.tree.map(_spec, tree) for tree in (parameters, *kept))

        def local(rate: jax.Array, decay: jax.Array, *trees: Tree) -> tuple[Tree, ...]:
            return tuple(over(partial(_step, rate=rate, decay=decay), weights, *trees))

        manual = jax.shard_map(
            local,
            in_specs=(PartitionSpec(), PartitionSpec(), weights, *slots, weights),
            out_specs=(weights, *slots),
        )
        updates, *kept = manual(jnp.asarray(rate, jnp.float32), decay, gradients, *kept, parameters)
        return updates, State(state.count + 1, *kept)

    return optax.GradientTransformation(init, update)


def _spec(array: jax.Array) -> PartitionSpec:
    return jax.typeof(array).sharding.spec


def _begin(place: Placement, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    def without(*dims: int) -> jax.Array:
        # Of the type of a sum, so that it is sliced as the sums will be.
        return jnp.zeros_like(jax.eval_shape(partial(jnp.sum, axis=dims), weight))

    one = without(*_own(place))[..., None]
    if (dims := _factored(place)) is None:
        return one, one, jnp.zeros_like(weight)
    lesser, larger = dims
    return without(larger), without(lesser), one


def _step(
    place: Placement,
    spec: PartitionSpec,
    gradient: jax.Array,
    v_row: jax.Array,
    v_col: jax.Array,
    v: jax.Array,
    weight: jax.Array,
    *,
    rate: Any,
    decay: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The update of a device's slice of a weight, and the three arrays behind it. Runs inside shard_map."""
    own = _own(place)
    sizes = dict(zip(own, _sizes(place), strict=True))

    def mean(x: jax.Array, *dims: int) -> jax.Array:
        sliced_by = [axis for dim in dims for axis in axes(spec[dim])]
        return total(jnp.sum(x, axis=dims, keepdims=True), sliced_by) / math.prod(sizes[dim] for dim in dims)

    def size(x: jax.Array) -> jax.Array:  # root mean square, of each layer
        return jnp.sqrt(mean(jnp.square(x), *own))

    squares = jnp.square(gradient) + SQUARES
    if (dims := _factored(place)) is None:
        v = decay * v + (1 - decay) * squares
        update = gradient * v**-0.5
    else:
        lesser, larger = dims
        row = decay * jnp.expand_dims(v_row, larger) + (1 - decay) * mean(squares, larger)
        column = decay * jnp.expand_dims(v_col, lesser) + (1 - decay) * mean(squares, lesser)
        update = gradient * (row / mean(row, lesser)) ** -0.5 * column**-0.5
        v_row, v_col = jnp.squeeze(row, larger), jnp.squeeze(column, lesser)
    update = update / jnp.maximum(1.0, size(update) / THRESHOLD)
    return -rate * jnp.maximum(SMALLEST, size(weight)) * update, v_row, v_col, v


def placed(slot: str, place: Placement) -> Placement:
    """Where a weight's array of that name lies."""
    kept = _kept(slot, place)
    if kept is None:
        return place
    lead = int(place.stacked)
    real = len(place.logical_shape) - len(_own(place))  # dims before those: none in a pipeline outside of the layers
    shape = tuple(place.shape[dim] for dim in kept) or (1,)
    logical = tuple(place.logical_shape[dim - lead + real] for dim in kept) or (1,)
    return replace(
        place, shape=place.shape[:lead] + shape, logical_shape=place.logical_shape[:real] + logical, tensor_dim=None,
        zero_dim=None,
    )  # fmt: skip


def _kept(slot: str, place: Placement) -> tuple[int, ...] | None:
    """The dims of its weight that an array has; None for all of them."""
    dims = _factored(place)
    if dims is None:
        return None if slot == "v" else ()
    lesser, larger = dims
    return {"v_row": (lesser,), "v_col": (larger,), "v": ()}[slot]


def _own(place: Placement) -> tuple[int, ...]:
    """The dims of one layer's weight."""
    return tuple(range(int(place.stacked), len(place.shape)))


def _sizes(place: Placement) -> tuple[int, ...]:
    """What they count, without the padding of the vocabulary."""
    return place.logical_shape[-len(_own(place)) :]


def _factored(place: Placement) -> tuple[int, int] | None:
    """The lesser and the larger of a matrix's dims; None for what is not factored. Of equal ones the last is the larger."""
    sizes = _sizes(place)
    if len(sizes) < 2 or min(sizes) < FACTORED:
        return None
    first, second = _own(place)
    return (second, first) if sizes[0] > sizes[1] else (first, second)


ADAFACTOR = Transformation("adafactor", adafactor, "Shazeer and Stern 2018, section 9", placed)
