"""Causal attention: with all scores at once, block by block with the softmax taken on the way, or by a kernel.

Shapes: b sequences, t or s positions, k key/value heads and g query heads for each, n = k g query heads, H head size;
in blocks, c positions of a block of queries and s of a block of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.model.blocks import MASKED, added, block, lower_triangle, product, written
from jaxllm.model.ring import Ring, derivatives, softmax_on_the_way
from jaxllm.spec.attention import blocks

Save = Callable[[str, jax.Array], jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Save], jax.Array]


def materialised(q: jax.Array, k: jax.Array, v: jax.Array, save: Save) -> jax.Array:
    """q (b, t, k, g, H), k and v (b, t, k, H) -> (b, t, n H), by way of the whole square of scores (b, k, g, t, t).

    `save` sees the activations "scores" and "attention".
    """
    scores = save("scores", attention_scores(q, k))
    mixed = jnp.einsum("bkgts,bskh->btkgh", causal_softmax(scores), v)
    return save("attention", mixed.reshape(*q.shape[:2], -1))


def attention_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q (b, t, k, g, H) against k (b, s, k, H): scaled scores (b, k, g, t, s)."""
    return jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5


def causal_softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last dim with the future masked, computed in f32, returned in the dtype of the scores."""
    t, s = scores.shape[-2:]
    past = lax.broadcasted_iota(jnp.int32, (t, s), 0) >= lax.broadcasted_iota(jnp.int32, (t, s), 1)
    return jax.nn.softmax(jnp.where(past, scores.astype(jnp.float32), MASKED), axis=-1).astype(scores.dtype)


# ---------------------------------------------------------------- block by block


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, save: Save, ring: Ring | None = None) -> jax.Array:
    """q (b, t, k, g, H), k and v (b, t, k, H) -> (b, t, n H), without the square of scores.

    FlashAttention-2 (Dao 2023, algorithms 1 and 2; memory linear in t: Rabe and Staats 2021) in plain JAX. `save` sees
    "attention" and its statistics, "lse": for each query the logarithm of the sum of the exponentials of its scores
    (b, n, t), f32. They are what the backward pass needs beside q, k and v: with both of them recalled nothing here is
    computed again. With a `ring` the t positions are those of one of its devices, and they attend to those of all.
    """
    forward = _softmax_on_the_way if ring is None else partial(softmax_on_the_way, ring)
    out, lse = forward(*map(lax.stop_gradient, (q, k, v)))
    return _differentiable(ring, q, k, v, save("attention", out), save("lse", lse))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    ring: Ring | None, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array
) -> jax.Array:
    """`out`, with the derivatives of attention by q, k and v."""
    return out


def _derivatives(ring: Ring | None, kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradients of q, k and v from the gradient of the output (b, t, n H): algorithm 2 of Dao 2023."""
    if ring is not None:
        return *derivatives(ring, kept, d_out), None, None
    q, k, v, out, lse = kept
    length, number, size = q.shape[1], *blocks(q.shape[1])
    # The softmax's derivative takes off, from the gradient of each probability, their mean: dO . O, computed once.
    wide = lambda y: y.reshape(q.shape).astype(jnp.float32)  # noqa: E731
    mean = jnp.moveaxis(jnp.sum(wide(d_out) * wide(out), axis=-1), 1, 3)
    lse = lse.reshape(mean.shape)
    q, k, v, d_out = (_filled_up(y, 1) for y in (q, k, v, d_out.reshape(q.shape)))
    mean, lse = (_filled_up(y, 3) for y in (mean, lse))
    zeros = partial(jnp.zeros_like, dtype=jnp.float32)
    if number == 1:
        # No loop is left that keeps these scores from being taken for those of the forward pass, where it is computed again:
        # XLA:TPU merges the two, the others do not.
        q = lax.optimization_barrier(q)

    def pair(carry: tuple[jax.Array, ...], i: jax.Array, j: jax.Array) -> tuple[jax.Array, ...]:
        dq, dq_i, dk, dv = carry
        q_i, d_out_i = block(q, i, size), block(d_out, i, size)
        k_j, v_j = block(k, j, size), block(v, j, size)
        p = jnp.exp(_scores(q_i, k_j, i, j) - block(lse, i, size, 3)[..., None])
        dp = product("bckgh,bskh->bkgcs", d_out_i, v_j)
        ds = (p * (dp - block(mean, i, size, 3)[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dv = added(dv, j, size, product("bkgcs,bckgh->bskh", p.astype(q.dtype), d_out_i))
        dk = added(dk, j, size, product("bkgcs,bckgh->bskh", ds, q_i))
        dq_i = jnp.where(j == 0, 0.0, dq_i) + product("bkgcs,bskh->bckgh", ds, k_j)
        return written(dq, i, size, dq_i.astype(q.dtype)), dq_i, dk, dv

    start = (jnp.zeros_like(q), zeros(q[:, :size]), zeros(k), zeros(v))
    dq, _, dk, dv = lower_triangle(pair, start, number)
    return *(y[:, :length].astype(q.dtype) for y in (dq, dk, dv)), None, None


_differentiable.defvjp(lambda ring, *kept: (kept[3], kept), _derivatives)


def _softmax_on_the_way(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output (b, t, n H) and statistics (b, n, t): algorithm 1 of Dao 2023."""
    length, number, size = q.shape[1], *blocks(q.shape[1])
    q, k, v = (_filled_up(y, 1) for y in (q, k, v))

    def pair(carry: tuple[jax.Array, ...], i: jax.Array, j: jax.Array) -> tuple[jax.Array, ...]:
        out, lse, *of_block = carry
        before, total, mixed = (jnp.where(j == 0, new, y) for new, y in zip((MASKED, 0.0, 0.0), of_block, strict=True))
        scores = _scores(block(q, i, size), block(k, j, size), i, j)
        largest = jnp.maximum(before, jnp.max(scores, axis=-1))
        p, shrunk = jnp.exp(scores - largest[..., None]), jnp.exp(before - largest)
        total = shrunk * total + jnp.sum(p, axis=-1)
        mixed = shrunk[..., None] * mixed + product("bkgcs,bskh->bkgch", p.astype(q.dtype), block(v, j, size))
        # Written at each turn, in place: the last of a block of queries, that of its diagonal, stays.
        done = jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype)
        out, lse = written(out, i, size, done), written(lse, i, size, largest + jnp.log(total), 3)
        return out, lse, largest, total, mixed

    heads = jnp.moveaxis(q, 1, 3)  # (b, k, g, t, H)
    statistic, of_block = (jnp.zeros_like(y, dtype=jnp.float32) for y in (heads[..., 0], heads[..., :size, :]))
    start = (jnp.zeros_like(q), statistic, of_block[..., 0], of_block[..., 0], of_block)
    out, lse, *_ = lower_triangle(pair, start, number)
    b, n = q.shape[0], q.shape[2] * q.shape[3]
    return out[:, :length].reshape(b, length, -1), lse[..., :length].reshape(b, n, length)


def _scores(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Scaled scores (b, k, g, c, s) in f32 of block i of queries against block j of keys, the future masked."""
    scores = product("bckgh,bskh->bkgcs", q, k) * q.shape[-1] ** -0.5
    c, s = scores.shape[-2:]
    # In a block below the diagonal all are past, and the same comparison says so.
    past = i * c + lax.broadcasted_iota(jnp.int32, (c, s), 0) >= j * s + lax.broadcasted_iota(jnp.int32, (c, s), 1)
    return jnp.where(past, scores, MASKED)


def _filled_up(x: jax.Array, dim: int) -> jax.Array:
    """x with zeros behind its positions up to whole blocks. As keys they are the future of every query, and as queries
    their output is dropped and its gradient zero."""
    number, size = blocks(x.shape[dim])
    widths = [(0, number * size - length if at == dim else 0) for at, length in enumerate(x.shape)]
    return jnp.pad(x, widths)


# ---------------------------------------------------------------- by a kernel


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, save: Save) -> jax.Array:
    """q (b, t, k, g, H), k and v (b, t, k, H) -> (b, t, n H), by NVIDIA's cuDNN; `save` sees "attention".

    The kernel's backward pass takes the statistics that its forward pass gives, and jax lets nobody hand it others: so the
    forward pass runs again before it, whatever is saved. Raises RuntimeError without cuDNN, NotImplementedError for f32
    and for sizes of a head that it lacks.
    """
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    out = jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn")
    return save("attention", out.reshape(*q.shape[:2], -1))


# By the names that spec.attention gives them.
ATTENTION: dict[str, Attend] = {"xla": materialised, "blockwise": blockwise, "cudnn": cudnn}
