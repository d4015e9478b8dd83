"""The collectives of the step, over named mesh axes. An axis that is not in the mesh (degree 1) costs nothing.

Inside `jax.shard_map` with `check_vma=True` each value has a type that says over which axes it varies. The transpose
of `vary` is a sum and the transpose of `total` is `vary`: Megatron's conjugate pair f and g, kept by the type system.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax


def present(axes: Iterable[str]) -> tuple[str, ...]:
    """Those of the axes that the mesh of the surrounding shard_map has, in the order of the mesh."""
    wanted = set(axes)
    return tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in wanted)


def varying(x: Any) -> frozenset[str]:
    """The axes that an array, or the type of one, varies over."""
    kind = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    return kind.manual_axis_type.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """x, seen as varying over the axes too; free forward, a sum over those that are new backward."""
    names = [axis for axis in present(axes) if axis not in varying(x)]
    return lax.pcast(x, tuple(names), to="varying") if names else x


def total(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """All-reduce: the sum of x over the axes."""
    return lax.psum(x, names) if (names := present(axes)) else x


def largest(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """All-reduce: the maximum of x over the axes."""
    return lax.pmax(x, names) if (names := present(axes)) else x


def gathered(x: jax.Array, axes: Iterable[str], dim: int) -> jax.Array:
    """All-gather: the slices of x along `dim`, put together."""
    return lax.all_gather(x, names, axis=dim, tiled=True) if (names := present(axes)) else x


def scattered_total(x: jax.Array, axes: Iterable[str], dim: int) -> jax.Array:
    """Reduce-scatter: this device's slice along `dim` of the sum of x over the axes."""
    return lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True) if (names := present(axes)) else x


def exchanged(x: jax.Array, axis: str, given: int, taken: int) -> jax.Array:
    """All-to-all: of the slices of x along `given` each device gets one, and with it those of all others along `taken`."""
    return lax.all_to_all(x, names, given, taken, tiled=True) if (names := present((axis,))) else x


def passed_on(x: jax.Array, axis: str) -> jax.Array:
    """Permute: x of the device before this one along the axis, the first one's from the last."""
    size = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def own(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """This device's slice along `dim` of what all devices of the axis hold whole."""
    if not (names := present((axis,))):
        return x
    size = x.shape[dim] // lax.axis_size(names[0])
    return lax.dynamic_slice_in_dim(x, lax.axis_index(names[0]) * size, size, dim)


def index(axis: str) -> Any:
    """Position of this device along the axis."""
    return lax.axis_index(axis) if present((axis,)) else 0
