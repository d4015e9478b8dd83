"""Attention round a ring equals attention at once, and every device has as much to do as the others."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxllm.model import attention, halves, order, ring
from jaxllm.model.ring import Ring
from jaxllm.spec import attention as spec
from tests.model.test_attention import _inner, by_reference, dots, error, example, keep, value_and_gradients


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(spec, "LONGEST_BLOCK", 3)


def of(size):
    """A ring of so many devices, over the axis "x" of a shard_map."""
    pass_on = lambda x: lax.ppermute(x, "x", [(i, (i + 1) % size) for i in range(size)])  # noqa: E731
    return Ring(size, lambda: lax.axis_index("x"), pass_on)


def round_a_ring(size):
    """Attention of whole arrays, computed on so many devices and put in order again."""

    def attend(q, k, v, save):
        mesh = jax.make_mesh((size,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
        places = order(size, q.shape[1])
        here = PartitionSpec(None, "x")
        body = jax.shard_map(
            lambda *qkv: attention.blockwise(*qkv, keep, ring=of(size)), mesh=mesh, in_specs=here, out_specs=here
        )
        return body(*(y[:, places] for y in (q, k, v)))[:, np.argsort(places)]

    return attend


# Halves of one token; of one block; of two blocks, of which the last is filled up by one; rings of two and three devices,
# in which the loops over the turns in the middle are empty.
@pytest.mark.parametrize(
    ("size", "length", "heads", "group"), [(4, 8, 2, 3), (4, 24, 1, 2), (4, 40, 2, 3), (2, 20, 3, 1), (3, 24, 1, 1), (8, 80, 1, 1)]
)
def test_values_and_gradients_are_the_references(size, length, heads, group):
    case = example(length, heads, group)
    found, expected = (value_and_gradients(attend, *case) for attend in (round_a_ring(size), by_reference))
    assert max(map(error, found, expected)) < 2e-6


def test_scores_too_large_for_an_exponential():
    q, k, v, weight = example(24)
    found, expected = (value_and_gradients(attend, 40 * q, 40 * k, v, weight) for attend in (round_a_ring(4), by_reference))
    assert all(np.isfinite(y).all() for y in found)
    assert max(map(error, found, expected)) < 2e-4


def permuted(jaxpr, times=1):
    """Elements that a device passes on."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            yield times * equation.outvars[0].aval.size
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for part in _inner(equation):
            yield from permuted(part, inner)


@pytest.mark.parametrize(("size", "length"), [(4, 8), (4, 40), (2, 20), (3, 24)])
def test_what_goes_round_has_nothing_that_fills_up_a_block(size, length):
    """x - 1 hops of keys and of values forward; backward as many of them, and of the sums of their gradients."""
    q, k, v, weight = example(length)
    attend = partial(round_a_ring(size), save=keep)
    each = 2 * (size - 1) * k.size // size
    assert sum(permuted(jax.make_jaxpr(attend)(q, k, v).jaxpr)) == each
    _, vjp = jax.vjp(attend, q, k, v)
    assert sum(permuted(jax.make_jaxpr(vjp)(weight).jaxpr)) == 2 * each


def test_each_device_has_a_part_from_the_front_and_one_from_the_back():
    assert order(2, 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for size, length in ((1, 6), (3, 12), (4, 40)):
        places = order(size, length)
        assert sorted(places) == list(range(length))
        for i, mine in enumerate(np.split(places, size)):
            one = Ring(size, lambda i=i: i, lambda x: x)
            np.testing.assert_array_equal(halves(one, jnp.arange(length), length // size), mine)


@pytest.mark.parametrize(("size", "length"), [(4, 8), (4, 40), (2, 24), (3, 24)])
def test_all_devices_meet_as_many_blocks_and_together_each_pair_once(size, length):
    """Pairs of blocks of queries and keys: those of the lower triangle, each once, as many on every device."""
    number, _ = spec.blocks(length // (2 * size))
    met, counts = [], []
    for me in range(size):
        one = Ring(size, lambda me=me: me, lambda x: x)
        mine, count = [me, 2 * size - 1 - me], 0
        for step in range(size):
            theirs = [(me - step) % size, 2 * size - 1 - (me - step) % size]
            turns = [ring.pair(one, step, number, turn) for turn in range(2 * number * number)]
            own = [(i, j) for i in range(2 * number) for j in range(i + 1)]
            for i, j in ((int(i), int(j)) for i, j in (turns if step else own)):
                met.append((mine[i // number] * number + i % number, theirs[j // number] * number + j % number))
                count += 1
        counts.append(count)
    every = 2 * size * number
    assert sorted(met) == [(i, j) for i in range(every) for j in range(i + 1)]
    assert set(counts) == {number * (2 * size * number + 1)}


@pytest.mark.parametrize(("size", "length"), [(4, 40), (2, 24)])
def test_two_products_forward_and_five_backward_for_each_pair(size, length):
    q, k, v, weight = example(length)
    number, block = spec.blocks(length // (2 * size))
    one = 2 * 2 * (2 * 3) * block * block * 4  # 2 for each of b x heads x c x s x H
    pairs = number * (2 * size * number + 1)
    total = lambda jaxpr: sum(times * each for times, each in dots(jaxpr))  # noqa: E731
    attend = partial(round_a_ring(size), save=keep)
    assert total(jax.make_jaxpr(attend)(q, k, v).jaxpr) == 2 * pairs * one
    _, vjp = jax.vjp(attend, q, k, v)
    assert total(jax.make_jaxpr(vjp)(weight).jaxpr) == 5 * pairs * one
