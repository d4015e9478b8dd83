"""A train step of Llama as it is written in an afternoon: what experiments/bench_step.py holds ours against.

How it is split is left to the compiler: NamedShardings on what is held, and a few constraints. The maths, f32, the
optimizer, remat, ZeRO's slices and donation are ours. One microbatch, no replicas, degrees that divide every dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.lax import with_sharding_constraint as constrain
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

# remat=none is faster on XLA:CPU, and takes less memory, when it saves matmuls alone than by autodiff's own choice.
SAVES = {"full": {}, "none": {"policy": jax.checkpoint_policies.dots_saveable, "prevent_cse": False}}


def specs(sliced):
    """Megatron's slices over tensor, and with `sliced` ZeRO's over data; weights of layers are stacked in dim 0."""
    data = ("data",) if sliced else ()
    column, row, scale = P(None, data, "tensor"), P(None, ("tensor", *data), None), P(None, data)
    layers = dict.fromkeys(("q", "k", "v", "gate", "up"), column) | dict.fromkeys(("o", "down"), row)
    layers |= {"attention_norm": scale, "mlp_norm": scale}
    return {"embed": P(*row[1:]), "layers": layers, "final_norm": P(data), "head": P(*column[1:])}


def norm(x, weight, epsilon):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * weight


def rotate(x, cos, sin):
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def plain_step(config, layout, devices, learning_rate):
    """step (parameters, state, tokens, targets) -> (parameters, state, loss), init, and shardings to put things by."""
    mesh = jax.make_mesh((layout.data, layout.tensor), ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices)
    place = partial(jax.tree.map, partial(NamedSharding, mesh))
    held, sliced, whole = (place(specs(layout.zero >= stage)) for stage in (3, 1, 4))
    layer = place({name: P(*spec[1:]) for name, spec in specs(False)["layers"].items()})
    stream, rows, columns = place((P("data", None, None), P("data", None), P("data", None, "tensor")))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1)
    )

    def block(rope, x, w):
        w = constrain(w, layer)  # ZeRO 3 gathers here, and with remat again in the backward pass
        heads = lambda y: y.reshape(*y.shape[:2], -1, config.head_dim)  # noqa: E731
        h = norm(x, w["attention_norm"], config.norm_epsilon)
        q, k, v = rotate(heads(h @ w["q"]), *rope), rotate(heads(h @ w["k"]), *rope), heads(h @ w["v"])
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*x.shape[:2], -1)
        x = constrain(x + mixed @ w["o"], stream)
        h = norm(x, w["mlp_norm"], config.norm_epsilon)
        return constrain(x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], stream), None

    def loss(parameters, tokens, targets):
        outer = {name: constrain(w, whole[name]) for name, w in parameters.items() if name != "layers"}
        frequency = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2) / config.head_dim)
        angle = jnp.arange(tokens.shape[1])[:, None, None] * frequency
        body = partial(block, (jnp.cos(angle), jnp.sin(angle)))
        body = jax.checkpoint(body, **SAVES[layout.remat])
        x, _ = jax.lax.scan(body, constrain(outer["embed"][tokens], stream), parameters["layers"])
        logits = constrain(norm(x, outer["final_norm"], config.norm_epsilon) @ outer["head"], columns)
        chosen = jnp.sum(jnp.where(targets[..., None] == jnp.arange(config.vocab), logits, 0), -1)
        return jnp.sum(jnp.where(targets >= 0, jax.nn.logsumexp(logits, -1) - chosen, 0)) / jnp.sum(targets >= 0)

    zeros = jax.eval_shape(optimizer.init, jax.tree.map(lambda _: 0.0, held))
    state = optax.tree_map_params(optimizer, lambda _, s: s, zeros, sliced, transform_non_params=lambda _: place(P()))

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(held, state, None))
    def step(parameters, opt_state, tokens, targets):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens, targets)
        gradients, mine = constrain((gradients, parameters), (sliced, sliced))
        updates, opt_state = optimizer.update(gradients, opt_state, mine)
        return optax.apply_updates(mine, updates), opt_state, value

    return step, jax.jit(optimizer.init, out_shardings=state), (held, rows)
