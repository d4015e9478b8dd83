"""Adafactor (Shazeer and Stern 2018): two vectors in the place of a matrix, and what their means send when it is sliced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from jaxllm.spec.layout import ZERO_AXES
from jaxllm.spec.ledger import Line
from jaxllm.spec.optimizers import FACTORED
from jaxllm.theory.collectives import SCALAR, collective
from jaxllm.theory.parameters import Dim, Weight, weights
from jaxllm.theory.products import part
from jaxllm.theory.symbols import Symbols

PAPER = "Shazeer and Stern 2018"


def factored(weight: Weight) -> tuple[Dim, Dim] | None:
    """The lesser and the larger dim of a matrix; None for a weight that is not factored. Of equal ones the last is the
    larger, as optax has it. Sizes are the model's, without padding: the same in every layout."""
    if len(weight.dims) < 2 or min(dim.real for dim in weight.dims) < FACTORED:
        return None
    first, second = weight.dims
    return (second, first) if first.real > second.real else (first, second)


def kept(of: str, weight: Weight) -> Weight:
    """The array of a slot (`rows`, `columns` or `rest`) in the place of its weight. One element where there is none."""
    dims = factored(weight)
    if dims is None and of == "rest":
        return weight
    here = () if dims is None or of == "rest" else (dims[of == "columns"],)
    whole, logical, ways, parts = 1, 1, 1, 1
    for dim in here:
        whole, logical = whole * (dim.size // dim.ways), logical * dim.real
        ways, parts = ways * dim.ways, parts * dim.parts
    formula = here[0].formula if here else "1"
    return replace(weight, formula=formula, whole=whole, logical=(logical, ways), parts=parts, dims=here)


def collectives(s: Symbols) -> Iterator[Line]:
    """The all-reduces of an update: the sums behind every mean over dims that are sliced."""
    for weight in weights(s):
        every = weight.dims
        dims = factored(weight)
        if dims is not None:
            lesser, larger = dims
            yield from _sum(s, weight, (larger,), lesser, "squares by row", "algorithm 4")
            yield from _sum(s, weight, (lesser,), larger, "squares by column", "algorithm 4")
            yield from _sum(s, weight, (lesser,), None, "means by row", "algorithm 4")
        yield from _sum(s, weight, every, None, "squares of its update", "algorithm 4, clipping")
        yield from _sum(s, weight, every, None, "squares of itself", "algorithm 4, relative step")


def _sum(s: Symbols, weight: Weight, over: tuple[Dim, ...], along: Dim | None, what: str, where: str) -> Iterator[Line]:
    """Sums over dims of each layer's array, one for each element along a dim that stays."""
    by_data = by_tensor = np.asarray(False)
    for dim in over:
        by_data, by_tensor = by_data | _by_data(s, dim), by_tensor | np.not_equal(dim.ways, 1)
    length = 1 if along is None else along.size // (along.ways * np.where(_by_data(s, along), along.parts, 1))
    layers = "L " if weight.stacked else ""
    formula = layers + ("" if along is None else f"{along.formula} or its slice ") + str(SCALAR)
    for axes in ((*ZERO_AXES, "tensor"), ZERO_AXES, ("tensor",)):
        alike = np.equal(by_data, "data" in axes) & np.equal(by_tensor, "tensor" in axes)
        term = (f"{weight.name}, {what}", formula, f"{PAPER}, {where}")
        yield collective(s, "all-reduce", axes, "update", "f32", 1 * alike, weight.held * length * SCALAR, term, part(weight.name))


def _by_data(s: Symbols, dim: Dim) -> Any:
    """Whether ZeRO slices the dim."""
    return np.greater_equal(s.z, 1) & np.greater(dim.parts, 1)
