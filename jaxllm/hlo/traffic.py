"""Bytes of HBM that an operation reads and writes, a fusion counted as one: what is inside of it stays on the chip.

An operation that looks at a slice of an array reads the slice, and one that updates an array in place writes the update.
Arrays in a TPU's own memories and in the host's are no traffic of HBM.
"""

from __future__ import annotations

from jaxllm.hlo.graph import Computation, Instruction, Module, Shape
from jaxllm.hlo.rules import tile_padded_bytes

HBM = 0

# What names or regroups arrays, or is counted where its computations are.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call opt-barrier after-all partition-id replica-id "
    "add-dependency domain async-start async-update async-done copy-done all-reduce-done all-gather-done "
    "collective-permute-done send-done recv recv-done get-dimension-size token infeed outfeed".split()
)
_COLLECTIVES = ("all-", "reduce-scatter", "collective-", "ragged-all-to-all")
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_ALIKE = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))  # inside a fusion: the same elements


def held(shape: Shape) -> int:
    """Bytes in HBM of the arrays of a shape, tiles padded."""
    return sum(
        tile_padded_bytes(leaf) if leaf.tiles else leaf.bytes for leaf in shape.leaves if leaf.memory_space == HBM
    )


def names_only(instruction: Instruction) -> bool:
    """Whether an instruction runs nothing by itself."""
    return instruction.opcode in _FREE or instruction.opcode.endswith("-done")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """(read, written) bytes of HBM of one execution."""
    if names_only(instruction):
        return 0, 0
    opcode = instruction.opcode
    if opcode == "fusion" and instruction.called_ids:
        return _fusion(module, computation, instruction)
    operands = [operand.shape for operand in computation.operands(instruction)]
    if opcode in _SLICES:
        return held_like(operands, instruction.shape) + sum(map(held, operands[1:])), held(instruction.shape)
    if opcode == "dynamic-update-slice" and len(operands) > 1:
        update = held(operands[1])
        return update, update
    if opcode == "scatter" and len(operands) > 2:
        updates = _updates(computation, instruction)
        return sum(map(held, operands[_arrays_of(instruction) :])) + updates, updates
    if opcode == "send" or opcode.endswith("-start"):
        return sum(map(held, operands)), _started(instruction)
    distinct = {id_: computation.by_id[id_].shape for id_ in instruction.operand_ids}
    return sum(map(held, distinct.values())), held(instruction.shape)


def held_like(operands: list[Shape], result: Shape) -> int:
    """Bytes that a slice of the first operand takes from HBM: those of the result, where the operand lies there."""
    first = operands[0] if operands else result
    return min(result.bytes, held(first)) if first.memory_space == HBM else 0


def _started(instruction: Instruction) -> int:
    """What the start of an asynchronous operation has written when it is done: its result, which its shape lists beside
    its operands."""
    shape = instruction.shape
    if instruction.opcode == "send":
        return 0
    if shape.dtype != "tuple" or len(shape.elements) < 2 or instruction.opcode == "all-reduce-start":
        return held(shape)
    return held(shape.elements[0] if instruction.opcode == "copy-start" else shape.elements[1])


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> tuple[int, int]:
    fused = module.called(fusion)[0]
    inside = fused.parameters
    travels = _travelling(fused)
    read = 0
    for number, operand in enumerate(computation.operands(fusion)):
        parameter = inside.get(number)
        if parameter is not None and parameter.id not in travels:
            read += min(held(operand.shape), _used(module, fused, parameter))
    if fused.root_id in travels:
        return read, 0
    roots = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
    leaves = fusion.shape.leaves
    if len(roots) != len(leaves):
        return read, held(fusion.shape)
    return read, sum(_kept(fused, root, leaf) for root, leaf in zip(roots, leaves, strict=True) if root.id not in travels)


def _travelling(fused: Computation) -> set[int]:
    """What is in a fusion only because a collective goes on beside what it computes, as XLA:TPU has it: one of a chain of
    copies of the collective, the calls at the ends of the chain, and the arrays that go from one to the next. What a
    collective moves is no traffic of the fusion."""
    found = {
        one.id
        for one in fused.instructions
        if (one.opcode.startswith(_COLLECTIVES) and any(pair.key == "chain_id" for pair in one.proto.frontend_attributes.map))
        or (one.opcode == "custom-call" and one.proto.custom_call_target.startswith("AsyncCollective"))
    }
    if found:
        tuple_ = {fused.root_id} if fused.root.opcode == "tuple" else set()
        handed_on = found | tuple_
        found |= {p.id for p in fused.parameters.values() if all(u.id in handed_on for u in fused.users.get(p.id, ()))}
    return found


def _used(module: Module, fused: Computation, parameter: Instruction, depth: int = 4) -> int:
    """Bytes that a fusion takes of a parameter: of slices alone, if it only slices; none, if it only overwrites."""
    total = 0
    whole = held(parameter.shape)
    for user in fused.users.get(parameter.id, ()):
        first = user.operand_ids[0] == parameter.id
        if user.opcode in _SLICES and first:
            total += user.shape.bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        elif user.opcode == "scatter" and parameter.id in user.operand_ids[: _arrays_of(user)]:
            total += _updates(fused, user)  # what is there is read where it is added to
        elif user.opcode in _ALIKE and user.id == fused.root_id:
            total += whole  # nothing else is in the fusion
        elif user.opcode in _ALIKE and depth:
            total += _used(module, fused, user, depth - 1)
        elif user.opcode == "fusion" and user.called_ids and depth:
            inner = module.called(user)[0]
            for number, operand in enumerate(user.operand_ids):
                if operand == parameter.id and number in inner.parameters:
                    total += _used(module, inner, inner.parameters[number], depth - 1)
        else:
            return whole
        if total >= whole:
            return whole
    return total


def _kept(fused: Computation, root: Instruction, leaf: Shape) -> int:
    """Bytes that a fusion writes of one result: of an array updated in place, the update."""
    if leaf.memory_space != HBM:
        return 0
    while root.opcode in _ALIKE and root.operand_ids:
        root = fused.operand(root)
    if root.opcode == "dynamic-update-slice":
        return min(held(leaf), fused.operand(root, 1).shape.bytes)
    if root.opcode == "scatter":
        return min(held(leaf), _updates(fused, root))
    return held(leaf)


def _arrays_of(scatter: Instruction) -> int:
    """How many arrays a scatter updates: its operands are those, the indices, and as many updates."""
    return (len(scatter.operand_ids) - 1) // 2


def _updates(computation: Computation, scatter: Instruction) -> int:
    """Bytes of the updates of a scatter."""
    return sum(operand.shape.bytes for operand in computation.operands(scatter)[_arrays_of(scatter) + 1 :])
