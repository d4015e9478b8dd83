"""What everything that measures a module takes for granted, checked once after it has been read.

A damaged file may still be one that a parser takes: an operand that is not there, a dim out of range, a loop without a
body, a call of itself. Whoever reads a module that has passed need not look for these. What is checked:

* ids: of instructions and computations, once each; of operands, before their users; of what is called; of roots
* calls: no recursion; callees before callers; as many parameters, numbered 0 .. n-1, as operands; results alike
* shapes: dims, layouts, tiles and tuples, and that what only hands a tuple on has the same
* numbers: of dots, convolutions, groups, meshes, permutes and trip counts, in range
* what lies beside the computations: schedule, aliases, stack frames, buffers

What each opcode needs is in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from jaxllm.hlo import wire
from jaxllm.hlo.checks import ANY, RULES, Context
from jaxllm.hlo.errors import ParseError
from jaxllm.hlo.graph import ELEMENT_TYPES, Computation, Instruction, Module, Shape

MOST_ELEMENTS = 2**62
MOST_DEVICES = 2**20
MOST_RUNS = 2_000_000  # ways in which computations are reached, all together
DEEPEST = 200  # calls in each other
_AGAIN = "the file is damaged, dump the program again"


class _Wrong(Exception):
    """What is wrong, and with which instruction, of which computation; either may be unknown."""

    def __init__(self, reason: str, computation: Any = None, instruction: Any = None) -> None:
        super().__init__(reason)
        self.reason, self.computation, self.instruction = reason, computation, instruction


def _error(wrong: _Wrong, name: str, data: bytes) -> ParseError:
    inside = wrong.computation.instructions if wrong.computation is not None else ()
    offset = getattr(wrong.instruction or next(iter(inside), None), "offset", None)
    if offset is not None:  # an instruction that was written in a line
        return ParseError(name, offset, f"{wrong.reason}; {_AGAIN}.", data.count(b"\n", 0, offset) + 1)
    ids = (part.id if part is not None else None for part in (wrong.computation, wrong.instruction))
    return ParseError(name, wire.place(data, *ids), f"{wrong.reason}; {_AGAIN}.")


# ---- the tables of a proto, before a graph is made of it ----


def verify_tables(proto: Any, name: str, data: bytes) -> None:
    """Checks the ids of an HloModuleProto, before a graph is made of it. Raises ParseError."""
    try:
        _tables(proto)
    except _Wrong as wrong:
        raise _error(wrong, name, data) from None


def _tables(proto: Any) -> None:
    known: dict[int, Any] = {}
    seen: set[int] = set()
    for computation in proto.computations:
        if computation.id in known:
            raise _Wrong(f"two computations have the id {computation.id}", computation)
        known[computation.id] = computation
        before = len(seen)
        seen.update(instruction.id for instruction in computation.instructions)
        if len(seen) != before + len(computation.instructions):
            raise _Wrong(f"two instructions have the same id, one of them in {computation.name}", computation)
        if not any(instruction.id == computation.root_id for instruction in computation.instructions):
            raise _Wrong(f"computation {computation.name} has no instruction that is its root", computation)
        for instruction in computation.instructions:
            _element_types(instruction.shape, computation, instruction)
    if proto.entry_computation_id not in known:
        raise _Wrong(f"the module has no computation {proto.entry_computation_id}, which is said to be its entry")
    for sequence in proto.schedule.sequences:
        computation = known.get(sequence.key)
        if computation is None:
            raise _Wrong(f"the schedule is of a computation {sequence.key} that the module does not have")
        scheduled = sorted(sequence.value.instruction_ids)
        if scheduled != sorted(instruction.id for instruction in computation.instructions):
            raise _Wrong(f"the schedule of {computation.name} is not a list of its instructions", computation)


_OTHER_TYPES = frozenset((13, 14, 17))  # tuple, opaque, token


def _element_types(shape: Any, computation: Any, instruction: Any) -> None:
    if shape.element_type not in ELEMENT_TYPES and shape.element_type not in _OTHER_TYPES:
        reason = f"{instruction.name} has elements of a type, number {shape.element_type}, that is not known here"
        raise _Wrong(reason, computation, instruction)
    for element in shape.tuple_shapes:
        _element_types(element, computation, instruction)


# ---- the call graph ----


def in_call_order(module: Module, name: str, data: bytes) -> Module:
    """The module with callees before callers, whatever the order in the file. Raises ParseError on recursion, and on a
    call of what is not there."""
    try:
        ordered = _call_order(module)
    except _Wrong as wrong:
        raise _error(wrong, name, data) from None
    if ordered == list(module.computations):
        return module
    return replace(module, computations={id_: module.computations[id_] for id_ in ordered})


def _call_order(module: Module) -> list[int]:
    """Ids of computations, each after those that it calls. An order that is one already stays."""
    depth: dict[int, int] = {}
    open_: set[int] = set()
    for first in module.computations:
        stack = [(first, False)]
        while stack:
            id_, left = stack.pop()
            computation = module.computations[id_]
            if left:
                open_.discard(id_)
                called = {callee for instruction in computation.instructions for callee in instruction.called_ids}
                depth[id_] = 1 + max((depth[callee] for callee in called), default=0)
                if depth[id_] > DEEPEST:
                    raise _Wrong(f"calls lie more than {DEEPEST} deep in each other in {computation.name}", computation)
                continue
            if id_ in depth:
                continue
            open_.add(id_)
            stack.append((id_, True))
            for instruction in computation.instructions:
                for callee in instruction.called_ids:
                    if callee in depth:
                        continue
                    if callee in open_:
                        reason = f"{instruction.name} calls {module.computations[callee].name}, in which it is itself"
                        raise _Wrong(reason, computation, instruction)
                    if callee not in module.computations:
                        reason = f"{instruction.name} calls a computation {callee}, which the module does not have"
                        raise _Wrong(reason, computation, instruction)
                    stack.append((callee, False))
    return list(depth)


def _runs(module: Module) -> None:
    """Raises _Wrong when computations are reached in more ways than anything could list."""
    ways = dict.fromkeys(module.computations, 0)
    ways[module.entry.id] = 1
    for computation in reversed(module.computations.values()):
        here = ways[computation.id]
        if not here:
            continue
        for instruction in computation.instructions:
            for callee in instruction.called_ids:
                ways[callee] += here
    if sum(ways.values()) > MOST_RUNS:
        raise _Wrong(f"its computations are reached in more than {MOST_RUNS:,} ways", module.entry)


# ---- the module ----


def verify(module: Module, name: str, data: bytes) -> None:
    """Raises ParseError when a module, callees before callers, is not one that a compiler can have made."""
    try:
        _Verifier(module).run()
    except _Wrong as wrong:
        raise _error(wrong, name, data) from None


class _Verifier:
    """Goes through one module. What many instructions share, shapes and groups, is looked at once."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.shapes: set[int] = set()  # by identity: a text has one object for all shapes that read the same
        self.context = Context(module, module.devices if module.devices > 1 else MOST_DEVICES)

    def run(self) -> None:
        module = self.module
        if not 0 <= module.devices <= MOST_DEVICES:
            raise _Wrong(f"the module is for {module.devices:,} devices, and the most is {MOST_DEVICES:,}")
        for computation in module.computations.values():
            try:
                self._computation(computation)
            except _Wrong as wrong:
                raise _Wrong(wrong.reason, computation, wrong.instruction) from None
        _runs(module)
        self._aliases()
        self._frames()

    def _computation(self, computation: Computation) -> None:
        seen: dict[int, Instruction] = {}
        shapes, context = self.shapes, self.context
        parameters: dict[int, Instruction] = {}
        for instruction in computation.instructions:
            operand_ids = instruction.operand_ids
            for id_ in operand_ids:
                if id_ not in seen:
                    raise _Wrong(f"an operand of {instruction.name} is not defined before it", instruction=instruction)
            seen[instruction.id] = instruction
            shape = instruction.shape
            if id(shape) not in shapes:
                if reason := _wrong_shape(shape):
                    raise _Wrong(f"{instruction.name} has {reason}", instruction=instruction)
                shapes.add(id(shape))
            opcode = instruction.opcode
            least, most, check = RULES.get(opcode, ANY)
            if not least <= len(operand_ids) <= most:
                wanted = least if least == most else f"{least} or more"
                reason = f"{instruction.name} has {len(operand_ids)} operands, and {opcode} takes {wanted}"
                raise _Wrong(reason, instruction=instruction)
            if check is not None and (reason := check(context, instruction, [seen[id_] for id_ in operand_ids])):
                raise _Wrong(f"{instruction.name} {reason}", instruction=instruction)
            if opcode == "parameter":
                number = instruction.proto.parameter_number
                if number in parameters:
                    raise _Wrong(f"{instruction.name} is the second parameter {number}", instruction=instruction)
                parameters[number] = instruction
        if any(number not in parameters for number in range(len(parameters))):
            raise _Wrong(f"the parameters of {computation.name} are not numbered from 0 on")
        context.parameters[computation.id] = parameters

    def _aliases(self) -> None:
        entry = self.module.entry
        parameters = self.context.parameters[entry.id]
        for output, number, index in self.module.aliases:
            parameter = parameters.get(number)
            if not _has(entry.root.shape, output) or parameter is None or not _has(parameter.shape, index):
                reason = f"output {list(output)} is said to take the place of argument {number} {list(index)}"
                raise _Wrong(f"{reason}, and they are not both there", entry, parameter)

    def _frames(self) -> None:
        frames = self.module.frames
        files, functions = len(frames.file_names), len(frames.function_names)
        for place in frames.file_locations:
            if not (0 < place.file_name_id <= files and 0 <= place.function_name_id <= functions and place.line >= 0):
                raise _Wrong("a row of the table FileLocations names a file or a function that is not there")
        places, count = len(frames.file_locations), len(frames.stack_frames)
        for frame in frames.stack_frames:
            if not (0 < frame.file_location_id <= places and 0 <= frame.parent_frame_id <= count):
                raise _Wrong("a row of the table StackFrames names a place or a frame that is not there")


