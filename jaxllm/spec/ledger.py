"""The ledger: a flat list of lines, written in the same form by the closed form and by the compiler.

All figures are per device and per step, with loops multiplied out. Memory and payload are in bytes.
In a ledger made by `predict` over arrays of layouts a value is an array with one entry a layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SECTIONS = ("memory", "flops", "collectives")
PHASES = ("forward", "recompute", "backward", "update")
MEMORY_LINES = ("parameters", "optimizer", "batch", "gradients", "residuals", "padding", "host")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")

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


@dataclass(frozen=True)
class Rule:
    """A compiler's habit that touched a line, and the bytes it moved."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Line:
    """One line of a ledger.

    `value` is bytes (memory), FLOPs (flops) or payload bytes (collectives); for collectives `wire` is what
    a device sends in a ring and `count` how many times a collective runs. `emitted` is known to a compiler only:
    the payload in the optimised module. `value` None means that this author cannot know it, and `reason` says why.
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

    @property
    def key(self) -> tuple:
        """What a line of the other ledger must share to be compared with this one."""
        return (self.section, self.name, self.phase, self.axes, self.dtype)

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
    All-gather, reduce-scatter and all-to-all send (n-1)/n of it, an all-reduce twice that, a permute all of it.
    Payloads are multiples of n where a collective exists, so the division is exact but for scalars, which round down.
    """
    if kind == "permute":
        return payload
    once = payload * (n - 1) // n
    return payload * 2 * (n - 1) // n if kind == "all-reduce" else once


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
            emitted=None if old.emitted is None and line.emitted is None else (old.emitted or 0) + (line.emitted or 0),
            terms=old.terms + line.terms,
            rules=old.rules + line.rules,
            reason=old.reason or line.reason,
        )
    return tuple(merged.values())
