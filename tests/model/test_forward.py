"""The NNX model, and the reference of the train step, equal the papers' forward pass written in NumPy."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.model import WHOLE, Shards, family
from jaxllm.model.gpt import gelu, layer_norm
from jaxllm.program import reference
from jaxllm.program.run import random_batch, random_parameters
from jaxllm.spec import activations
from jaxllm.spec.model import ModelConfig, RopeScaling
from tests.model import numpy_gpt, numpy_llama

STRETCHED = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_sequence=32)


def tiny(**changes):
    figures = {
        "name": "tiny", "layers": 2, "d_model": 24, "d_ff": 40, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 50,
        "tied": False, "rope_theta": 10000.0, "rope_scaling": None, "norm_epsilon": 1e-5, "max_sequence": 64,
        "source": "test",
    }  # fmt: skip
    return ModelConfig(**(figures | changes))


def tiny_gpt(**changes):
    figures = {
        "name": "tiny", "layers": 2, "d_model": 24, "d_ff": 96, "heads": 3, "head_dim": 8, "vocab": 50, "tied": True,
        "norm_epsilon": 1e-5, "max_sequence": 19, "source": "test", "family": "gpt",
    } | changes  # fmt: skip
    return ModelConfig(**(figures | {"kv_heads": figures["heads"]}))


CASES = {
    "one query head a key": tiny(kv_heads=4),
    "two": tiny(),
    "eight": tiny(heads=8, kv_heads=1, head_dim=4),
    "eight, two groups": tiny(heads=16, kv_heads=2, head_dim=2),
    "tied": tiny(tied=True),
    "rope scaling": tiny(rope_scaling=STRETCHED, rope_theta=500.0, head_dim=16),
    "a large epsilon": tiny(norm_epsilon=0.1),
    "odd sizes": tiny(layers=3, d_model=13, d_ff=17, heads=3, kv_heads=1, head_dim=6, vocab=31),
    "one layer": tiny(layers=1, heads=1, kv_heads=1),
    "gpt": tiny_gpt(),
    "gpt, not tied": tiny_gpt(tied=False, max_sequence=64),
    "gpt, a large epsilon": tiny_gpt(norm_epsilon=0.1),
    "gpt, odd sizes": tiny_gpt(layers=3, d_model=13, d_ff=17, heads=3, head_dim=5, vocab=31, max_sequence=20),
    "gpt, one layer": tiny_gpt(layers=1, heads=1),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def example(config, sequence=19):
    """Seeded parameters, none of them a plain one or zero, and a batch of 3 sequences."""
    rng = np.random.default_rng(7)
    return random_parameters(config, rng), random_batch(config, 3, sequence, rng)


def oracle(config):
    return {"llama": numpy_llama, "gpt": numpy_gpt}[config.family]


def logits_of(config, parameters, tokens, dtype=jnp.float32):
    """The NNX model's logits, with these parameters in place of its own."""
    definition, state = nnx.split(nnx.eval_shape(lambda: family(config).model(config, dtype=dtype, rngs=nnx.Rngs(0))))
    own = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    assert own == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters)
    # jit: op by op, each odd shape would be compiled apart
    call = jax.jit(lambda parameters, tokens: nnx.merge(definition, parameters)(tokens, dtype=dtype))
    return call(parameters, tokens)


def mean_loss(logits, targets):
    """Mean of -log softmax over the targets that are not negative, in nats; token by token, in float64."""
    total, count = 0.0, 0
    for index in np.ndindex(*np.shape(targets)):
        target = targets[index]
        if target >= 0:
            row = logits[index]
            total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[target]
            count += 1
    return total / count


def relative(a, b):
    return np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))


@cases
def test_model_equals_numpy(config):
    parameters, batch = example(config)
    logits = logits_of(config, parameters, batch["tokens"])
    assert logits.shape == (3, 19, config.vocab)
    assert relative(logits, oracle(config).forward(config, parameters, batch["tokens"])) < 1e-5


