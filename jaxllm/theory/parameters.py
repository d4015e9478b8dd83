"""The weights of a model and how many elements of each a device holds: Psi and its division.

Tensor parallelism slices a dim that runs over heads, feed-forward or vocabulary; ZeRO slices the first dim of the array
that divides. Which of the dims it is changes no count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.theory.products import Product, products
from jaxllm.theory.symbols import Symbols, remembered

# The weights outside the stack of layers.
OUTER = ("embed", "positions", "final_norm", "final_norm_bias", "head")


@dataclass(frozen=True)
class Dim:
    """A dim of a weight.

    size     of the whole weight, padding included, and `formula` of what a tensor rank has of it
    ways     in which tensor parallelism slices it
    logical  its size without padding, where it has some
    parts    devices that ZeRO slices it over
    """

    size: Any
    formula: str
    ways: Any = 1
    logical: Any = None
    parts: Any = 1

    @property
    def real(self) -> Any:
        """Its size without padding."""
        return self.size if self.logical is None else self.logical


@dataclass(frozen=True)
class Weight:
    """One weight, all its layers together. Elements are counted per layer.

    layers   how many a device needs, and held: how many it has room for, which in a pipeline may be more
    uses     how many times each microbatch uses one: the layers; of an embedding that is the head too, both
    whole    elements in the gathered weight of one tensor rank, one layer
    logical  the same without the padding of the vocabulary, in elements times ways
    parts    devices that ZeRO slices it over: n x where a dim divides, else 1
    sliced   tensor parallelism slices it
    shared   every tensor rank holds all of it and adds to its gradient: key/value weights with K < t, and with q > 1
             what is applied to the residual stream
    dims     of one layer, in the order of the array
    again    1 where the backward pass uses it too, else 0: a bias serves only to compute again what it is added to
    """

    name: str
    formula: str  # of `whole`, in symbols; V' is the padded vocabulary
    layers: Any
    held: Any
    uses: Any
    whole: Any
    logical: Any
    parts: Any
    sliced: bool
    shared: Any
    dims: tuple[Dim, ...]
    again: Any = 1

    @property
    def elements(self) -> Any:
        """Elements that one tensor rank has room for, all layers, before ZeRO."""
        return self.held * self.whole

    @property
    def stacked(self) -> bool:
        """Whether each layer has one."""
        return self.name not in OUTER


@remembered
def weights(s: Symbols) -> tuple[Weight, ...]:
    """All weights of the model, in the order in which a token meets them."""
    padded = -(-s.V // s.t) * s.t
    vocabulary = Dim(padded, "V'/t", s.t, s.V)
    model = Dim(s.D, "D")
    # A tied embedding is the head too: on both ends of a pipeline, which one stage may have.
    end = np.maximum(s.first, s.last) if s.tied else s.first
    table = [_weight(s, "embed", "D V'/t", end, vocabulary, model, sliced=True)]
    if s.tied:  # without a pipeline one gather serves both ends of a microbatch
        table = [replace(table[0], uses=np.where(s.pipe > 1, s.first + s.last, 1))]
    if s.family == "gpt":
        table.append(_weight(s, "positions", "P D", s.first, Dim(s.P, "P"), model, shared=s.q > 1))
    table += _norm(s, "attention_norm", s.L)
    for product in products(s):
        table += _matrix(s, product)
        if product.name == "o":
            table += _norm(s, "mlp_norm", s.L)
    table += _norm(s, "final_norm", s.last)
    if not s.tied:
        table.append(_weight(s, "head", "D V'/t", s.last, model, vocabulary, sliced=True))
    return tuple(table)


def _norm(s: Symbols, name: str, layers: Any) -> list[Weight]:
    """RMSNorm has a scale, LayerNorm a bias too."""
    names = (name, f"{name}_bias") if s.family == "gpt" else (name,)
    return [_weight(s, each, "D", layers, Dim(s.D, "D"), shared=s.q > 1) for each in names]


def _matrix(s: Symbols, product: Product) -> list[Weight]:
    """A product's weight, and its bias: sliced with the columns, or whole and added behind the sum."""
    model, other = Dim(s.D, "D"), Dim(product.other, product.held, product.ways)
    dims = (model, other) if product.column else (other, model)
    found = [_weight(s, product.name, f"D {product.held}", s.L, *dims, sliced=True, shared=product.shared)]
    if s.family == "gpt":
        dim, formula = (other, product.held) if product.column else (model, "D")
        shared = False if product.column else s.q > 1
        bias = _weight(s, f"{product.name}_bias", formula, s.L, dim, sliced=product.column, shared=shared)
        found.append(replace(bias, again=s.again(product.name)))
    return found


def _weight(
    s: Symbols, name: str, formula: str, layers: Any, *dims: Dim, sliced: bool = False, shared: Any = False
) -> Weight:
    whole, logical, ways, divides = 1, 1, 1, False
    held = []
    for dim in dims:
        local = dim.size // dim.ways
        whole = whole * local
        logical = logical * dim.real
        ways = ways * dim.ways
        # ZeRO slices the first dim that divides.
        here = np.equal(local % s.slices, 0) & ~np.asarray(divides)
        held.append(replace(dim, parts=np.where(here, s.slices, 1)))
        divides = divides | here
    return Weight(
        name=name,
        formula=formula,
        layers=layers,
        held=1 if name in OUTER else s.R,
        uses=layers,
        whole=whole,
        # In elements times ways, to be divided last: a padded slice has a fractional share of real rows.
        logical=(logical, ways),
        parts=np.where(divides, s.slices, 1),
        sliced=sliced,
        shared=shared,
        dims=tuple(held),
    )


def fallbacks(s: Symbols) -> tuple[str, ...]:
    """What a single layout keeps whole, or pads, because a size does not divide: one sentence each, with the bytes."""
    table = weights(s)
    whole = [weight for weight in table if s.z >= 1 and s.slices > 1 and weight.parts == 1]
    shared = [weight for weight in table if weight.sliced and weight.shared and s.t > 1]
    padded = -(-s.V // s.t) * s.t - s.V
    sentences = (
        (whole, f"zero={s.z} slices no dim of {_names(whole)}, none of which {s.slices} divides"),
        (shared, f"{s.K} key/value heads are fewer than tensor={s.t}: every rank holds {_names(shared)} whole"),
    )
    notes = [f"{text}: {sum(int(w.elements) for w in found) * s.p:,} bytes a device" for found, text in sentences if found]
    if padded:
        ends = "embed" if s.tied else "embed and head"
        notes.append(f"the vocabulary of {s.V:,} is padded by {padded} row{'s' if padded > 1 else ''} for tensor={s.t}, in {ends}")
    return tuple(notes)


def _names(found: list[Weight]) -> str:
    return ", ".join(weight.name for weight in found)
