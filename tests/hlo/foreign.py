"""Programs that are not ours in shape, each with a count of its FLOPs and collectives made by hand from its shapes.

A program gives a function, abstract arguments for a mesh, and what one device does in one call of it. They are picked up
by discovery: every function here whose name begins with `program_`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from tests.hlo.compilers import array, mesh_of


@dataclass(frozen=True)
class Program:
    """A function with abstract arguments, and the count by hand: FLOPs of matmuls and convolutions of one device, and
    payload bytes of its collectives by kind and axes. `opaque`: custom calls that say nothing of themselves."""

    function: Callable
    arguments: tuple[Any, ...]
    mesh: Mesh
    flops: int
    collectives: dict[tuple[str, tuple[str, ...]], int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    opaque: int = 0


def programs() -> dict[str, Callable[[str], Program]]:
    """All programs by name; each takes the name of a target."""
    return {name.removeprefix("program_"): made for name, made in globals().items() if name.startswith("program_")}


def _auto(target: str, axes: dict[str, int] | None = None) -> Mesh:
    return mesh_of(target, axes or {"data": 8}, AxisType.Auto)


def conv_flops(batch: int, size: int, kernel: int, inputs: int, outputs: int, groups: int = 1) -> int:
    """FLOPs of a convolution of stride 1 whose output is as large as its input, square: products with padding are not
    counted. Along one dim, the offset k meets size - |k| positions."""
    reach = kernel // 2
    along = sum(size - abs(offset) for offset in range(-reach, reach + 1))
    return 2 * batch * along**2 * (inputs // groups) * outputs


def program_cnn(target: str) -> Program:
    """A Flax CNN with two convolutions and a dense layer, its loss and gradients, data parallel."""
    mesh = _auto(target)
    batch, size = 64, 16

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.one = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.two = nnx.Conv(16, 32, (3, 3), rngs=rngs)
            self.head = nnx.Linear(32, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.one(x))
            x = nnx.relu(self.two(x))
            return self.head(x.mean((1, 2)))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: array(mesh, leaf.shape, dtype=leaf.dtype), state)

    def step(params, x, y):
        def loss(params):
            logits = nnx.merge(graph, params)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return jax.value_and_grad(loss)(params)

    arguments = (
        state,
        array(mesh, (batch, size, size, 8), P("data")),
        array(mesh, (batch,), P("data"), dtype="int32"),
    )
    own = batch // 8
    one, two = conv_flops(own, size, 3, 8, 16), conv_flops(own, size, 3, 16, 32)
    head = 2 * own * 32 * 10
    gradients = 4 * (3 * 3 * 8 * 16 + 16 + 3 * 3 * 16 * 32 + 32 + 32 * 10 + 10)
    # the first convolution needs no gradient of its input
    return Program(
        step, arguments, mesh, flops=2 * one + 3 * two + 3 * head, collectives={("all-reduce", ("data",)): gradients + 4}
    )


def program_unet(target: str) -> Program:
    """Down, up and a skip connection: convolutions with strides, a transposed one, and a grouped one; forward only."""
    mesh = _auto(target)
    batch, size, width = 256, 16, 16  # with few images XLA:TPU cuts each into overlapping pieces
    numbers = ("NHWC", "HWIO", "NHWC")

    def one(params, x):
        conv = partial(lax.conv_general_dilated, dimension_numbers=numbers, padding="SAME")
        first = jax.nn.relu(conv(x, params["in"], (1, 1)))
        low = jax.nn.relu(conv(first, params["down"], (2, 2)))
        low = jax.nn.relu(conv(low, params["group"], (1, 1), feature_group_count=4))
        up = lax.conv_transpose(low, params["up"], (2, 2), "SAME", dimension_numbers=numbers)
        return conv(jnp.concatenate([first, up], -1), params["out"], (1, 1))

    def step(params, x):
        # each device for itself: left to itself, XLA gathers the batch for the grouped convolution
        return jax.shard_map(one, in_specs=(P(), P("data")), out_specs=P("data"))(params, x)

    shapes = {
        "in": (3, 3, 4, width), "down": (2, 2, width, 2 * width), "group": (3, 3, 2 * width // 4, 2 * width),
        "up": (2, 2, 2 * width, width), "out": (3, 3, 2 * width, 4),
    }  # fmt: skip
    params = {name: array(mesh, shape) for name, shape in shapes.items()}
    own, half = batch // 8, size // 2
    flops = (
        conv_flops(own, size, 3, 4, width)
        + 2 * own * half**2 * 4 * width * 2 * width
        + conv_flops(own, half, 3, 2 * width, 2 * width, groups=4)
        # each input position meets each of the 2 x 2 weights once; cuDNN is given the zeros between them too
        + 2 * own * (size if target == "gpu" else half) ** 2 * 4 * 2 * width * width
        + conv_flops(own, size, 3, 2 * width, 4)
    )
    return Program(step, (params, array(mesh, (batch, size, size, 4), P("data"))), mesh, flops)


def program_experts(target: str) -> Program:
    """A mixture of experts: tokens go to their experts and back by all-to-all."""
    mesh = mesh_of(target, {"expert": 8})
    tokens, width, hidden = 64, 128, 256  # tokens of one device, evenly spread over the experts

    def step(x, up, down):
        def one(x, up, down):
            sent = lax.all_to_all(x.reshape(8, -1, width), "expert", 0, 0)
            made = jax.nn.relu(sent.reshape(-1, width) @ up[0]) @ down[0]
            return lax.all_to_all(made.reshape(8, -1, width), "expert", 0, 0).reshape(-1, width)

        spec = P("expert")
        return jax.shard_map(one, in_specs=spec, out_specs=spec)(x, up, down)

    arguments = (
        array(mesh, (8 * tokens, width), P("expert")),
        array(mesh, (8, width, hidden), P("expert")),
        array(mesh, (8, hidden, width), P("expert")),
    )
    # XLA:TPU multiplies in bf16 by default, and rounds what it multiplies before it sends it
    payload = tokens * width * (2 + 4 if target == "tpu" else 4 + 4)
    return Program(step, arguments, mesh, 4 * tokens * width * hidden, {("all-to-all", ("expert",)): payload})


def program_ring(target: str) -> Program:
    """Ring attention: keys and values travel from device to device in a loop."""
    mesh = mesh_of(target, {"context": 8})
    length, heads, size = 32, 4, 64  # of one device

    def step(q, k, v):
        def one(q, k, v):
            around = [(i, (i + 1) % 8) for i in range(8)]

            def turn(carry, _):
                k, v, top, bottom = carry
                scores = jnp.exp(jnp.einsum("qhd,khd->hqk", q, k) * 1e-3)
                top = top + jnp.einsum("hqk,khd->qhd", scores, v)
                bottom = bottom + scores.sum(-1).T
                k, v = (lax.ppermute(x, "context", around) for x in (k, v))
                return (k, v, top, bottom), None

            start = (k, v, jnp.zeros_like(q), lax.pcast(jnp.zeros((length, heads)), "context", to="varying"))
            (_, _, top, bottom), _ = lax.scan(turn, start, length=8)
            return top / bottom[..., None]

        return jax.shard_map(one, in_specs=P("context"), out_specs=P("context"))(q, k, v)

    arguments = tuple(array(mesh, (8 * length, heads, size), P("context")) for _ in "qkv")
    payload = length * heads * size * (2 if target == "tpu" else 4)
    return Program(
        step, arguments, mesh, 8 * 2 * 2 * heads * length * length * size, {("permute", ("context",)): 16 * payload}
    )


def program_scan_in_scan(target: str) -> Program:
    """A scan inside a scan, differentiated, with jax.checkpoint around the inner one."""
    mesh = _auto(target)
    outer, inner, width, own = 3, 4, 64, 16

    def step(w, x):
        def loss(w):
            def small(x, w):
                return jnp.sin(x @ w), None

            @jax.checkpoint
            def large(x, w):
                return lax.scan(small, x, w)[0], None

            return (lax.scan(large, x, w)[0] ** 2).sum()

        return jax.grad(loss)(w)

    arguments = array(mesh, (outer, inner, width, width)), array(mesh, (8 * own, width), P("data"))
    one = 2 * own * width * width
    gradients = outer * inner * width * width * 4
    # forward, what the checkpoint repeats, the gradients of x and w
    return Program(step, arguments, mesh, 4 * outer * inner * one, {("all-reduce", ("data",)): gradients})


def program_custom_vjp(target: str) -> Program:
    """A function with a backward pass of its own, which has one matmul more than autodiff's."""
    mesh = _auto(target)
    rows, width = 32, 128

    @jax.custom_vjp
    def layer(x, w):
        return jnp.sin(x @ w)

    def forward(x, w):
        return layer(x, w), (x, w)

    def backward(saved, g):
        x, w = saved
        g = g * jnp.cos(x @ w)
        return g @ w.T, x.T @ g

    layer.defvjp(forward, backward)

    def step(x, w):
        return jax.grad(lambda x, w: layer(layer(x, w), w).sum(), argnums=(0, 1))(x, w)

    arguments = array(mesh, (8 * rows, width), P("data")), array(mesh, (width, width))
    one = 2 * rows * width * width
    # of the second layer's output the derivative alone is needed, and the first layer's product serves both passes: with
    # the gradients of x and w of both layers six products
    return Program(step, arguments, mesh, 6 * one, {("all-reduce", ("data",)): width * width * 4 * (2 if target == "cpu" else 1)})


