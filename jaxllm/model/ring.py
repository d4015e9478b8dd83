"""Blockwise attention where keys and values go round a ring of devices (Liu et al. 2023, Ring Attention, section 3).

Each device has two parts of a sequence, the one as far from its beginning as the other is from its end (Llama Team 2024,
section 3.3.2). Whatever part comes round, of a device before this one or behind it, the same number of queries meets the
same number of keys: all devices have as much to do, and none of it is masked.

Shapes: b sequences, t positions here, k key/value heads and g query heads for each, H head size; the positions of each
half are filled up to A blocks of C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.model.blocks import MASKED, added, block, lower_triangle, product, written
from jaxllm.spec.attention import blocks

Arrays = tuple[jax.Array, ...]
Step = Callable[[Arrays, jax.Array, jax.Array], Arrays]

OWN = "own"  # the keys and values that are here from the beginning, in the place of a number of hops


@dataclass(frozen=True)
class Ring:
    """A ring of devices.

    size     how many there are
    index    which of them this is, 0 to size - 1
    pass_on  what the device before this one gives it, for what this one gives to the next
    """

    size: int
    index: Callable[[], Any]
    pass_on: Callable[[jax.Array], jax.Array]


def halves(ring: Ring, x: jax.Array, length: int, dim: int = 0) -> jax.Array:
    """Of an array over all positions along `dim` those of this device, `length` of them."""
    part, first = length // 2, ring.index()
    starts = first * part, (2 * ring.size - 1 - first) * part
    return jnp.concatenate([lax.dynamic_slice_in_dim(x, start, part, dim) for start in starts], axis=dim)


def order(size: int, length: int) -> np.ndarray:
    """Positions of a sequence of that length in the order in which the devices have them, one after the other."""
    parts = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([parts[[i, 2 * size - 1 - i]].reshape(-1) for i in range(size)])


def softmax_on_the_way(ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output (b, t, n H) and statistics (b, n, t): algorithm 1 of Dao 2023, over the parts as they come round."""
    length, (number, size) = q.shape[1], _blocks(q)
    q = _filled_up(q, 1)
    heads = jnp.moveaxis(q, 1, 3)  # (b, k, g, t, H)
    zeros = jnp.zeros_like(heads, dtype=jnp.float32)
    state = (jnp.full_like(zeros[..., 0], MASKED), zeros[..., 0], zeros)

    def meet(state: Arrays, kv: Arrays, step: Any) -> Arrays:
        kv = _all_filled_up(kv)

        def one(state: Arrays, i: jax.Array, j: jax.Array) -> Arrays:
            largest, total, mixed = state
            scores = _scores(block(q, i, size), block(kv[0], j, size), i, j, length // 2, own=step is OWN)
            before = block(largest, i, size, 3)
            after = jnp.maximum(before, jnp.max(scores, axis=-1))
            p, shrunk = jnp.exp(scores - after[..., None]), jnp.exp(before - after)
            new = shrunk[..., None] * block(mixed, i, size, 3)
            new += product("bkgcs,bskh->bkgch", p.astype(q.dtype), block(kv[1], j, size))
            sums = shrunk * block(total, i, size, 3) + jnp.sum(p, axis=-1)
            return tuple(written(y, i, size, z, 3) for y, z in zip(state, (after, sums, new), strict=True))

        return _over_pairs(ring, one, state, step, number)

    coming = _passed_on(ring, (k, v))
    state = meet(state, (k, v), OWN)

    def turn(carry: tuple[Arrays, Arrays], step: jax.Array) -> tuple[tuple[Arrays, Arrays], None]:
        state, here = carry
        coming = _passed_on(ring, here)  # under way while those that are here are met
        return (meet(state, here, step), coming), None

    (state, here), _ = lax.scan(turn, (state, coming), jnp.arange(1, ring.size - 1))
    largest, total, mixed = meet(state, here, ring.size - 1)
    out = jnp.moveaxis(mixed / total[..., None], 3, 1).astype(q.dtype)
    lse = _cut_back(largest + jnp.log(total), 3, length)
    return _cut_back(out, 1, length).reshape(*out.shape[:1], length, -1), lse.reshape(lse.shape[0], -1, length)


def derivatives(ring: Ring, kept: Arrays, d_out: jax.Array) -> Arrays:
    """Gradients of q, k and v from that of the output (b, t, n H): algorithm 2 of Dao 2023. The sums of the gradients of keys
    and values follow these round, and end where they belong."""
    q, k, v, out, lse = kept
    length, (number, size) = q.shape[1], _blocks(q)
    wide = lambda y: y.reshape(q.shape).astype(jnp.float32)  # noqa: E731
    mean = jnp.moveaxis(jnp.sum(wide(d_out) * wide(out), axis=-1), 1, 3)
    lse, mean = (_filled_up(y, 3) for y in (lse.reshape(mean.shape), mean))
    q, d_out = (_filled_up(y, 1) for y in (q, d_out.reshape(q.shape)))
    zeros = partial(jnp.zeros_like, dtype=jnp.float32)

    def meet(dq: jax.Array, kv: Arrays, step: Any) -> tuple[jax.Array, Arrays]:
        """dq with what these keys and values add, and the gradients of them that the queries here make."""
        kv = _all_filled_up(kv)

        def one(sums: Arrays, i: jax.Array, j: jax.Array) -> Arrays:
            dq, dk, dv = sums
            q_i, d_out_i, k_j, v_j = block(q, i, size), block(d_out, i, size), block(kv[0], j, size), block(kv[1], j, size)
            p = jnp.exp(_scores(q_i, k_j, i, j, length // 2, own=step is OWN) - block(lse, i, size, 3)[..., None])
            dp = product("bckgh,bskh->bkgcs", d_out_i, v_j)
            ds = (p * (dp - block(mean, i, size, 3)[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq = added(dq, i, size, product("bkgcs,bskh->bckgh", ds, k_j))
            dk = added(dk, j, size, product("bkgcs,bckgh->bskh", ds, q_i))
            dv = added(dv, j, size, product("bkgcs,bckgh->bskh", p.astype(q.dtype), d_out_i))
            return dq, dk, dv

        dq, *d_kv = _over_pairs(ring, one, (dq, *map(zeros, kv)), step, number)
        return dq, tuple(_cut_back(y, 1, length) for y in d_kv)

    # Behind a fence, or the first hop is taken for that of the forward pass, where this is computed again, and is said to
    # belong to it.
    here = _passed_on(ring, lax.optimization_barrier((k, v)))
    dq, own = meet(zeros(q), (k, v), OWN)
    last = ring.size - 1
    coming = _passed_on(ring, here) if last > 1 else here
    dq, going = meet(dq, here, 1)

    def turn(carry: tuple[jax.Array, Arrays, Arrays], step: jax.Array) -> tuple[tuple[jax.Array, Arrays, Arrays], None]:
        dq, here, going = carry
        coming, sums = _passed_on(ring, here), _passed_on(ring, going)  # both while those that are here are met
        dq, new = meet(dq, here, step)
        return (dq, coming, _sum(sums, new)), None

    if last > 1:
        (dq, here, going), _ = lax.scan(turn, (dq, coming, going), jnp.arange(2, last))
        sums = _passed_on(ring, going)
        dq, new = meet(dq, here, last)
        going = _sum(sums, new)
    dk, dv = _sum(own, _passed_on(ring, going))
    return tuple(y.astype(q.dtype) for y in (_cut_back(dq, 1, length), dk, dv))


def _over_pairs(ring: Ring, one: Step, start: Arrays, step: Any, number: int) -> Arrays:
    """What `one(carry, i, j)` makes of `start` for each pair of blocks of queries here and of keys that meet: of OWN, or of
    the keys that began `step` devices before this one, round the ring."""
    if step is OWN:  # the front half before the back half: a lower triangle
        return lower_triangle(one, start, 2 * number)

    def turn(carry: Arrays, count: jax.Array) -> tuple[Arrays, None]:
        return one(carry, *pair(ring, step, number, count)), None

    return lax.scan(turn, start, jnp.arange(2 * number * number))[0]


def pair(ring: Ring, step: Any, number: int, count: Any) -> tuple[jax.Array, jax.Array]:
    """The blocks of queries and of keys that meet at a turn, of 2 number^2 turns.

    The back half here is behind every front half. Beside, where the keys' device comes earlier in the sequence, the front
    half here is behind its front half; else the back half here is behind its back half.
    """
    later = jnp.where(ring.index() < step, number, 0)
    a, b, first = count // number % number, count % number, count < number * number
    return a + jnp.where(first, number, later), b + jnp.where(first, 0, later)


def _scores(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, part: int, *, own: bool) -> jax.Array:
    """Scaled scores (b, k, g, c, s) in f32 of a block of queries against a block of keys; masked are the future, which only
    the own keys can be of, and what fills up the last block of each half."""
    scores = product("bckgh,bskh->bkgcs", q, k) * q.shape[-1] ** -0.5
    c, s = scores.shape[-2:]
    number, _ = blocks(part)
    column = lax.broadcasted_iota(jnp.int32, (c, s), 1)
    met = []
    if own:
        met.append(i * c + lax.broadcasted_iota(jnp.int32, (c, s), 0) >= j * s + column)
    if part % number:
        met.append(j % number * s + column < part)
    return jnp.where(jnp.logical_and(*met) if len(met) == 2 else met[0], scores, MASKED) if met else scores


def _passed_on(ring: Ring, arrays: Arrays) -> Arrays:
    return tuple(map(ring.pass_on, arrays))


def _sum(some: Arrays, others: Arrays) -> Arrays:
    return tuple(x + y for x, y in zip(some, others, strict=True))


def _blocks(q: jax.Array) -> tuple[int, int]:
    """(blocks in each half, positions in each)."""
    return blocks(q.shape[1] // 2)


def _filled_up(x: jax.Array, dim: int) -> jax.Array:
    """x with zeros behind each half of its positions, up to whole blocks."""
    number, size = blocks(x.shape[dim] // 2)
    if number * size * 2 == x.shape[dim]:
        return x
    parts = jnp.split(x, 2, axis=dim)
    widths = [(0, number * size - x.shape[dim] // 2 if at == dim else 0) for at in range(x.ndim)]
    return jnp.concatenate([jnp.pad(part, widths) for part in parts], axis=dim)


def _all_filled_up(arrays: Arrays) -> Arrays:
    """Keys and values, filled up where they are met: what goes round has no more than there is."""
    return tuple(_filled_up(y, 1) for y in arrays)


def _cut_back(x: jax.Array, dim: int, length: int) -> jax.Array:
    """The inverse of `_filled_up`."""
    if x.shape[dim] == length:
        return x
    return jnp.concatenate([lax.slice_in_dim(part, 0, length // 2, axis=dim) for part in jnp.split(x, 2, axis=dim)], axis=dim)
