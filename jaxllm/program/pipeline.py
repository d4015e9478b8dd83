"""Loss and gradients of one step of a pipeline, on one device: a schedule's table, interpreted tick by tick.

All stages run one program. At a tick a stage finds in its column of the table what to do, and does it in loops that run
as often as the table says: a loop of no turns is a step that another stage, or another tick, has to do. Loops, because
what a loop carries it updates in place, where the branches of a conditional return copies: the stash and the gradient
accumulators are never copied, and an idle stage multiplies nothing. At the end of a tick the result goes to both
neighbours, and each keeps what its table tells it to keep. docs/pipeline.md has the measurements.

The cells: F runs the layers of a chunk forward and stashes what the backward pass needs; behind the last layer the loss
is computed with its gradient. BW runs a chunk backward and accumulates its gradients. B does that for the gradient of the
inputs alone and keeps, for W, what each weight was multiplied with and the gradient of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint

from jaxllm.model import Family, Shards, family
from jaxllm.program import collectives as mesh
from jaxllm.program import gradient as whole
from jaxllm.program.gradient import TENSOR, substitute
from jaxllm.program.sharding import DTYPES
from jaxllm.schedules import Schedule
from jaxllm.schedules.counts import Slots, Step, plan, slots
from jaxllm.spec.layout import TOKEN_AXES, Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.stages import Stages, forward_only

Tree = dict[str, Any]
PIPE = ("pipe",)

# What the table tells a stage at each tick. The first six say how often a loop runs, 0 or 1.
COLUMNS = (
    "embed", "forward", "loss", "fused", "inputs", "weights", "lookup",
    "microbatch", "row", "layers", "input_slot", "stash_slot", "weight_slot", "from_left", "from_right", "from_self",
)  # fmt: skip


def table(stages: Stages, steps: Sequence[Sequence[Step]]) -> np.ndarray:
    """What each stage does at each tick, int32 (stages, ticks, len(COLUMNS))."""

    def row(stage: int, step: Step) -> Iterator[int]:
        kind = step.kind
        backward = kind in ("B", "BW")
        yield kind == "F" and step.first
        yield kind == "F"
        yield kind == "F" and step.last
        yield kind == "BW"
        yield kind == "B"
        yield kind == "W"
        yield backward and step.first
        yield step.microbatch
        yield step.chunk * stages.rows
        yield len(stages.layers(stage, step.chunk)) if kind else 0
        # A cell without a slot does not look into it, so any will do for the address.
        yield max(step.input_slot, 0)
        yield max(step.stash_slot, 0)
        yield max(step.weight_slot, 0)
        yield step.from_left
        yield step.from_right
        yield step.from_self

    columns = zip(*steps, strict=True)
    return np.array([[list(row(stage, step)) for step in column] for stage, column in enumerate(columns)], np.int32)


# Those that say where something lies.
ADDRESSES = ("microbatch", "row", "input_slot", "stash_slot", "weight_slot")


def neighbours(schedule: Schedule) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of what goes up and of what goes down. A ring is closed where chunks follow each other round it."""
    last = schedule.stages - 1
    closed = schedule.placement == "ring" and schedule.chunks > 1
    up = [(stage, stage + 1) for stage in range(last)] + ([(last, 0)] if closed else [])
    return up, [(to, stage) for stage, to in up]


