"""Loss and gradients of one step, on one device of the mesh: the body of a fully manual `jax.shard_map`.

Forward and backward pass are written out as loops over microbatches and layers, for three reasons, each measured:
the gradient accumulator is updated in place (autodiff of a scan stacks a second full-size gradient beside it), the
forward pass saves exactly what the family declares, and every collective stands where ZeRO's table puts it on all three
compilers. Derivatives inside a block are JAX's own. docs/design.md has the figures.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.model import ATTENTION, Attend, Multiply, Ring, Shards, cross_entropy, family, halves
from jaxllm.program import collectives as mesh
from jaxllm.program import fp8
from jaxllm.program.offload import to_device, to_host
from jaxllm.program.sharding import DTYPES, Placement, is_placement
from jaxllm.spec.activations import INPUT
from jaxllm.spec.layout import AXES, TOKEN_AXES, ZERO_AXES, Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

TENSOR = ("tensor",)

_WHOLE_STREAM = Shards(
    enter=lambda x: mesh.vary(x, TENSOR),
    leave=lambda x: mesh.total(x, TENSOR),
    sum=lambda x: mesh.total(x, TENSOR),
    max=lambda x: mesh.largest(x, TENSOR),
    index=lambda: mesh.index("tensor"),
)
_CUT_STREAM = replace(
    _WHOLE_STREAM,
    enter=lambda x: mesh.gathered(x, TENSOR, 1),
    leave=lambda x: mesh.scattered_total(x, TENSOR, 1),
    part=lambda x: mesh.own(x, "tensor", 0),
)

Tree = dict[str, Any]


@lru_cache  # one object a layout: JAX traces a derivative again for another ring
def ring(layout: Layout) -> Ring | None:
    """The ring that keys and values go round, of a layout that has one."""
    if not layout.ring:
        return None
    return Ring(layout.context, lambda: mesh.index("context"), lambda x: mesh.passed_on(x, "context"))


def shards(layout: Layout) -> Shards:
    """How the ranks of tensor parallelism meet, and those of context parallelism."""
    found = _CUT_STREAM if layout.sequence else _WHOLE_STREAM
    if layout.ring:
        return replace(found, rows=lambda table, tokens: halves(ring(layout), table, tokens))
    if layout.context > 1:
        return replace(
            found,
            rows=lambda table, tokens: mesh.own(table[: tokens * layout.context], "context", 0),
            to_heads=lambda x: mesh.exchanged(x, "context", 2, 1),
            to_positions=lambda x: mesh.exchanged(x, "context", 1, 2),
        )
    return found


def attend(layout: Layout) -> Attend:
    """Attention, as the blocks call it."""
    kind = ATTENTION[layout.attention]
    return partial(kind, ring=ring(layout)) if layout.ring else kind


def positions(layout: Layout, tokens: int) -> jax.Array:
    """Positions in the sequence, in f32, of what attention is among on a device that has so many tokens of it."""
    everywhere = jnp.arange(tokens * layout.context, dtype=jnp.float32)
    return halves(ring(layout), everywhere, tokens) if layout.ring else everywhere


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
    factor: jax.Array | None = None,
    scales: jax.Array | None = None,
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
) -> tuple[jax.Array, Tree, jax.Array, jax.Array | None]:
    """Local parameters and batch (microbatches, b, t) -> loss, reduced gradients, their global norm, amaxes.

    The loss is the mean over all unmasked tokens of the global batch. Gradients are in the gradient dtype, summed over
    the mesh, and sliced over data from ZeRO 1 on; with a `factor` they are of the loss times that, but not their norm. With
    `scales` (L, P, 3) the products of the blocks are in 8 bits, and the amaxes (L, P, 3) of all that they quantize the largest
    on any device; without there are none. Runs inside shard_map.
    """
    dtypes = workload.dtypes
    with jax.named_scope("forward"):
        # Counted before any backward pass, so that each microbatch's gradient has its final scale at once.
        tokens = mesh.total(jnp.sum(batch["targets"] >= 0).astype(jnp.float32), TOKEN_AXES)
        scale = (1.0 if factor is None else factor) / jnp.maximum(tokens, 1.0)
    one_microbatch = partial(
        _autodiff_microbatch if layout.remat == "jax" else _microbatch,
        parameters,
        scale,
        None if scales is None else mesh.vary(scales, AXES),
        config=config,
        layout=layout,
        compute=DTYPES[dtypes.compute],
        places=places,
    )
    zeros = partial(zeros_like_gradient, dtype=DTYPES[dtypes.gradients], layout=layout)
    with jax.named_scope("gradients"):
        start = jax.tree.map(zeros, parameters, places)
    amaxes = None if scales is None else mesh.vary(jnp.zeros_like(scales), AXES)
    (accumulator, loss, amaxes), _ = lax.scan(
        one_microbatch, (start, mesh.vary(jnp.float32(0.0), TOKEN_AXES), amaxes), (batch["tokens"], batch["targets"])
    )
    with jax.named_scope("gradients"):
        # What is alive after the backward pass, by name: the ledger's line is read off these fences. One a leaf,
        # because a fence around all would give every leaf the axes of the most varying one.
        accumulator = jax.tree.map(lax.optimization_barrier, accumulator)
    with jax.named_scope("backward"):
        reduced = reduce_once(accumulator, places, layout)
    with jax.named_scope("forward"):
        loss = mesh.total(loss, TOKEN_AXES)
    with jax.named_scope("update"):
        norm = global_norm(reduced, places, layout)
        amaxes = None if amaxes is None else mesh.largest(amaxes, AXES)
    return (loss, reduced, norm, amaxes) if factor is None else (loss / factor, reduced, norm / factor, amaxes)


def mean_loss(
    parameters: Tree,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
) -> jax.Array:
    """Local parameters and batch (microbatches, b, t) -> the step's loss, by its forward pass alone. Inside shard_map.

    In the dtype of the compute throughout: the scales of products in 8 bits belong to training.
    """
    gather = partial(prepared, layout=layout, compute=DTYPES[workload.dtypes.compute])
    apply = _block(config, layout, batch["tokens"].shape[-1])

    def microbatch(loss: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        tokens, targets = batch
        outer = {key: gather(parameters[key], place) for key, place in places.items() if key != "layers"}

        def layer(x: jax.Array, weights: Tree) -> tuple[jax.Array, None]:
            return apply(jax.tree.map(partial(gather, layer=True), weights, places["layers"]), x), None

        y, _ = lax.scan(layer, _embed(_entry(outer, config), tokens, config, layout), parameters["layers"])
        return loss + summed_loss(y, _exit(outer, config), targets, config, layout), None

    start = mesh.vary(jnp.float32(0.0), TOKEN_AXES)
    loss, _ = lax.scan(microbatch, start, (batch["tokens"], batch["targets"]))
    tokens = jnp.sum(batch["targets"] >= 0).astype(jnp.float32)
    return mesh.total(loss, TOKEN_AXES) / jnp.maximum(mesh.total(tokens, TOKEN_AXES), 1.0)


# ---------------------------------------------------------------- one microbatch


def _microbatch(
    parameters: Tree,
    scale: jax.Array,
    scales: jax.Array | None,
    carry: tuple[Tree, jax.Array, jax.Array | None],
    batch: tuple[jax.Array, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    compute: Any,
    places: Tree,
) -> tuple[tuple[Tree, jax.Array, jax.Array | None], None]:
    """Adds one microbatch's gradients to the accumulator and its loss to the loss, and keeps the largest amaxes."""
    accumulator, loss, amaxes = carry
    tokens, targets = batch
    gather = partial(prepared, layout=layout, compute=compute)
    apply = _block(config, layout, tokens.shape[-1])

    with jax.named_scope("forward"):
        outer = {key: gather(parameters[key], place) for key, place in places.items() if key != "layers"}
        x, embed_vjp = jax.vjp(lambda entry: _embed(entry, tokens, config, layout), _entry(outer, config))

        def kept(name: str, value: jax.Array) -> jax.Array:
            """An activation in the memory where it waits for the backward pass."""
            return to_host(value) if name in layout.offloaded else value

        def forward(x: jax.Array, layer: Any) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
            weights, scales = layer
            saved: Tree = {}

            def save(name: str, value: jax.Array) -> jax.Array:
                if name in layout.saved:
                    saved[name] = kept(name, value)
                return value

            weights = jax.tree.map(partial(gather, layer=True), weights, places["layers"])
            return apply(weights, x, save, scales=scales), (kept(INPUT, x), saved)

        y, (inputs, saved) = lax.scan(forward, x, (parameters["layers"], scales))
        micro_loss, head_vjp = jax.vjp(
            lambda y, last: summed_loss(y, last, targets, config, layout) * scale, y, _exit(outer, config)
        )

    with jax.named_scope("backward"):
        dy, outer_gradients = head_vjp(mesh.vary(jnp.float32(1.0), TOKEN_AXES))

        def backward(carry: tuple[jax.Array, Tree], layer: Any) -> tuple[tuple[jax.Array, Tree], jax.Array | None]:
            dy, accumulator = carry
            weights, x, saved, index, scales = layer
            x, saved = to_device((x, saved))
            weights = jax.tree.map(partial(gather, layer=True), weights, places["layers"])

            def save(name: str, value: jax.Array) -> jax.Array:
                return substitute(value, saved[name]) if name in saved else value

            _, vjp = jax.vjp(lambda weights, x, scales: apply(weights, x, save, scales=scales), weights, x, scales)
            gradient, dx, found = vjp(dy)
            add = partial(accumulate_layer, index=index, layout=layout)
            return (dx, jax.tree.map(add, accumulator, gradient, places["layers"])), found

        layers = (parameters["layers"], inputs, saved, jnp.arange(config.layers), scales)
        (dx, layer_accumulator), found = lax.scan(backward, (dy, accumulator["layers"]), layers, reverse=True)

        (entry_gradients,) = embed_vjp(dx)
        if config.tied:
            entry_gradients["embed"] = entry_gradients["embed"] + outer_gradients["embed"]
        outer_gradients |= entry_gradients
        total = {
            key: accumulator[key] + reduce_each(gradient, places[key], accumulator[key].dtype, layout)
            for key, gradient in outer_gradients.items()
        }
    return (total | {"layers": layer_accumulator}, loss + micro_loss, _largest(amaxes, found)), None