def _wrong_shape(shape: Shape) -> str:
    """What is wrong with a shape, or ""."""
    if shape.dtype == "tuple":
        return next(filter(None, map(_wrong_shape, shape.elements)), "")
    rank = len(shape.dims)
    if any(dim < 0 for dim in shape.dims) or prod(shape.dims) > MOST_ELEMENTS:
        return f"a shape that no array has, {shape}"
    if shape.minor_to_major and sorted(shape.minor_to_major) != list(range(rank)):
        return f"a layout that is none of {shape}"
    if any(not 0 < size <= MOST_ELEMENTS for tile in shape.tiles for size in tile) or shape.tail_alignment < 1:
        return f"tiles that no layout has, {shape.tiles}"
    return "" if shape.memory_space >= 0 else f"a memory space of {shape.memory_space}"


def _has(shape: Shape, index: Sequence[int]) -> bool:
    """Whether an index into nested tuples names something."""
    for position in index:
        if not 0 <= position < len(shape.elements):
            return False
        shape = shape.elements[position]
    return True


# ---- the buffer assignment ----


def verify_buffers(proto: Any, module: Module, name: str, data: bytes) -> None:
    """Checks a BufferAssignmentProto against its module. Raises ParseError."""
    instructions = {instruction.id: instruction for _, instruction in module.instructions()}
    buffers: dict[int, int] = {}
    for position, buffer in enumerate(proto.logical_buffers):
        place = buffer.defined_at
        maker = instructions.get(place.instruction_id)
        if buffer.id in buffers or buffer.size < 0 or maker is None or not _has(maker.shape, place.shape_index):
            reason = f"buffer {buffer.id} is of {buffer.size:,} bytes and made by no instruction that there is"
            raise _buffer_error(name, data, 1, position, reason)
        buffers[buffer.id] = buffer.size
    parameters = module.entry.parameters
    indexes = set()
    for position, allocation in enumerate(proto.buffer_allocations):
        reason = ""
        if allocation.index in indexes or allocation.size < 0:
            reason = f"allocation {allocation.index} is of {allocation.size:,} bytes, or there twice"
        indexes.add(allocation.index)
        if allocation.is_entry_computation_parameter:
            parameter = parameters.get(allocation.parameter_number)
            if parameter is None or not _has(parameter.shape, allocation.parameter_shape_index):
                reason = f"allocation {allocation.index} is said to be of parameter {allocation.parameter_number}"
        for assigned in allocation.assigned:
            if assigned.logical_buffer_id not in buffers:
                reason = f"allocation {allocation.index} holds a buffer {assigned.logical_buffer_id} that is not there"
            elif min(assigned.offset, assigned.size) < 0 or assigned.offset + assigned.size > allocation.size:
                reason = f"buffer {assigned.logical_buffer_id} lies outside of its allocation {allocation.index}"
        if reason:
            raise _buffer_error(name, data, 3, position, reason)
    for position, trace in enumerate(proto.heap_simulator_traces):
        for event in trace.events:
            named = [event.buffer_id, *([event.share_with_canonical_id] if event.kind == 2 else [])]
            if not 0 <= event.kind <= 2 or any(id_ not in buffers for id_ in named):
                reason = f"an event of the trace of allocations is of a buffer {event.buffer_id} that is not there"
                raise _buffer_error(name, data, 4, position, reason)


def _buffer_error(name: str, data: bytes, number: int, position: int, reason: str) -> ParseError:
    return ParseError(name, wire.buffer_place(data, number, position), f"{reason}; {_AGAIN}.")
