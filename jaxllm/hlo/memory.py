"""Memory of a program: its arguments, gradient accumulators and residuals by class, and the peak of its buffers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxllm.hlo.flops import tail
from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape
from jaxllm.hlo.loops import Context, Executions
from jaxllm.hlo.phases import phase_of
from jaxllm.hlo.rules import argument_padding, tile_padded_bytes
from jaxllm.spec.ledger import Line, Rule, Term, by_stage

# What XLA calls to mark a value whose array is to be in host memory, and to have room for such an array, with nothing in it.
MOVE_TO_HOST, ALLOCATE = "MoveToHost", "AllocateBuffer"
HBM, HOST = 0, 5  # memory spaces, which XLA calls colors; the others are on-chip memories of a TPU

CLASSES = ("parameters", "optimizer", "batch")


def is_call(instruction: Instruction, target: str) -> bool:
    """Whether an instruction calls what XLA knows by that name."""
    return instruction.opcode == "custom-call" and instruction.proto.custom_call_target == target


@dataclass(frozen=True)
class Buffers:
    """The buffer assignment of an optimized module."""

    proto: Any
    module: Module

    @cached_property
    def allocations(self) -> list[Any]:
        """The allocations that last beyond one thread."""
        return [allocation for allocation in self.proto.buffer_allocations if not allocation.is_thread_local]

    @property
    def on_chip(self) -> int:
        """Bytes of temporaries in a TPU's own memories, which are no part of HBM."""
        return sum(
            allocation.size
            for allocation in self.allocations
            if self.space(allocation) not in (HBM, HOST) and not allocation.is_entry_computation_parameter
        )

    def space(self, allocation: Any) -> int:
        """The memory space of an allocation: its color, or the host's, which XLA:GPU says in the layouts of its arrays
        alone."""
        if allocation.color == HBM and allocation.assigned:
            if self.shape(allocation.assigned[0].logical_buffer_id).memory_space == HOST:
                return HOST
        return allocation.color

    def size(self, space: int) -> int:
        """Bytes of all allocations in one memory space."""
        return sum(allocation.size for allocation in self.allocations if self.space(allocation) == space)

    @property
    def arguments(self) -> int:
        """Bytes of the arguments as they are laid out, on the device and on the host."""
        return sum(allocation.size for allocation in self.allocations if allocation.is_entry_computation_parameter)

    def arguments_in(self, space: int) -> int:
        """Bytes of those in one memory space."""
        arguments = [allocation for allocation in self.allocations if allocation.is_entry_computation_parameter]
        return sum(allocation.size for allocation in arguments if self.space(allocation) == space)

    @cached_property
    def stacks_on_host(self) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
        """The arrays in host memory that are no arguments: those with room of their own, several of them in one allocation of
        XLA:GPU's; and those in the room of an argument that is not needed any more, such as an embedding that has come to
        the device."""
        own, lent = [], []
        for allocation in self.allocations:
            if self.space(allocation) != HOST:
                continue
            if allocation.is_entry_computation_parameter:
                buffers = [place.logical_buffer_id for place in allocation.assigned]
                lent += [self.shape(buffer) for buffer in buffers if is_call(self.defined_by(buffer), ALLOCATE)]
            else:
                own += [self.shape(buffer) for buffer in self.largest(allocation)]
        return tuple(own), tuple(lent)

    def defined_by(self, buffer_id: int) -> Instruction:
        """What makes a logical buffer."""
        return self.instructions[self.buffers[buffer_id].defined_at.instruction_id]

    def shape(self, buffer_id: int) -> Shape:
        """The array of a logical buffer."""
        return self.defined_by(buffer_id).shape.at(tuple(self.buffers[buffer_id].defined_at.shape_index))

    def largest(self, allocation: Any) -> dict[int, int]:
        """Logical buffer id -> bytes, of buffers that lie in one allocation without overlap: those alive when they take
        the most room, or, where the compiler left no trace of lifetimes (tpu), the largest ones of each place."""
        assigned = {place.logical_buffer_id: place for place in allocation.assigned}
        for trace in self.proto.heap_simulator_traces:
            if assigned.keys() <= {event.buffer_id for event in trace.events}:
                live = _live_at_peak(trace.events, self.buffers)
                return {buffer: size for buffer, size in live.items() if buffer in assigned}
        chosen: list[Any] = []
        for place in sorted(allocation.assigned, key=lambda place: -place.size):
            if all(place.offset + place.size <= o.offset or o.offset + o.size <= place.offset for o in chosen):
                chosen.append(place)
        return {place.logical_buffer_id: place.size for place in chosen}

    @cached_property
    def buffers(self) -> dict[int, Any]:
        return {buffer.id: buffer for buffer in self.proto.logical_buffers}

    @cached_property
    def instructions(self) -> dict[int, Instruction]:
        return {instruction.id: instruction for _, instruction in self.module.instructions()}


