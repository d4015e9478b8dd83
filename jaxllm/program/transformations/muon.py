"""Muon (Jordan 2024) for the matrices of the layers, AdamW for all else.

An update is the momentum of a matrix, made nearly orthogonal by five Newton-Schulz iterations, and needs all of it: the
layers are gone through one at a time, each device gathers a layer's momentum over what slices it, and keeps its slice of
the result. optax.contrib.muon would have every layer whole at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.program.sharding import Placement, axes, is_placement
from jaxllm.program.transformations import Transformation

Tree = Any

# Jordan 2024: momentum, iterations and their coefficients. Liu et al. 2025 (arXiv:2502.16982), section 2.2: decay, and the
# factor by which an update has AdamW's root mean square, so that one rate serves both.
BETA, ITERATIONS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)
DECAY, LIKE_ADAMW = 0.1, 0.2
EPSILON = 1e-8

ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=EPSILON)


class State(NamedTuple):
    """mu is the momentum of matrices and the first moment of others; nu their second moment, None for matrices."""

    count: jax.Array
    mu: Tree
    nu: Tree


def muon(rate: Any, places: Tree) -> optax.GradientTransformation:
    """The transformation for parameters that are placed so."""
    paths, shape = jax.tree_util.tree_flatten_with_path(places, is_leaf=is_placement)
    matrices = [_is_matrix(path, place) for path, place in paths]

    def divided(tree: Tree) -> tuple[list[Any], list[Any]]:
        """Leaves of the matrices, and of the others."""
        leaves = shape.flatten_up_to(tree)
        return tuple([leaf for leaf, matrix in zip(leaves, matrices, strict=True) if matrix == which] for which in (True, False))

    def together(of_matrices: list[Any], of_others: list[Any]) -> Tree:
        both = {True: iter(of_matrices), False: iter(of_others)}
        return jax.tree.unflatten(shape, [next(both[matrix]) for matrix in matrices])

    def init(parameters: Tree) -> State:
        large, others = divided(parameters)
        nu = together([None] * len(large), jax.tree.map(jnp.zeros_like, others))
        return State(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, parameters), nu)

    def update(gradients: Tree, state: State, parameters: Tree) -> tuple[Tree, State]:
        (large, others), (momentum, first), (_, second) = map(divided, (gradients, state.mu, state.nu))
        count = state.count + 1
        momentum = [BETA * m + (1 - BETA) * g for m, g in zip(momentum, large, strict=True)]
        # Nesterov's look ahead, with corrections for a beginning at 0.
        ahead = optax.tree.bias_correction(momentum, BETA, count + 1), optax.tree.bias_correction(large, BETA, count)
        turned = [BETA * m + (1 - BETA) * g for m, g in zip(*ahead, strict=True)]
        others, adam = ADAM.update(others, optax.ScaleByAdamState(state.count, first, second))
        turned = together(orthogonal(turned), others)
        updates = jax.tree.map(lambda update, weight: -rate * (update + DECAY * weight), turned, parameters)
        nu = together([None] * len(large), adam.nu)
        return updates, State(count, together(momentum, adam.mu), nu)

    return optax.GradientTransformation(init, update)


def _is_matrix(path: tuple[Any, ...], place: Placement) -> bool:
    return path[0].key == "layers" and len(place.shape) == 3


def orthogonal(stacks: list[jax.Array]) -> list[jax.Array]:
    """Stacks of matrices (layers, rows, columns), sliced in any way within a layer, each made nearly orthogonal and scaled."""
    specs = [jax.typeof(stack).sharding.spec for stack in stacks]

    def layer(slices: list[jax.Array]) -> list[jax.Array]:
        return [_slice(_scaled(_whole(piece, spec)), spec, piece.shape) for piece, spec in zip(slices, specs, strict=True)]

    return jax.shard_map(partial(lax.map, layer), in_specs=(specs,), out_specs=specs)(stacks)


def _whole(piece: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A layer's matrix from the slices that the devices have of it."""
    for dim, entry in enumerate(spec[1:]):
        if axes(entry):
            piece = lax.all_gather(piece, axes(entry), axis=dim, tiled=True)
    return piece


def _slice(matrix: jax.Array, spec: PartitionSpec, shape: tuple[int, ...]) -> jax.Array:
    """This device's slice of a layer's matrix."""
    starts = [lax.axis_index(axes(entry)) * size if axes(entry) else 0 for entry, size in zip(spec[1:], shape, strict=True)]
    return lax.dynamic_slice(matrix, starts, shape)


def _scaled(matrix: jax.Array) -> jax.Array:
    return LIKE_ADAMW * max(matrix.shape) ** 0.5 * newton_schulz(matrix)


def newton_schulz(matrix: jax.Array) -> jax.Array:
    """U V^T of the matrix U S V^T, with singular values between 0.7 and 1.2 in the place of 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + EPSILON)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = first * x + (third * square + fifth * square @ square) @ x
    return x.T if tall else x


MUON = Transformation("muon", muon, "Jordan 2024; Liu et al. 2025, section 2.2")
