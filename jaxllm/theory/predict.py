"""predict: nouns in, ledger out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import MEMORY_LINES, Ledger, Line, Term, by_stage, merge
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate
from jaxllm.spec.workload import Workload
from jaxllm.theory import activations, collectives, flops, fp8, parameters, peak, state, transfers, update
from jaxllm.theory.partition import described, stages_of
from jaxllm.theory.stages import Stages
from jaxllm.theory.symbols import Symbols

AUTHOR = "closed form"
PLAIN_AUTODIFF = "remat=jax is plain autodiff, which saves what it likes: measured, not predicted"


def predict(model: ModelConfig, layout: Layout, workload: Workload, *, target: str = "") -> Ledger:
    """The ledger of one training step, per device. `target` is whose compiler it is for, which no line depends on, but the
    estimate of the peak. Raises SpecError when model, layout and workload do not go together, TargetError when there is no
    program of that layout."""
    validate(model, layout, layout.devices, workload)
    s = Symbols.of(model, layout, workload)
    stages = stages_of(model, layout, workload)
    ledger = of_symbols(s, target) if stages is None else of_stages(s, stages, target)
    notes = (*((model.note,) if model.note else ()), *parameters.fallbacks(s))
    if workload.sequence > model.max_sequence:
        notes += (f"{workload.sequence:,} tokens are more than the {model.max_sequence:,} that {model.name} was trained with",)
    if stages is not None:
        notes += described(model, layout, workload, stages)
    if layout.remat == "jax":
        known = ("parameters", "optimizer", "batch", "gradients", "padding", "host")
        kept = tuple(line for line in ledger.lines if line.name in known or (line.section == "transfers" and line.value))
        unknown = Line("memory", "residuals", None, reason=PLAIN_AUTODIFF)
        return Ledger(AUTHOR, (*kept, unknown), peak=None, notes=(PLAIN_AUTODIFF, *notes))
    lines = tuple(_exact(line) for line in ledger.lines)
    # A line that the layout does not have is no line: only memory is said to be zero.
    lines = tuple(line for line in lines if line.section == "memory" and line.name in MEMORY_LINES or line.value)
    return replace(ledger, lines=lines, peak=int(ledger.peak), peak_terms=_terms(ledger.peak_terms), notes=notes)


def of_symbols(s: Symbols, target: str = "") -> Ledger:
    """The ledger in the symbols given: integers, or arrays with one entry a layout."""
    memory = merge((*state.lines(s), *activations.lines(s)))
    total, terms = peak.estimate(s, memory, target)
    work = merge((*flops.lines(s), *collectives.lines(s), *update.lines(s), *fp8.lines(s), *transfers.lines(s)))
    return Ledger(AUTHOR, (*memory, *work), peak=total, peak_terms=terms)


def of_stages(s: Symbols, stages: Stages, target: str = "") -> Ledger:
    """The ledger of a pipeline: of each line the stage with the most, and all of them where they are not alike."""
    known: dict[Symbols, Ledger] = {}
    each = []
    for stage in range(stages.schedule.stages):
        of_stage = s.on_stage(stages, stage)
        key = replace(of_stage, dtypes=None)  # all stages' alike, and a dict is no key
        known.setdefault(key, of_symbols(of_stage, target))
        each.append(known[key])
    largest = max(each, key=lambda ledger: ledger.peak)
    ticks = Term("rows of the table", stages.schedule.ticks, f"{stages.schedule.name}, tick by tick")
    return Ledger(
        AUTHOR,
        (
            *by_stage([ledger.lines for ledger in each]),
            Line("pipeline", "ticks", stages.schedule.ticks, terms=(ticks,)),
        ),
        peak=largest.peak,
        peak_terms=largest.peak_terms,
    )


def _exact(line: Line) -> Line:
    """A line in Python's own integers, without the terms that are zero."""
    return replace(
        line,
        value=int(line.value),
        wire=int(line.wire),
        count=int(line.count),
        stages=tuple(map(int, line.stages)),
        terms=_terms(line.terms),
    )


def _terms(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    exact: list[Any] = [replace(term, value=int(term.value)) for term in terms]
    return tuple(term for term in exact if term.value)
