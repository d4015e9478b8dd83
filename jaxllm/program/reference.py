"""The train step written without any sharding: what every layout has to reproduce.

It shares no code with jaxllm.model or the step: a bug there cannot hide here. One device, f32, the whole batch at once,
no remat, gradients by plain autodiff, optimizers by optax. Products in 8 bits are f32 products of what has been rounded to 8
bits and back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxllm.spec.model import ModelConfig

Tree = dict[str, Any]
Slots = dict[tuple[str, str], np.ndarray]  # arrays of an optimizer's state, by their names and that of the parameter


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


def _times(y: jax.Array, w: Tree, name: str, seen: Tree) -> jax.Array:
    """y (B, T, in) times the weight of that name.

    With a "probe" of the output, which is zero, what goes in is `seen` by its largest absolute values, and the probe's
    gradient is that of the output. With a "scale" (3,) both and that gradient are rounded to 8 bits.
    """
    weight = w[name]
    if "probe" not in w:
        return y @ weight
    seen[name] = jnp.stack([jnp.max(jnp.abs(y)), jnp.max(jnp.abs(weight))])
    if "scale" in w:
        scale = w["scale"][name]
        y, weight = _rounded(jnp.float8_e4m3fn, y, scale[0]), _rounded(jnp.float8_e4m3fn, weight, scale[1])
    product = y @ weight
    return (_gradient_rounded(product, w["scale"][name][2]) if "scale" in w else product) + w["probe"][name]


def _to_8_bits_and_back(to: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
    largest = float(jnp.finfo(to).max)
    return jnp.clip(x * scale, -largest, largest).astype(to).astype(jnp.float32) / scale


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(to: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x as its scaled values are in a format of 8 bits; its gradient as if it were not rounded."""
    return _to_8_bits_and_back(to, x, scale)


_rounded.defvjp(
    lambda to, x, scale: (_to_8_bits_and_back(to, x, scale), scale), lambda to, scale, d: (d, jnp.zeros_like(scale))
)


@jax.custom_vjp
def _gradient_rounded(y: jax.Array, scale: jax.Array) -> jax.Array:
    """y, whose gradient is rounded on its way back."""
    return y


_gradient_rounded.defvjp(
    lambda y, scale: (y, scale), lambda scale, d: (_to_8_bits_and_back(jnp.float8_e5m2, d, scale), jnp.zeros_like(scale))
)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q, k and v (B, T, heads, H) -> (B, T, heads x H): each position looks at itself and those before it."""
    past = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(past, scores, -jnp.inf)), v)
    return mixed.reshape(*q.shape[:2], -1)


def _llama(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> tuple[jax.Array, Tree]:
    """tokens (B, T) -> what the head multiplies (B, T, D), and what has been seen in each layer."""
    angles = _angles(config, tokens.shape[1])

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_epsilon) * weight

    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, Tree]:
        seen: Tree = {}
        times = lambda y, name: _times(y, w, name, seen)  # noqa: E731
        h = norm(x, w["attention_norm"])
        q, k, v = (times(h, name).reshape(*tokens.shape, -1, config.head_dim) for name in "qkv")
        k, v = (jnp.repeat(y, config.heads // config.kv_heads, 2) for y in (_rotate(k, angles), v))
        x = x + times(_attend(_rotate(q, angles), k, v), "o")
        h = norm(x, w["mlp_norm"])
        return x + times(jax.nn.silu(times(h, "gate")) * times(h, "up"), "down"), seen

    x, seen = jax.lax.scan(block, parameters["embed"][tokens], parameters["layers"])
    return norm(x, parameters["final_norm"]), seen


def _gpt(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> tuple[jax.Array, Tree]:
    """tokens (B, T) -> what the head multiplies (B, T, D), and what has been seen in each layer."""

    def norm(x: jax.Array, w: Mapping[str, Any], name: str) -> jax.Array:
        scaled = (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + config.norm_epsilon)
        return scaled * w[name] + w[f"{name}_bias"]

    def block(x: jax.Array, w: Tree) -> tuple[jax.Array, Tree]:
        seen: Tree = {}
        linear = lambda y, name: _times(y, w, name, seen) + w[f"{name}_bias"]  # noqa: E731
        h = norm(x, w, "attention_norm")
        x = x + linear(_attend(*(linear(h, name).reshape(*tokens.shape, config.heads, -1) for name in "qkv")), "o")
        h = linear(norm(x, w, "mlp_norm"), "up")
        h = h / 2 * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return x + linear(h, "down"), seen

    x = parameters["embed"][tokens] + parameters["positions"][: tokens.shape[1]]
    x, seen = jax.lax.scan(block, x, parameters["layers"])
    return norm(x, parameters, "final_norm"), seen


_HIDDEN = {"llama": _llama, "gpt": _gpt}


def forward(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> logits (B, T, V) in f32."""
    return _forward(config, parameters, tokens)[0]


