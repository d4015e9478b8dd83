"""Loss and gradients of one step, on one device of the mesh: the body of a fully manual `jax.shard_map`.

Forward and backward pass are written out as loops over microbatches and layers, for three reasons, each measured:
the gradient accumulator is updated in place (autodiff of a scan stacks a second full-size gradient beside it), the
forward pass saves exactly what the family declares, and every collective stands where ZeRO's table puts it on all three
compilers. Derivatives inside a block are JAX's own. docs/design.md has the figures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.model import Shards, cross_entropy, family
from jaxllm.program import collectives as mesh
from jaxllm.program.sharding import DTYPES, Placement, is_placement
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

TENSOR = ("tensor",)
BATCH = ("replica", "data")  # the axes that the batch is split over

SHARDS = Shards(
    enter=lambda x: mesh.vary(x, TENSOR),
    sum=lambda x: mesh.total(x, TENSOR),
    max=lambda x: mesh.largest(x, TENSOR),
    index=lambda: mesh.index("tensor"),
)

Tree = dict[str, Any]


@jax.custom_vjp
def substitute(value: jax.Array, saved: jax.Array) -> jax.Array:
    """`saved` going forward, the derivative of `value` going backward: so `value` itself is never computed again."""
    return saved


substitute.defvjp(lambda value, saved: (saved, None), lambda _, cotangent: (cotangent, jnp.zeros_like(cotangent)))


@jax.custom_vjp
def together(*values: jax.Array) -> tuple[jax.Array, ...]:
    """The values going forward; going backward, none of their derivatives is used before all of them are there."""
    return values


together.defvjp(lambda *values: (values, None), lambda _, cotangents: lax.optimization_barrier(cotangents))


def gradients(
    parameters: Tree,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
) -> tuple[jax.Array, Tree, jax.Array]:
    """Local parameters and batch (microbatches, b, t) -> loss, reduced gradients, their global norm.

    The loss is the mean over all unmasked tokens of the global batch. Gradients are in the gradient dtype, summed over
    the mesh, and sliced over data from ZeRO 1 on. Runs inside shard_map.
    """
    dtypes = workload.dtypes
    with jax.named_scope("forward"):
        # Counted before any backward pass, so that each microbatch's gradient has its final scale at once.
        tokens = mesh.total(jnp.sum(batch["targets"] >= 0).astype(jnp.float32), BATCH)
        scale = 1.0 / jnp.maximum(tokens, 1.0)
    one_microbatch = partial(
        _autodiff_microbatch if layout.remat == "jax" else _microbatch,
        parameters,
        scale,
        config=config,
        layout=layout,
        compute=DTYPES[dtypes.compute],
        places=places,
    )
    zeros = partial(zeros_like_gradient, dtype=DTYPES[dtypes.gradients], layout=layout)
    with jax.named_scope("gradients"):
        start = jax.tree.map(zeros, parameters, places)
    (accumulator, loss), _ = lax.scan(
        one_microbatch, (start, mesh.vary(jnp.float32(0.0), BATCH)), (batch["tokens"], batch["targets"])
    )
    with jax.named_scope("gradients"):
        # What is alive after the backward pass, by name: the ledger's line is read off these fences. One a leaf,
        # because a fence around all would give every leaf the axes of the most varying one.
        accumulator = jax.tree.map(lax.optimization_barrier, accumulator)
    with jax.named_scope("backward"):
        reduced = reduce_once(accumulator, places, layout)
    with jax.named_scope("forward"):
        loss = mesh.total(loss, BATCH)
    with jax.named_scope("update"):
        norm = global_norm(reduced, places, layout)
    return loss, reduced, norm


def mean_loss(
    parameters: Tree,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
) -> jax.Array:
    """Local parameters and batch (microbatches, b, t) -> the step's loss, by its forward pass alone. Inside shard_map."""
    gather = partial(prepared, layout=layout, compute=DTYPES[workload.dtypes.compute])
    apply = _block(config, workload.sequence)

    def microbatch(loss: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens, targets = batch
        outer = {key: gather(parameters[key], place) for key, place in places.items() if key != "layers"}

        def layer(x: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
            return apply(jax.tree.map(partial(gather, layer=True), weights, places["layers"]), x), None

        y, _ = lax.scan(layer, _embed(_entry(outer, config), tokens, config), parameters["layers"])
        return loss + summed_loss(y, _exit(outer, config), targets, config), None

    start = mesh.vary(jnp.float32(0.0), BATCH)
    loss, _ = lax.scan(microbatch, start, (batch["tokens"], batch["targets"]))
    tokens = jnp.sum(batch["targets"] >= 0).astype(jnp.float32)
    return mesh.total(loss, BATCH) / jnp.maximum(mesh.total(tokens, BATCH), 1.0)


# ---------------------------------------------------------------- one microbatch


def _microbatch(
    parameters: Tree,
    scale: jax.Array,
    carry: tuple[Tree, jax.Array],
    batch: tuple[jax.Array, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    compute: Any,
    places: Tree,
) -> tuple[tuple[Tree, jax.Array], None]:
    """Adds one microbatch's gradients to the accumulator and its loss to the loss."""
    accumulator, loss = carry
    tokens, targets = batch
    gather = partial(prepared, layout=layout, compute=compute)
    apply = _block(config, tokens.shape[-1])
    saved_names = family(config).saved if layout.remat == "none" else ()

    with jax.named_scope("forward"):
        outer = {key: gather(parameters[key], place) for key, place in places.items() if key != "layers"}
        x, embed_vjp = jax.vjp(lambda entry: _embed(entry, tokens, config), _entry(outer, config))

        def forward(x: jax.Array, weights: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            saved: Tree = {}

            def save(name: str, value: jax.Array) -> jax.Array:
                if name in saved_names:
                    saved[name] = value
                return value

            weights = jax.tree.map(partial(gather, layer=True), weights, places["layers"])
            return apply(weights, x, save), (x, saved)

        y, (inputs, saved) = lax.scan(forward, x, parameters["layers"])
        micro_loss, head_vjp = jax.vjp(
            lambda y, last: summed_loss(y, last, targets, config) * scale, y, _exit(outer, config)
        )

    with jax.named_scope("backward"):
        dy, outer_gradients = head_vjp(mesh.vary(jnp.float32(1.0), BATCH))

        def backward(carry: tuple[jax.Array, Tree], layer: Any) -> tuple[tuple[jax.Array, Tree], None]:
            dy, accumulator = carry
            weights, x, saved, index = layer
            weights = jax.tree.map(partial(gather, layer=True), weights, places["layers"])

            def save(name: str, value: jax.Array) -> jax.Array:
                return substitute(value, saved[name]) if name in saved_names else value

            _, vjp = jax.vjp(lambda weights, x: apply(weights, x, save), weights, x)
            gradient, dx = vjp(dy)
            add = partial(accumulate_layer, index=index, layout=layout)
            return (dx, jax.tree.map(add, accumulator, gradient, places["layers"])), None

        layers = (parameters["layers"], inputs, saved, jnp.arange(config.layers))
        (dx, layer_accumulator), _ = lax.scan(backward, (dy, accumulator["layers"]), layers, reverse=True)

        (entry_gradients,) = embed_vjp(dx)
        if config.tied:
            entry_gradients["embed"] = entry_gradients["embed"] + outer_gradients["embed"]
        outer_gradients |= entry_gradients
        total = {
            key: accumulator[key] + reduce_each(gradient, places[key], accumulator[key].dtype, layout)
            for key, gradient in outer_gradients.items()
        }
    return (total | {"layers": layer_accumulator}, loss + micro_loss), None


def _autodiff_microbatch(
    parameters: Tree,
    scale: jax.Array,
    carry: tuple[Tree, jax.Array],
    batch: tuple[jax.Array, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    compute: Any,
    places: Tree,
) -> tuple[tuple[Tree, jax.Array], None]:
    """The same by plain autodiff of the loss (remat=jax): JAX chooses what is saved."""
    accumulator, loss = carry
    tokens, targets = batch
    apply = _block(config, tokens.shape[-1])
    gather = partial(prepared, layout=layout, compute=compute)
    # Gathered inside the differentiated function, so that the transpose reduces the gradients; without ZeRO 3
    # the cast to varying stays outside, or its transpose would be an all-reduce for each microbatch.
    free = (lambda w, place, layer=False: w) if layout.zero >= 3 else gather
    inside = gather if layout.zero >= 3 else (lambda w, place, layer=False: w)

    def loss_of(parameters: Tree) -> jax.Array:
        outer = {key: inside(parameters[key], place) for key, place in places.items() if key != "layers"}
        x = _embed(_entry(outer, config), tokens, config)

        def forward(x: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
            weights = jax.tree.map(partial(inside, layer=True), weights, places["layers"])
            return apply(weights, x), None

        y, _ = lax.scan(forward, x, parameters["layers"])
        return summed_loss(y, _exit(outer, config), targets, config) * scale

    with jax.named_scope("autodiff"):
        micro_loss, vjp = jax.vjp(loss_of, jax.tree.map(free, parameters, places))
        (gradient,) = vjp(mesh.vary(jnp.float32(1.0), BATCH))

    def add(accumulated: jax.Array, gradient: jax.Array, place: Placement) -> jax.Array:
        if layout.zero == 2:
            gradient = reduce_each(gradient, place, accumulated.dtype, layout)
        return accumulated + gradient.astype(accumulated.dtype)

    with jax.named_scope("backward"):
        return (jax.tree.map(add, accumulator, gradient, places), loss + micro_loss), None


def _block(config: ModelConfig, length: int) -> Any:
    """The block as a function of one layer's weights, for sequences of that length."""
    kind = family(config)
    definition, _ = nnx.split(nnx.eval_shape(lambda: kind.block(config, rngs=nnx.Rngs(0))))
    context = kind.context(config, length)

    def apply(weights: Tree, x: jax.Array, save: Any = lambda name, value: value) -> jax.Array:
        return nnx.merge(definition, weights)(x, context, SHARDS, save)

    return apply


def _entry(outer: Tree, config: ModelConfig) -> Tree:
    """Those of the weights outside the layers that make of tokens what the first layer takes."""
    return {name: outer[name] for name in family(config).entry}


def _exit(outer: Tree, config: ModelConfig) -> Tree:
    """Those that make of the last layer's output the logits."""
    return {name: outer[name] for name in (*family(config).exit, _head(config))}


def _head(config: ModelConfig) -> str:
    return "embed" if config.tied else "head"


def _embed(entry: Tree, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    return family(config).embed(config, entry, tokens, SHARDS)


def summed_loss(y: jax.Array, last: Tree, targets: jax.Array, config: ModelConfig) -> jax.Array:
    """Final norm, head and the summed cross-entropy of hidden states y (b, t, D)."""
    # Else XLA:GPU puts off the gradient of a tied head until that of the embedding is there, and keeps the logits.
    h, head = together(SHARDS.enter(family(config).finish(config, last, y)), last[_head(config)])
    logits = h @ (head.T if config.tied else head)
    return cross_entropy(logits, targets, config.vocab, SHARDS)


# ---------------------------------------------------------------- weights in, gradients out


def _varying(place: Placement) -> tuple[str, ...]:
    """The axes over which a whole parameter's gradient differs before it is reduced, beside its own slicing."""
    return (*BATCH, *(TENSOR if place.shared else ()))


def prepared(weight: jax.Array, place: Placement, *, layout: Layout, compute: Any, layer: bool = False) -> jax.Array:
    """A held weight as the compute needs it: cast, gathered under ZeRO 3, its gradient left to us to reduce."""
    weight = weight.astype(compute)
    sliced = layout.zero >= 3 and place.zero_dim is not None
    if sliced:
        weight = mesh.gathered(weight, "data", place.zero_dim - layer)
    return mesh.vary(weight, [axis for axis in _varying(place) if not (sliced and axis == "data")])


def reduce_each(gradient: jax.Array, place: Placement, dtype: Any, layout: Layout, layer: bool = False) -> jax.Array:
    """What is reduced for each layer and microbatch: from ZeRO 2 on, a reduce-scatter over data."""
    gradient = gradient.astype(dtype)
    if layout.zero >= 2 and place.zero_dim is not None:
        return mesh.scattered_total(gradient, "data", place.zero_dim - layer)
    return gradient


def accumulate_layer(accumulated: jax.Array, gradient: jax.Array, place: Placement, *, index: Any, layout: Layout):
    """Adds one layer's gradient to its row of the stacked accumulator, in place."""
    gradient = reduce_each(gradient, place, accumulated.dtype, layout, layer=True)
    if layout.microbatches > 1:  # else there are only zeros to add to, which need not be read
        gradient = gradient + lax.dynamic_index_in_dim(accumulated, index, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(accumulated, gradient, index, 0)


def reduce_once(accumulator: Tree, places: Tree, layout: Layout) -> Tree:
    """What is reduced once a step: everything under ZeRO 0, the scatter under ZeRO 1, then what is left over replica."""
    if layout.zero == 1:
        # Layer by layer: to scatter along an inner dim of the whole stack XLA:GPU would transpose all of it first.
        scatter = partial(jax.tree.map, _scatter_row)
        layers = lax.map(lambda rows: scatter(rows, places["layers"]), accumulator["layers"])
        outer = {key: _scatter_row(accumulator[key], place) for key, place in places.items() if key != "layers"}
        accumulator = outer | {"layers": layers}
    return jax.tree.map(partial(_reduce_rest, layout=layout), accumulator, places)


def _scatter_row(gradient: jax.Array, place: Placement) -> jax.Array:
    """Reduce-scatters one layer's gradient, or that of a weight outside the layers."""
    if place.zero_dim is None:
        return gradient
    return mesh.scattered_total(gradient, "data", place.zero_dim - place.stacked)


def _reduce_rest(gradient: jax.Array, place: Placement, layout: Layout) -> jax.Array:
    """Sums over the axes that no scatter has summed over."""
    scattered = layout.zero >= 1 and place.zero_dim is not None
    return mesh.total(gradient, [axis for axis in _varying(place) if not (scattered and axis == "data")])


def zeros_like_gradient(parameter: jax.Array, place: Placement, *, dtype: Any, layout: Layout) -> jax.Array:
    """Zeros for one parameter's gradient: whole up to ZeRO 1, this device's slice from ZeRO 2 on."""
    shape = list(parameter.shape)
    axes = set(_varying(place)) | (set(TENSOR) if place.tensor_dim is not None else set())
    if place.zero_dim is not None and layout.zero == 2:  # under ZeRO 3 the parameter is a slice already
        shape[place.zero_dim] //= layout.data
    return mesh.vary(jnp.zeros(shape, dtype), axes)


def global_norm(reduced: Tree, places: Tree, layout: Layout) -> jax.Array:
    """The L2 norm of all gradients: each device's squares, summed over just the axes that slice them."""
    squares: dict[tuple[str, ...], list[jax.Array]] = {}
    for gradient, place in zip(jax.tree.leaves(reduced), jax.tree.leaves(places, is_leaf=is_placement), strict=True):
        axes = ("data",) if layout.zero >= 1 and place.zero_dim is not None else ()
        axes += TENSOR if place.tensor_dim is not None else ()
        axes = (*(("pipe",) if place.rows is not None else ()), *axes)
        squares.setdefault(axes, []).append(jnp.sum(jnp.square(gradient.astype(jnp.float32))))
    return jnp.sqrt(sum(mesh.total(sum(group), axes) for axes, group in squares.items()))


