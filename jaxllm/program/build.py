"""build: from the nouns to a jitted step and abstract arguments, ready to be lowered for any target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.model import family, order
from jaxllm.program import fp8, gradient, offload, optimizer, pipeline
from jaxllm.program.sharding import DTYPES, Placement, held_specs, is_placement, place, plain_tree, state_specs
from jaxllm.program.transformations import registry
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.partition import stages_of
from jaxllm.theory.stages import Stages

Tree = Any

ROWS = PartitionSpec(None, ("replica", "data"), "context")  # tokens and targets (microbatches, sequences, T)


def device_mesh(layout: Layout, devices: Sequence[Any]) -> Mesh:
    """The mesh of the layout over the devices, axes of degree 1 left out, the innermost over neighbours.

    Raises SpecError when the degrees do not multiply to the number of devices.
    """
    if layout.devices != len(devices):
        raise SpecError(f"layout {layout} multiplies to {layout.devices:,}, and the mesh has {len(devices):,} devices.")
    degrees = {axis: degree for axis, degree in layout.degrees.items() if degree > 1} or {"data": 1}
    grid = np.asarray(devices, dtype=object).reshape(tuple(degrees.values()))
    return Mesh(grid, tuple(degrees), axis_types=(AxisType.Explicit,) * len(degrees))


def on_mesh(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec without the axes that the mesh lacks."""

    def dim(entry: Any) -> Any:
        axes = tuple(axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if axis in mesh.axis_names)
        return axes[0] if len(axes) == 1 else axes or None

    return PartitionSpec(*(dim(entry) for entry in spec))


def arranged(value: Any, place: Placement, like: Any) -> Any:
    """A parameter in the model's own shape as the mesh holds it: rows in the order of the stages, zeros where nothing
    is, in the shape and dtype of `like`. For arrays of JAX or NumPy."""
    numpy = np if isinstance(value, np.ndarray) else jnp
    if place.rows is not None:
        stack = value if len(value.shape) == len(place.shape) else value[None]
        filled = numpy.asarray([row >= 0 for row in place.rows]).reshape(-1, *[1] * (len(stack.shape) - 1))
        value = numpy.where(filled, stack[numpy.maximum(numpy.asarray(place.rows), 0)], 0)
    rows = [(0, held - size) for held, size in zip(like.shape, value.shape, strict=True)]
    return numpy.pad(value, rows).astype(like.dtype)


def natural(value: jax.Array, place: Placement) -> jax.Array:
    """The inverse of `arranged`: a parameter as the mesh holds it in the model's own shape."""
    if place.rows is not None:
        layers = 1 + max(place.rows)
        value = value[np.asarray([place.rows.index(layer) for layer in range(layers)])]
        if len(place.logical_shape) < len(place.shape):
            value = value[0]
    return value[tuple(slice(size) for size in place.logical_shape)]