@cases
def test_reference_equals_numpy(config):
    parameters, batch = example(config)
    expected = oracle(config).forward(config, parameters, batch["tokens"])
    logits = jax.jit(partial(reference.forward, config))(parameters, batch["tokens"])
    assert relative(logits, expected) < 1e-5
    expected = mean_loss(expected, batch["targets"])
    assert float(reference.loss_and_gradients(config, parameters, batch)[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", ["rope scaling", "gpt"])
def test_model_in_bf16_is_close(case):
    config = CASES[case]
    parameters, batch = example(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    logits = logits_of(config, rounded, batch["tokens"], jnp.bfloat16)
    assert logits.dtype == jnp.bfloat16
    # Each value is rounded to 8 bits, by up to 2^-9, about 12 times a block on the way to the logits; two blocks and
    # the head make some 26 roundings, which add up as a random walk to 2^-9 * sqrt(26) = 0.01. Twice that is allowed.
    error = relative(logits, oracle(config).forward(config, rounded, batch["tokens"]))
    assert 1e-4 < error < 0.02


def test_scaling_changes_only_slow_pairs():
    """The oracle itself, on figures worked out by hand: H = 8, theta = 10000, original context 32."""
    plain = numpy_llama.frequencies(tiny())
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-12)
    scaled = numpy_llama.frequencies(tiny(rope_scaling=STRETCHED))
    # Wavelengths 6.28, 62.8, 628, 6283: below 32/4 kept, above 32/1 divided by 8.
    np.testing.assert_allclose(scaled, [1, 0.0125, 0.00125, 0.000125], rtol=1e-12)
    # Wavelength 6.28 * 500^(1/4) = 29.7 lies between: 32/29.7 = 1.077 turns, (1.077 - 1) / 3 of it kept.
    between = numpy_llama.frequencies(tiny(rope_scaling=STRETCHED, rope_theta=500.0))[1]
    turns = 32 * 500**-0.25 / (2 * np.pi)
    keep = (turns - 1) / 3
    assert 0 < keep < 1
    assert between == pytest.approx(500**-0.25 * (keep + (1 - keep) / 8), rel=1e-12)


@pytest.mark.parametrize("config", [tiny(), tiny_gpt()], ids=["llama", "gpt"])
def test_the_future_is_not_seen(config):
    parameters, batch = example(config)
    changed = batch["tokens"].copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % config.vocab
    before, after = (np.asarray(logits_of(config, parameters, tokens)) for tokens in (batch["tokens"], changed))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.abs(before[:, 10:] - after[:, 10:]).max() > 0.1


def test_loss_of_equal_logits_is_log_vocab():
    """With a head of zeros every token is as likely; masked targets do not enter the mean."""
    config = tiny()
    parameters, batch = example(config)
    parameters["head"] = np.zeros_like(parameters["head"])
    logits = numpy_llama.forward(config, parameters, batch["tokens"])
    assert mean_loss(logits, batch["targets"]) == pytest.approx(np.log(config.vocab), rel=1e-12)
    assert (batch["targets"] < 0).any()


def test_a_gpt_knows_where_a_token_stands():
    """The same token everywhere: without positions all logits were alike."""
    config = tiny_gpt()
    parameters, batch = example(config)
    same = np.full_like(batch["tokens"], 7)
    logits = np.asarray(logits_of(config, parameters, same))
    assert np.abs(logits[:, 1:] - logits[:, :-1]).max(axis=-1).min() > 0.01
    parameters["positions"] = np.zeros_like(parameters["positions"])
    assert np.ptp(np.asarray(logits_of(config, parameters, same)), axis=1).max() < 1e-5


def test_layer_norm_and_gelu_on_figures_worked_out_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 3.5
    normed = layer_norm(x, jnp.full(4, 2.0), jnp.full(4, 0.5), 0.0)
    np.testing.assert_allclose(normed, 0.5 + 2 * np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-6)
    # x times the normal distribution's share below it, 0.8413 of 1 and 0.0228 of -2; the tanh form is 0.0005 off.
    np.testing.assert_allclose(gelu(jnp.array([0.0, 1.0, -2.0])), [0, 0.8412, -0.0454], atol=5e-5)


@pytest.mark.parametrize("config", [tiny(heads=4, kv_heads=2), tiny_gpt(heads=4)], ids=["llama", "gpt"])
def test_slices_of_a_block_together_are_the_block(config):
    """Two ranks of tensor parallelism, one after the other: their sums are made by hand."""
    kind = family(config)
    parameters, _ = example(config)
    weights = jax.tree.map(lambda stack: stack[0], parameters["layers"])
    block, state = nnx.split(nnx.eval_shape(lambda: kind.block(config, rngs=nnx.Rngs(0))))
    dims = {name: param.get_metadata()["dims"] for name, param in state.items()}
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 7, config.d_model)), jnp.float32)
    context = kind.context(config, jnp.arange(7.0))

    def part(name, rank):
        sliced = [i for i, dim in enumerate(dims[name]) if dim in ("heads", "kv_heads", "mlp")]
        return np.split(weights[name], 2, axis=sliced[0])[rank] if sliced else weights[name]

    sums = []

    def partial_sums(rank, known):
        """The partial results that a rank adds to a sum, when the sums before it are known."""
        mine, given = [], iter(known)

        def total(value):
            mine.append(value)
            return next(given, value)

        nnx.merge(block, {name: part(name, rank) for name in weights})(x, context, Shards(leave=total))
        return mine

    for number in range(2):
        sums.append(sum(partial_sums(rank, sums)[number] for rank in range(2)))
    given = iter(sums)
    sliced = nnx.merge(block, {name: part(name, 0) for name in weights})(x, context, Shards(leave=lambda _: next(given)))
    whole = nnx.merge(block, weights)(x, context, WHOLE)
    assert relative(sliced, np.asarray(whole, np.float64)) < 1e-5


