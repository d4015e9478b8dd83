"""How often each computation runs: trip counts of loops, multiplied along the call graph."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module
from jaxllm.hlo.phases import join

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.hlo.values import Values


@dataclass(frozen=True)
class Context:
    """One way in which a computation is reached: how often per step, through which loops, from which call."""

    count: int = 1
    trips: tuple[int, ...] = ()  # of the loops around it, outermost first
    caller: str = ""  # op_name of the calls around it, to which the names inside are relative
    thread: str = ""  # name of the async or fusion instruction that runs it, if one does
    conditional: bool = False  # in a branch that may not be taken: `count` is the most there can be
    loops: tuple[int, ...] = ()  # ids of the loops around it, outermost first
    turns: Turns | None = None  # of the loops around it whose turns a table tells

    def op_name(self, instruction: Instruction) -> str:
        return join(self.caller, instruction.op_name)


@dataclass(frozen=True)
class Executions:
    """For each computation that runs, the contexts in which it does, and what could not be told."""

    contexts: dict[int, tuple[Context, ...]]  # computation id -> contexts
    unknown_trips: tuple[str, ...] = ()  # loops that are counted once, because nothing tells their trip count
    open_branches: tuple[str, ...] = ()  # conditionals with work in a branch: each branch is counted once

    @property
    def unexplained(self) -> tuple[str, ...]:
        return (*self.unknown_trips, *self.open_branches)

    def of(self, computation: Computation) -> tuple[Context, ...]:
        return self.contexts.get(computation.id, ())


def executions(module: Module, device: int = 0) -> Executions:
    """Walks the call graph from the entry, as one device does it: a loop whose turns a table tells may have others on
    another device. A loop whose trip count is unknown is counted once, and reported."""
    tables = _Tables(module, device)
    contexts: dict[int, list[Context]] = {module.entry.id: [Context()]}
    unknown: list[str] = []
    branches: list[str] = []
    works: dict[int, bool] = {}
    # Callees are listed before callers, so in reverse all contexts of a computation are known when it is reached.
    for computation in reversed(module.computations.values()):
        here = contexts.get(computation.id)
        if not here:
            continue
        for instruction in computation.instructions:
            if not instruction.called_ids:
                continue
            opcode = instruction.opcode
            if opcode == "while":
                if instruction.id not in computation.needed and not _has_effect(module, instruction):
                    continue  # XLA drops it; with one device it does so behind the place of the partitioner
                body, condition = module.while_parts(instruction)
                trips = trip_count(module, computation, instruction)
                turns = None if trips is not None else tables.turns(computation, instruction)
                if turns is not None:
                    for context in here:
                        for part, more in ((body, 0), (condition, 1)):
                            inside = _by_table(context, turns, more)
                            if inside.count:
                                contexts.setdefault(part.id, []).append(inside)
                    continue
                if trips is None:
                    unknown.append(f"trip count of {instruction.name} ({module.source(instruction)}): counted once")
                    trips = 1
                for context in here:
                    inside = replace(
                        context,
                        count=context.count * trips,
                        trips=(*context.trips, trips),
                        loops=(*context.loops, instruction.id),
                    )
                    contexts.setdefault(body.id, []).append(inside)
                    contexts.setdefault(condition.id, []).append(replace(inside, count=context.count * (trips + 1)))
                continue
            open_ = opcode == "conditional" and len(instruction.called_ids) > 1
            if open_ and any(_works(module, branch, works) for branch in module.called(instruction)):
                branches.append(f"branches of {instruction.name} ({module.source(instruction)}): each counted once")
            for called in module.called(instruction):
                for context in here:
                    if opcode == "call":
                        context = replace(context, caller=context.op_name(instruction))
                    elif open_:
                        context = replace(context, conditional=True)
                    elif opcode.startswith(("async-", "fusion")) or opcode.endswith("-start"):
                        context = replace(context, thread=instruction.name)
                    contexts.setdefault(called.id, []).append(context)
    return Executions({key: tuple(value) for key, value in contexts.items()}, tuple(unknown), tuple(branches))


def _by_table(context: Context, turns: Turns, more: int) -> Context:
    """The context inside of a loop that takes `turns`, and `more` at each of them. Where several such loops lie in each
    other, each counts where those around it run."""
    if turns.loop not in (None, *context.loops) or (context.turns and context.turns.loop not in (None, turns.loop)):
        raise AssertionError("the counter of a loop is known inside of it alone")
    each, before = turns.each + more, len(turns.each)
    if context.turns is not None:
        each, before = context.turns.each * each, int(context.turns.each.sum())
    # All that is around the loop whose counter tells the turns, and between it and this one.
    rest = context.count // max(1, before) if turns.loop is not None else context.count
    count = rest * int(each.sum())
    outer = context.trips[: context.loops.index(turns.loop)] if turns.loop is not None else context.trips
    return replace(context, count=count, trips=(*outer, int(each.sum())), turns=Turns(turns.loop, each))


@dataclass(frozen=True, eq=False)
class Turns:
    """How many turns a loop takes, at each turn of the loop around it by whose counter a table is looked up."""

    loop: int | None  # id of that loop; None where no counter takes part
    each: np.ndarray


class _Tables:
    """Turns of loops whose limit is computed from constants, counters and the device."""

    def __init__(self, module: Module, device: int) -> None:
        self.module, self.device = module, device

    @cached_property
    def values(self) -> Values:
        from jaxllm.hlo.values import Values  # it imports NumPy, which few programs need it for

        return Values(self.module, self.device, self._counter)

    def turns(self, computation: Computation, loop: Instruction) -> Turns | None:
        """None where the limit depends on anything else."""
        from jaxllm.hlo.values import Unknown, carried_unchanged, not_below_zero

        body, condition = self.module.while_parts(loop)
        value = _follow(self.module, condition, condition.root)
        if value.made_by is None or value.made_by.opcode != "compare":
            return None
        left, right = _operands(self.module, value)
        start = self._start(computation, loop, left.slot)
        if value.made_by.proto.comparison_direction != "LT" or right.slot is None or start is None:
            return None
        if _step(self.module, body, left.slot) != 1 or not carried_unchanged(self.module, loop, right.slot):
            return None
        try:
            limit = self.values.asked(computation, computation.operand(loop), (right.slot,))
        except Unknown:
            return None
        return Turns(self.values.loop, not_below_zero(limit.reshape(-1) - start))

    def _start(self, computation: Computation, loop: Instruction, slot: int | None) -> int | None:
        return None if slot is None else _constant(self.module, computation, computation.operand(loop), (slot,))

    def _counter(self, computation: Computation, loop: Instruction) -> tuple[int, range] | None:
        """The counter of a loop with a known trip count: its place in what is carried, and its value at each turn."""
        trips = trip_count(self.module, computation, loop)
        body, condition = self.module.while_parts(loop)
        limit = _limit(self.module, condition)
        if trips is None or limit is None:
            return None
        start, step = self._start(computation, loop, limit[0]), _step(self.module, body, limit[0])
        if start is None or step is None:
            return None
        return limit[0], range(start, start + step * trips, step)


def _works(module: Module, computation: Computation, known: dict[int, bool]) -> bool:
    """Whether a computation, or one that it runs, holds a matmul or a collective. `known` keeps what was found."""
    if computation.id not in known:
        known[computation.id] = any(
            instruction.opcode in ("dot", "convolution", "ragged-dot", "custom-call", "collective-permute")
            or instruction.opcode.startswith(("all-", "reduce-scatter", "collective-", "ragged-"))
            or any(_works(module, called, known) for called in module.called(instruction))
            for instruction in computation.instructions
        )
    return known[computation.id]


def _has_effect(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction, or one that it runs, may do more than give a value: then it runs though nobody reads that."""
    return instruction.opcode.startswith(_EFFECTS) or any(
        _has_effect(module, inner) for called in module.called(instruction) for inner in called.instructions
    )


