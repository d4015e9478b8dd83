"""The train step written without any sharding: what every layout has to reproduce.

It shares no code with jaxllm.model or the step: a bug there cannot hide here. One device, f32, the whole batch at once,
no remat, gradients by plain autodiff, the optimizer by optax.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.spec.model import ModelConfig

Tree = dict[str, Any]

B1 = 0.9  # AdamW's decay of its first moment


def _angles(config: ModelConfig, sequence: int) -> np.ndarray:
    """(T, H/2) radians; the low frequencies stretched by the rule of the Llama 3.1 release."""
    frequency = float(config.rope_theta) ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_sequence * frequency / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return np.outer(np.arange(sequence), frequency)


def _rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """x (B, T, heads, H) seen as H/2 complex numbers, real parts in the first half, each turned by its angle."""
    cos, sin = (f(angles)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
    real, imaginary = jnp.split(x, 2, -1)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q, k and v (B, T, heads, H) -> (B, T, heads x H): each position looks at itself and those before it."""
    past = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(past, scores, -jnp.inf)), v)
    return mixed.reshape(*q.shape[:2], -1)


def _llama(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> what the head multiplies (B, T, D)."""
    angles = _angles(config, tokens.shape[1])

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_epsilon) * weight

    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        h = norm(x, w["attention_norm"])
        q, k, v = ((h @ w[name]).reshape(*tokens.shape, -1, config.head_dim) for name in "qkv")
        k, v = (jnp.repeat(y, config.heads // config.kv_heads, 2) for y in (_rotate(k, angles), v))
        x = x + _attend(_rotate(q, angles), k, v) @ w["o"]
        h = norm(x, w["mlp_norm"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(block, parameters["embed"][tokens], parameters["layers"])
    return norm(x, parameters["final_norm"])


def _gpt(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> what the head multiplies (B, T, D)."""

    def norm(x: jax.Array, w: Mapping[str, Any], name: str) -> jax.Array:
        scaled = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + config.norm_epsilon)
        return scaled * w[name] + w[f"{name}_bias"]

    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        linear = lambda y, name: y @ w[name] + w[f"{name}_bias"]  # noqa: E731
        h = norm(x, w, "attention_norm")
        x = x + linear(_attend(*(linear(h, name).reshape(*tokens.shape, config.heads, -1) for name in "qkv")), "o")
        h = linear(norm(x, w, "mlp_norm"), "up")
        h = h / 2 * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return x + linear(h, "down"), None

    x = parameters["embed"][tokens] + parameters["positions"][: tokens.shape[1]]
    x, _ = jax.lax.scan(block, x, parameters["layers"])
    return norm(x, parameters, "final_norm")


_HIDDEN = {"llama": _llama, "gpt": _gpt}


def forward(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> logits (B, T, V) in f32."""
    hidden = _HIDDEN[config.family](config, parameters, tokens)
    return hidden @ (parameters["embed"].T if config.tied else parameters["head"])


def loss(config: ModelConfig, parameters: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    """Cross-entropy in nats, the mean over those of batch["targets"] (B, T) that are not negative."""
    logs = jax.nn.log_softmax(forward(config, parameters, batch["tokens"]))
    chosen = jnp.take_along_axis(logs, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    mask = batch["targets"] >= 0
    return -jnp.sum(jnp.where(mask, chosen, 0)) / jnp.sum(mask)


def loss_and_gradients(config: ModelConfig, parameters: Tree, batch: Mapping[str, np.ndarray]) -> tuple[Any, Tree]:
    """The loss, and its gradients before clipping, on one device."""
    # "highest": a GPU or TPU would otherwise multiply f32 matrices in a shorter format.
    with jax.default_matmul_precision("highest"):
        return _differentiate(config, *jax.device_put((parameters, dict(batch)), jax.local_devices()[0]))


def reference_steps(
    config: ModelConfig,
    parameters: Tree,
    moments: tuple[Tree, Tree],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    learning_rates: Iterable[float],
) -> Iterator[tuple[float, Tree, Tree]]:
    """One train step a batch: (loss, gradients before clipping, parameters after the step), as NumPy f32.

    parameters, and AdamW's first and second moments to start from, are full and unpadded, in f32; a batch holds
    `tokens` and `targets`, int32 (B, T). `learning_rates` gives one for each step.
    """
    device = jax.local_devices()[0]
    parameters, m, v = jax.device_put((parameters, *moments), device)
    # Counters come from no argument and lie on no device yet: the first update would be compiled apart from the next.
    state = jax.device_put(optax.tree.set(jax.jit(_optimizer(0.0).init)(parameters), mu=m, nu=v), device)
    for batch, learning_rate in zip(batches, learning_rates, strict=False):
        value, gradients = loss_and_gradients(config, parameters, batch)
        parameters, state = _update(learning_rate, parameters, state, gradients)
        yield float(value), jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, parameters)


# Both at the top level, so that runs of one model compile them once.
@partial(jax.jit, static_argnums=0)
def _differentiate(config: ModelConfig, parameters: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
    return jax.value_and_grad(partial(loss, config))(parameters, batch)


@jax.jit
def _update(learning_rate: Any, parameters: Tree, state: Any, gradients: Tree) -> tuple[Tree, Any]:
    updates, state = _optimizer(learning_rate).update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state


def _optimizer(learning_rate: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b1=B1, b2=0.95, eps=1e-5, weight_decay=0.1)
    )
