"""Two ledgers side by side: every line is equal, differs, or is not comparable and says why."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllm.spec.ledger import SECTIONS, Ledger, Line, Rule, Term, merge

EQUAL, DIFFERS, NOT_COMPARABLE = "equal", "differs", "not comparable"

# Peak memory is an estimate: temporaries depend on the order in which a compiler schedules instructions.
PEAK_TOLERANCE = 0.10

# What a run in f32 may be off the reference: the largest max|a-b| / max|b| over all tensors and shards.
RUN_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Setup:
    """What was asked: the four nouns, the target that compiled it, and the versions that took part."""

    model: Any
    layout: Any
    mesh: Any
    workload: Any
    target: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line as both authors have it. Values are bytes (payload for collectives) or FLOPs; None is unknown."""

    section: str
    name: str
    phase: str
    axes: tuple[str, ...]
    dtype: str
    predicted: int | None
    compiled: int | None
    wire_predicted: int | None
    wire_compiled: int | None
    emitted: int | None
    count: int | None
    status: str
    rules: tuple[Rule, ...] = ()
    reason: str = ""
    predicted_terms: tuple[Term, ...] = ()
    compiled_terms: tuple[Term, ...] = ()
    predicted_stages: tuple[int, ...] = ()  # of a pipeline, where they are not alike; else empty
    compiled_stages: tuple[int, ...] = ()

    def on_stage(self, stage: int) -> tuple[int | None, int | None]:
        """Both authors' values on one stage of a pipeline."""
        sides = ((self.predicted_stages, self.predicted), (self.compiled_stages, self.compiled))
        return tuple(stages[stage] if stages else value for stages, value in sides)

    @property
    def label(self) -> str:
        """The name of the line in one word, as `--explain` takes it."""
        return Line(self.section, self.name, 0, self.phase, self.axes, self.dtype).label

    @property
    def empty(self) -> bool:
        """Nothing on either side: the line agrees, but says nothing."""
        return not any((self.predicted, self.compiled, self.wire_predicted, self.wire_compiled)) and (
            self.status == EQUAL
        )


@dataclass(frozen=True)
class Peak:
    """Peak memory of one device by both authors, and what the device offers. Bytes; None is unknown."""

    predicted: int | None
    compiled: int | None
    capacity: int | None
    refused: str = ""  # what the compiler said when it would not compile a program of this size
    tolerance: float = PEAK_TOLERANCE
    predicted_terms: tuple[Term, ...] = ()
    compiled_terms: tuple[Term, ...] = ()

    @property
    def error(self) -> float | None:
        """(predicted - compiled) / compiled; None when one of them is unknown."""
        if self.predicted is None or not self.compiled:
            return None
        return (self.predicted - self.compiled) / self.compiled

    @property
    def within(self) -> bool | None:
        """Whether the estimate is inside its tolerance. An estimate is never called equal."""
        return None if self.error is None else abs(self.error) <= self.tolerance

    @property
    def decisive(self) -> int | None:
        """The peak the verdict uses: the compiler's, and the closed form's when the compiler has none."""
        return self.predicted if self.compiled is None else self.compiled

    @property
    def fits(self) -> bool:
        if self.refused:
            return False
        return self.capacity is None or self.decisive is None or self.decisive <= self.capacity


@dataclass(frozen=True)
class RunResult:
    """What became of the steps on devices that are here, against the reference without any sharding.

    Losses are in nats. `errors` gives by `kind/parameter` the largest max|a-b| / max|b| over all devices' shards: kinds
    are `loss/1` and `gradient_norm/1` of each step, `gradient` at the first step, before clipping, and `change`, the
    parameters after the last step less those before the first; with a bf16 parameter beside an f32 master copy,
    `change` is the master's, and `parameters` are those held after the last step. In less than f32 elements may be far off
    by rounding; `sizes` gives of gradients and changes |<a-b,b>| / <b,b>, in which it evens out.
    """

    steps: int
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    errors: Mapping[str, float]
    tolerance: float = RUN_TOLERANCE
    sizes: Mapping[str, float] = field(default_factory=dict)
    size_tolerance: float = 0.0

    @property
    def max_relative_error(self) -> float:
        """Of the worst tensor; NaN when anything was not a number."""
        return self.errors[worst(self.errors)]

    @property
    def agrees(self) -> bool:
        near = self.max_relative_error <= self.tolerance  # False for NaN
        return near and all(size <= self.size_tolerance for size in self.sizes.values())


@dataclass(frozen=True)
class Comparison:
    """Every line of two ledgers, and the verdict."""

    rows: tuple[Row, ...]
    peak: Peak
    authors: tuple[str, str]  # of the predicted and of the compiled ledger
    unexplained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    run: RunResult | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    cached: bool = False  # what was compiled and measured is from an earlier check; so are its seconds

    @property
    def fits(self) -> bool:
        return self.peak.fits

    @property
    def agrees(self) -> bool:
        """No line differs, nothing is unexplained, and the run, if there was one, gave the reference's numbers."""
        differs = any(row.status == DIFFERS for row in self.rows)
        return not differs and not self.unexplained and (self.run is None or self.run.agrees)

    @property
    def certain(self) -> bool:
        """What `--strict` asks for on top: every line comparable, and both peaks known."""
        return self.peak.error is not None and all(row.status != NOT_COMPARABLE for row in self.rows)

    def section(self, name: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.section == name)