_EFFECTS = ("infeed", "outfeed", "send", "recv", "custom-call", "all-", "reduce-scatter", "collective-", "ragged-all")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a `while`: the compiler's own figure, else from its condition and step, else None."""
    config = loop.proto.backend_config
    if b"known_trip_count" in config:
        return int(json.loads(config)["known_trip_count"]["n"])
    body, condition = module.while_parts(loop)
    slot_and_limit = _limit(module, condition)
    if slot_and_limit is None:
        return None
    slot, limit, direction = slot_and_limit
    start = _constant(module, computation, computation.operand(loop), (slot,))
    step = _step(module, body, slot)
    if start is None or step is None or step == 0:
        return None
    distance = limit - start + (direction == "LE") - (direction == "GE")
    if direction == "NE":  # it must hit the limit, or the loop does not end
        return distance // step if distance % step == 0 and distance // step >= 0 else None
    if (step > 0) != (direction in ("LT", "LE")):
        return None
    return max(0, -(-distance // step))


@dataclass(frozen=True)
class _Value:
    """An array followed to where it is made: an element of the parameter of its loop, an integer, or another."""

    slot: int | None = None
    constant: int | None = None
    made_by: Instruction | None = None
    made_in: Computation | None = None
    arguments: tuple[_Value, ...] | None = None  # of the function `made_in`, when it was entered by a call


def _follow(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    index: tuple[int, ...] = (),
    arguments: tuple[_Value, ...] | None = None,
) -> _Value:
    """Follows an array back through copies, tuples, calls and fusions. `index` is where it sits in a tuple, and
    `arguments` what the function got that `computation` is, when it was entered by a call."""
    while True:
        opcode = instruction.opcode
        if opcode in PASSES and instruction.operand_ids:
            instruction = computation.operand(instruction)
        elif opcode == "get-tuple-element":
            index = (instruction.proto.tuple_index, *index)
            instruction = computation.operand(instruction)
        elif opcode == "tuple" and index:
            instruction, index = computation.operand(instruction, index[0]), index[1:]
        elif opcode in ("call", "fusion") and instruction.called_ids:
            arguments = tuple(_follow(module, computation, o, (), arguments) for o in computation.operands(instruction))
            computation = module.called(instruction)[0]
            instruction = computation.root
        elif opcode == "parameter" and arguments is not None:
            value = arguments[instruction.proto.parameter_number]
            if index and value.made_by is not None and value.made_by.opcode == "parameter":
                return _Value(slot=index[0])  # the loop's tuple handed to a function whole
            return value
        elif opcode == "parameter" and index:
            return _Value(slot=index[0])
        elif opcode == "constant":
            literal = instruction.proto.literal
            values = literal.s32s or literal.s64s or literal.u32s or literal.u64s
            return _Value(constant=values[0] if len(values) == 1 else None, made_by=instruction, made_in=computation)
        else:
            return _Value(made_by=instruction, made_in=computation, arguments=arguments)


def _operands(module: Module, value: _Value) -> list[_Value]:
    assert value.made_by is not None and value.made_in is not None
    return [_follow(module, value.made_in, o, (), value.arguments) for o in value.made_in.operands(value.made_by)]


def _limit(module: Module, condition: Computation) -> tuple[int, int, str] | None:
    """(slot of the induction variable, limit, direction) of a condition that compares the one with the other."""
    value = _follow(module, condition, condition.root)
    if value.made_by is None or value.made_by.opcode != "compare":
        return None
    left, right = _operands(module, value)
    direction = value.made_by.proto.comparison_direction
    if left.slot is None and right.slot is not None:
        left, right = right, left
        direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
    if left.slot is None or right.constant is None or direction not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    return left.slot, right.constant, direction


def _step(module: Module, body: Computation, slot: int) -> int | None:
    """The constant that a loop's body adds to its slot."""
    value = _follow(module, body, body.root, (slot,))
    if value.made_by is None or value.made_by.opcode not in ("add", "subtract"):
        return None
    left, right = _operands(module, value)
    if value.made_by.opcode == "add" and left.slot is None:
        left, right = right, left
    if left.slot != slot or right.constant is None:
        return None
    return right.constant if value.made_by.opcode == "add" else -right.constant


def _constant(module: Module, computation: Computation, instruction: Instruction, index: tuple[int, ...]) -> int | None:
    return _follow(module, computation, instruction, index).constant