def program_pallas(target: str) -> Program:
    """A Pallas kernel between two matmuls. Its own work is declared, as no compiler can see into it."""
    from jax.experimental import pallas as pl

    mesh = _auto(target)
    rows, width = 64, 128

    def kernel(x, y):
        y[...] = x[...] * 2.0

    double = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, width), "float32"),
        interpret=target == "cpu",
        cost_estimate=pl.CostEstimate(flops=rows * width, bytes_accessed=8 * rows * width, transcendentals=0),
    )

    def step(x, w):
        def one(x, w):
            return double(x @ w) @ w

        return jax.shard_map(one, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)(x, w)

    arguments = array(mesh, (8 * rows, width), P("data")), array(mesh, (width, width))
    # XLA:TPU keeps the declaration, XLA:GPU nothing; on cpu the kernel is interpreted
    return Program(step, arguments, mesh, 4 * rows * width * width, opaque=int(target == "gpu"))


def program_update(target: str) -> Program:
    """AdamW alone, its state sharded: nothing is multiplied, nothing travels."""
    mesh = _auto(target)
    optimizer = optax.adamw(1e-3)

    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: array(mesh, shape, P("data")) for name, shape in {"w": (256, 128), "b": (128,)}.items()}
    state = jax.tree.map(
        lambda leaf: array(mesh, leaf.shape, P("data") if leaf.shape else P(), dtype=leaf.dtype),
        jax.eval_shape(optimizer.init, params),
    )
    return Program(step, (params, state, params), mesh, 0, options={"donate_argnums": (1, 2)})


