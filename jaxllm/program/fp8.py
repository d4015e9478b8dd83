"""Products of a block in 8 bits with delayed scaling (Micikevicius et al. 2022; NVIDIA's Transformer Engine).

Each product quantizes its input, its kernel and the gradient of its output. Their scales stand before the step begins: they
come from the amaxes (largest absolute values) of the steps before. So what is quantized again in the backward pass is the
same bits as in the forward pass, on every device, and all of a step's amaxes are reduced at once, when it is over.

Shapes: L layers, P products of a block, H steps of history; 3 tensors of each product, in the order of spec.fp8.FORMATS.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.model import family
from jaxllm.program import collectives as mesh
from jaxllm.program.sharding import DTYPES
from jaxllm.spec.fp8 import FORMATS, HISTORY
from jaxllm.spec.layout import AXES
from jaxllm.spec.model import ModelConfig

INPUT, KERNEL, GRADIENT = FORMATS
_TYPES = {tensor: DTYPES[name] for tensor, name in FORMATS.items()}
_LARGEST = {tensor: float(jnp.finfo(dtype).max) for tensor, dtype in _TYPES.items()}  # 448 and 57,344


def begin(config: ModelConfig) -> jax.Array:
    """The amaxes before training (L, P, 3, H), f32: none."""
    return jnp.zeros((config.layers, len(family(config).products), len(FORMATS), HISTORY), jnp.float32)


def scales(amaxes: jax.Array) -> jax.Array:
    """What is multiplied before it is quantized, for amaxes (L, P, 3, H): (L, P, 3). The largest amax meets the largest number
    of the format; without one the scale is 1."""
    found = jnp.asarray(tuple(_LARGEST.values()), jnp.float32) / jnp.max(amaxes, axis=-1)
    return jnp.where(jnp.isfinite(found), found, 1.0)


def entered(amaxes: jax.Array, new: jax.Array) -> jax.Array:
    """The amaxes (L, P, 3, H) of the steps that count for the next one: this step's (L, P, 3) first, the oldest dropped. One
    that is not finite says nothing of the steps to come, and zero is entered."""
    new = jnp.where(jnp.isfinite(new), new, 0.0)
    return jnp.concatenate([new[..., None], amaxes[..., :-1]], axis=-1)


def by_name(config: ModelConfig, rows: jax.Array) -> dict[str, jax.Array]:
    """The scales of one layer (P, 3) by the names of its products: (3,) each."""
    return dict(zip(family(config).products, rows, strict=True))


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x (b, t, in) times a kernel (in, out), both multiplied with their `scale` (3,) and quantized: (b, t, out) in x's dtype.

    What is taken for the gradient of the scales are the amaxes of the three tensors (3,) on this device: so they come out of
    a backward pass beside the gradients.
    """
    return _forward(x, kernel, scale)[0]


def _forward(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    by_input, by_kernel, _ = scale
    x8, kernel8 = quantized(x, by_input, INPUT), quantized(kernel, by_kernel, KERNEL)
    y = _multiplied(x8, kernel8, ((2,), (0,)), by_input * by_kernel, x.dtype)
    return y, (x8, kernel8, scale, _amax(x), _amax(kernel))


def _backward(kept: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x8, kernel8, scale, *amaxes = kept
    by_input, by_kernel, by_gradient = scale
    dy8 = quantized(dy, by_gradient, GRADIENT)
    dx = _multiplied(dy8, kernel8, ((2,), (1,)), by_gradient * by_kernel, dy.dtype)
    d_kernel = _multiplied(x8, dy8, ((0, 1), (0, 1)), by_input * by_gradient, dy.dtype)
    return dx, d_kernel, jnp.stack([mesh.vary(amax, AXES) for amax in (*amaxes, _amax(dy))])


product.defvjp(_forward, _backward)


def quantized(x: jax.Array, scale: jax.Array, tensor: str) -> jax.Array:
    """x times its scale in the format of that tensor. What is beyond its largest number becomes that number, as an amax may
    be larger than those of the steps before."""
    largest = _LARGEST[tensor]
    return jnp.clip(x.astype(jnp.float32) * scale, -largest, largest).astype(_TYPES[tensor])


def _multiplied(
    a: jax.Array, b: jax.Array, contracted: tuple[Iterable[int], Iterable[int]], scale: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The product of two quantized arrays, summed in f32, without the scale that is in both."""
    sums = lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)
    return (sums / scale).astype(dtype)


def _amax(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x)).astype(jnp.float32)