def _live_at_peak(events: Any, buffers: dict[int, Any]) -> dict[int, int]:
    """Replays a trace of the heap simulator up to the event after which most bytes are alive."""
    alloc, free = 0, 1
    live: dict[int, int] = {}
    best: dict[int, int] = {}
    users: dict[int, int] = {}  # of a piece of memory, by the buffer that it was allocated for
    owner: dict[int, int] = {}  # buffer -> the one whose memory it shares
    size = peak = 0
    for event in events:
        if event.kind == free:
            holder = owner.pop(event.buffer_id, event.buffer_id)
            users[holder] = users.get(holder, 1) - 1
            if not users[holder]:
                size -= live.pop(holder, 0)
            continue
        holder = event.buffer_id if event.kind == alloc else event.share_with_canonical_id
        holder = owner.get(holder, holder)
        owner[event.buffer_id] = holder
        # A buffer may take over memory in the moment in which the one before it is freed.
        if holder not in live:
            live[holder], users[holder] = buffers[holder].size, 0
            size += live[holder]
        users[holder] += 1
        if size > peak:
            peak, best = size, dict(live)
    return best


def argument_class(op_name: str) -> str:
    """`parameters['layers']['q']` -> parameters: the name of an argument up to its first `[` or `.`."""
    return re.split(r"[\[.]", op_name, maxsplit=1)[0]


def argument_lines(
    module: Module,
    buffers: Buffers | None,
    logical_bytes: dict[str, int],
    needed_bytes: dict[str, tuple[int, ...]],
    saved_on_host: tuple[Term, ...] = (),
) -> tuple[list[Line], tuple[str, ...]]:
    """Lines parameters, optimizer, batch, padding and host; and of a pipeline uniform.

    Args: the module whose entry has the arguments in per-device shapes; its buffer assignment, or None when there is
    none; op_name -> bytes of an argument without padding of its vocabulary, and -> those that each stage needs; the
    residuals that the program keeps in host memory.
    """
    terms: dict[str, list[Term]] = {name: [] for name in CLASSES}
    unexplained, vocabulary, host = [], [], []
    arrays = 0
    for _, parameter in sorted(module.entry.parameters.items()):
        name, size = parameter.op_name or parameter.name, parameter.shape.bytes
        arrays += size
        on_host = any(leaf.memory_space == HOST for leaf in parameter.shape.leaves)
        logical = size if on_host else logical_bytes.get(name, size)
        if logical != size:
            vocabulary.append(Term(name, size - logical, f"vocabulary padding of {parameter.shape}"))
        kind = argument_class(name)
        if kind in terms and on_host:
            host.append(Term(name, size, str(parameter.shape)))
        elif kind in terms:
            terms[kind].append(Term(name, logical, str(parameter.shape)))
        else:
            unexplained.append(f"argument {name} ({parameter.shape}, {size} bytes): of no known class")
    if needed_bytes:
        lines = _lines_of_stages(terms, needed_bytes)
    else:
        lines = [Line("memory", kind, sum(t.value for t in terms[kind]), terms=tuple(terms[kind])) for kind in CLASSES]
    padding = _padding(module, buffers, arrays, vocabulary)
    lines.append(padding)
    tiles = next((term.value for term in padding.terms if term.label == "tiles"), 0)
    ruled = sum(rule.bytes for rule in padding.rules)
    if tiles != ruled:
        unexplained.append(f"padding of the arguments: {tiles} bytes are allocated, the rule of tiles gives {ruled}")
    host += saved_on_host
    if buffers is not None:
        # Tiles, of these and of arguments, are in the line padding.
        own, lent = buffers.stacks_on_host
        beyond = sum(shape.bytes for shape in (*own, *lent)) - sum(term.value for term in saved_on_host)
        if beyond:
            label = "temporaries" if beyond > 0 else "residuals that were not put there"
            host.append(Term(label, beyond, "arrays in host memory beside arguments and residuals"))
    lines.append(Line("memory", "host", sum(term.value for term in host), terms=tuple(host)))
    return lines, tuple(unexplained)


