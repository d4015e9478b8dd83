"""What goes between device memory and host memory: copies and slices whose source is in one and whose target in the other.

Read from the optimized module, the only one that says in which memory an array is.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.hlo.flops import describe_loops
from jaxllm.hlo.graph import Computation, Instruction, Module, Shape
from jaxllm.hlo.loops import Executions
from jaxllm.hlo.memory import ALLOCATE, HOST, is_call
from jaxllm.spec.ledger import TO_DEVICE, TO_HOST, Line, Term, merge

MOVES = ("copy", "copy-start", "slice", "dynamic-slice", "dynamic-update-slice")

# What names arrays or hands them on; what it calls is looked at by itself.
_HANDS_ON = frozenset(
    "parameter tuple get-tuple-element bitcast while conditional call fusion opt-barrier async-start async-update async-done "
    "copy-done".split()
)


def transfer_lines(module: Module, runs: Executions) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Lines copy-to-device and copy-to-host by dtype, in bytes a step, and what could not be told: other work on arrays in
    host memory, and copies within it."""
    lines, unexplained = [], []
    for computation, instruction in module.instructions():
        contexts = runs.of(computation)
        if not contexts or instruction.opcode in _HANDS_ON or not _in_host_memory(computation, instruction):
            continue
        if is_call(instruction, ALLOCATE):
            continue
        if instruction.opcode not in MOVES:
            unexplained.append(f"{instruction.opcode} {instruction.name} works on an array in host memory")
            continue
        source, target, moved = _ends(computation, instruction)
        if source == target:
            unexplained.append(f"{instruction.opcode} {instruction.name} copies {moved.bytes:,} bytes within host memory")
            continue
        for context in contexts:
            value = moved.bytes * context.count
            term = Term(instruction.name, value, f"{moved}{describe_loops(context)}", module.source(instruction))
            name = TO_HOST if target == HOST else TO_DEVICE
            lines.append(Line("transfers", name, value, dtype=moved.dtype, count=context.count, terms=(term,)))
    return merge(lines), tuple(unexplained)


def between_memories(computation: Computation, instruction: Instruction) -> int:
    """Bytes that one execution of an instruction moves between device and host memory."""
    if instruction.opcode not in MOVES or not _in_host_memory(computation, instruction):
        return 0
    source, target, moved = _ends(computation, instruction)
    return moved.bytes if source != target else 0


def _in_host_memory(computation: Computation, instruction: Instruction) -> bool:
    return any(leaf.memory_space == HOST for leaf in _leaves(computation, instruction))


def _leaves(computation: Computation, instruction: Instruction) -> Iterator[Shape]:
    yield from instruction.shape.leaves
    for operand in computation.operands(instruction):
        yield from operand.shape.leaves


def _ends(computation: Computation, instruction: Instruction) -> tuple[int, int, Shape]:
    """The memory spaces that an array comes from and goes to, and the array: of an update of a slice, the slice."""
    operands = [operand.shape for operand in computation.operands(instruction)]
    result = instruction.shape.leaves[0]  # of a copy's start its target, with the source beside it
    if instruction.opcode == "dynamic-update-slice":
        return operands[1].memory_space, result.memory_space, operands[1]
    return operands[0].memory_space, result.memory_space, result
