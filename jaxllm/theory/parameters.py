"""The weights of a Llama and how many elements of each a device holds: Psi and its division.

Each weight is a model dim D times another dim X (1 for a norm). Tensor parallelism slices X where it runs over heads,
feed-forward or vocabulary; ZeRO slices the first dim of the array that divides. Which of the two it is changes no count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.theory.symbols import Symbols, pick


# The weights outside the stack of layers.
OUTER = ("embed", "final_norm", "head")


@dataclass(frozen=True)
class Weight:
    """One weight, all its layers together. Elements are counted per layer.

    whole    elements in the gathered weight of one tensor rank, one layer: D X / t
    logical  the same without the padding of the vocabulary, times layers
    parts    devices that ZeRO slices it over: n where a dim divides, else 1
    sliced   tensor parallelism slices it
    shared   every tensor rank holds all of it and adds to its gradient: key/value weights with K < t
    """

    name: str
    formula: str  # of `whole`, in symbols; V' is the padded vocabulary
    layers: int
    whole: Any
    logical: Any
    parts: Any
    sliced: bool
    shared: Any

    @property
    def elements(self) -> Any:
        """Elements of one tensor rank, all layers, before ZeRO."""
        return self.layers * self.whole


def weights(s: Symbols) -> tuple[Weight, ...]:
    """All weights of the model, in the order in which a token meets them."""
    shared = s.K % s.t != 0
    kv = np.where(shared, 1, s.t)
    kv_formula = pick(shared, "D K H", "D K H/t")
    padded = -(-s.V // s.t) * s.t
    table = [
        _weight(s, "embed", "D V'/t", 1, padded, s.t, s.V, sliced=True),
        _weight(s, "attention_norm", "D", s.L, 1, 1),
        _weight(s, "q", "D N H/t", s.L, s.N * s.H, s.t, sliced=True),
        _weight(s, "k", kv_formula, s.L, s.K * s.H, kv, sliced=True, shared=shared),
        _weight(s, "v", kv_formula, s.L, s.K * s.H, kv, sliced=True, shared=shared),
        _weight(s, "o", "D N H/t", s.L, s.N * s.H, s.t, sliced=True),
        _weight(s, "mlp_norm", "D", s.L, 1, 1),
        _weight(s, "gate", "D F/t", s.L, s.F, s.t, sliced=True),
        _weight(s, "up", "D F/t", s.L, s.F, s.t, sliced=True),
        _weight(s, "down", "D F/t", s.L, s.F, s.t, sliced=True),
        _weight(s, "final_norm", "D", 1, 1, 1),
    ]
    if not s.tied:
        table.append(_weight(s, "head", "D V'/t", 1, padded, s.t, s.V, sliced=True))
    return tuple(table)


def _weight(
    s: Symbols,
    name: str,
    formula: str,
    layers: int,
    other: Any,
    ways: Any,
    logical: Any = None,
    *,
    sliced: bool = False,
    shared: Any = False,
) -> Weight:
    local = other // ways
    parts = np.where(s.D % s.n == 0, s.n, np.where((np.asarray(other) > 1) & (local % s.n == 0), s.n, 1))
    return Weight(
        name=name,
        formula=formula,
        layers=layers,
        whole=s.D * local,
        # In elements times ways, to be divided last: a padded slice has a fractional share of real rows.
        logical=(layers * s.D * (other if logical is None else logical), ways),
        parts=parts,
        sliced=sliced,
        shared=shared,
    )


def fallbacks(s: Symbols) -> tuple[str, ...]:
    """What a single layout keeps whole, or pads, because a size does not divide: one sentence each, with the bytes."""
    table = weights(s)
    whole = [weight for weight in table if s.z >= 1 and s.n > 1 and weight.parts == 1]
    shared = [weight for weight in table if weight.shared and s.t > 1]
    padded = -(-s.V // s.t) * s.t - s.V
    sentences = (
        (whole, f"zero={s.z} slices no dim of {_names(whole)}, none of which {s.n} divides"),
        (shared, f"{s.K} key/value heads are fewer than tensor={s.t}: every rank holds {_names(shared)} whole"),
    )
    notes = [f"{text}: {sum(int(w.elements) for w in found) * s.p:,} bytes a device" for found, text in sentences if found]
    if padded:
        ends = "embed" if s.tied else "embed and head"
        notes.append(f"the vocabulary of {s.V:,} is padded by {padded} row{'s' if padded > 1 else ''} for tensor={s.t}, in {ends}")
    return tuple(notes)


def _names(found: list[Weight]) -> str:
    return ", ".join(weight.name for weight in found)