def _padding(module: Module, buffers: Buffers | None, arrays: int, vocabulary: list[Term]) -> Line:
    if buffers is None:
        reason = "the compiler refused the program, so no argument was laid out"
        return Line("memory", "padding", None, terms=tuple(vocabulary), reason=reason)
    stacks, _ = buffers.stacks_on_host
    kept = buffers.size(HOST) - buffers.arguments_in(HOST) - sum(shape.bytes for shape in stacks)
    tiles = buffers.arguments - arrays + kept
    what = "arguments, and of stacks in host memory," if stacks else "arguments"
    terms = (*vocabulary, Term("tiles", tiles, f"allocated bytes of the {what} less those of their arrays"))
    # The rule's figure comes from shapes and layouts, the line's from the allocations: neither is made from the other.
    padding = argument_padding(module) + sum(tile_padded_bytes(shape) - shape.bytes for shape in stacks)
    rule = Rule("tpu-tile-padding", padding, "arrays in HBM lie in tiles, and a tile is never cut")
    rules = (rule,) if rule.bytes else ()
    return Line("memory", "padding", sum(term.value for term in terms), terms=terms, rules=rules)


@dataclass(frozen=True)
class Loop:
    """A `while` in the computation that runs it."""

    computation: Computation
    instruction: Instruction
    context: Context

    @property
    def slots(self) -> tuple[Shape, ...]:
        return self.instruction.shape.elements

    def initial(self, module: Module, slot: int) -> tuple[Instruction, int | None]:
        """What an element of the loop's tuple starts as: the instruction that makes it, and, when that gives a tuple,
        which element of it."""
        return source_of(module, self.computation, self.computation.operand(self.instruction), (slot,))

    def passes_through(self, module: Module, slot: int) -> bool:
        """Whether the body hands this element on as it got it."""
        body, _ = module.while_parts(self.instruction)
        made_by, element = source_of(module, body, body.root, (slot,))
        return made_by.opcode == "parameter" and element == slot


def source_of(
    module: Module, computation: Computation, instruction: Instruction, index: tuple[int, ...] = ()
) -> tuple[Instruction, int | None]:
    """Follows an array back through tuples, copies, converts, bitcasts and calls to the instruction that makes it."""
    while True:
        opcode = instruction.opcode
        if opcode == "get-tuple-element":
            index = (instruction.proto.tuple_index, *index)
            instruction = computation.operand(instruction)
        elif opcode in PASSES and instruction.operand_ids:
            instruction = computation.operand(instruction)
        elif opcode == "tuple" and index:
            instruction, index = computation.operand(instruction, index[0]), index[1:]
        elif opcode == "call":
            callee = module.called(instruction)[0]
            made_by, element = source_of(module, callee, callee.root, index)
            if made_by.opcode != "parameter":
                return made_by, element
            instruction = computation.operand(instruction, made_by.proto.parameter_number)
            index = () if element is None else (element,)
        else:
            return instruction, index[0] if index else None


def loops_of(module: Module, runs: Executions) -> list[Loop]:
    return [
        Loop(computation, instruction, context)
        for computation, instruction in module.instructions()
        if instruction.opcode == "while"
        for context in runs.of(computation)[:1]
    ]


def _lines_of_stages(terms: dict[str, list[Term]], needed: dict[str, tuple[int, ...]]) -> list[Line]:
    """What each stage needs of its arguments, and `uniform`, what it has of them beside: of each line the stage with the
    most. `terms` are the arguments as they are allocated, the same on all stages."""
    count = len(next(iter(needed.values())))
    per_stage = []
    for stage in range(count):
        lines, spare = [], []
        for kind, found in terms.items():
            parts = [replace(term, value=needed[term.label][stage] if term.label in needed else term.value) for term in found]
            lines.append(Line("memory", kind, sum(part.value for part in parts), terms=tuple(p for p in parts if p.value)))
            spare += [replace(t, value=t.value - part.value) for t, part in zip(found, parts, strict=True)]
        spare = [term for term in spare if term.value]
        lines.append(Line("memory", "uniform", sum(term.value for term in spare), terms=tuple(spare)))
        per_stage.append(lines)
    return list(by_stage(per_stage))