def _forward(config: ModelConfig, parameters: Mapping[str, Any], tokens: jax.Array) -> tuple[jax.Array, Tree]:
    hidden, seen = _HIDDEN[config.family](config, parameters, tokens)
    return hidden @ (parameters["embed"].T if config.tied else parameters["head"]), seen


def loss(config: ModelConfig, parameters: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    """Cross-entropy in nats, the mean over those of batch["targets"] (B, T) that are not negative."""
    return _loss(config, parameters, batch)[0]


def _loss(config: ModelConfig, parameters: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Tree]:
    logits, seen = _forward(config, parameters, batch["tokens"])
    logs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logs, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    mask = batch["targets"] >= 0
    return -jnp.sum(jnp.where(mask, chosen, 0)) / jnp.sum(mask), seen


def loss_and_gradients(config: ModelConfig, parameters: Tree, batch: Mapping[str, np.ndarray]) -> tuple[Any, Tree]:
    """The loss, and its gradients before clipping, on one device."""
    # "highest": a GPU or TPU would otherwise multiply f32 matrices in a shorter format.
    with jax.default_matmul_precision("highest"):
        return _differentiate(config, *jax.device_put((parameters, dict(batch)), jax.local_devices()[0]))


def in_8_bits(
    config: ModelConfig, parameters: Tree, batch: Mapping[str, np.ndarray], amaxes: np.ndarray | None
) -> tuple[Any, Tree, np.ndarray]:
    """The loss, its gradients before clipping, and the largest absolute values of what each product of the blocks takes: its
    input, its weight and the gradient of its output (layers, products, 3).

    All of that is rounded to 8 bits, by the largest of the `amaxes` (layers, products, 3, steps) of the steps before; with
    None nothing is.
    """
    with jax.default_matmul_precision("highest"):
        found = _differentiate_in_8_bits(config, *jax.device_put((parameters, dict(batch), amaxes), jax.local_devices()[0]))
    return found[0], found[1], np.asarray(found[2])


def reference_steps(
    config: ModelConfig,
    parameters: Tree,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    learning_rates: Iterable[float],
    optimizer: str = "adamw",
    slots: Slots | None = None,
    amaxes: np.ndarray | None = None,
    first: tuple[Any, ...] | None = None,
) -> Iterator[tuple[float, Tree, Tree, np.ndarray | None]]:
    """One train step a batch: (loss, gradients before clipping, parameters after the step, amaxes after it), as NumPy.

    parameters are full and unpadded, in f32; `slots` are what the optimizer's arrays begin with, those that it would begin
    with by itself where left out. A batch holds `tokens` and `targets`, int32 (B, T). `learning_rates` gives one for each
    step. With `amaxes` (layers, products, 3, steps) the products of the blocks are in 8 bits. `first` is what
    `loss_and_gradients` or `in_8_bits` gave for the first batch, where that was asked before.
    """
    state = begin(optimizer, parameters, slots or {})
    for batch, learning_rate in zip(batches, learning_rates, strict=False):
        weights = _as(np.float32, parameters)
        if first is not None:
            found, first = first, None
        elif amaxes is None:
            found = loss_and_gradients(config, weights, batch)
        else:
            found = in_8_bits(config, weights, batch, amaxes)
        value, gradients, *new = found
        if new:
            amaxes = np.concatenate([new[0][..., None], amaxes[..., :-1]], axis=-1)
        parameters, state = update(optimizer, learning_rate, parameters, state, gradients)
        yield float(value), jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, parameters), amaxes


def begin(optimizer: str, parameters: Tree, slots: Slots) -> Any:
    """The optimizer's state for parameters, with these arrays in the place of its own."""

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        return jnp.broadcast_to(slots.get(slot_of(path), leaf), leaf.shape)

    with _precise(optimizer) as dtype:
        return jax.tree_util.tree_map_with_path(put, _begin(optimizer, _as(dtype, parameters)))


def update(optimizer: str, learning_rate: Any, parameters: Tree, state: Any, gradients: Tree) -> tuple[Tree, Any]:
    """Parameters and state after one update by gradients that are clipped first."""
    with _precise(optimizer) as dtype:
        trees = tuple(_as(dtype, tree) for tree in (parameters, state, gradients))
        # From wherever they come: the same program for all that lie on one device.
        return _update(optimizer, learning_rate, *jax.device_put(trees, jax.local_devices()[0]))


@contextlib.contextmanager
def _precise(optimizer: str) -> Iterator[Any]:
    """The dtype of an update: f32, but f64 where f32 rounding grows, so that what is off is the step's own rounding alone.
    Measured: Muon's iterations in f32 are 5e-6 off those in f64."""
    if optimizer == "muon":
        with jax.enable_x64(True):
            yield np.float64
    else:
        yield np.float32


