"""An optimizer's state in host memory: which of it, and an update that takes it from there layer by layer.

A loop over the layers copies a layer's arrays to the device, updates them, and copies them back to where they were: the
stacks in host memory are the loop's own, and no second copy of them is made. What is outside of the layers goes as it is,
and so do stacks of vectors.
ZeRO-Offload (Ren et al. 2021) sends gradients and parameters instead, and has the host compute the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Tree = Any
Update = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]]  # (weights, state, gradients, numbers) -> weights, state

HOST_KIND = "pinned_host"


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """The same sharding of an array in host memory.

    Devices that are only described may know no memories, and a sharding over them forgets the kind; one over the abstract
    mesh keeps it, and takes its devices from the context.
    """
    found = NamedSharding(sharding.mesh, sharding.spec, memory_kind=HOST_KIND)
    if found.memory_kind == HOST_KIND:
        return found
    return NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=HOST_KIND)


def offloaded(state: Tree) -> Tree:
    """Abstract state of the optimizer with its arrays of weights in host memory; counts and factors stay."""

    def of(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not leaf.shape:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=in_host_memory(leaf.sharding))

    return jax.tree.map(of, state)


def streamed(
    updated: Update, pieces: Tree, kept: Tree, master: Tree | None, gradients: Tree, numbers: Tree, specs: Tree
) -> tuple[Tree, Tree, Tree | None]:
    """New weights, state and master copy, each in the memory of the old one: state and master copy are in the host's.

    `pieces` are the weights, sliced as the state is by `specs`. `updated` looks at one element at a time, so that a layer,
    and a device's slice of it, is updated by itself; `numbers` are the same for all weights.
    """
    nodes, shape = jax.tree.flatten(kept, is_leaf=_of_weights)
    of_weights = [_of_weights(node) for node in nodes]
    scalars = [node for node, array in zip(nodes, of_weights, strict=True) if not array]
    arrays = [node for node, array in zip(nodes, of_weights, strict=True) if array] + ([] if master is None else [master])

    def state_of(arrays: list[Tree], scalars: list[jax.Array]) -> Tree:
        each = {True: iter(arrays), False: iter(scalars)}
        return shape.unflatten([next(each[array]) for array in of_weights])

    def local(
        pieces: Tree, arrays: list[Tree], gradients: Tree, scalars: list[jax.Array], numbers: Tree
    ) -> tuple[Tree, list[Tree], list[jax.Array]]:
        def one(weights: Tree, arrays: list[Tree], gradients: Tree) -> tuple[Tree, list[Tree], list[jax.Array]]:
            """Weights, arrays in device memory, and scalars, after the update of some of the weights."""
            current, state = updated(weights if master is None else arrays[-1], state_of(arrays, scalars), gradients, numbers)
            new = jax.tree.map(lambda weight, value: value.astype(weight.dtype), weights, current)
            found = list(zip(shape.flatten_up_to(state), of_weights, strict=True))
            after = [node for node, array in found if array] + ([] if master is None else [current])
            return new, after, [node for node, array in found if not array]

        given = pieces, arrays, gradients
        small, large = jax.tree.map(_small, given, is_leaf=_of_weights), jax.tree.map(_large, given, is_leaf=_of_weights)
        *found, others = one(*to_device(small))
        found = back(found, list(small[:2]))
        layers = list(_layer_by_layer(one, *large))
        new, after = jax.tree.map(_together, found, layers, is_leaf=_of_weights)
        return new, after, others

    each, whole = [specs] * len(arrays), jax.tree.map(lambda _: PartitionSpec(), (scalars, numbers))
    manual = jax.shard_map(local, in_specs=(specs, each, specs, *whole), out_specs=(specs, each, whole[0]))
    new, arrays, scalars = manual(pieces, arrays, gradients, scalars, jax.tree.map(jnp.asarray, numbers))
    return new, state_of(arrays, scalars), None if master is None else arrays[-1]


def _of_weights(node: Any) -> bool:
    """Whether a node of the state is a tree like that of the weights."""
    return isinstance(node, dict)


def _is_small(weight: jax.Array) -> bool:
    """Whether a layer's weight is a vector. XLA:TPU may lay a stack of vectors out layer by layer within a row, of which it
    copies no part to the host or back."""
    return weight.ndim == 2


def _small(tree: Tree) -> Tree:
    """Weights that come to the device as a whole: those outside of the layers, and stacks of vectors."""
    return tree | {"layers": {name: weight for name, weight in tree["layers"].items() if _is_small(weight)}}


def _large(tree: Tree) -> Tree:
    """Stacks of matrices, of which a layer's comes at a time."""
    return {name: weight for name, weight in tree["layers"].items() if not _is_small(weight)}


def _together(small: Tree, large: Tree) -> Tree:
    return small | {"layers": small["layers"] | large}


def to_device(tree: Tree) -> Tree:
    """The arrays in device memory."""
    device = jax.memory.Space.Device
    return jax.tree.map(lambda x: x if jax.typeof(x).memory_space == device else jax.device_put(x, device), tree)


def to_host(value: jax.Array) -> jax.Array:
    """The array in the memory of the device's host."""
    return jax.device_put(value, jax.memory.Space.Host)


def small_to_device(parameters: Tree) -> Tree:
    """Parameters of which all but the layers' matrices are in device memory. Once a step: XLA would merge several copies of
    them where it sees them."""
    return _together(to_device(_small(parameters)), _large(parameters))


def back(tree: Tree, like: Tree) -> Tree:
    """The arrays of a tree in device memory, each in the memory of its like."""

    def put(new: jax.Array, old: jax.Array) -> jax.Array:
        space = jax.typeof(old).memory_space
        return new if space == jax.memory.Space.Device else jax.device_put(new, space)

    return jax.tree.map(put, tree, like)


def _layer_by_layer(one: Any, weights: Tree, arrays: list[Tree], gradients: Tree) -> tuple[Tree, list[Tree]]:
    """The update of all layers in their own places: those that a device has."""

    def turn(index: jax.Array, carry: tuple[Tree, list[Tree]]) -> tuple[Tree, list[Tree]]:
        def rows(tree: Tree) -> Tree:
            return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, index, 0), tree)

        *new, _ = one(*to_device(rows((*carry, gradients))))
        write = lambda stack, row: lax.dynamic_update_slice_in_dim(stack, row, index, 0)  # noqa: E731
        return jax.tree.map(write, carry, tuple(back(new, list(carry))))

    depth = jax.tree.leaves(weights)[0].shape[0]
    return lax.fori_loop(0, depth, turn, (weights, arrays))
