"""What the families share: hooks on a block, a sliced vocabulary at both ends.

Shapes: b sequences, t positions, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


Multiply = Callable[[str, jax.Array, jax.Array], jax.Array]


def _same(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Shards:
    """How a slice of the model meets the other slices: Megatron's f and g, and what a sliced vocabulary needs.

    enter  from the residual stream to where the slices part: identity forward, sum over the slices backward (Megatron's
           f), or all positions of a stream that is cut along the sequence
    leave  where partial results meet in the residual stream: sum over the slices forward, identity backward (Megatron's
           g), or of that sum the positions of this slice
    part   of something that every slice holds, by position in its first dim, the rows that this slice's stream has
    sum    the sum of numbers for each token over the slices
    max    the largest over the slices; not differentiated
    index  which slice this is, 0 to n-1

    And where devices share out the positions of a sequence:

    rows          of something that every one holds, by position in its first dim, as many rows as there are tokens here, in
                  their order
    to_heads      features of the positions here (b, t, heads and head size), all heads one behind the other: those of all
                  positions, of the heads that attention is computed for here
    to_positions  the inverse
    """

    enter: Callable[[jax.Array], jax.Array] = _same
    leave: Callable[[jax.Array], jax.Array] = _same
    part: Callable[[jax.Array], jax.Array] = _same
    sum: Callable[[jax.Array], jax.Array] = _same
    max: Callable[[jax.Array], jax.Array] = _same
    index: Callable[[], Any] = lambda: 0
    rows: Callable[[jax.Array, int], jax.Array] = lambda table, tokens: table[:tokens]
    to_heads: Callable[[jax.Array], jax.Array] = _same
    to_positions: Callable[[jax.Array], jax.Array] = _same


WHOLE = Shards()


def keep(name: str, value: jax.Array) -> jax.Array:
    """The default for `save`: names an activation and changes nothing."""
    return value


def plain(name: str, value: jax.Array, product: jax.Array) -> jax.Array:
    """The default for `tap`: sees what a weight is multiplied with and the product, and changes nothing."""
    return product


def lookup(table: jax.Array, tokens: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """Rows of a table (V, D) sliced by vocabulary, for tokens (b, t): masked where the row lies elsewhere, then summed.

    Megatron-LM's vocabulary-parallel embedding: one all-reduce or reduce-scatter, no one-hot matmul.
    """
    rows = table.shape[0]
    local = tokens - shards.index() * rows
    here = (local >= 0) & (local < rows)
    return shards.leave(jnp.where(here[..., None], jnp.take(table, local, axis=0, mode="clip"), 0))


def cross_entropy(logits: jax.Array, targets: jax.Array, vocab: int, shards: Shards = WHOLE) -> jax.Array:
    """Sum over the tokens of -log softmax(logits)[target], in f32; a target below 0 is masked out.

    Logits (b, t, V) may be a slice of the vocabulary; they are never gathered. Columns from `vocab` on are padding.
    """
    columns = shards.index() * logits.shape[-1] + lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    logits = jnp.where(columns < vocab, logits.astype(jnp.float32), -1e30)
    largest = shards.max(lax.stop_gradient(jnp.max(logits, axis=-1)))
    total = shards.sum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    # A comparison instead of a gather: its derivative is a select, where a gather's would be a scatter.
    picked = shards.sum(jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1))
    return jnp.sum(jnp.where(targets >= 0, jnp.log(total) + largest - picked, 0.0))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype: Any, dims: tuple[str, ...]) -> nnx.Param:
    """A weight, normal of that standard deviation, with the names of its dims."""
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * scale).astype(dtype), dims=dims)