def program_vmapped(target: str) -> Program:
    """An ensemble: one model under vmap, its members on one axis, its rows on the other."""
    mesh = _auto(target, {"member": 4, "data": 2})
    members, rows, width = 8, 32, 64

    def model(w, x):
        return jnp.tanh(jnp.tanh(x @ w["one"]) @ w["two"])

    def step(w, x):
        return jax.vmap(model, (0, None))(w, x).mean(0)

    w = {name: array(mesh, (members, width, width), P("member")) for name in ("one", "two")}
    own = (members // 4) * (rows // 2)
    return Program(
        step, (w, array(mesh, (rows, width), P("data"))), mesh, 2 * 2 * own * width * width,
        {("all-reduce", ("member",)): rows // 2 * width * 4}, {"out_shardings": jax.NamedSharding(mesh, P("data"))},
    )  # fmt: skip


def program_decode(target: str) -> Program:
    """One token of a decoder with a cache of keys and values, heads over the axis tensor."""
    mesh = _auto(target, {"tensor": 8})
    batch, length, heads, size, layers = 4, 128, 8, 64, 3
    width = heads * size

    def step(params, cache, x, position):
        def layer(x, given):
            w, keys, values = given
            q, k, v = jnp.einsum("bd,dchk->cbhk", x, w["qkv"])
            keys = lax.dynamic_update_slice(keys, k[:, None], (0, position, 0, 0))
            values = lax.dynamic_update_slice(values, v[:, None], (0, position, 0, 0))
            scores = jnp.einsum("bhk,bthk->bht", q, keys) / math.sqrt(size)
            scores = jnp.where(jnp.arange(length) <= position, scores, -1e9)
            mixed = jnp.einsum("bht,bthk->bhk", jax.nn.softmax(scores), values)
            return x + jnp.einsum("bhk,hkd->bd", mixed, w["out"]), (keys, values)

        x, cache = lax.scan(layer, x, (params, *cache))
        return x, cache

    params = {
        "qkv": array(mesh, (layers, width, 3, heads, size), P(None, None, None, "tensor")),
        "out": array(mesh, (layers, heads, size, width), P(None, "tensor")),
    }
    cache = tuple(array(mesh, (layers, batch, length, heads, size), P(None, None, None, "tensor")) for _ in range(2))
    arguments = params, cache, array(mesh, (batch, width)), array(mesh, (), dtype="int32")
    own = heads // 8
    flops = layers * 2 * batch * (width * 3 * own * size + 2 * own * length * size + own * size * width)
    return Program(
        step, arguments, mesh, flops, {("all-reduce", ("tensor",)): layers * batch * width * 4},
        {"donate_argnums": (1,)},
    )  # fmt: skip


def program_ragged(target: str) -> Program:
    """A ragged dot: rows of several groups, each with a matrix of its own."""
    mesh = _auto(target)
    rows, width, hidden, groups = 64, 128, 256, 4

    def step(x, w, sizes):
        return jax.shard_map(
            lambda x, w, sizes: lax.ragged_dot(x, w, sizes), in_specs=(P("data"), P(), P()), out_specs=P("data")
        )(x, w, sizes)

    arguments = (
        array(mesh, (8 * rows, width), P("data")),
        array(mesh, (groups, width, hidden)),
        array(mesh, (groups,), dtype="int32"),
    )
    # XLA:TPU has a kernel; the others multiply with the matrices of all groups, the other rows masked
    times = 1 if target == "tpu" else groups
    return Program(step, arguments, mesh, times * 2 * rows * width * hidden)
