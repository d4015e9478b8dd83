"""Blocks of positions of an array, read and written in place; for attention that goes block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # of a score: its exponential is zero, and no arithmetic with it is undefined

product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def block(x: jax.Array, index: jax.Array, size: int, dim: int = 1) -> jax.Array:
    """The block of that index, of `size` positions along `dim`."""
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def written(x: jax.Array, index: jax.Array, size: int, values: jax.Array, dim: int = 1) -> jax.Array:
    """x with these values in the place of the block."""
    return lax.dynamic_update_slice_in_dim(x, values, index * size, dim)


def added(x: jax.Array, index: jax.Array, size: int, values: jax.Array) -> jax.Array:
    """x with these values added to the block, along the second dim."""
    return written(x, index, size, block(x, index, size) + values)


def lower_triangle(step: Callable[[Any, jax.Array, jax.Array], Any], start: Any, number: int) -> Any:
    """What `step(carry, i, j)` makes of `start` for each pair of blocks in which a query meets a key of its past, row by row:
    j up to i, i below the number.

    One loop, with one turn for each pair, where two nested loops would have the inner one's end move: so the trip count is a
    number of the program. The pairs are counted off, since a table of them grows with the square of the number.
    """

    def turn(carry: tuple[Any, jax.Array, jax.Array], _: None) -> tuple[tuple[Any, jax.Array, jax.Array], None]:
        carried, i, j = carry
        return (step(carried, i, j), jnp.where(j == i, i + 1, i), jnp.where(j == i, 0, j + 1)), None

    (end, _, _), _ = lax.scan(turn, (start, jnp.int32(0), jnp.int32(0)), length=number * (number + 1) // 2)
    return end
