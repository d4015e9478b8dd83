"""What the backend made of the collectives: the payload in the optimized module beside that of the partitioned one.

For information: a backend merges collectives, moves them out of loops, changes small ones into another kind, and
promotes types. What can be matched by kind, axes, phase and dtype is put beside the line; the rest becomes a note.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from jaxllm.hlo.collectives import emitted_parts
from jaxllm.hlo.graph import Module
from jaxllm.hlo.loops import Executions
from jaxllm.hlo.rules import cpu_f32_promotion
from jaxllm.spec.ledger import Line

Key = tuple[str, tuple[str, ...], str, str]  # kind, axes, phase, dtype


def emitted_payload(module: Module, runs: Executions, axes: dict[str, int]) -> dict[Key, int]:
    """Payload bytes per device and step of the optimized module by (kind, axes, phase, dtype)."""
    payload: dict[Key, int] = defaultdict(int)
    for _, _, context, part in emitted_parts(module, runs, axes):
        payload[part.kind, part.axes, part.phase, part.dtype] += part.payload * context.count
    return dict(payload)


def put_beside(
    lines: tuple[Line, ...], payload: dict[Key, int], target: str
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """The lines with their `emitted` payload, and a note for each emitted collective that has no line."""
    left = dict(payload)
    matched = []
    for line in lines:
        key = (line.name, line.axes, line.phase, line.dtype)
        matched.append(replace(line, emitted=left.pop(key, 0)))
    matched = _without_phase(matched, left)
    if target == "cpu":
        matched = cpu_f32_promotion(matched, left)
    missing = [line for line in matched if line.emitted != line.value]
    notes = []
    for (kind, over, phase, dtype), value in sorted(left.items()):
        candidates = {line.name for line in missing if line.axes == over and line.dtype == dtype} - {kind}
        instead = f", perhaps instead of {' or '.join(sorted(candidates))}" if candidates else ""
        notes.append(
            f"emitted: {kind} of {value:,} bytes of {dtype} over {'+'.join(over)}"
            f"{f' in {phase}' if phase else ', phase unknown'}{instead}"
        )
    return tuple(matched), tuple(notes)


def _without_phase(lines: list[Line], left: dict[Key, int]) -> list[Line]:
    """The lines, of which one is all that a collective without a phase can be: a backend that makes a new instruction of
    an old one may lose its name."""
    placed = list(lines)
    for key in [key for key in left if not key[2]]:
        kind, over, _, dtype = key
        same = [
            number
            for number, line in enumerate(placed)
            if (line.name, line.axes, line.dtype, line.emitted, line.value) == (kind, over, dtype, 0, left[key])
        ]
        if len(same) == 1:
            placed[same[0]] = replace(placed[same[0]], emitted=left.pop(key))
    return placed