def fenced_line(module: Module, runs: Executions, name: str) -> Line:
    """What stands behind optimization barriers of a scope: `gradients` are the accumulators; of a pipeline, `stash`,
    `weight_stash` and `inbox` are its buffers.

    The program puts one around each array, where the backward pass ends or where a buffer is made. A barrier computes
    nothing, and no compiler merges or removes it before partitioning, so that the arrays can be told by name on all of
    them.
    """
    terms = [
        Term(instruction.name, instruction.shape.bytes, str(instruction.shape), module.source(instruction))
        for computation, instruction in module.by_opcode.get("opt-barrier", ())
        if runs.of(computation) and name in runs.of(computation)[0].op_name(instruction).split("/")
    ]
    return Line("memory", name, sum(term.value for term in terms), terms=tuple(terms))


def _phase_of_loop(loop: Loop) -> str:
    return phase_of(loop.context.op_name(loop.instruction))


@dataclass(frozen=True)
class Residual:
    """An array that the forward pass keeps for the backward pass. `on_host`: the program keeps it in host memory."""

    shape: Shape
    term: Term
    on_host: bool


def residuals(module: Module, runs: Executions) -> tuple[Residual, ...]:
    """What the forward pass keeps for the backward pass: arrays that a loop of phase forward makes and that a loop of
    phase backward takes whole. They live once, whatever the number of microbatches."""
    loops = loops_of(module, runs)
    phases = {loop.instruction.id: _phase_of_loop(loop) for loop in loops}
    forward = {loop.instruction.id: loop for loop in loops if phases[loop.instruction.id] == "forward"}
    found: dict[tuple[int, int], Residual] = {}
    for loop in loops:
        if phases[loop.instruction.id] != "backward":
            continue
        for slot in range(len(loop.slots)):
            made_by, element = loop.initial(module, slot)
            producer = forward.get(made_by.id)
            if producer is None or element is None or producer.passes_through(module, element):
                continue
            body, _ = module.while_parts(producer.instruction)
            shape = producer.slots[element]
            detail = f"{shape}, element {element} of {producer.instruction.name}"
            saved, on_host = _saved_value(module, body, element)
            label = tail(saved.op_name) if saved is not None and saved.op_name else producer.instruction.name
            source = module.source(saved) if saved is not None else ""
            found[made_by.id, element] = Residual(shape, Term(label, shape.bytes, detail, source), on_host)
    return tuple(found.values())


def _saved_value(module: Module, body: Computation, slot: int) -> tuple[Instruction | None, bool]:
    """The value that a loop's body writes into a stacked output, to name it by, and whether it goes to host memory on the
    way: a call of XLA's says so, until a pass behind the partitioner gives the stack its memory."""
    made_by, _ = source_of(module, body, body.root, (slot,))
    if made_by.opcode != "dynamic-update-slice" or made_by.id not in body.by_id:
        return None, False
    value, _ = source_of(module, body, body.operand(made_by, 1))
    if not is_call(value, MOVE_TO_HOST):
        return value, False
    return source_of(module, body, body.operand(value))[0], True


def peak_of(buffers: Buffers, top: int = 10) -> tuple[int, tuple[Term, ...]]:
    """Peak bytes in HBM, the sum of its allocations, and terms that add up to it.

    The terms are arguments, outputs that do not take an argument's place, constants, the `top` largest temporaries
    alive at the peak, the other ones, and what the packing of temporaries loses.
    """
    arguments = outputs = constants = temporaries = 0
    live: dict[int, int] = {}
    for allocation in buffers.allocations:
        if buffers.space(allocation) != HBM:
            continue
        if allocation.is_entry_computation_parameter:
            arguments += allocation.size
        elif allocation.is_constant:
            constants += allocation.size
        elif allocation.maybe_live_out:
            outputs += allocation.size
        else:
            temporaries += allocation.size
            live |= buffers.largest(allocation)
    largest = sorted(live, key=live.__getitem__, reverse=True)[:top]
    alive = sum(live.values())
    terms = [
        Term("arguments", arguments, "parameters, optimizer and batch as they are laid out"),
        Term("outputs", outputs, "outputs that do not take the place of an argument"),
        Term("constants", constants),
        *(_buffer_term(buffers, buffer, live[buffer]) for buffer in largest),
        Term("other temporaries", alive - sum(live[buffer] for buffer in largest)),
        Term("rest", temporaries - alive, "allocations of temporaries less those buffers: fragmentation, copies"),
    ]
    return sum(term.value for term in terms), tuple(term for term in terms if term.value)


def _buffer_term(buffers: Buffers, buffer_id: int, size: int) -> Term:
    instruction = buffers.defined_by(buffer_id)
    detail = f"{buffers.shape(buffer_id)}  {tail(instruction.op_name)}"
    return Term(instruction.name, size, detail, buffers.module.source(instruction))
