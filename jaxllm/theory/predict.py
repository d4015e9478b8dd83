"""predict: nouns in, ledger out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger, Line, Term
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate_sequence, validate_tensor
from jaxllm.spec.workload import Workload
from jaxllm.theory import activations, collectives, flops, parameters, peak, state
from jaxllm.theory.symbols import Symbols

AUTHOR = "closed form"
PLAIN_AUTODIFF = "remat=jax is plain autodiff, which saves what it likes: measured, not predicted"


def predict(model: ModelConfig, layout: Layout, workload: Workload) -> Ledger:
    """The ledger of one training step, per device. Raises SpecError when model, layout and workload do not go together."""
    validate_tensor(model, layout)
    validate_sequence(model, workload.sequence)
    s = Symbols.of(model, layout, workload)
    ledger = of_symbols(s)
    fallbacks = parameters.fallbacks(s)
    if layout.remat == "jax":
        known = ("parameters", "optimizer", "batch", "gradients", "padding", "host")
        kept = tuple(line for line in ledger.lines if line.name in known)
        unknown = Line("memory", "residuals", None, reason=PLAIN_AUTODIFF)
        return Ledger(AUTHOR, (*kept, unknown), peak=None, notes=(PLAIN_AUTODIFF, *fallbacks))
    lines = tuple(_exact(line) for line in ledger.lines)
    # A line that the layout does not have is no line: only memory is said to be zero.
    lines = tuple(line for line in lines if line.section == "memory" or line.value)
    return replace(ledger, lines=lines, peak=int(ledger.peak), peak_terms=_terms(ledger.peak_terms), notes=fallbacks)


def of_symbols(s: Symbols) -> Ledger:
    """The ledger in the symbols given: integers, or arrays with one entry a layout."""
    memory = (*state.lines(s), activations.residuals(s))
    total, terms = peak.estimate(s, memory)
    return Ledger(AUTHOR, (*memory, *flops.lines(s), *collectives.lines(s)), peak=total, peak_terms=terms)


def _exact(line: Line) -> Line:
    """A line in Python's own integers, without the terms that are zero."""
    return replace(
        line, value=int(line.value), wire=int(line.wire), count=int(line.count), terms=_terms(line.terms)
    )


def _terms(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    exact: list[Any] = [replace(term, value=int(term.value)) for term in terms]
    return tuple(term for term in exact if term.value)
