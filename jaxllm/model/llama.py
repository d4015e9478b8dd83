"""A Llama decoder in Flax NNX (Touvron et al. 2023; grouped-query attention: Ainslie et al. 2023).

The modules derive every size from the weights they are given. Handed a slice of the weights, with `Shards` that
say how to sum over the other slices, the same code is one rank of Megatron's tensor parallelism
(Shoeybi et al. 2019, section 3); handed all of them, with the default `WHOLE`, it is the plain model.

Shapes: b sequences, t or s positions, D model, F feed-forward, n query heads and k key/value heads held here,
H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.model.attention import Attend, materialised
from jaxllm.model.parts import WHOLE, Multiply, Shards, keep, lookup, normal, plain
from jaxllm.spec.model import ModelConfig

# The weights of a block that multiply matrices, and the name of what each is multiplied with: all that its gradient
# needs beside the gradient of its output, so that a pipeline can put it off to a step of its own.
PRODUCTS = {
    "q": "attention_input",
    "k": "attention_input",
    "v": "attention_input",
    "o": "attention",
    "gate": "mlp_input",
    "up": "mlp_input",
    "down": "hidden",
}


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last dim (Zhang and Sennrich 2019), computed in f32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def rotary(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding (Su et al. 2021) of positions (t,) in f32, each (t, H/2) in f32, with Llama
    3.1's scaling."""
    frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2 * jnp.pi / frequency
        smooth = (scaling.original_sequence / wavelength - scaling.low_frequency_factor) / (
            scaling.high_frequency_factor - scaling.low_frequency_factor
        )
        # Below 0 the wavelength is long and fully stretched, above 1 it is short and left alone.
        smooth = jnp.clip(smooth, 0.0, 1.0)
        frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    angle = positions[:, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotary embedding to x (b, t, heads, H): pairs are (i, i + H/2), as in the published weights."""
    cos, sin = (part[None, :, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """One decoder block. Each weight carries the names of its dims: sharding rules speak of those."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F, H = config.d_model, config.d_ff, config.head_dim
        N, K = config.heads * H, config.kv_heads * H
        # Scaled by their inputs, so that scores and activations start at order 1 whatever the width; smaller ones would
        # have to grow out of rounding errors first. Output projections are scaled down with depth too (GPT-2), so that
        # deep residual streams start tame.
        narrow, deep = D**-0.5, (2 * config.layers) ** -0.5
        self.attention_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        self.q = normal(rngs, (D, N), narrow, dtype, ("model", "heads"))
        self.k = normal(rngs, (D, K), narrow, dtype, ("model", "kv_heads"))
        self.v = normal(rngs, (D, K), narrow, dtype, ("model", "kv_heads"))
        self.o = normal(rngs, (N, D), deep * N**-0.5, dtype, ("heads", "model"))
        self.mlp_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        self.gate = normal(rngs, (D, F), narrow, dtype, ("model", "mlp"))
        self.up = normal(rngs, (D, F), narrow, dtype, ("model", "mlp"))
        self.down = normal(rngs, (F, D), deep * F**-0.5, dtype, ("mlp", "model"))
        self.head_dim, self.group, self.epsilon = H, config.heads // config.kv_heads, config.norm_epsilon

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        shards: Shards = WHOLE,
        save: Callable[[str, jax.Array], jax.Array] = keep,
        tap: Callable[[str, jax.Array, jax.Array], jax.Array] = plain,
        attend: Attend = materialised,
        multiply: Multiply | None = None,
    ) -> jax.Array:
        """x (b, t, D) -> (b, t, D). `save(name, value)` sees each activation named in spec.activations and returns it, and
        `tap(name, input, product)` each product named in PRODUCTS, before any sum over the slices. `attend` is one of
        jaxllm.model.attention; `multiply(name, input, weight)` makes the products, where `@` is not to."""
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        times = lambda name, y: tap(name, y, self.product(name, y, shards, multiply))  # noqa: E731

        h = shards.enter(rms_norm(x, self.attention_norm[...], self.epsilon))
        q, k, v = (heads(save(name, shards.to_heads(times(name, h)))) for name in ("q", "k", "v"))
        q, k = rotate(q, rope), rotate(k, rope)
        mixed = shards.to_positions(attend(q.reshape(*k.shape[:3], -1, self.head_dim), k, v, save))
        x = save("residual", x + shards.leave(times("o", mixed)))

        h = shards.enter(rms_norm(x, self.mlp_norm[...], self.epsilon))
        hidden = jax.nn.silu(save("gate", times("gate", h))) * save("up", times("up", h))
        return x + shards.leave(times("down", hidden))

    def product(self, name: str, x: jax.Array, shards: Shards = WHOLE, multiply: Multiply | None = None) -> jax.Array:
        """x (b, t, in) times the weight of that name: (b, t, out)."""
        weight = getattr(self, name)[...].astype(x.dtype)
        weight = self._own_kv(weight, shards) if name in ("k", "v") else weight
        return x @ weight if multiply is None else multiply(name, x, weight)

    def _own_kv(self, weight: jax.Array, shards: Shards) -> jax.Array:
        """The key or value columns (D, k*H) that the query heads held here attend with.

        With fewer key/value heads than slices every slice holds them all, and takes the one that it shares.
        """
        query_heads = self.q[...].shape[1] // self.head_dim
        needed = max(1, query_heads // self.group) * self.head_dim
        if weight.shape[1] == needed:
            return weight
        first = shards.index() * query_heads // self.group * self.head_dim
        return lax.dynamic_slice_in_dim(weight, first, needed, axis=1)


class Llama(nnx.Module):
    """Embedding, stacked blocks, final norm and head (none when the embedding is tied).

    `vocab` is the number of rows and columns held for the vocabulary: more than config.vocab when it is padded.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, vocab: int | None = None, rngs: nnx.Rngs):
        V, D = vocab or config.vocab, config.d_model
        self.config = config
        self.embed = normal(rngs, (V, D), D**-0.5, dtype, ("vocab", "model"))
        block = lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key))  # noqa: E731
        self.layers = jax.vmap(block)(jax.random.split(rngs.params(), config.layers))
        self.final_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        if not config.tied:
            self.head = normal(rngs, (D, V), 0.02, dtype, ("model", "vocab"))

    def __call__(self, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """tokens (b, t) int -> logits (b, t, V) in `dtype`, the dtype of the activations."""
        rope = rotary(self.config, jnp.arange(tokens.shape[1], dtype=jnp.float32))
        x = lookup(self.embed[...].astype(dtype), tokens)
        x, _ = lax.scan(lambda x, block: (block(x, rope), None), x, self.layers)
        head = self.embed[...].T if self.config.tied else self.head[...]
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon) @ head.astype(dtype)
