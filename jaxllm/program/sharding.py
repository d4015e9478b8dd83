"""Where each parameter lies: the tensor axis by the names of its dims, ZeRO's axis by what divides.

The three trees of specs that follow from it (between steps, in the optimizer, in the gradient accumulator) are
the columns of the ZeRO table in docs/step.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.model import family
from jaxllm.spec.layout import ZERO_AXES, Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.theory.stages import Stages

# Logical dims that Megatron's tensor parallelism slices; every other dim stays whole.
TENSOR_DIMS = ("heads", "kv_heads", "mlp", "vocab")


@dataclass(frozen=True)
class Placement:
    """How one parameter is sliced. Dims count from the first dim of the array, the layer dim included."""

    shape: tuple[int, ...]  # as held by all devices together, vocabulary padding included
    logical_shape: tuple[int, ...]  # without padding
    stacked: bool  # the first dim runs over layers
    tensor_dim: int | None
    zero_dim: int | None  # the dim that ZeRO slices; None when no dim divides, or when there is nothing to slice over
    # Held whole by every tensor rank, yet each adds to its gradient: replicated key/value weights, and what is applied to
    # a residual stream that is cut along the sequence.
    shared: bool
    # In a pipeline the first dim runs over the rows of all stages: the layer in each, or 0 where a stage has the weight
    # that is outside of the layers; -1 in rows that nothing needs.
    rows: tuple[int, ...] | None = None

    def spec(self, *, sliced: bool) -> PartitionSpec:
        """Its PartitionSpec, over tensor alone or over ZeRO's axis too."""
        axes: list[tuple[str, ...]] = [() for _ in self.shape]
        if self.rows is not None:
            axes[0] += ("pipe",)
        if self.tensor_dim is not None:
            axes[self.tensor_dim] += ("tensor",)
        if sliced and self.zero_dim is not None:
            axes[self.zero_dim] += ZERO_AXES
        return PartitionSpec(*(dim[0] if len(dim) == 1 else dim or None for dim in axes))


def padded_vocab(config: ModelConfig, layout: Layout) -> int:
    """The vocabulary, rounded up to a multiple of the tensor degree."""
    return -(-config.vocab // layout.tensor) * layout.tensor


def place(config: ModelConfig, layout: Layout, stages: Stages | None = None) -> dict[str, Any]:
    """A Placement for each parameter, in the model's own tree."""
    logical = _abstract(config, config.vocab)
    padded = _abstract(config, padded_vocab(config, layout))
    places = jax.tree.map(
        lambda param, held: _placement(param, held.get_value().shape, config, layout),
        logical,
        padded,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    if stages is None:
        return places
    return {key: _on_stages(key, node, config, stages) for key, node in places.items()}


def _on_stages(key: str, node: Any, config: ModelConfig, stages: Stages) -> Any:
    """Placements over the stages of a pipeline: layers in the order of the stages, and a row of each other weight on
    every stage, as one program has to have it, though the first alone or the last alone uses it."""
    if key == "layers":
        rows = stages.held
        return jax.tree.map(
            lambda place: replace(place, shape=(len(rows), *place.shape[1:]), rows=rows), node, is_leaf=is_placement
        )
    entry = key in family(config).entry
    owners = {stages.first} if entry else {stages.last}
    if key == "embed" and config.tied:
        owners = {stages.first, stages.last}
    rows = tuple(0 if stage in owners else -1 for stage in range(stages.schedule.stages))

    def on_stages(place: Placement) -> Placement:
        inner = lambda dim: None if dim is None else dim + 1  # noqa: E731
        return replace(
            place, shape=(len(rows), *place.shape), stacked=True, rows=rows,
            tensor_dim=inner(place.tensor_dim), zero_dim=inner(place.zero_dim),
        )  # fmt: skip

    return jax.tree.map(on_stages, node, is_leaf=is_placement)


def _abstract(config: ModelConfig, vocab: int) -> dict[str, Any]:
    model = nnx.eval_shape(lambda: family(config).model(config, vocab=vocab, rngs=nnx.Rngs(0)))
    return plain_tree(nnx.state(model, nnx.Param))


def plain_tree(state: Any) -> Any:
    """Nested plain dicts with the variables, and so the names of their dims, left in."""
    return {key: value if isinstance(value, nnx.Variable) else plain_tree(value) for key, value in state.items()}


def _placement(param: nnx.Variable, shape: tuple[int, ...], config: ModelConfig, layout: Layout) -> Placement:
    dims = param.get_metadata()["dims"]
    first = len(shape) - len(dims)  # 1 when stacked along layers
    sliced = [i + first for i, name in enumerate(dims) if name in TENSOR_DIMS]
    repeated = "kv_heads" in dims and config.kv_heads % layout.tensor != 0
    tensor_dim = sliced[0] if sliced and layout.tensor > 1 and not repeated else None
    shared = tensor_dim is None and layout.tensor > 1 and (repeated or layout.sequence)
    zero_dim = None
    if layout.zero_ways > 1:
        # The first dim that divides: slices of it are contiguous, and XLA:GPU transposes what it must scatter along
        # an inner dim, whole accumulators included. A layer is gathered alone, so its dim stays whole.
        for dim in range(first, len(shape)):
            size = shape[dim] // (layout.tensor if dim == tensor_dim else 1)
            if size % layout.zero_ways == 0:
                zero_dim = dim
                break
    logical = tuple(param.get_value().shape)
    return Placement(tuple(shape), logical, first == 1, tensor_dim, zero_dim, shared)


def held_specs(places: Any, layout: Layout) -> Any:
    """Parameters between steps: sliced over data and context from ZeRO 3 on."""
    return _specs(places, sliced=layout.zero >= 3)


def state_specs(places: Any, layout: Layout) -> Any:
    """Optimizer state, and reduced gradients: sliced over data and context from ZeRO 1 on."""
    return _specs(places, sliced=layout.zero >= 1)


def _specs(places: Any, *, sliced: bool) -> Any:
    return jax.tree.map(lambda place: place.spec(sliced=sliced), places, is_leaf=is_placement)


def axes(entry: Any) -> tuple[str, ...]:
    """The axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def is_placement(node: Any) -> bool:
    return isinstance(node, Placement)


DTYPES = {
    "f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "s32": jnp.int32,
    "f8e4m3fn": jnp.float8_e4m3fn, "f8e5m2": jnp.float8_e5m2,
}  # fmt: skip
