"""What a device holds between steps, and the gradient accumulator: the ZeRO paper's table, weight by weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.symbols import ZERO, Symbols, pick, reference

TOKEN = 4  # bytes of an int32


def lines(s: Symbols) -> tuple[Line, ...]:
    """parameters, optimizer, batch, gradients and padding, in bytes per device; and of a pipeline `uniform`, what one
    program for all stages allocates of the first two on a stage that does not need it."""
    table = weights(s)
    parameters = _held(s, table, "parameters", s.p, stage=3, symbol="p", where="section 5.3")
    state = _held(s, table, "optimizer", s.o, stage=1, symbol="o", where="section 5.1")
    gradients = _held(s, table, "gradients", s.g, stage=2, symbol="g", where="section 5.2")
    count = Term("step count", 4, "4", "Adam's t, an int32")
    tokens = 2 * TOKEN * s.m * s.b * s.T
    return (
        _line("parameters", parameters.needed),
        _line("optimizer", (*state.needed, count)),
        _line("batch", (Term("tokens and targets", tokens, "2 * 4 m b T"),)),
        # The accumulator as it is laid out: no row of it is told apart, so rows of padding and of other stages count.
        _line("gradients", (*gradients.needed, *gradients.spare, *gradients.padding)),
        _line("padding", (*parameters.padding, *state.padding)),
        _line("host", ()),
        _line("uniform", (*parameters.spare, *state.spare)),
    )


@dataclass(frozen=True)
class _Held:
    """Bytes that a stage needs, those that it has room for beside, and those of the vocabulary's padding."""

    needed: tuple[Term, ...]
    spare: tuple[Term, ...]
    padding: tuple[Term, ...]


def _held(
    s: Symbols, table: Iterable[Weight], owner: str, size: int, *, stage: int, symbol: str, where: str
) -> _Held:
    """Bytes of every weight at `size` bytes an element, sliced from a ZeRO stage on; and the vocabulary's padding."""
    needed, spare, padding = [], [], []
    for weight in table:
        parts = np.where(s.z >= stage, weight.parts, 1)
        everything = weight.elements * size // parts
        elements, ways = weight.logical
        need = weight.layers * elements * size // (ways * parts)
        logical = weight.held * elements * size // (ways * parts)
        layers = "L " if weight.stacked else ""
        sliced = _sliced(s, weight, stage, symbol)
        real = weight.formula.replace("V'", "V")
        needed.append(Term(weight.name, need, f"{real} {layers}{sliced}", reference(ZERO, where)))
        more = "(R - L) " if weight.stacked else ""
        label = f"{weight.name} in {owner}, of other stages"
        spare.append(Term(label, logical - need, f"{real} {more}{sliced}", "one program for all stages"))
        if weight.name in ("embed", "head"):
            label = f"rows that pad the vocabulary, {weight.name} in {owner}"
            padding.append(Term(label, everything - logical, f"(V' - V) D/t {sliced}"))
    return _Held(tuple(needed), tuple(spare), tuple(padding))


def _sliced(s: Symbols, weight: Weight, stage: int, symbol: str) -> str:
    """The end of a formula: `p/n` from a ZeRO stage on, where n divides the weight."""
    whole = pick(s.z >= stage, f"{symbol}, as n divides none of its dims", f"{symbol}, as z < {stage}")
    return pick((s.z >= stage) & ((weight.parts > 1) | (s.n == 1)), f"{symbol}/n, as z >= {stage}", whole)


def _line(name: str, terms: tuple[Term, ...]) -> Line:
    return Line("memory", name, add(term.value for term in terms), terms=terms)


def add(values: Iterable[Any]) -> Any:
    """A sum that starts from an integer, so that no terms at all is 0."""
    total: Any = 0
    for value in values:
        total = total + value
    return total
