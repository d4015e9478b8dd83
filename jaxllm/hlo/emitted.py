"""What the backend made of the collectives: the payload in the optimized module beside that of the partitioned one.

For information: a backend merges collectives, moves them out of loops, changes small ones into another kind, and
promotes types. What can be matched by kind, axes, phase and dtype is put beside the line; the rest becomes a note.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from jaxllm.hlo.collectives import kind_of, parts_of
from jaxllm.hlo.graph import Computation, Instruction, Module
from jaxllm.hlo.loops import Executions
from jaxllm.hlo.rules import cpu_f32_promotion
from jaxllm.spec.ledger import Line

Key = tuple[str, tuple[str, ...], str, str]  # kind, axes, phase, dtype


def emitted_payload(module: Module, runs: Executions, axes: dict[str, int]) -> dict[Key, int]:
    """Payload bytes per device and step of the optimized module by (kind, axes, phase, dtype)."""
    payload: dict[Key, int] = defaultdict(int)
    chains = set()
    for computation, instruction in module.instructions():
        if not kind_of(instruction):
            continue
        scatters = "all-reduce-scatter" in computation.name  # a TPU's reduce-scatter is a fusion of this name
        for context in runs.of(computation):
            chain = (_chain(computation, instruction), context.trips)
            if chain[0] and chain in chains:
                continue
            chains.add(chain)
            for part in parts_of(module, computation, instruction, context, axes):
                kind = "reduce-scatter" if scatters and part.kind == "all-reduce" else part.kind
                payload[kind, part.axes, part.phase, part.dtype] += part.payload * context.count
    return dict(payload)


def _chain(computation: Computation, instruction: Instruction) -> str:
    """What the copies of one collective share that XLA:TPU spreads over several fusions, to overlap it with them: its
    start, the computations beside it, and its end each hold one. "" for a collective that stands once."""
    if not ("fused_computation" in computation.name or "async_collective_fusion" in computation.name):
        return ""
    return next((pair.value for pair in instruction.proto.frontend_attributes.map if pair.key == "chain_id"), "")


def put_beside(
    lines: tuple[Line, ...], payload: dict[Key, int], target: str
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """The lines with their `emitted` payload, and a note for each emitted collective that has no line."""
    left = dict(payload)
    matched = []
    for line in lines:
        key = (line.name, line.axes, line.phase, line.dtype)
        matched.append(replace(line, emitted=left.pop(key, 0)))
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
