"""A layout of a plan as a compiler has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verified:
    """One layout, predicted and compiled.

    rank     that it was planned with; a layout that compiles to something else comes behind those that do not
    lines    lines of the ledger that are compared, and equal of them
    peak, compiled_peak   bytes of a device
    wire, compiled_wire   bytes that a device sends in a step
    reason   why it moves down; "" where it compiles to what was planned
    """

    rank: int
    layout: str
    lines: int = 0
    equal: int = 0
    peak: int | None = None
    compiled_peak: int | None = None
    wire: int | None = None
    compiled_wire: int | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
