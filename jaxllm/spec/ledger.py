"""The ledger: a flat list of lines, written in the same form by the closed form and by the compiler.

All figures are per device and per step, with loops multiplied out. Memory and payload are in bytes.
In a ledger made by `predict` over arrays of layouts a value is an array with one entry a layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

SECTIONS = ("memory", "pipeline", "flops", "collectives", "transfers")
PHASES = ("forward", "recompute", "backward", "update")
MEMORY_LINES = ("parameters", "optimizer", "batch", "gradients", "residuals", "padding", "host")
# Of a pipeline: buffers of its schedule, and what each stage allocates only because another one needs it.
PIPELINE_LINES = ("stash", "weight_stash", "inbox", "uniform")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
TO_DEVICE, TO_HOST = TRANSFERS = ("copy-to-device", "copy-to-host")  # between a device's memory and its host's

DTYPE_BYTES = {
    "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4,
    "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One contribution to a line: a formula with its value, or an instruction with its source line."""

    label: str  # what it is: "gather of q", or the name of the instruction
    value: Any  # bytes or FLOPs, per device and step; the terms of a line add up to it
    detail: str = ""  # the formula in symbols, or the instruction with shapes and loop counts
    source: str = ""  # the paper's equation, or file:line of the program
    part: str = ""  # of a formula: the part of the model that it is for, as theory.parts names it; "" is the step's own


@dataclass(frozen=True)
class Rule:
    """A compiler's habit that touched a line, and the bytes it moved."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Line:
    """One line of a ledger.

    `value` is bytes (memory, transfers), FLOPs (flops), payload bytes (collectives) or a number (pipeline); for collectives `wire` is what
    a device sends in a ring and `count` how many times a collective runs. `emitted` is known to a compiler only:
    the payload in the optimised module. `stages` has the value on each stage of a pipeline where they are not alike, and
    `value` is then that of the stage with the most. `value` None means that this author cannot know it, and `reason` says why.
    """

    section: str
    name: str
    value: Any
    phase: str = ""
    axes: tuple[str, ...] = ()
    dtype: str = ""
    wire: Any = 0
    count: Any = 0
    emitted: int | None = None
    terms: tuple[Term, ...] = ()
    rules: tuple[Rule, ...] = ()
    reason: str = ""
    stages: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple:
        """What a line of the other ledger must share to be compared with this one."""
        return (self.section, self.name, self.phase, self.axes, self.dtype)

    def on_stage(self, stage: int) -> Any:
        """The value on one stage of a pipeline."""
        return self.stages[stage] if self.stages else self.value

    @property
    def label(self) -> str:
        """The name of the line in one word, as `--explain` takes it: `all-gather/data/forward/bf16`."""
        parts = [self.name, "+".join(self.axes), self.phase, self.dtype]
        return "/".join(part for part in parts if part)


@dataclass(frozen=True)
class Ledger:
    """All lines of one author, its estimate or measure of the peak, and what it could not place."""

    author: str  # "closed form", "XLA:CPU", "XLA:GPU", "XLA:TPU"
    lines: tuple[Line, ...]
    peak: Any = None  # bytes; None when the author cannot know
    peak_terms: tuple[Term, ...] = ()
    unexplained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def section(self, name: str) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.section == name)

    def line(self, name: str, **match: Any) -> Line:
        """The one line of that name (and phase, axes or dtype). Raises KeyError when there is none or several."""
        found = [
            line
            for line in self.lines
            if line.name == name and all(getattr(line, key) == value for key, value in match.items())
        ]
        if len(found) != 1:
            raise KeyError(f"{len(found)} lines match {name!r} {match}")
        return found[0]

    def total(self, section: str, name: str | None = None) -> Any:
        """The sum of the values of a section, or of one name in it."""
        return sum(line.value for line in self.section(section) if name in (None, line.name) and line.value is not None)


def wire_bytes(kind: str, payload: Any, n: Any) -> Any:
    """Bytes that one device sends when `payload` goes round a ring of `n` (bandwidth-optimal ring algorithms).

    The payload is the output of an all-gather, the input of a reduce-scatter, and the buffer of the others.
    All-gather, reduce-scatter and all-to-all send (n-1)/n of it, an all-reduce twice that, a permute, a broadcast and a
    send all of it.
    Payloads are multiples of n where a collective exists, so the division is exact but for scalars, which round down.
    """
    if kind in ("permute", "broadcast", "send"):
        return payload
    once = payload * (n - 1) // n
    return payload * 2 * (n - 1) // n if kind == "all-reduce" else once


def by_stage(stages: Sequence[Iterable[Line]]) -> tuple[Line, ...]:
    """The lines of all stages of a pipeline as one ledger has them: of each key that of the stage with the most."""
    keyed = [{line.key: line for line in merge(lines)} for lines in stages]
    found = []
    for key in dict.fromkeys(key for lines in keyed for key in lines):
        values = tuple(lines[key].value if key in lines else 0 for lines in keyed)
        most = keyed[values.index(max(values))][key]
        found.append(replace(most, stages=values if len(set(values)) > 1 else ()))
    return tuple(found)


def _stages(*lines: Line) -> tuple[Any, ...]:
    """The values on each stage of lines that are added up."""
    count = max(len(line.stages) for line in lines)
    each = [line.stages or (line.value,) * count for line in lines]
    return tuple(sum(values) for values in zip(*each, strict=True)) if count else ()


def merge(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Adds up lines of the same key, in the order of first appearance."""
    merged: dict[tuple, Line] = {}
    for line in lines:
        old = merged.get(line.key)
        if old is None:
            merged[line.key] = line
            continue
        merged[line.key] = Line(
            section=line.section,
            name=line.name,
            value=old.value + line.value,
            phase=line.phase,
            axes=line.axes,
            dtype=line.dtype,
            wire=old.wire + line.wire,
            count=old.count + line.count,
            stages=_stages(old, line),
            emitted=None if old.emitted is None and line.emitted is None else (old.emitted or 0) + (line.emitted or 0),
            terms=old.terms + line.terms,
            rules=old.rules + line.rules,
            reason=old.reason or line.reason,
        )
    return tuple(merged.values())