def _as(dtype: Any, tree: Any) -> Any:
    """The tree with its fractions in a dtype."""
    return jax.tree.map(lambda x: x if x.dtype.kind != "f" or x.dtype == dtype else np.asarray(x, dtype), tree)


def slots_of(state: Any) -> Slots:
    """The arrays in an optimizer's state, as NumPy, by their name in optax and that of their parameter."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {slot_of(path): np.asarray(leaf) for path, leaf in found if slot_of(path)[0] != "count"}


def slot_of(path: tuple[Any, ...]) -> tuple[str, str]:
    """The name in optax, and that of the parameter, of an array at a path in the state: ("mu", "layers.q"). The number of
    updates is ("count", "")."""
    names = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    if path[names[-1]].name == "count":
        return "count", ""
    parameter = (path[0], *(key for key in path[names[-1] + 1 :]))
    return path[names[-1]].name, ".".join(key.key for key in parameter)


# All at the top level, so that runs of one model compile them once.
@partial(jax.jit, static_argnums=0)
def _differentiate(config: ModelConfig, parameters: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
    return jax.value_and_grad(partial(loss, config))(parameters, batch)


@partial(jax.jit, static_argnums=0)
def _differentiate_in_8_bits(
    config: ModelConfig, parameters: Tree, batch: Tree, amaxes: jax.Array | None
) -> tuple[jax.Array, Tree, jax.Array]:
    names = [name for name in ("q", "k", "v", "o", "gate", "up", "down") if name in parameters["layers"]]
    scales = {}
    if amaxes is not None:
        each = np.asarray([448.0, 448.0, 57344.0], np.float32) / jnp.max(amaxes, axis=-1)
        scales = {"scale": {name: each[:, i] for i, name in enumerate(names)}}
    layers, rows = parameters["layers"], batch["tokens"].shape
    probes = {name: jnp.zeros((config.layers, *rows, layers[name].shape[-1]), jnp.float32) for name in names}

    def of(parameters: Tree, probes: Tree) -> tuple[jax.Array, Tree]:
        return _loss(config, parameters | {"layers": parameters["layers"] | scales | {"probe": probes}}, batch)

    (value, seen), (gradients, back) = jax.value_and_grad(of, (0, 1), has_aux=True)(parameters, probes)
    found = [jnp.concatenate([seen[name], jnp.max(jnp.abs(back[name]), (1, 2, 3))[:, None]], 1) for name in names]
    return value, gradients, jnp.stack(found, 1)


@partial(jax.jit, static_argnums=0)
def _begin(optimizer: str, parameters: Tree) -> Any:
    begin = OPTIMIZERS[optimizer](0.0).init
    return {name: _apart(optimizer, name, begin)(weights) for name, weights in parameters.items()}


@partial(jax.jit, static_argnums=0)
def _update(optimizer: str, learning_rate: Any, parameters: Tree, state: Any, gradients: Tree) -> tuple[Tree, Any]:
    gradients, _ = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    step = OPTIMIZERS[optimizer](learning_rate).update
    found = {
        name: _apart(optimizer, name, step)(gradients[name], state[name], parameters[name]) for name in parameters
    }
    updates = {name: each for name, (each, _) in found.items()}
    return optax.apply_updates(parameters, updates), {name: after for name, (_, after) in found.items()}


def _apart(optimizer: str, name: str, function: Any) -> Any:
    """A function of one layer's arrays for those of all layers, where an optimizer looks at whole arrays."""
    return jax.vmap(function) if name == "layers" and optimizer in ("adafactor", "muon") else function


def _muon(rate: Any) -> optax.GradientTransformation:
    """For one layer's arrays, or one that is outside of the layers and is no matrix of them."""
    matrices = optax.contrib.muon(rate, weight_decay=0.1, consistent_rms=0.2)
    others = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)

    def kinds(weights: Any) -> Any:
        return jax.tree.map(lambda w: "matrix" if isinstance(weights, dict) and w.ndim == 2 else "other", weights)

    return optax.partition({"matrix": matrices, "other": others}, kinds)


OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.chain(optax.trace(0.9), optax.scale(-rate)),
    "adagrad": lambda rate: optax.chain(optax.scale_by_rss(0.0, 1e-20), optax.scale(-rate)),
    "adam": lambda rate: optax.chain(optax.scale_by_adam(0.9, 0.999, 1e-8), optax.scale(-rate)),
    "adamw": lambda rate: optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1),
    "adafactor": lambda rate: optax.adafactor(rate),
    "lion": lambda rate: optax.chain(
        optax.scale_by_lion(0.9, 0.99), optax.add_decayed_weights(0.3), optax.scale(-rate)
    ),
    "muon": _muon,
}  # fmt: skip