def gradients(
    parameters: Tree,
    batch: dict[str, jax.Array],
    factor: jax.Array | None = None,
    scales: None = None,
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
    stages: Stages,
) -> tuple[jax.Array, Tree, jax.Array, None]:
    """Local parameters and batch (microbatches, b, t) -> loss, reduced gradients, their global norm, and no amaxes.

    As jaxllm.program.gradient.gradients, whose layouts have no pipeline and may have products in 8 bits. The leading dim of
    the parameters is this stage's: rows of layers, and one of each weight outside of them. Runs inside shard_map.
    """
    outer, layers = _parts(parameters)
    with jax.named_scope("forward"):
        tokens = mesh.total(jnp.sum(batch["targets"] >= 0).astype(jnp.float32), TOKEN_AXES)
        scale = (1.0 if factor is None else factor) / jnp.maximum(tokens, 1.0)
    work = _Work(config, layout, workload, places, stages, outer, layers, batch, scale)
    state = work.state(slots(stages.schedule), training=True)
    state = _interpret(work, table(stages, plan(stages.schedule)), state)
    with jax.named_scope("gradients"):
        # What is alive after the backward pass, by name: the ledger's line is read off these fences.
        accumulator = jax.tree.map(lax.optimization_barrier, state.accumulator)
    with jax.named_scope("backward"):
        reduced = whole.reduce_once(accumulator, places, layout)
        if config.tied and stages.first != stages.last:
            reduced["embed"] = _exchanged(reduced["embed"], stages)
        reduced = {key: value if key == "layers" else value[None] for key, value in reduced.items()}
    with jax.named_scope("forward"):
        loss = mesh.total(state.loss, (*PIPE, *TOKEN_AXES))
    with jax.named_scope("update"):
        norm = whole.global_norm(_counted_once(reduced, config, stages), places, layout)
    return (loss, reduced, norm, None) if factor is None else (loss / factor, reduced, norm / factor, None)


def mean_loss(
    parameters: Tree,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    layout: Layout,
    workload: Workload,
    places: Tree,
    stages: Stages,
) -> jax.Array:
    """Local parameters and batch (microbatches, b, t) -> the step's loss, by forward cells alone. Inside shard_map."""
    outer, layers = _parts(parameters)
    work = _Work(config, layout, workload, places, stages, outer, layers, batch, jnp.float32(1.0))
    forward = forward_only(stages.schedule)
    state = _interpret(work, table(stages, plan(forward)), work.state(slots(forward), training=False))
    tokens = jnp.sum(batch["targets"] >= 0).astype(jnp.float32)
    return mesh.total(state.loss, (*PIPE, *TOKEN_AXES)) / jnp.maximum(mesh.total(tokens, TOKEN_AXES), 1.0)


def _parts(parameters: Tree) -> tuple[Tree, Tree]:
    """The weights outside of the layers, without the dim of their one row; and the stacked layers."""
    return {key: value[0] for key, value in parameters.items() if key != "layers"}, parameters["layers"]


