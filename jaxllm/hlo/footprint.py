"""Memory of one device over the schedule: how much is in use at each step, the peak, and everything alive there.

From XLA's buffer assignment each array has a place, so that what lies between them at the peak, fragmentation, is measured
as well; together they are all that XLA asks for. Without one, from the lifetimes of the arrays alone, the peak is a lower
bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.hlo.classes import Classes, argument_kind
from jaxllm.hlo.graph import Instruction, Module, Shape
from jaxllm.hlo.lifetimes import Lifetimes, leaf_of
from jaxllm.hlo.loops import Executions
from jaxllm.hlo.memory import HBM, HOST, Buffers
from jaxllm.hlo.phases import phase_of
from jaxllm.hlo.rules import tile_padded_bytes
from jaxllm.report.inspection import CLASSES, Buffer, Memory, Place


@dataclass(frozen=True)
class _Held:
    """An array in memory. Times in half steps; `place` is (allocation, offset), None when nothing tells."""

    kind: str
    bytes: int
    instruction: Instruction
    shape: str
    start: int
    end: int
    place: tuple[int, int] | None = None


def footprint(
    module: Module, assignment: Any | None, runs: Executions, lives: Lifetimes, kinds: Classes
) -> tuple[Memory, tuple[Buffer, ...]]:
    """The memory of a module and all its buffers in HBM. `assignment`: a BufferAssignmentProto, or None."""
    exact = assignment is not None and len(assignment.buffer_allocations) > 0
    if exact:
        buffers = Buffers(assignment, module)
        stays, comes, room = _assigned(buffers, lives, kinds)
        host = buffers.size(HOST)
        on_chip = buffers.on_chip
    else:
        spaces = _by_lifetime(module, lives, kinds)
        stays, comes = spaces.get(HBM, ([], []))
        room = {}
        host = _peak(*spaces.get(HOST, ([], [])))
        on_chip = sum(_peak(*held) for space, held in spaces.items() if space not in (HBM, HOST))
    base = dict.fromkeys(CLASSES, 0)
    for item in stays:
        base[item.kind] += item.bytes
    at, points = _over_time(comes, base)
    alive = [item for item in comes if item.start <= at <= item.end]

    sums = dict.fromkeys(CLASSES, 0)
    for item in (*stays, *alive):
        sums[item.kind] += item.bytes
    sums["fragmentation"] = _holes(alive, room)
    live = sorted((*stays, *alive), key=lambda item: -item.bytes)
    step = min(at // 2, max(0, len(lives.order) - 1))
    memory = Memory(
        exact=exact,
        peak=sum(base.values()) + sum(room.values()) if exact else sum(sums.values()),
        classes={kind: size for kind, size in sums.items() if size},
        at=step,
        where=_place(lives, runs, module, step) if at else None,
        live=tuple(_buffer(module, item) for item in live if item.bytes),
        timeline=tuple((step, sum(levels.values())) for step, levels in points),
        by_class={
            kind: tuple(levels[kind] for _, levels in points)
            for kind in CLASSES
            if any(levels[kind] for _, levels in points)
        },
        steps=len(lives.order),
        aliased=_aliased(module),
        host=host,
        on_chip=on_chip,
    )
    return memory, tuple(_buffer(module, item) for item in (*stays, *comes) if item.bytes)


def _over_time(comes: Iterable[_Held], base: dict[str, int]) -> tuple[int, list[tuple[int, dict[str, int]]]]:
    """The half step with the most bytes, 0 when they never change; and bytes by class at each step in which they change,
    of its two halves the one with more."""
    changes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for item in comes:
        changes[item.start].append((item.kind, item.bytes))
        changes[item.end + 1].append((item.kind, -item.bytes))
    levels = dict(base)
    level = best = at = 0
    points: list[tuple[int, dict[str, int]]] = [(0, dict(base))]
    for half in sorted(changes):
        # in the second half of a step the first one's level still counts for it
        highest = sum(points[-1][1].values()) if half // 2 == points[-1][0] else level if half % 2 else -1
        before = dict(levels) if half % 2 else levels
        for kind, size in changes[half]:
            levels[kind] += size
        level = sum(levels.values())
        if level > best:
            best, at = level, half
        if half // 2 != points[-1][0]:
            points.append((half // 2, dict(levels) if level >= highest else before))
        elif level > highest:
            points[-1] = half // 2, dict(levels)
    return at, points


def _holes(items: Iterable[_Held], room: dict[int, int]) -> int:
    """Bytes of the allocations in which none of the items lies, from their places."""
    ends = dict.fromkeys(room, 0)
    holes = 0
    for item in sorted(items, key=lambda item: item.place or (0, 0)):
        if item.place is not None:
            allocation, low = item.place
            holes += max(0, low - ends[allocation])
            ends[allocation] = max(ends[allocation], low + item.bytes)
    return holes + sum(size - ends[allocation] for allocation, size in room.items())


def _assigned(
    buffers: Buffers, lives: Lifetimes, kinds: Classes
) -> tuple[list[_Held], list[_Held], dict[int, int]]:
    """What stays the whole step, what comes and goes, and the size of each allocation for the latter."""
    stays: list[_Held] = []
    comes: list[_Held] = []
    room: dict[int, int] = {}
    last = 2 * len(lives.order) - 1
    for allocation in buffers.allocations:
        if buffers.space(allocation) != HBM:
            continue
        if kind := _lasting(buffers, allocation):
            held = _largest(buffers, allocation)
            if held is not None:
                instruction, shape = held
                stays.append(_Held(kind, allocation.size, instruction, shape, 0, last, (allocation.index, 0)))
                continue
        room[allocation.index] = allocation.size
        pieces: dict[tuple[int, int], _Held] = {}
        for assigned in allocation.assigned:
            location = buffers.buffers[assigned.logical_buffer_id].defined_at
            instruction = buffers.instructions[location.instruction_id]
            memory, start, end, shape, kind = _lived(instruction, tuple(location.shape_index), lives, kinds)
            piece = _Held(kind, assigned.size, instruction, shape, start, end, (allocation.index, assigned.offset))
            known = pieces.get((memory, assigned.offset))
            if known is None or known.bytes < piece.bytes:
                pieces[memory, assigned.offset] = piece
        comes += _overwritten(pieces.values())
    return stays, comes, room


def _lived(
    instruction: Instruction, index: tuple[int, ...], lives: Lifetimes, kinds: Classes
) -> tuple[int, int, int, str, str]:
    """(memory, first and last half step, shape, class) of a buffer; of a table of pointers, which a tuple has, and of
    what no step runs, the whole time."""
    leaf = leaf_of(instruction.shape, index)
    shape = instruction.shape.at(index)
    if leaf is None or instruction.id not in lives.base:
        return -instruction.id, 0, 2 * len(lives.order) - 1, str(shape), "temporary"
    memory, start, end = lives.of(instruction.id, leaf)
    # It has a place of its own, so it is there as soon as the instruction runs, beside its operands.
    return memory, start - 1, end, str(shape), kinds.of(memory, shape)


def _overwritten(pieces: Iterable[_Held]) -> list[_Held]:
    """Ends what lies where another array begins: two arrays never use the same bytes at the same time."""
    made: list[_Held] = []
    places: list[int] = []  # of those in use, in order, and which they are in `made`
    active: list[int] = []
    for piece in sorted(pieces, key=lambda piece: (piece.start, -piece.bytes)):
        low = piece.place[1] if piece.place else 0
        high = low + piece.bytes
        at = bisect_left(places, low)
        if at and _high(made[active[at - 1]]) > low:
            at -= 1
        others = range(at, bisect_left(places, high))
        if any(made[active[index]].start == piece.start for index in others):
            continue  # a part of what begins there at that time
        for index in others:
            other = made[active[index]]
            made[active[index]] = replace(other, end=min(other.end, piece.start - 1))
        del places[others.start : others.stop], active[others.start : others.stop]
        places.insert(at, low)
        active.insert(at, len(made))
        made.append(piece)
    return made


def _high(piece: _Held) -> int:
    return (piece.place[1] if piece.place else 0) + piece.bytes


def _lasting(buffers: Buffers, allocation: Any) -> str:
    if allocation.is_entry_computation_parameter:
        parameter = buffers.module.entry.parameters.get(allocation.parameter_number)
        return argument_kind(parameter.op_name) if parameter is not None else "argument"
    if allocation.is_constant:
        return "constant"
    return "output" if allocation.maybe_live_out else ""


def _largest(buffers: Buffers, allocation: Any) -> tuple[Instruction, str] | None:
    """What to name an allocation by: the argument it holds, or the last to write the most of it; and its shape."""
    if allocation.is_entry_computation_parameter:
        parameter = buffers.module.entry.parameters.get(allocation.parameter_number)
        index = tuple(allocation.parameter_shape_index)
        return None if parameter is None else (parameter, str(parameter.shape.at(index)))
    sizes = [(place.size, place.logical_buffer_id) for place in allocation.assigned]
    if not sizes:
        return None
    location = buffers.buffers[max(sizes)[1]].defined_at
    instruction = buffers.instructions[location.instruction_id]
    return instruction, str(instruction.shape.at(tuple(location.shape_index)))


def _by_lifetime(
    module: Module, lives: Lifetimes, kinds: Classes
) -> dict[int, tuple[list[_Held], list[_Held]]]:
    """The same of a module without a buffer assignment, for each memory space; one item for all arrays that must share
    memory.

    The caller holds an argument all the time, unless it was donated: then its memory is free from its last reader on,
    until the output is made that takes its place.
    """
    sizes: dict[int, tuple[int, Instruction, Shape]] = {}
    given: dict[int, str] = {}  # memory of arguments and constants -> class
    for computation, instruction in lives.order:
        for leaf, shape in enumerate(instruction.shape.leaves):
            if not shape.dtype:
                continue
            memory = lives.memory(instruction.id, leaf)
            size = tile_padded_bytes(shape) if shape.tiles else shape.bytes
            if memory not in sizes or size > sizes[memory][0]:
                sizes[memory] = size, instruction, shape
            if instruction.opcode == "parameter" and computation is module.entry:
                given[memory] = argument_kind(instruction.op_name)
            elif instruction.opcode == "constant":
                given.setdefault(memory, "constant")
    last = 2 * len(lives.order) - 1
    donated, outputs = _donated(module, lives, given)
    spaces: dict[int, tuple[list[_Held], list[_Held]]] = {}
    for memory, (size, instruction, shape) in sizes.items():
        start, end = lives.time(memory)
        kind = given.get(memory) or outputs.get(memory) or kinds.of(memory, shape)
        stays, comes = spaces.setdefault(shape.memory_space, ([], []))
        if memory in given and memory not in donated:
            stays.append(_Held(kind, size, instruction, str(shape), 0, last))
        else:
            start = 0 if memory in given else start
            comes.append(_Held(kind, size, instruction, str(shape), start, end))
    return spaces


def _donated(module: Module, lives: Lifetimes, given: dict[int, str]) -> tuple[set[int], dict[int, str]]:
    """Memory of arguments whose place an output takes; and of outputs their class, which is that argument's."""
    entry = module.entry
    root = entry.root
    memory_of = [lives.of(root.id, leaf)[0] for leaf in range(len(root.shape.leaves))]
    outputs = dict.fromkeys(memory_of, "output")
    donated = set()
    for output, number, index in module.aliases:
        parameter = entry.parameters.get(number)
        out = leaf_of(root.shape, output)
        held = None if parameter is None else leaf_of(parameter.shape, index)
        if parameter is None or out is None or held is None:
            continue
        memory = lives.of(parameter.id, held)[0]
        donated.add(memory)
        outputs[memory_of[out]] = given.get(memory, "output")
    return donated, outputs


def _peak(stays: list[_Held], comes: list[_Held]) -> int:
    _, points = _over_time(comes, dict.fromkeys(CLASSES, 0))
    return sum(item.bytes for item in stays) + max(sum(levels.values()) for _, levels in points)


def _buffer(module: Module, item: _Held) -> Buffer:
    instruction = item.instruction
    return Buffer(
        instruction.name, item.kind, item.bytes, item.shape, instruction.op_name, module.source(instruction),
        item.start // 2, item.end // 2,
    )  # fmt: skip


def _place(lives: Lifetimes, runs: Executions, module: Module, step: int) -> Place | None:
    if not lives.order:
        return None
    computation, instruction = lives.order[step]
    contexts = runs.of(computation)
    op_name = contexts[0].op_name(instruction) if contexts else instruction.op_name
    count = sum(context.count for context in contexts)
    trips = contexts[0].trips if contexts else ()
    return Place(instruction.name, op_name, module.source(instruction), phase_of(op_name), count, trips)


def _aliased(module: Module) -> int:
    """Bytes of outputs that take an argument's place."""
    total = 0
    for output, _, _ in module.aliases:
        total += module.entry.root.shape.at(output).bytes
    return total