@dataclass(frozen=True)
class Built:
    """A training step over a mesh.

    step       jitted (parameters, optimizer, batch) -> (parameters, optimizer, metrics); state is donated
    loss       jitted (parameters, batch) -> loss, by the forward pass alone
    arguments  abstract parameters, optimizer and batch, with their shardings; the tokens of a batch are in the order of
               `positions`
    stages     of a pipeline, None without one
    places     how each parameter is sliced
    """

    model: ModelConfig
    layout: Layout
    workload: Workload
    mesh: Mesh
    stages: Stages | None
    places: Tree
    arguments: tuple[Tree, Tree, Tree]
    learning_rate: float
    warmup: int  # updates until the learning rate is reached, see optimizer.rate; 0: it is constant
    target: str  # which compiler it is for: cpu, gpu, tpu or local
    hardware: str  # all that the compiler is told of the devices

    @property
    def axes(self) -> dict[str, int]:
        """Degrees of the axes in the mesh, outermost first."""
        return dict(self.mesh.shape)

    @cached_property
    def _specs(self) -> tuple[Tree, Tree]:
        """Specs on this mesh of held parameters and of optimizer state."""
        trim = partial(jax.tree.map, partial(on_mesh, mesh=self.mesh))
        return trim(held_specs(self.places, self.layout)), trim(state_specs(self.places, self.layout))

    def _on_each_device(self, body: Any, out_specs: Any, *more: Any) -> Any:
        """A function of local parameters and batch, and of what has the specs of `more`, as one of global arrays."""
        body = partial(body, config=self.model, layout=self.layout, workload=self.workload, places=self.places)
        if self.stages is not None:
            body = partial(body, stages=self.stages)
        rows = on_mesh(ROWS, self.mesh)
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(self._specs[0], {"tokens": rows, "targets": rows}, *more),
            out_specs=out_specs,
            check_vma=True,
        )

    def _gradients(self, parameters: Tree, batch: Tree, factor: Any, scales: Any) -> tuple[jax.Array, Tree, jax.Array, Any]:
        alike = PartitionSpec()
        of = self._on_each_device(self._program.gradients, (alike, self._specs[1], alike, alike), alike, alike)
        return of(parameters, batch, factor, scales)

    @property
    def _program(self) -> Any:
        return gradient if self.stages is None else pipeline

    @cached_property
    def step(self) -> Any:
        held, sliced = self._specs

        def step(held_parameters: Tree, optimizer_state: Tree, batch: Tree) -> tuple[Tree, Tree, dict[str, jax.Array]]:
            parameters = offload.small_to_device(held_parameters)
            amaxes = optimizer_state.get("amax")
            scales = None if amaxes is None else fp8.scales(amaxes)
            loss, grads, norm, found = self._gradients(parameters, batch, optimizer_state.get("scale"), scales)
            with jax.named_scope("update"):
                parameters, optimizer_state = optimizer.update(
                    parameters,
                    optimizer_state,
                    grads,
                    norm,
                    layout=self.layout,
                    workload=self.workload,
                    places=self.places,
                    held=held,
                    sliced=sliced,
                    learning_rate=self.learning_rate,
                    warmup=self.warmup,
                )
                if amaxes is not None:
                    optimizer_state["amax"] = fp8.entered(amaxes, found)
            return offload.back(parameters, held_parameters), optimizer_state, {"loss": loss, "gradient_norm": norm}

        # Named as the ledger's lines: XLA calls its arguments by these names. An argument that is not used still counts.
        def train_step(parameters: Tree, optimizer: Tree, batch: Tree) -> Any:
            return step(parameters, optimizer, batch)

        shardings = (*(self._shardings(tree) for tree in self.arguments[:2]), None)
        return jax.jit(train_step, donate_argnums=(0, 1), keep_unused=True, out_shardings=shardings)

    @cached_property
    def loss(self) -> Any:
        return jax.jit(self._on_each_device(self._program.mean_loss, PartitionSpec()))

    def init_parameters(self, seed: int) -> Tree:
        """Parameters on the mesh, random by the seed: the same ones whatever the layout, but for the last bit of some
        where a device draws an odd number of them, and zeros where nothing is."""
        # On a mesh of automatic axes, so that each device draws its own slice and none of them all.
        automatic = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(self.axes))
        shardings = jax.tree.map(lambda leaf: NamedSharding(automatic, leaf.sharding.spec), self.arguments[0])

        @partial(jax.jit, out_shardings=shardings)
        def init() -> Tree:
            drawn = plain_tree(nnx.state(family(self.model).model(self.model, rngs=nnx.Rngs(seed)), nnx.Param))
            values = jax.tree.map(lambda leaf: leaf.get_value(), drawn, is_leaf=lambda node: isinstance(node, nnx.Variable))
            return jax.tree.map(arranged, values, self.places, self.arguments[0])

        return jax.device_put(init(), self._shardings(self.arguments[0]))

    def init_optimizer(self, parameters: Tree) -> Tree:
        """The optimizer's state for real parameters on the mesh."""
        with jax.set_mesh(self.mesh):
            return jax.jit(
                lambda parameters: _begun(offload.to_device(parameters), self.model, self.workload, self.places),
                out_shardings=self._shardings(self.arguments[1]),
            )(parameters)

    @cached_property
    def positions(self) -> np.ndarray:
        """The place in its sequence of each token of a batch (T,): devices of a ring have two parts of it each."""
        length = self.workload.sequence
        return order(self.layout.context, length) if self.layout.ring else np.arange(length)

    def lower(self) -> Any:
        """The step, traced and lowered for the platform of its mesh."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.arguments)

    @staticmethod
    def _shardings(tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: leaf.sharding, tree)

    def place_of(self, path: tuple[Any, ...]) -> Placement | None:
        """The placement of a leaf of parameters or optimizer, whose path ends in that of its parameter; None for others."""
        for tail, place in jax.tree_util.tree_leaves_with_path(self.places, is_leaf=is_placement):
            if path[-len(tail) :] == tail:
                slot = getattr(path[-len(tail) - 1], "name", "") if len(path) > len(tail) else ""
                return registry()[self.workload.optimizer].placed(slot, place) if slot else place
        return None

    @property
    def logical_bytes(self) -> dict[str, int]:
        """Bytes per device of each argument, by XLA's name for it, without the padding of the vocabulary."""
        return {name: size for name, size, _ in self._sizes()}

    @property
    def needed_bytes(self) -> dict[str, tuple[int, ...]]:
        """Of those the bytes that each stage of a pipeline needs; empty without one."""
        if self.stages is None:
            return {}
        count = self.stages.schedule.stages

        def needed(size: int, rows: tuple[int, ...]) -> tuple[int, ...]:
            each = len(rows) // count
            return tuple(
                size * sum(row >= 0 for row in rows[stage * each :][:each]) // each for stage in range(count)
            )

        return {
            name: needed(size, place.rows) if place is not None else (size,) * count
            for name, size, place in self._sizes()
        }

    def _sizes(self) -> Iterator[tuple[str, int, Placement | None]]:
        """(XLA's name, bytes per device without the padding of the vocabulary, placement) of each argument."""
        for name, tree in zip(("parameters", "optimizer", "batch"), self.arguments, strict=True):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                place = self.place_of(path)
                if place is not None:
                    # Of one row, in a pipeline: its rows are those of stages, and none of them is cut.
                    held = leaf.shape if place.rows is None else leaf.shape[1:]
                    size = size * math.prod(place.logical_shape[-len(held) :]) // math.prod(held)
                yield name + jax.tree_util.keystr(path), size, place


