"""A GPT decoder in Flax NNX: GPT-2 (Radford et al. 2019), which GPT-3 and Megatron-LM's models are larger ones of.

LayerNorm stands before attention and feed-forward, positions are learned, every matrix has a bias. As in llama.py the
modules derive every size from the weights they are given, and a slice of the weights is one rank of Megatron's tensor
parallelism (Shoeybi et al. 2019, section 3).

Shapes: b sequences, t or s positions, P positions that are learned, D model, F feed-forward, n heads held here, H head
size, V vocabulary.
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

# The weights of a block that multiply matrices, and the name of what each is multiplied with.
PRODUCTS = {
    "q": "attention_input",
    "k": "attention_input",
    "v": "attention_input",
    "o": "attention",
    "up": "mlp_input",
    "down": "hidden",
}


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last dim (Ba et al. 2016), computed in f32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (centred * scale).astype(x.dtype) * weight.astype(x.dtype) + bias.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh form (Hendrycks and Gimpel 2016), as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


def embed(table: jax.Array, positions: jax.Array, tokens: jax.Array, shards: Shards = WHOLE) -> jax.Array:
    """Rows of the table (V, D) for tokens (b, t), plus those of the positions (P, D), which every slice holds."""
    return lookup(table, tokens, shards) + shards.part(shards.rows(positions, tokens.shape[1]))


class Block(nnx.Module):
    """One decoder block. Each weight carries the names of its dims: sharding rules speak of those.

    The bias of a product that is sliced by columns is sliced with them; that of one sliced by rows is whole, and added
    once, behind the sum over the slices.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        D, F, H = config.d_model, config.d_ff, config.head_dim
        N = config.heads * H
        # Scaled as in llama.py: by their inputs, output projections with depth too.
        narrow, deep = D**-0.5, (2 * config.layers) ** -0.5
        zeros = lambda size, dim: nnx.Param(jnp.zeros(size, dtype), dims=(dim,))  # noqa: E731
        self.attention_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        self.attention_norm_bias = zeros(D, "model")
        self.q = normal(rngs, (D, N), narrow, dtype, ("model", "heads"))
        self.q_bias = zeros(N, "heads")
        self.k = normal(rngs, (D, N), narrow, dtype, ("model", "heads"))
        self.k_bias = zeros(N, "heads")
        self.v = normal(rngs, (D, N), narrow, dtype, ("model", "heads"))
        self.v_bias = zeros(N, "heads")
        self.o = normal(rngs, (N, D), deep * N**-0.5, dtype, ("heads", "model"))
        self.o_bias = zeros(D, "model")
        self.mlp_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        self.mlp_norm_bias = zeros(D, "model")
        self.up = normal(rngs, (D, F), narrow, dtype, ("model", "mlp"))
        self.up_bias = zeros(F, "mlp")
        self.down = normal(rngs, (F, D), deep * F**-0.5, dtype, ("mlp", "model"))
        self.down_bias = zeros(D, "model")
        self.head_dim, self.epsilon = H, config.norm_epsilon

    def __call__(
        self,
        x: jax.Array,
        context: None = None,
        shards: Shards = WHOLE,
        save: Callable[[str, jax.Array], jax.Array] = keep,
        tap: Callable[[str, jax.Array, jax.Array], jax.Array] = plain,
        attend: Attend = materialised,
        multiply: Multiply | None = None,
    ) -> jax.Array:
        """x (b, t, D) -> (b, t, D). `save(name, value)` sees each activation named in spec.activations and returns it, and
        `tap(name, input, product)` each product named in PRODUCTS, before its bias and any sum over the slices. `attend`
        is one of jaxllm.model.attention; `multiply(name, input, weight)` makes the products, where `@` is not to."""
        times = lambda name, y: tap(name, y, self.product(name, y, shards, multiply))  # noqa: E731
        bias = lambda name: getattr(self, f"{name}_bias")[...].astype(x.dtype)  # noqa: E731

        h = shards.enter(layer_norm(x, self.attention_norm[...], self.attention_norm_bias[...], self.epsilon))
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q, k, v = (heads(save(name, shards.to_heads(times(name, h) + bias(name)))) for name in ("q", "k", "v"))
        mixed = shards.to_positions(attend(q[:, :, :, None], k, v, save))
        x = save("residual", x + shards.leave(times("o", mixed)) + bias("o"))

        h = shards.enter(layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], self.epsilon))
        hidden = gelu(save("up", times("up", h) + bias("up")))
        return x + shards.leave(times("down", hidden)) + bias("down")

    def product(self, name: str, x: jax.Array, shards: Shards = WHOLE, multiply: Multiply | None = None) -> jax.Array:
        """x (b, t, in) times the weight of that name: (b, t, out), without its bias."""
        weight = getattr(self, name)[...].astype(x.dtype)
        return x @ weight if multiply is None else multiply(name, x, weight)


class GPT(nnx.Module):
    """Embedding, learned positions, stacked blocks, final norm and head (none when the embedding is tied).

    `vocab` is the number of rows and columns held for the vocabulary: more than config.vocab when it is padded.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, vocab: int | None = None, rngs: nnx.Rngs):
        V, D = vocab or config.vocab, config.d_model
        self.config = config
        self.embed = normal(rngs, (V, D), D**-0.5, dtype, ("vocab", "model"))
        # Half of what a token starts with, as in GPT-2.
        self.positions = normal(rngs, (config.max_sequence, D), 0.5 * D**-0.5, dtype, ("position", "model"))
        block = lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key))  # noqa: E731
        self.layers = jax.vmap(block)(jax.random.split(rngs.params(), config.layers))
        self.final_norm = nnx.Param(jnp.ones(D, dtype), dims=("model",))
        self.final_norm_bias = nnx.Param(jnp.zeros(D, dtype), dims=("model",))
        if not config.tied:
            self.head = normal(rngs, (D, V), 0.02, dtype, ("model", "vocab"))

    def __call__(self, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """tokens (b, t) int -> logits (b, t, V) in `dtype`, the dtype of the activations."""
        x = embed(self.embed[...].astype(dtype), self.positions[...].astype(dtype), tokens)
        x, _ = lax.scan(lambda x, block: (block(x), None), x, self.layers)
        head = self.embed[...].T if self.config.tied else self.head[...]
        h = layer_norm(x, self.final_norm[...], self.final_norm_bias[...], self.config.norm_epsilon)
        return h @ head.astype(dtype)