def _largest(amaxes: jax.Array | None, found: jax.Array | None) -> jax.Array | None:
    """The larger amaxes of those so far and those of a microbatch, where there are any."""
    return None if amaxes is None else jnp.maximum(amaxes, found)


def _autodiff_microbatch(
    parameters: Tree,
    scale: jax.Array,
    scales: jax.Array | None,
    carry: tuple[Tree, jax.Array, jax.Array | None],
    batch: tuple[jax.Array, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    compute: Any,
    places: Tree,
) -> tuple[tuple[Tree, jax.Array, jax.Array | None], None]:
    """The same by plain autodiff of the loss (remat=jax): JAX chooses what is saved."""
    accumulator, loss, amaxes = carry
    tokens, targets = batch
    apply = _block(config, layout, tokens.shape[-1])
    gather = partial(prepared, layout=layout, compute=compute)
    # Gathered inside the differentiated function, so that the transpose reduces the gradients; without ZeRO 3
    # the cast to varying stays outside, or its transpose would be an all-reduce for each microbatch.
    free = (lambda w, place, layer=False: w) if layout.zero >= 3 else gather
    inside = gather if layout.zero >= 3 else (lambda w, place, layer=False: w)

    def loss_of(parameters: Tree, scales: jax.Array | None) -> jax.Array:
        outer = {key: inside(parameters[key], place) for key, place in places.items() if key != "layers"}
        x = _embed(_entry(outer, config), tokens, config, layout)

        def forward(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            weights, scales = layer
            weights = jax.tree.map(partial(inside, layer=True), weights, places["layers"])
            return apply(weights, x, scales=scales), None

        y, _ = lax.scan(forward, x, (parameters["layers"], scales))
        return summed_loss(y, _exit(outer, config), targets, config, layout) * scale

    with jax.named_scope("autodiff"):
        micro_loss, vjp = jax.vjp(loss_of, jax.tree.map(free, parameters, places), scales)
        gradient, found = vjp(mesh.vary(jnp.float32(1.0), TOKEN_AXES))

    def add(accumulated: jax.Array, gradient: jax.Array, place: Placement) -> jax.Array:
        if layout.zero == 2:
            gradient = reduce_each(gradient, place, accumulated.dtype, layout)
        return accumulated + gradient.astype(accumulated.dtype)

    with jax.named_scope("backward"):
        return (jax.tree.map(add, accumulator, gradient, places), loss + micro_loss, _largest(amaxes, found)), None


def _block(config: ModelConfig, layout: Layout, length: int) -> Any:
    """The block as a function of one layer's weights, for so many tokens of a sequence on this device; of its scales too where
    its products are in 8 bits."""
    kind = family(config)
    definition, _ = nnx.split(nnx.eval_shape(lambda: kind.block(config, rngs=nnx.Rngs(0))))
    context = kind.context(config, positions(layout, length))

    def apply(
        weights: Tree, x: jax.Array, save: Any = lambda name, value: value, scales: jax.Array | None = None
    ) -> jax.Array:
        block = nnx.merge(definition, weights)
        return block(x, context, shards(layout), save, attend=attend(layout), multiply=_multiply(config, scales))

    return apply


def _multiply(config: ModelConfig, scales: jax.Array | None) -> Multiply | None:
    """How the products of a block are made in 8 bits, with the scales (P, 3) of its layer; None where they are not."""
    if scales is None:
        return None
    of = fp8.by_name(config, scales)
    return lambda name, x, weight: fp8.product(x, weight, of[name])


def _entry(outer: Tree, config: ModelConfig) -> Tree:
    """Those of the weights outside the layers that make of tokens what the first layer takes."""
    return {name: outer[name] for name in family(config).entry}


def _exit(outer: Tree, config: ModelConfig) -> Tree:
    """Those that make of the last layer's output the logits."""
    return {name: outer[name] for name in (*family(config).exit, _head(config))}


def _head(config: ModelConfig) -> str:
    return "embed" if config.tied else "head"


def _embed(entry: Tree, tokens: jax.Array, config: ModelConfig, layout: Layout) -> jax.Array:
    return family(config).embed(config, entry, tokens, shards(layout))


def summed_loss(y: jax.Array, last: Tree, targets: jax.Array, config: ModelConfig, layout: Layout) -> jax.Array:
    """Final norm, head and the summed cross-entropy of hidden states y (b, t, D), t being the device's own positions."""
    # Else XLA:GPU puts off the gradient of a tied head until that of the embedding is there, and keeps the logits.
    h, head = together(shards(layout).enter(family(config).finish(config, last, y)), last[_head(config)])
    logits = h @ (head.T if config.tied else head)
    return cross_entropy(logits, targets, config.vocab, shards(layout))


# ---------------------------------------------------------------- weights in, gradients out


def _varying(place: Placement) -> tuple[str, ...]:
    """The axes over which a whole parameter's gradient differs before it is reduced, beside its own slicing."""
    return (*TOKEN_AXES, *(TENSOR if place.shared else ()))


def prepared(weight: jax.Array, place: Placement, *, layout: Layout, compute: Any, layer: bool = False) -> jax.Array:
    """A held weight as the compute needs it: in device memory, cast, gathered under ZeRO 3, its gradient left to us to
    reduce."""
    if layout.parameters_on_host:
        weight = to_device(weight)
    weight = weight.astype(compute)
    sliced = layout.zero >= 3 and place.zero_dim is not None
    if sliced:
        weight = mesh.gathered(weight, ZERO_AXES, place.zero_dim - layer)
    return mesh.vary(weight, [axis for axis in _varying(place) if not (sliced and axis in ZERO_AXES)])


def reduce_each(gradient: jax.Array, place: Placement, dtype: Any, layout: Layout, layer: bool = False) -> jax.Array:
    """What is reduced for each layer and microbatch: from ZeRO 2 on, a reduce-scatter over data."""
    gradient = gradient.astype(dtype)
    if layout.zero >= 2 and place.zero_dim is not None:
        return mesh.scattered_total(gradient, ZERO_AXES, place.zero_dim - layer)
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
    return mesh.scattered_total(gradient, ZERO_AXES, place.zero_dim - place.stacked)


def _reduce_rest(gradient: jax.Array, place: Placement, layout: Layout) -> jax.Array:
    """Sums over the axes that no scatter has summed over."""
    scattered = layout.zero >= 1 and place.zero_dim is not None
    return mesh.total(gradient, [axis for axis in _varying(place) if not (scattered and axis in ZERO_AXES)])


def zeros_like_gradient(parameter: jax.Array, place: Placement, *, dtype: Any, layout: Layout) -> jax.Array:
    """Zeros for one parameter's gradient: whole up to ZeRO 1, this device's slice from ZeRO 2 on."""
    shape = list(parameter.shape)
    axes = set(_varying(place)) | (set(TENSOR) if place.tensor_dim is not None else set())
    if place.zero_dim is not None and layout.zero == 2:  # under ZeRO 3 the parameter is a slice already
        shape[place.zero_dim] //= layout.zero_ways
    return mesh.vary(jnp.zeros(shape, dtype), axes)


def global_norm(reduced: Tree, places: Tree, layout: Layout) -> jax.Array:
    """The L2 norm of all gradients: each device's squares, summed over just the axes that slice them."""
    squares: dict[tuple[str, ...], list[jax.Array]] = {}
    for gradient, place in zip(jax.tree.leaves(reduced), jax.tree.leaves(places, is_leaf=is_placement), strict=True):
        axes = ZERO_AXES if layout.zero >= 1 and place.zero_dim is not None else ()
        axes += TENSOR if place.tensor_dim is not None else ()
        axes = (*(("pipe",) if place.rows is not None else ()), *axes)
        squares.setdefault(axes, []).append(jnp.sum(jnp.square(gradient.astype(jnp.float32))))
    return jnp.sqrt(sum(mesh.total(sum(group), axes) for axes, group in squares.items()))


