"""The NNX model, and the reference of the train step, equal the papers' forward pass written in NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.model import Llama
from jaxllm.program import reference
from jaxllm.program.run import random_batch, random_parameters
from jaxllm.spec.model import ModelConfig, RopeScaling
from tests.model import numpy_llama

STRETCHED = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_sequence=32)


def tiny(**changes):
    figures = {
        "name": "tiny", "layers": 2, "d_model": 24, "d_ff": 40, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 50,
        "tied": False, "rope_theta": 10000.0, "rope_scaling": None, "norm_epsilon": 1e-5, "max_sequence": 64,
        "source": "test",
    }  # fmt: skip
    return ModelConfig(**(figures | changes))


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
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def example(config, sequence=19):
    """Seeded parameters, none of them a plain one or zero, and a batch of 3 sequences."""
    rng = np.random.default_rng(7)
    return random_parameters(config, rng), random_batch(config, 3, sequence, rng)


def logits_of(config, parameters, tokens, dtype=jnp.float32):
    """The NNX model's logits, with these parameters in place of its own."""
    definition, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))))
    own = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    assert own == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters)
    # jit: op by op, each odd shape would be compiled apart
    call = jax.jit(lambda parameters, tokens: nnx.merge(definition, parameters)(tokens, dtype=dtype))
    return call(parameters, tokens)


def relative(a, b):
    return np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))


@cases
def test_model_equals_numpy(config):
    parameters, batch = example(config)
    logits = logits_of(config, parameters, batch["tokens"])
    assert logits.shape == (3, 19, config.vocab)
    assert relative(logits, numpy_llama.forward(config, parameters, batch["tokens"])) < 1e-5


@cases
def test_reference_equals_numpy(config):
    parameters, batch = example(config)
    expected = numpy_llama.forward(config, parameters, batch["tokens"])
    logits = jax.jit(partial(reference.forward, config))(parameters, batch["tokens"])
    assert relative(logits, expected) < 1e-5
    expected = numpy_llama.loss(config, parameters, **batch)
    assert float(reference.loss_and_gradients(config, parameters, batch)[0]) == pytest.approx(expected, rel=1e-6)


def test_model_in_bf16_is_close():
    config = CASES["rope scaling"]
    parameters, batch = example(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    logits = logits_of(config, rounded, batch["tokens"], jnp.bfloat16)
    assert logits.dtype == jnp.bfloat16
    # Each value is rounded to 8 bits, by up to 2^-9, about 12 times a block on the way to the logits; two blocks and
    # the head make some 26 roundings, which add up as a random walk to 2^-9 * sqrt(26) = 0.01. Twice that is allowed.
    error = relative(logits, numpy_llama.forward(config, rounded, batch["tokens"]))
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


def test_the_future_is_not_seen():
    config = tiny()
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
    assert numpy_llama.loss(config, parameters, **batch) == pytest.approx(np.log(config.vocab), rel=1e-12)
    assert (batch["targets"] < 0).any()