# ---------------------------------------------------------------- the interpreter


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a stage carries from tick to tick. Buffers are (slots, ...); `inputs` holds what waits to be used."""

    inputs: jax.Array
    stash: Tree
    weights: Tree
    accumulator: Tree
    loss: jax.Array


def gate(cell: Tree, loop: str, body: Callable[[Tree, Any], Any], carried: Any) -> Any:
    """`body` of the cell and of what is carried, or what is carried itself: the cell's `loop` turns once or not at all.
    Updates in place what it carries.

    Every address in the cell has the number of the turn added, which is 0: without it XLA takes the slice that a chunk
    of one layer reads of weights and stash out of the loop, to where every stage copies it at every tick.
    """

    def turn(number: jax.Array, value: Any) -> Any:
        return body(cell | {address: cell[address] + number for address in ADDRESSES}, value)

    return lax.fori_loop(0, cell[loop], turn, carried)


def _interpret(work: _Work, rows: np.ndarray, state: State) -> State:
    """All ticks of the schedule. `rows` is (stages, ticks, columns)."""
    mine = lax.dynamic_index_in_dim(jnp.asarray(rows), mesh.index("pipe"), 0, keepdims=False)
    up, down = neighbours(work.stages.schedule)

    def tick(state: State, row: jax.Array) -> tuple[State, None]:
        cell = {name: row[number] for number, name in enumerate(COLUMNS)}
        result, state = work.run(cell, state)
        # What goes up is an activation, and what goes down a gradient, but in the second chunk of a V.
        with jax.named_scope("forward"):
            raised = lax.ppermute(result, "pipe", up)
        with jax.named_scope("backward"):
            # Of two stages in a ring both neighbours are the other one.
            lowered = raised if set(up) == set(down) else lax.ppermute(result, "pipe", down)
        inputs = state.inputs
        for slot, arrived in (("from_left", raised), ("from_right", lowered), ("from_self", result)):
            inputs = _kept(inputs, cell[slot], arrived)
        # What a weight step does needs nothing that travels, so that the one may hide the other.
        return work.weigh(cell, replace(state, inputs=inputs)), None

    return lax.scan(tick, state, mine)[0]


def _kept(buffer: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """The buffer with the value in a slot; as it was where the slot is negative."""
    at = jnp.maximum(slot, 0)
    value = jnp.where(slot < 0, lax.dynamic_index_in_dim(buffer, at, 0, keepdims=False), value)
    return lax.dynamic_update_index_in_dim(buffer, value, at, 0)


@dataclass(frozen=True)
class _Work:
    """What one device does in the cells of a schedule."""

    config: ModelConfig
    layout: Layout
    workload: Workload
    places: Tree
    stages: Stages
    outer: Tree
    layers: Tree
    batch: dict[str, jax.Array]
    scale: jax.Array

    # ---- what is carried

    def state(self, given: Slots, *, training: bool) -> State:
        """Empty buffers, as many as the schedule needs, and the accumulators."""
        stream = self._stream()
        zero = mesh.vary(jnp.float32(0.0), (*PIPE, *TOKEN_AXES))
        inputs = self._buffers("inbox", {"": stream}, given.inputs)[""]
        if not training:
            return State(inputs, {}, {}, {}, zero)
        saved, kept = self._saved(), {}
        if given.weights:
            kept = self._buffers("weight_stash", self._tapped(), given.weights, self.stages.rows)
        stash = self._buffers("stash", saved, given.stash, self.stages.rows)
        dtype = DTYPES[self.workload.dtypes.gradients]
        with jax.named_scope("gradients"):
            zeros = partial(whole.zeros_like_gradient, dtype=dtype, layout=self.layout)
            layers = jax.tree.map(zeros, self.layers, self.places["layers"])
            outer = {key: zeros(w[None], self.places[key])[0] for key, w in self.outer.items()}
            accumulator = jax.tree.map(lambda x: mesh.vary(x, PIPE), outer | {"layers": layers})
        return State(inputs, stash, kept, accumulator, zero)

    def _buffers(self, scope: str, like: Tree, *shape: int) -> Tree:
        """Zeros for slots of arrays, behind fences by whose scope the ledger's line is known.

        One fence for those that vary over the same axes, as it makes them all vary over all of their axes; and not one
        for each, as XLA would make one of two that hold zeros of the same shape.
        """
        made = {}
        with jax.named_scope(scope):
            for axes in dict.fromkeys(mesh.varying(x) for x in like.values()):
                names = [name for name, x in like.items() if mesh.varying(x) == axes]
                zeros = [mesh.vary(jnp.zeros((*shape, *like[name].shape), like[name].dtype), axes) for name in names]
                made |= dict(zip(names, lax.optimization_barrier(zeros), strict=True))
        return {name: made[name] for name in like}

    def _stream(self) -> Any:
        """The type of what travels between layers and stages: (b, t, D), another one on each stage and data rank, and cut
        along the sequence on each tensor rank."""
        _, b, t = self.batch["tokens"].shape
        cut, axes = (self.layout.tensor, TENSOR) if self.layout.sequence else (1, ())
        x = jnp.zeros((b, t // cut, self.config.d_model), DTYPES[self.workload.dtypes.compute])
        return jax.typeof(mesh.vary(x, (*PIPE, *TOKEN_AXES, *axes)))

    def _saved(self) -> Tree:
        """The types of what F stashes of one layer, by name."""
        return _types(lambda: self._forward(self._row(self.layers, 0), _zeros(self._stream()))[1])

    def _tapped(self) -> Tree:
        """The types of what B keeps of one layer: what each weight is multiplied with, and each product's gradient."""

        def once() -> Tree:
            x = _zeros(self._stream())
            weights = self._row(self.layers, 0)
            return self._backward_inputs(weights, x, self._forward(weights, x)[1])[2]

        return _types(once)

    # ---- a cell

    def run(self, cell: dict[str, jax.Array], state: State) -> tuple[jax.Array, State]:
        """Runs a cell but for a weight step. Returns what it hands on: the output of F, the input's gradient of B and
        BW, and of the last part's F the gradient that the loss has of it."""
        training = bool(state.accumulator)
        accumulator = state.accumulator
        outer = {key: value for key, value in accumulator.items() if key != "layers"}
        stash, kept, loss = state.stash, state.weights, state.loss
        x = lax.dynamic_index_in_dim(state.inputs, cell["input_slot"], 0, keepdims=False)
        with jax.named_scope("forward"):
            x = gate(cell, "embed", self._begin, x)
            x, stash = gate(cell, "forward", self._forward_chunk, (x, stash))
        x, loss, outer = gate(cell, "loss", self._loss, (x, loss, outer))
        if not training:
            return x, replace(state, loss=loss)
        with jax.named_scope("backward"):
            layers = accumulator["layers"]
            kinds = {cell.kind for _, _, cell in self.stages.schedule.cells()}
            if "BW" in kinds:
                x, layers = gate(cell, "fused", partial(self._backward_chunk, stash), (x, layers))
            if "B" in kinds:
                x, kept, layers = gate(cell, "inputs", partial(self._inputs_chunk, stash), (x, kept, layers))
            outer = gate(cell, "lookup", partial(self._embed_gradient, x), outer)
        return x, State(state.inputs, stash, kept, outer | {"layers": layers}, loss)

    def weigh(self, cell: dict[str, jax.Array], state: State) -> State:
        """Runs a weight step, if it is one."""
        if not state.weights:
            return state
        with jax.named_scope("backward"):
            layers = gate(cell, "weights", partial(self._weigh_chunk, state.weights), state.accumulator["layers"])
        return replace(state, accumulator=state.accumulator | {"layers": layers})

    def _rows(self, cell: Tree, name: str) -> jax.Array:
        """The tokens or targets (b, t) of the cell's microbatch."""
        every = self.batch[name]
        rows = lax.dynamic_index_in_dim(every, cell["microbatch"], 0, keepdims=False)
        return _here(rows, cell["microbatch"]) if every.shape[0] == 1 else rows

    # ---- weights

    @property
    def family(self) -> Family:
        return family(self.config)

    @property
    def shards(self) -> Shards:
        return whole.shards(self.layout)

    def _apply(self, weights: Tree, x: jax.Array, **hooks: Any) -> jax.Array:
        """One block."""
        positions = whole.positions(self.layout, self.batch["tokens"].shape[-1])
        context = self.family.context(self.config, positions)
        return self._merged(weights)(x, context, self.shards, attend=whole.attend(self.layout), **hooks)

    def _merged(self, weights: Tree) -> Any:
        return nnx.merge(self._definition, weights)

    @cached_property
    def _definition(self) -> Any:
        return nnx.split(nnx.eval_shape(lambda: self.family.block(self.config, rngs=nnx.Rngs(0))))[0]

    def _row(self, layers: Tree, row: Any) -> Tree:
        """One layer's weights as the compute needs them."""

        def take(weight: jax.Array, place: Any) -> jax.Array:
            one = lax.dynamic_index_in_dim(weight, row, 0, keepdims=False)
            return self._gather(_here(one, row) if weight.shape[0] == 1 else one, place)

        return jax.tree.map(take, layers, self.places["layers"])

    def _outer(self, names: Sequence[str]) -> Tree:
        """Weights outside of the layers as the compute needs them."""
        return {name: self._gather(self.outer[name], self.places[name]) for name in names}

    def _gather(self, weight: jax.Array, place: Any) -> jax.Array:
        return whole.prepared(weight, place, layout=self.layout, compute=DTYPES[self.workload.dtypes.compute], layer=True)

    # ---- the work

    def _begin(self, cell: Tree, x: jax.Array) -> jax.Array:
        """The embedded tokens, in a loop that nothing else changes from turn to turn.

        XLA:TPU would take the gather of the table out of the loop, to where every stage does it at every tick. Behind a
        fence with what the loop carries, and with a use of that, it stays inside. Weights that tensor parallelism
        slices have a fence of their own: behind one with the others all would be taken for slices.
        """
        here = cell["embed"] > 0  # it always is, inside of the loop
        outer, shards = {}, self.shards
        for sliced in (True, False):
            names = [name for name in self.family.entry if ("tensor" in mesh.varying(self.outer[name])) == sliced]
            if names:
                carried = mesh.vary(x, TENSOR) if sliced else x
                held, carried = lax.optimization_barrier(({name: self.outer[name] for name in names}, carried))
                outer |= {name: self._gather(weight, self.places[name]) for name, weight in held.items()}
                if sliced and not self.layout.sequence:
                    shards = replace(shards, leave=lambda y, x=carried: self.shards.leave(jnp.where(here, y, x)))
                else:
                    x = carried
        return jnp.where(here, self.family.embed(self.config, outer, self._rows(cell, "tokens"), shards), x)

    def _embed_gradient(self, dx: jax.Array, cell: Tree, accumulator: Tree) -> Tree:
        outer, tokens = self._outer(self.family.entry), self._rows(cell, "tokens")
        _, vjp = jax.vjp(lambda outer: self.family.embed(self.config, outer, tokens, self.shards), outer)
        return self._add_outer(accumulator, vjp(dx)[0])

    def _loss(self, cell: Tree, carried: tuple[jax.Array, jax.Array, Tree]) -> tuple[jax.Array, jax.Array, Tree]:
        """Adds a microbatch's loss; turns the last part's output into the gradient that the loss has of it."""
        y, loss, accumulator = carried
        targets = self._rows(cell, "targets")
        names = (*self.family.exit, "embed" if self.config.tied else "head")
        loss_of = lambda y, outer: whole.summed_loss(y, outer, targets, self.config, self.layout) * self.scale  # noqa: E731
        with jax.named_scope("forward"):
            outer = self._outer(names)
            if not accumulator:
                return y, loss + loss_of(y, outer), accumulator
            micro, vjp = jax.vjp(loss_of, y, outer)
        with jax.named_scope("backward"):
            dy, gradient = vjp(mesh.vary(jnp.float32(1.0), mesh.varying(micro)))
            accumulator = self._add_outer(accumulator, gradient)
        return dy, loss + micro, accumulator

    def _add_outer(self, accumulator: Tree, gradient: Tree) -> Tree:
        add = lambda old, new, place: old + whole.reduce_each(new, place, old.dtype, self.layout, layer=True)  # noqa: E731
        return accumulator | {name: add(accumulator[name], new, self.places[name]) for name, new in gradient.items()}

    def _forward(self, weights: Tree, x: jax.Array) -> tuple[jax.Array, Tree]:
        """One block's output, and what it stashes."""
        saved = {"input": x}

        def save(name: str, value: jax.Array) -> jax.Array:
            if name in self.layout.saved:
                saved[name] = value
            return value

        return self._apply(weights, x, save=save), saved

    def _forward_chunk(self, cell: Tree, carried: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        def layer(i: jax.Array, carried: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
            x, stash = carried
            x, saved = self._forward(self._row(self.layers, cell["row"] + i), x)
            return x, {name: _write(buffer, saved[name], cell["stash_slot"], i) for name, buffer in stash.items()}

        return lax.fori_loop(0, self._depth(cell), layer, carried)

    def _backward_chunk(self, stash: Tree, cell: Tree, carried: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        depth = self._depth(cell)

        def layer(i: jax.Array, carried: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
            dy, accumulator = carried
            i = depth - 1 - i
            row = cell["row"] + i
            saved = self._stashed(stash, cell, i)
            run = lambda weights, x: self._apply(weights, x, save=self._recall(saved))  # noqa: E731
            _, vjp = jax.vjp(run, self._row(self.layers, row), saved["input"])
            gradient, dx = vjp(dy)
            return dx, self._add_layer(accumulator, gradient, row)

        return lax.fori_loop(0, depth, layer, carried)

    def _inputs_chunk(self, stash: Tree, cell: Tree, carried: tuple[jax.Array, Tree, Tree]) -> tuple[jax.Array, Tree, Tree]:
        depth = self._depth(cell)

        def layer(i: jax.Array, carried: tuple[jax.Array, Tree, Tree]) -> tuple[jax.Array, Tree, Tree]:
            dy, kept, accumulator = carried
            i = depth - 1 - i
            row = cell["row"] + i
            saved = self._stashed(stash, cell, i)
            dx, gradient, tapped = self._backward_inputs(self._row(self.layers, row), dy, saved)
            kept = {name: _write(buffer, tapped[name], cell["weight_slot"], i) for name, buffer in kept.items()}
            return dx, kept, self._add_layer(accumulator, gradient, row)

        return lax.fori_loop(0, depth, layer, carried)

    def _backward_inputs(self, weights: Tree, dy: jax.Array, saved: Tree) -> tuple[jax.Array, Tree, Tree]:
        """Gradients of a block's input and of its weights that multiply no matrix; and what those that do will need."""
        products = self.family.products
        matrices, vectors = _split(weights, products)
        # Added to each product and never computed with: their gradients are those of the products.
        probes = {name: _zeros(kind) for name, kind in self._products.items()}

        def run(vectors: Tree, x: jax.Array, probes: Tree) -> tuple[jax.Array, Tree]:
            seen = {}

            def tap(name: str, value: jax.Array, product: jax.Array) -> jax.Array:
                seen[products[name]] = value
                return product + probes[name]

            return self._apply(matrices | vectors, x, save=self._recall(saved), tap=tap), seen

        _, vjp, seen = jax.vjp(run, vectors, saved["input"], probes, has_aux=True)
        gradient, dx, cotangents = vjp(dy)
        return dx, gradient, seen | {f"d_{name}": value for name, value in cotangents.items()}

    @cached_property
    def _products(self) -> Tree:
        """The types of the products of a block's weights, by the name of the weight."""

        def once() -> Tree:
            seen = {}

            def tap(name: str, value: jax.Array, product: jax.Array) -> jax.Array:
                seen[name] = product
                return product

            self._apply(self._row(self.layers, 0), _zeros(self._stream()), tap=tap)
            return seen

        return _types(once)

    def _weigh_chunk(self, kept: Tree, cell: Tree, accumulator: Tree) -> Tree:
        def layer(i: jax.Array, accumulator: Tree) -> Tree:
            row = cell["row"] + i
            matrices, vectors = _split(self._row(self.layers, row), self.family.products)
            tapped = {name: _read(buffer, cell["weight_slot"], i) for name, buffer in kept.items()}

            def products(matrices: Tree) -> Tree:
                block = self._merged(matrices | vectors)
                return {
                    name: block.product(name, tapped[seen], self.shards) for name, seen in self.family.products.items()
                }

            _, vjp = jax.vjp(products, matrices)
            (gradient,) = vjp({name: tapped[f"d_{name}"] for name in self.family.products})
            return self._add_layer(accumulator, gradient, row)

        return lax.fori_loop(0, self._depth(cell), layer, accumulator)

    def _depth(self, cell: Tree) -> Any:
        """Layers in the chunk: a number of the program where all chunks have as many, else the table's."""
        return self.stages.rows if self.stages.even else cell["layers"]

    @staticmethod
    def _stashed(stash: Tree, cell: Tree, i: jax.Array) -> Tree:
        """What F stashed of layer `i` of the chunk, by name."""
        return {name: _read(buffer, cell["stash_slot"], i) for name, buffer in stash.items()}

    @staticmethod
    def _recall(saved: Tree) -> Callable[[str, jax.Array], jax.Array]:
        """The `save` that gives back what was stashed in the place of what would be computed."""
        return lambda name, value: substitute(value, saved[name]) if name in saved else value

    def _add_layer(self, accumulator: Tree, gradient: Tree, row: jax.Array) -> Tree:
        add = partial(whole.accumulate_layer, index=row, layout=self.layout)
        places = self.places["layers"]
        return accumulator | {name: add(accumulator[name], new, places[name]) for name, new in gradient.items()}


def _zeros(like: Any) -> jax.Array:
    """Zeros of a type."""
    return mesh.vary(jnp.zeros(like.shape, like.dtype), mesh.varying(like))


def _types(thunk: Callable[[], Tree]) -> Tree:
    """The types of the arrays that a function would return, by name: shapes, dtypes, and the axes they vary over."""
    names: list[str] = []

    def values() -> list[jax.Array]:
        found = thunk()
        names.extend(found)
        return list(found.values())

    avals = jax.make_jaxpr(values)().out_avals
    return dict(zip(names, avals, strict=True))


def _split(weights: Tree, products: Any) -> tuple[Tree, Tree]:
    """The weights that multiply matrices, and the others."""
    return {k: w for k, w in weights.items() if k in products}, {k: w for k, w in weights.items() if k not in products}


def _write(buffer: jax.Array, value: jax.Array, slot: jax.Array, layer: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(buffer, _laid_out(value[None, None]), (slot, layer, *[0] * value.ndim))


def _read(buffer: jax.Array, slot: jax.Array, layer: jax.Array) -> jax.Array:
    shape = buffer.shape[2:]
    read = _laid_out(lax.dynamic_slice(buffer, (slot, layer, *[0] * len(shape)), (1, 1, *shape))).reshape(shape)
    return _here(read, slot) if buffer.shape[:2] == (1, 1) else read


def _here(value: jax.Array, address: Any) -> jax.Array:
    """The only entry of a buffer, at an address of the turn: always that, but no compiler knows. Without a dependence on
    the turn it takes whatever is computed of the entry out of the gate, to where every tick computes it."""
    return jnp.where(address >= 0, value, jnp.zeros_like(value))


def _laid_out(value: jax.Array) -> jax.Array:
    """What is written to a buffer or read from it, row by row: else XLA:TPU lays out a whole buffer as each loop likes
    its slices best, and copies all of it between two loops."""
    return with_layout_constraint(value, DeviceLayout(tuple(range(value.ndim))))


# ---------------------------------------------------------------- tied embeddings


def _exchanged(gradient: jax.Array, stages: Stages) -> jax.Array:
    """The gradient of an embedding that is the head too: the first and the last stage swap theirs, and add."""
    pairs = [(stages.first, stages.last), (stages.last, stages.first)]
    return gradient + lax.ppermute(gradient, "pipe", pairs)


def _counted_once(reduced: Tree, config: ModelConfig, stages: Stages) -> Tree:
    """The gradients whose squares make the norm: of an embedding that two stages hold, the first stage's."""
    if not config.tied or stages.first == stages.last:
        return reduced
    here = mesh.index("pipe") == stages.first
    return reduced | {"embed": jnp.where(here, reduced["embed"], 0)}