def compare(
    predicted: Ledger,
    compiled: Ledger,
    *,
    capacity: int | None = None,
    not_comparable: Mapping[str, str] | None = None,
    refused: str = "",
) -> Comparison:
    """Lays two ledgers side by side, line by line, by `Line.key`.

    `capacity` is what one device offers, in bytes; None means that everything fits. `not_comparable` gives lines
    that one side cannot know on this target, as {name or label: reason}; where both know and agree, the line is
    equal all the same. `refused` is the compiler's sentence when the program was too large for it: then it does not
    fit. A line on one side only counts as 0 on the other. Memory and FLOPs are compared exactly; a collective by
    payload and wire bytes, or, where a rule changed its kind, by the wire bytes of its axes and phase.
    """
    left = {line.key: line for line in merge(predicted.lines)}
    right = {line.key: line for line in merge(compiled.lines)}
    rows = [_row(left.get(key), right.get(key), not_comparable or {}) for key in {**left, **right}]
    rows = [row for row in rows if row.section == "memory" or not row.empty]
    rows.sort(key=lambda row: SECTIONS.index(row.section))  # stable: the authors' order stays within a section
    return Comparison(
        rows=tuple(_settle_kinds(rows)),
        peak=Peak(
            predicted=_integer(predicted.peak),
            compiled=_integer(compiled.peak),
            capacity=_integer(capacity),
            refused=refused,
            predicted_terms=predicted.peak_terms,
            compiled_terms=compiled.peak_terms,
        ),
        authors=(predicted.author, compiled.author),
        unexplained=predicted.unexplained + compiled.unexplained,
        notes=predicted.notes + compiled.notes,
    )


def worst(errors: Mapping[str, float]) -> str:
    """The tensor that is furthest off; one that is not a number is further than any."""
    return max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))


def exit_code(comparison: Comparison, *, strict: bool = False) -> int:
    """0 all agree and it fits; 1 something differs (with `strict`: or is uncertain); 4 it does not fit."""
    if not comparison.agrees or (strict and not comparison.certain):
        return 1
    return 0 if comparison.fits else 4


def _row(left: Line | None, right: Line | None, not_comparable: Mapping[str, str]) -> Row:
    some = left or right
    assert some is not None
    collective = some.section == "collectives"
    predicted, compiled = _value(left), _value(right)
    wire_predicted = _wire(left) if collective else None
    wire_compiled = _wire(right) if collective else None
    unknown = left if predicted is None else right if compiled is None else None
    of_stages = tuple(() if line is None else tuple(map(operator.index, line.stages)) for line in (left, right))
    same = unknown is None and (predicted, wire_predicted) == (compiled, wire_compiled) and of_stages[0] == of_stages[1]
    if some.name == "padding" and unknown is None and right is not None:
        # The one memory line that a rule may account for: to the byte, or it differs.
        same = same or predicted + sum(rule.bytes for rule in right.rules) == compiled
    reason = "" if same else not_comparable.get(some.label) or not_comparable.get(some.name) or ""
    if unknown is not None and not reason:
        reason = unknown.reason or f"{'the closed form' if unknown is left else 'the compiler'} cannot know it"
    if reason and left is None:
        predicted = wire_predicted = None  # not 0: the closed form says nothing about it
    count = right.count if right is not None and right.count else (left.count if left is not None else 0)
    return Row(
        section=some.section,
        name=some.name,
        phase=some.phase,
        axes=some.axes,
        dtype=some.dtype,
        predicted=predicted,
        compiled=compiled,
        wire_predicted=wire_predicted,
        wire_compiled=wire_compiled,
        emitted=_integer(right.emitted) if right is not None else None,
        count=_integer(count) if collective else None,
        status=NOT_COMPARABLE if reason else EQUAL if same else DIFFERS,
        rules=_rules(left, right),
        reason=reason,
        predicted_terms=left.terms if left is not None else (),
        compiled_terms=right.terms if right is not None else (),
        predicted_stages=of_stages[0],
        compiled_stages=of_stages[1],
    )


def _rules(*lines: Line | None) -> tuple[Rule, ...]:
    """Each rule once, with the bytes it moved in all: a line is the sum of many instructions."""
    moved: dict[tuple[str, str], int] = {}
    for line in lines:
        for rule in line.rules if line is not None else ():
            moved[rule.name, rule.why] = moved.get((rule.name, rule.why), 0) + operator.index(rule.bytes)
    return tuple(Rule(name, total, why) for (name, why), total in moved.items())


def _settle_kinds(rows: list[Row]) -> list[Row]:
    """Calls collectives equal whose kind a rule changed, when the wire bytes of their axes and phase are the same.

    An einsum over windows sends permutes where the closed form has an all-gather: payloads differ by definition,
    what travels does not. Every line that the compiler changed must name its rule: no rule, no equality.
    """
    groups: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        if row.section == "collectives" and row.status == DIFFERS:
            groups.setdefault((row.axes, row.phase), []).append(index)
    for indices in groups.values():
        group = [rows[index] for index in indices]
        changed = [row for row in group if row.compiled]
        explained = bool(changed) and all(row.rules for row in changed)
        if explained and sum(row.wire_predicted for row in group) == sum(row.wire_compiled for row in group):
            rules = tuple(dict.fromkeys(rule for row in changed for rule in row.rules))
            for index in indices:
                rows[index] = replace(rows[index], status=EQUAL, rules=rows[index].rules or rules)
    return rows


def _value(line: Line | None) -> int | None:
    return 0 if line is None else _integer(line.value)


def _wire(line: Line | None) -> int | None:
    return None if line is not None and line.value is None else _integer(line.wire if line is not None else 0)


def _integer(value: Any) -> int | None:
    """Exact figures only: a float in a ledger is a bug, and raises TypeError here."""
    return None if value is None else operator.index(value)
