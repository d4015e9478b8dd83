"""Attention block by block equals attention at once, in values and gradients, and meets the lower triangle alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model import attention
from jaxllm.program import reference
from jaxllm.spec import attention as spec

BLOCK = 8


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(spec, "LONGEST_BLOCK", BLOCK)


def keep(name, value):
    return value


def example(length, heads=2, group=3, size=4, dtype=np.float32):
    """q, k, v, and what the sum of the output is weighted with."""
    rng = np.random.default_rng(length)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(2, length, *shape)), dtype)  # noqa: E731
    return draw(heads, group, size), draw(heads, size), draw(heads, size), draw(heads * group * size)


def by_reference(q, k, v, save):
    """The reference's attention, which knows of no groups: of every head of keys there is one for each query head."""
    group = q.shape[3]
    return reference._attend(q.reshape(*q.shape[:2], -1, q.shape[-1]), *(jnp.repeat(y, group, 2) for y in (k, v)))


def value_and_gradients(attend, q, k, v, weight, save=keep):
    of = lambda q, k, v: jnp.sum(attend(q, k, v, save).astype(jnp.float32) * weight)  # noqa: E731
    return jax.jit(lambda *qkv: (attend(*qkv, keep), *jax.grad(of, argnums=(0, 1, 2))(*qkv)))(q, k, v)


def error(found, expected):
    """Of a sequence of one token the gradients of q and k are zero."""
    return float(np.max(np.abs(np.asarray(found - expected, np.float32))) / max(1.0, np.max(np.abs(expected))))


# One token; less than a block; whole blocks; lengths that do not divide, into 2 and 5 blocks; groupings of heads.
@pytest.mark.parametrize(
    ("length", "heads", "group", "size"), [(1, 2, 3, 4), (5, 1, 4, 2), (24, 2, 3, 4), (9, 3, 1, 5), (37, 1, 1, 1)]
)
def test_values_and_gradients_are_the_references(length, heads, group, size):
    case = example(length, heads, group, size)
    found, expected = (value_and_gradients(attend, *case) for attend in (attention.blockwise, by_reference))
    assert max(map(error, found, expected)) < 2e-6


def test_in_bf16_it_is_closer_than_all_at_once():
    """Scores and sums are f32 in a block; at once the scores are rounded to bf16 first."""
    case = example(40, dtype=jnp.bfloat16)
    expected = value_and_gradients(by_reference, *(x.astype(jnp.float32) for x in case))
    blocks, whole = (
        [error(*pair) for pair in zip(value_and_gradients(attend, *case), expected, strict=True)]
        for attend in (attention.blockwise, attention.materialised)
    )
    assert value_and_gradients(attention.blockwise, *case)[0].dtype == jnp.bfloat16
    assert max(blocks) < max(whole) < 0.05


def test_scores_too_large_for_an_exponential():
    q, k, v, weight = example(20)
    found, expected = (
        value_and_gradients(attend, 100 * q, k, v, weight) for attend in (attention.blockwise, by_reference)
    )
    assert all(np.isfinite(x).all() for x in found)
    assert max(map(error, found, expected)) < 1e-4


@pytest.mark.parametrize(
    ("sequence", "number", "size"),
    [(1, 1, 1), (512, 1, 512), (513, 2, 257), (4096, 8, 512), (1021, 2, 511), (131072, 256, 512)],
)
def test_the_rule_of_blocks(sequence, number, size, monkeypatch):
    monkeypatch.undo()
    assert spec.blocks(sequence) == (number, size)
    assert 0 <= number * size - sequence < number
    assert [int(x[0]) for x in spec.blocks(np.array([sequence]))] == [number, size]


# ---------------------------------------------------------------- what is computed


def dots(jaxpr, times=1):
    """(times, floating-point operations of one) of each product in a jaxpr, loops multiplied out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
            each = 2 * equation.outvars[0].aval.size * int(np.prod([left.shape[dim] for dim in contracted]))
            yield times, each
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for part in _inner(equation):
            yield from dots(part, inner)


def _inner(equation):
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


@pytest.mark.parametrize(("length", "number", "size"), [(8, 1, 8), (32, 4, 8), (37, 5, 8)])
def test_two_products_forward_and_five_backward_for_each_pair_of_the_lower_triangle(length, number, size):
    q, k, v, weight = example(length)
    pairs = number * (number + 1) // 2
    one = 2 * 2 * (2 * 3) * size * size * 4  # 2 for each of b x heads x c x s x H
    forward = jax.make_jaxpr(partial(attention.blockwise, save=keep))(q, k, v)
    assert list(dots(forward.jaxpr)) == [(pairs, one)] * 2
    out, vjp = jax.vjp(partial(attention.blockwise, save=keep), q, k, v)
    backward = jax.make_jaxpr(vjp)(weight)
    assert sorted(dots(backward.jaxpr)) == [(pairs, one)] * 5


def test_what_lies_above_the_diagonal_is_never_met():
    """A masked score times not-a-number is not a number, so one that is met would show."""
    q, k, v, weight = example(32)
    past = slice(None, 16)
    bad = [y.at[:, 16:].set(jnp.nan) for y in (q, k, v)]
    found, expected = attention.blockwise(*bad, keep), attention.blockwise(q, k, v, keep)
    np.testing.assert_array_equal(found[:, past], expected[:, past])
    assert np.isnan(found[:, 16:]).all()
    assert np.isnan(attention.materialised(*bad, keep)[:, past]).all()
    # Backward, a key's gradient comes from the queries behind it: of the last block's keys from that block alone.
    last = slice(24, None)
    early = q.at[:, :16].set(jnp.nan)
    dk = value_and_gradients(attention.blockwise, early, k, v, weight)[2]
    np.testing.assert_array_equal(dk[:, last], value_and_gradients(attention.blockwise, q, k, v, weight)[2][:, last])


def test_what_is_recalled_is_not_computed_again():
    q, k, v, weight = example(32)
    kept = {}

    def save(name, value):
        kept[name] = value
        return value

    out = attention.blockwise(q, k, v, save)
    assert {name: value.shape for name, value in kept.items()} == {"attention": (2, 32, 24), "lse": (2, 6, 32)}
    assert kept["lse"].dtype == jnp.float32
    scores = np.where(np.tri(32, dtype=bool), np.asarray(attention.attention_scores(q, k), np.float64), -np.inf)
    np.testing.assert_allclose(kept["lse"], np.log(np.exp(scores).sum(-1)).reshape(2, 6, 32), rtol=1e-5)

    # The statistics are used: with others the gradients are others, and the output is what was recalled.
    again = value_and_gradients(attention.blockwise, q, k, v, weight, lambda name, value: kept[name])
    assert max(map(error, again, value_and_gradients(attention.blockwise, q, k, v, weight))) < 1e-6
    wrong = kept | {"lse": kept["lse"] + 1}
    other = value_and_gradients(attention.blockwise, q, k, v, weight, lambda name, value: wrong[name])
    assert error(other[1], again[1]) > 0.01
    np.testing.assert_array_equal(attention.blockwise(q, k, v, lambda name, value: 0 * value), 0 * out)