@pytest.mark.parametrize("config", [tiny(), tiny_gpt()], ids=["llama", "gpt"])
def test_hooks_see_what_the_family_declares(config):
    kind = family(config)
    parameters, _ = example(config)
    weights = jax.tree.map(lambda stack: stack[0], parameters["layers"])
    block = nnx.merge(nnx.split(nnx.eval_shape(lambda: kind.block(config, rngs=nnx.Rngs(0))))[0], weights)
    x = jnp.ones((1, 5, config.d_model))
    saved, seen = [], {}

    def save(name, value):
        saved.append(name)
        return value

    def tap(name, value, product):
        seen.setdefault(kind.products[name], value)
        np.testing.assert_array_equal(product, block.product(name, value))
        # What is multiplied goes by one name, so that it need be kept but once.
        np.testing.assert_array_equal(value, seen[kind.products[name]])
        return product

    block(x, kind.context(config, jnp.arange(5.0)), WHOLE, save, tap)
    assert tuple(saved) == activations.BY_FAMILY[config.family]
    assert set(seen) == set(kind.products.values())


def test_logits_of_a_gpt_are_those_of_hugging_faces_gpt2():
    """What FlaxGPT2LMHeadModel of transformers 4.41.2 gave for these weights and tokens, to five decimals."""
    config = tiny_gpt()
    parameters = random_parameters(config, np.random.default_rng(7))
    logits = np.asarray(logits_of(config, parameters, np.arange(19)[None] * 7 % 50))
    published = [
        [0.69937, 0.33972, 0.02508, 1.02411, -0.43787, 0.19650],
        [0.59096, 0.66966, -0.49370, 0.45577, 0.61403, 0.04651],
        [0.59505, -0.26227, 0.25124, 0.29203, 0.11914, 0.01807],
    ]
    np.testing.assert_allclose(logits[0, [0, 9, 18], :6], published, atol=1.1e-5)
