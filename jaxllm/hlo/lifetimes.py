"""When each array of a scheduled module is in use: from the instruction that makes it to the last one that reads it.

Arrays that must share memory (an update in place, a tuple and its elements, what a loop hands on unchanged) are one. What a
turn of a loop is given is in use until its last reader, and what the turn makes for the next from when it is made: in
between its place is free. Nothing else is taken to share, and no time is charged for an operand and a result together, so that a sum of what is alive
is at most what any compiler needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.hlo.graph import Computation, Instruction, Module, Shape

Node = tuple[int, int]  # id of an instruction, and which of the arrays (leaves) of its result

_WHOLE = frozenset(("bitcast", "opt-barrier", "domain"))  # result and operand are the same memory
_ENDS = frozenset(("all-reduce-done", "add-dependency"))
_IN_PLACE = ("dynamic-update-slice", "scatter")


@dataclass(frozen=True)
class Lifetimes:
    """The schedule of a module, loops and calls unfolded once, and the time in which arrays are in use.

    order     computation and instruction at each step; a loop's body stands before the loop
    position  id of an instruction -> its step
    """

    order: tuple[tuple[Computation, Instruction], ...]
    position: dict[int, int]
    base: dict[int, int] = field(repr=False)  # id of an instruction -> number of its first array
    owner: list[int] = field(repr=False)  # array -> the array that stands for all that share its memory
    start: dict[int, int] = field(repr=False)
    end: dict[int, int] = field(repr=False)

    def memory(self, instruction_id: int, leaf: int) -> int:
        """The array that stands for all that share the memory of one. Raises KeyError for an instruction that is not in
        the schedule."""
        return _find(self.owner, self.base[instruction_id] + leaf)

    def time(self, memory: int) -> tuple[int, int]:
        """First and last half step of a piece of memory: step p has halves 2p, in which operands are read, and 2p + 1,
        in which the result is there."""
        start = self.start[memory]
        return start, max(start, self.end.get(memory, 0))

    def of(self, instruction_id: int, leaf: int) -> tuple[int, int, int]:
        """Both of them, of one array."""
        memory = self.memory(instruction_id, leaf)
        return memory, *self.time(memory)


def leaf_of(shape: Shape, index: tuple[int, ...]) -> int | None:
    """Which array of a result an index into its nested tuples names; None for a tuple itself."""
    before = 0
    for position in index:
        before += sum(len(element.leaves) for element in shape.elements[:position])
        shape = shape.elements[position]
    return None if shape.dtype == "tuple" else before


def lifetimes(module: Module) -> Lifetimes:
    """The schedule and the times of a module whose instructions stand in the order in which they run."""
    order: list[tuple[Computation, Instruction]] = []
    begins: dict[int, int] = {}  # id of a loop -> its first step
    _unfold(module, module.entry, order, begins)
    position = {instruction.id: step for step, (_, instruction) in enumerate(order)}
    base: dict[int, int] = {}
    count = 0
    for _, instruction in order:
        base[instruction.id] = count
        count += len(instruction.shape.leaves)
    owner = list(range(count))
    for computation, instruction in order:
        _share(module, computation, instruction, base, owner)

    start: dict[int, int] = {}
    end: dict[int, int] = {}
    for step, (computation, instruction) in enumerate(order):
        first = base[instruction.id]
        for node in range(first, first + len(instruction.shape.leaves)):
            start.setdefault(_find(owner, node), 2 * step + 1)
        if instruction.opcode in ("tuple", "bitcast", "get-tuple-element", "parameter"):
            continue  # they only name arrays: who reads them comes later
        read = step
        if instruction.opcode == "while":
            read = begins[instruction.id]  # inside, its parameters are read
            body, _ = module.while_parts(instruction)
            for node in _nodes(base, body.root):
                end[_find(owner, node)] = 2 * step
        for operand in computation.operands(instruction):
            for node in _nodes(base, operand):
                memory = _find(owner, node)
                end[memory] = max(end.get(memory, 0), 2 * read)
    last = 2 * len(order) - 1
    for node in _nodes(base, module.entry.root):
        end[_find(owner, node)] = last
    return Lifetimes(tuple(order), position, base, owner, start, end)


def _nodes(base: dict[int, int], instruction: Instruction) -> range:
    """The arrays of an instruction of the schedule."""
    first = base.get(instruction.id, 0)
    return range(first, first + len(instruction.shape.leaves)) if instruction.id in base else range(0)


def _unfold(
    module: Module, computation: Computation, order: list[tuple[Computation, Instruction]], begins: dict[int, int],
    seen: set[int] | None = None,
) -> None:
    seen = set() if seen is None else seen
    seen.add(computation.id)
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            begins[instruction.id] = len(order)
        for called in sequential(module, instruction):
            if called.id not in seen:
                _unfold(module, called, order, begins, seen)
        order.append((computation, instruction))


def sequential(module: Module, instruction: Instruction) -> list[Computation]:
    """The computations that an instruction runs step by step: no fusion, and no function of a reduction or a sort."""
    opcode = instruction.opcode
    if opcode == "while":
        body, condition = module.while_parts(instruction)
        return [condition, body]
    if opcode in ("call", "conditional", "async-start"):
        return module.called(instruction)
    return []


def _find(owner: list[int], node: int) -> int:
    while owner[node] != node:
        owner[node] = owner[owner[node]]
        node = owner[node]
    return node


def _join(owner: list[int], left: int, right: int, count: int = 1) -> None:
    """Makes `count` arrays from `left` on the same as those from `right` on; the earlier one stands for both."""
    for offset in range(count):
        one, other = _find(owner, left + offset), _find(owner, right + offset)
        if one != other:
            owner[max(one, other)] = min(one, other)


def _share(module: Module, computation: Computation, instruction: Instruction, base: dict[int, int], owner: list[int]) -> None:
    """Joins the arrays of an instruction with those whose memory it hands on."""
    opcode, here = instruction.opcode, base[instruction.id]
    operands = computation.operands(instruction)
    if opcode == "tuple":
        for operand in operands:
            count = len(operand.shape.leaves)
            _join(owner, base[operand.id], here, count)
            here += count
    elif opcode == "get-tuple-element":
        whole = operands[0].shape
        index = instruction.proto.tuple_index
        before = sum(len(element.leaves) for element in whole.elements[:index])
        _join(owner, base[operands[0].id] + before, here, len(instruction.shape.leaves))
    elif opcode in _WHOLE or opcode in _ENDS:
        _join_all(owner, base, operands[0], instruction)
    elif opcode == "while":
        body, condition = module.while_parts(instruction)
        for parameter in (*body.parameters.values(), *condition.parameters.values()):
            _join_all(owner, base, operands[0], parameter)
        _join_all(owner, base, body.root, instruction)
    elif opcode in ("call", "async-start"):
        for number, parameter in module.called(instruction)[0].parameters.items() if instruction.called_ids else ():
            if number < len(operands):
                _join_all(owner, base, operands[number], parameter)
        if opcode == "call":
            _join_all(owner, base, module.called(instruction)[0].root, instruction)
        else:
            _share_start(module, instruction, operands, base, owner)
    elif opcode == "conditional":
        for branch, operand in zip(module.called(instruction), operands[1:], strict=False):
            for parameter in branch.parameters.values():
                _join_all(owner, base, operand, parameter)
            _join_all(owner, base, branch.root, instruction)
    elif opcode == "all-reduce-start":
        # reduced in place; since jax 0.12 its shape lists the operands before the results
        given = sum(len(operand.shape.leaves) for operand in operands)
        for start in range(here, here + len(instruction.shape.leaves) - given + 1, max(1, given)):
            for operand in operands:
                count = len(operand.shape.leaves)
                _join(owner, base[operand.id], start, count)
                start += count
    elif opcode in ("copy-start", "collective-permute-start", "all-gather-start"):
        _share_start(module, instruction, operands, base, owner)
    elif opcode.endswith("-done") and operands:
        _share_done(instruction, operands[0], base, owner)
    elif opcode in _IN_PLACE and operands:
        _join(owner, base[operands[0].id], here, min(len(operands[0].shape.leaves), len(instruction.shape.leaves)))
    elif opcode == "fusion":
        for leaf, number in enumerate(_overwritten(module, instruction)):
            if number is not None and number < len(operands) and operands[number].shape.dtype != "tuple":
                _join(owner, base[operands[number].id], here + leaf)


def _join_all(owner: list[int], base: dict[int, int], one: Instruction, other: Instruction) -> None:
    if one.id in base and other.id in base:
        count = min(len(one.shape.leaves), len(other.shape.leaves))
        _join(owner, base[one.id], base[other.id], count)


def _share_start(
    module: Module, start: Instruction, operands: list[Instruction], base: dict[int, int], owner: list[int]
) -> None:
    """A start's result lists its operands, then what there will be: (operands, results, ...); a copy's the other way."""
    here, shape = base[start.id], start.shape
    if shape.dtype != "tuple" or len(shape.elements) < 2:
        return
    first, second = (len(element.leaves) for element in shape.elements[:2])
    place = here + first if start.opcode == "copy-start" else here
    for operand in operands:
        count = min(len(operand.shape.leaves), (second if start.opcode == "copy-start" else first))
        _join(owner, base[operand.id], place, count)
        place += count
        if place >= here + first + second:
            break
    if start.opcode == "async-start" and start.called_ids:
        root = module.called(start)[0].root
        _join(owner, base[root.id], here + first, min(second, len(root.shape.leaves)))
        if root.opcode == "all-reduce":  # in place
            _join(owner, here, here + first, min(first, second))


def _share_done(done: Instruction, start: Instruction, base: dict[int, int], owner: list[int]) -> None:
    shape = start.shape
    if shape.dtype != "tuple" or not shape.elements:
        _join(owner, base[start.id], base[done.id], min(len(shape.leaves), len(done.shape.leaves)))
        return
    before = 0
    if done.opcode not in ("copy-done", "recv-done", "send-done"):
        before = len(shape.elements[0].leaves)
    count = min(len(done.shape.leaves), len(shape.leaves) - before)
    _join(owner, base[start.id] + before, base[done.id], count)


def _overwritten(module: Module, fusion: Instruction) -> list[int | None]:
    """For each array of a fusion's result, the number of the operand that it updates in place, if it does."""
    fused = module.called(fusion)[0] if fusion.called_ids else None
    if fused is None:
        return []
    roots = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
    numbers: list[int | None] = []
    for root in roots:
        while root.opcode == "bitcast":
            root = fused.operand(root)
        number = None
        if root.opcode in _IN_PLACE:
            target = fused.operand(root)
            while target.opcode == "bitcast":
                target = fused.operand(target)
            if target.opcode == "parameter":
                number = target.proto.parameter_number
        numbers.append(number)
    return numbers if len(numbers) == len(fusion.shape.leaves) else []
