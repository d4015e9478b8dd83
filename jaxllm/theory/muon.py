"""Muon (Jordan 2024): the gathers of each layer's momentum, and the matmuls that make it nearly orthogonal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxllm.spec.layout import ZERO_AXES
from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.collectives import collective
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.products import part
from jaxllm.theory.symbols import Symbols

PAPER = "Jordan 2024"
ITERATIONS = 5
F32 = 4


def is_matrix(weight: Weight) -> bool:
    """Whether a weight is updated by Muon: a matrix of each layer. AdamW has all others."""
    return weight.stacked and len(weight.dims) == 2


def lines(s: Symbols) -> Iterator[Line]:
    """Matmul FLOPs and all-gathers of an update. Every device does all the layers that it holds."""
    table = [weight for weight in weights(s) if is_matrix(weight)]
    terms = tuple(
        Term(weight.name, weight.held * _flops(*(dim.size for dim in weight.dims)), _formula(weight), PAPER, part(weight.name))
        for weight in table
    )
    yield Line("flops", "matmul", sum(term.value for term in terms), phase="update", terms=terms)
    for weight in table:
        yield from _gathers(s, weight)


def _flops(rows: Any, columns: Any) -> Any:
    """Of Newton-Schulz on a matrix with m the lesser side: X X^T, its square, and their sum times X, five times."""
    least, most = min(rows, columns), max(rows, columns)
    return ITERATIONS * (4 * least * least * most + 2 * least * least * least)


def _formula(weight: Weight) -> str:
    sides = sorted(weight.dims, key=lambda dim: dim.size)
    least, most = (dim.formula.replace("/t", "") for dim in sides)
    return f"L 5 (4 x^2 y + 2 x^3), x = {least}, y = {most}"


def _gathers(s: Symbols, weight: Weight) -> Iterator[Line]:
    """One all-gather for each dim that is sliced, over all that slices it: of a layer's momentum, in f32."""
    sizes = [dim.size // _slices(s, dim) for dim in weight.dims]
    for i, dim in enumerate(weight.dims):
        by_data = np.greater_equal(s.z, 1) & np.greater(dim.parts, 1)
        sizes[i] = dim.size
        buffer = sizes[0] * sizes[1] * F32
        for axes in ((*ZERO_AXES, "tensor"), ZERO_AXES, ("tensor",)):
            alike = np.equal(by_data, "data" in axes) & np.equal(np.not_equal(dim.ways, 1), "tensor" in axes)
            formula = f"L {' '.join(d.formula for d in weight.dims)} {F32}, of {dim.formula} all"
            term = (f"{weight.name}, momentum", formula, PAPER)
            yield collective(s, "all-gather", axes, "update", "f32", weight.held * alike, buffer, term, part(weight.name))


def _slices(s: Symbols, dim: Any) -> Any:
    return dim.ways * np.where(np.greater_equal(s.z, 1), dim.parts, 1)
