"""What a device holds between steps, and the gradient accumulator: the ZeRO paper's table, weight by weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.adafactor import kept
from jaxllm.theory.fp8 import history
from jaxllm.theory.muon import is_matrix
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.products import OTHERS, part
from jaxllm.theory.symbols import ZERO, Symbols, pick, reference, remembered

TOKEN = 4  # bytes of an int32
MASTER = 4  # bytes of an f32


@remembered
def lines(s: Symbols) -> tuple[Line, ...]:
    """parameters, optimizer, batch, gradients, padding and host, in bytes per device; and of a pipeline `uniform`, what one
    program for all stages allocates of the first two on a stage that does not need it. What is in host memory is in no
    other line, padding and spare rows included."""
    table = weights(s)
    parameters = _held(s, table, "parameters", s.p, stage=3, symbol="p", source=reference(ZERO, "section 5.3"))
    state = _optimizer(s)
    gradients = _held(s, table, "gradients", s.g, stage=2, symbol="g", source=reference(ZERO, "section 5.2"))
    count = (Term("step count", 4, "4", "updates so far, an int32"),)
    if s.scaled:
        source = "Micikevicius et al. 2018, section 3.2"
        count += (Term("loss scale", 8, "4 + 4", f"an f32, and steps since it changed, an int32; {source}"),)
    count += history(s)
    tokens = 2 * TOKEN * s.m * s.b * s.S
    on_host = (*_where(s.hp, parameters.all), *_where(s.h, state.all))
    parameters, state = parameters.where(1 - s.hp), state.where(1 - s.h)
    return (
        _line("parameters", parameters.needed),
        _line("optimizer", (*state.needed, *count)),
        _line("batch", (Term("tokens and targets", tokens, f"2 * 4 m b {s.here}"),)),
        # The accumulator as it is laid out: no row of it is told apart, so rows of padding and of other stages count.
        _line("gradients", (*gradients.needed, *gradients.spare, *gradients.padding)),
        _line("padding", (*parameters.padding, *state.padding)),
        _line("host", on_host),
        _line("uniform", (*parameters.spare, *state.spare)),
    )


def host_arrays(s: Symbols) -> tuple[Term, ...]:
    """The optimizer's arrays and the master copy where they are in host memory, else nothing: bytes of one device."""
    return _where(s.h, _optimizer(s).all)


@dataclass(frozen=True)
class _Held:
    """Bytes that a stage needs, those that it has room for beside, and those of the vocabulary's padding."""

    needed: tuple[Term, ...]
    spare: tuple[Term, ...]
    padding: tuple[Term, ...]

    @property
    def all(self) -> tuple[Term, ...]:
        return (*self.needed, *self.spare, *self.padding)

    def where(self, flag: Any) -> _Held:
        """The same where a flag of 0 or 1 is 1, and else nothing; of another number so many times."""
        return _Held(*(_where(flag, getattr(self, field.name)) for field in fields(self)))


@remembered
def _optimizer(s: Symbols) -> _Held:
    """All arrays that the optimizer keeps, and the master copy, weight by weight in the order of each."""
    found = tuple(_arrays(s, weights(s)))
    return _Held(*(tuple(chain.from_iterable(getattr(one, field.name) for one in found)) for field in fields(_Held)))


def _arrays(s: Symbols, table: Iterable[Weight]) -> Iterator[_Held]:
    """Each array that the optimizer keeps of the weights, and the master copy: with m and v the ZeRO paper's K = 12."""
    sliced = reference(ZERO, "section 5.1")
    if s.master:
        source = reference(ZERO, "sections 3.1 and 5.1")
        yield _held(s, table, "optimizer", MASTER, stage=1, symbol="4", source=source, what="master copy")
    slots = s.optimizer.slots
    if not isinstance(s.t, int):  # of many layouts those that are shaped like their weights are reckoned once
        alike = [slot for slot in slots if slot.of == "weight"]
        slots = [slot for slot in slots if slot.of != "weight"]
        if alike:
            one = _held(s, table, "optimizer", s.o, stage=1, symbol="o", source=sliced, what="arrays")
            yield one.where(np.asarray(len(alike)))
    for slot in slots:
        source = f"{s.optimizer.paper}; {sliced}"
        arrays = [held for weight in table if (held := _shaped(slot.of, weight)) is not None]
        yield _held(s, arrays, "optimizer", s.o, stage=1, symbol="o", source=source, what=slot.holds)


def _shaped(of: str, weight: Weight) -> Weight | None:
    """The array of a slot in the place of its weight, if it has one."""
    if of == "weight":
        return weight
    if of == "others":
        return None if is_matrix(weight) else weight
    return kept(of, weight)


def _held(
    s: Symbols, table: Iterable[Weight], owner: str, size: int, *, stage: int, symbol: str, source: str, what: str = ""
) -> _Held:
    """Bytes of every weight at `size` bytes an element, sliced from a ZeRO stage on; and the vocabulary's padding.
    `what` it is of the weight, where it is not the weight itself."""
    needed, spare, padding = [], [], []
    for weight in table:
        parts = np.where(s.z >= stage, weight.parts, 1)
        everything = weight.elements * size // parts
        elements, ways = weight.logical
        need = weight.layers * elements * size // (ways * parts)
        logical = weight.held * elements * size // (ways * parts)
        layers = "L " if weight.stacked else ""
        sliced = _sliced(s, weight, stage, symbol, f"{s.over} slices no dim of it" if what else f"{s.over} divides none of its dims")
        real = weight.formula.replace("V'", "V")
        name = f"{weight.name}, {what}" if what else weight.name
        needed.append(Term(name, need, f"{real} {layers}{sliced}", source, part(weight.name)))
        more = "(R - L) " if weight.stacked else ""
        label = f"{name} in {owner}, of other stages"
        spare.append(Term(label, logical - need, f"{real} {more}{sliced}", "one program for all stages", OTHERS))
        if weight.name in ("embed", "head"):
            label = f"rows that pad the vocabulary, {name} in {owner}"
            rows = "(V' - V) D/t" if len(weight.dims) > 1 else "(V' - V)/t"
            padding.append(Term(label, everything - logical, f"{rows} {sliced}", part=part(weight.name)))
    return _Held(tuple(needed), tuple(spare), tuple(padding))


def _sliced(s: Symbols, weight: Weight, stage: int, symbol: str, why: str) -> str:
    """The end of a formula: `p/n` from a ZeRO stage on, where n divides the weight; else why it does not."""
    whole = pick(s.z >= stage, f"{symbol}, as {why}", f"{symbol}, as z < {stage}")
    by = pick(s.x > 1, "(n x)", "n")
    return pick((s.z >= stage) & ((weight.parts > 1) | (s.slices == 1)), f"{symbol}/{by}, as z >= {stage}", whole)


def _where(flag: Any, terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms where a flag of 0 or 1 is 1, and else zero; of many layouts their sum, for there are terms by the hundred."""
    if not isinstance(flag, int) and terms:
        terms = (Term("all of them", add(term.value for term in terms)),)
    return tuple(replace(term, value=term.value * flag) for term in terms)


def _line(name: str, terms: tuple[Term, ...]) -> Line:
    return Line("memory", name, add(term.value for term in terms), terms=terms)


def add(values: Iterable[Any]) -> Any:
    """A sum that starts from an integer, so that no terms at all is 0. Small arrays come first: of arrays that are spread over
    each other, most of the sum is then made before it is large."""
    total: Any = 0
    for value in sorted(values, key=_size):
        total = total + value
    return total


def _size(value: Any) -> int:
    return getattr(value, "size", 1)
