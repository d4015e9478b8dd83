"""Which collectives run beside other work, by the schedule: what stands between the start and the end of each."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jaxllm.hlo.collectives import chain_of, kind_of
from jaxllm.hlo.graph import Computation, Instruction, Module

# What computes; the rest between a start and an end is bookkeeping or another transfer.
_WORK = frozenset(("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional", "reduce", "sort", "scatter"))


@dataclass(frozen=True)
class Overlap:
    """Whether a collective runs asynchronously, and the operations between its start and its end."""

    asynchronous: bool
    beside: tuple[str, ...]


def overlaps(module: Module) -> dict[int, Overlap]:
    """Id of a collective -> its overlap, for those that are not synchronous."""
    found: dict[int, Overlap] = {}
    chains: dict[str, list[tuple[Computation, Instruction]]] = {}
    for computation in module.computations.values():
        for position, instruction in enumerate(computation.instructions):
            if instruction.opcode.endswith("-start") and (starts := _collectives_of(module, instruction)):
                overlap = _between(computation, position, instruction)
                for started in starts:
                    found[started.id] = overlap
            elif kind_of(instruction) and (chain := chain_of(computation, instruction)):
                chains.setdefault(chain, []).append((computation, instruction))
    if chains:
        callers = _callers(module)
        for members in chains.values():
            fusions = tuple(dict.fromkeys(callers.get(computation.id, "") for computation, _ in members))
            for _, instruction in members:
                # a collective that XLA:TPU fuses with what runs beside it
                found[instruction.id] = Overlap(True, tuple(name for name in fusions if name))
    return found


def _collectives_of(module: Module, start: Instruction) -> list[Instruction]:
    if kind_of(start):
        return [start]
    return [
        instruction
        for called in module.called(start)
        for instruction in called.instructions
        if kind_of(instruction)
    ]


def _between(computation: Computation, position: int, start: Instruction) -> Overlap:
    if synchronous(start):
        return Overlap(False, ())
    ends = {user.id for user in computation.users.get(start.id, ()) if user.opcode.endswith("-done")}
    beside = []
    for instruction in computation.instructions[position + 1 :]:
        if instruction.id in ends:
            break
        if instruction.opcode in _WORK:
            beside.append(instruction.name)
    return Overlap(True, tuple(beside))


def synchronous(start: Instruction) -> bool:
    """XLA:GPU writes each collective as a start and an end, and says of some that they are one."""
    config = start.proto.backend_config
    if b"is_sync" not in config:
        return False
    try:
        return bool(json.loads(config).get("collective_backend_config", {}).get("is_sync"))
    except (ValueError, AttributeError):
        return False


def _callers(module: Module) -> dict[int, str]:
    return {
        called: instruction.name
        for _, instruction in module.by_opcode.get("fusion", ())
        for called in instruction.called_ids
    }