def _begun(parameters: Tree, model: ModelConfig, workload: Workload, places: Tree) -> Tree:
    """The optimizer's state for parameters that are sliced as it is, and amaxes where products are in 8 bits."""
    state = optimizer.init(parameters, workload, places)
    return state | {"amax": fp8.begin(model)} if workload.dtypes.fp8 else state


def build(
    model: ModelConfig,
    layout: Layout,
    workload: Workload,
    devices: Sequence[Any],
    *,
    learning_rate: float = optimizer.LEARNING_RATE,
    warmup: int = 0,
    target: str = "local",
    hardware: str = "",
) -> Built:
    """A training step for the model over these devices, which may be descriptions of devices that are not there.

    Raises SpecError when the degrees are not the mesh, or the batch leaves no whole sequence.
    """
    mesh = device_mesh(layout, devices)
    stages = stages_of(model, layout, workload)
    places = place(model, layout, stages)
    sequences = workload.sequences_per_device(layout) * layout.replica * layout.data
    dtype = DTYPES[workload.dtypes.parameters]

    def abstract(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, on_mesh(spec, mesh)))

    with jax.set_mesh(mesh):
        parameters, sliced = (
            jax.tree.map(
                lambda place, spec: abstract(place.shape, dtype, spec), places, specs(places, layout), is_leaf=is_placement
            )
            for specs in (held_specs, state_specs)
        )
        state = jax.eval_shape(lambda tree: _begun(tree, model, workload, places), sliced)
    # eval_shape keeps the spec of each array in its type; as an argument it needs the mesh too.
    state = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype, leaf.sharding.spec if leaf.sharding else PartitionSpec()), state
    )
    if layout.state_on_host:
        on_device = {key: state.pop(key) for key in ("amax",) if key in state}  # needed before the forward pass
        state = offload.offloaded(state) | on_device
    if layout.parameters_on_host:
        parameters = offload.offloaded(parameters)
    tokens = abstract((layout.microbatches, sequences, workload.sequence), jnp.int32, ROWS)
    return Built(
        model=model,
        layout=layout,
        workload=workload,
        mesh=mesh,
        stages=stages,
        places=places,
        arguments=(parameters, state, {"tokens": tokens, "targets": tokens}),
        learning_rate=learning_rate,
        warmup=warmup,
        target=target,
        hardware=hardware,
    )
