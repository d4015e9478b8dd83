"""What the families share: hooks on a block, attention, a sliced vocabulary at both ends.

Shapes: b sequences, t or s positions, D model, k key/value heads and g query heads for each, H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def _same(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Shards:
    """How a slice of the model meets the other slices: Megatron's f and g, and what a sliced vocabulary needs.

    enter  where the slices part: identity forward, sum over the slices backward (Megatron's f)
    sum    where partial results meet: sum over the slices forward, identity backward (Megatron's g)
    max    the largest over the slices; not differentiated
    index  which slice this is, 0 to n-1
    """

    enter: Callable[[jax.Array], jax.Array] = _same
    sum: Callable[[jax.Array], jax.Array] = _same
    max: Callable[[jax.Array], jax.Array] = _same
    index: Callable[[], Any] = lambda: 0


WHOLE = Shards()


def keep(name: str, value: jax.Array) -> jax.Array:
    """The default for `save`: names an activation and changes nothing."""
    return value


def plain(name: str, value: jax.Array, product: jax.Array) -> jax.Array:
    """The default for `tap`: sees what a weight is multiplied with and the product, and changes nothing."""
    return product


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q (b, t, k, g, H) against k (b, s, k, H): scaled scores (b, k, g, t, s)."""
    return jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5


def causal_softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last dim with the future masked, computed in f32, returned in the dtype of the scores."""
    t, s = scores.shape[-2:]
    past = lax.broadcasted_iota(jnp.int32, (t, s), 0) >= lax.broadcasted_iota(jnp.int32, (t, s), 1)
    return jax.nn.softmax(jnp.where(past, scores.astype(jnp.float32), -1e30), axis=-1).astype(scores.dtype)


def lookup(table: jax.Array, tokens: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """Rows of a table (V, D) sliced by vocabulary, for tokens (b, t): masked where the row lies elsewhere, then summed.

    Megatron-LM's vocabulary-parallel embedding: one all-reduce, no one-hot matmul.
    """
    rows = table.shape[0]
    local = tokens - shards.index() * rows
    here = (local >= 0) & (local < rows)
    return shards.sum(jnp.where(here[..., None], jnp.take(table, local, axis=0, mode="clip"), 0))


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
