"""Matrix-multiply FLOPs of a module: dots and convolutions, times the loops around them, by phase."""

from __future__ import annotations

from math import prod

from jaxllm.hlo.graph import Computation, Instruction, Module
from jaxllm.hlo.loops import Context, Executions
from jaxllm.hlo.phases import phase_of
from jaxllm.spec.ledger import Line, Term, merge


def instruction_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one execution, a multiply and an add counted as two; 0 for anything but a dot or a convolution.

    dot: 2 x elements of the result x product of the contracted dims. convolution: 2 x elements of the result x
    spatial size of the kernel x its input features (which are per group already).
    """
    if instruction.opcode == "dot":
        left = computation.operand(instruction).shape
        contracted = instruction.proto.dot_dimension_numbers.lhs_contracting_dimensions
        return 2 * instruction.shape.size * prod(left.dims[dim] for dim in contracted)
    if instruction.opcode == "convolution":
        kernel = computation.operand(instruction, 1).shape
        numbers = instruction.proto.convolution_dimension_numbers
        summed = [*numbers.kernel_spatial_dimensions, numbers.kernel_input_feature_dimension]
        return 2 * instruction.shape.size * prod(kernel.dims[dim] for dim in summed)
    return 0


def describe_loops(context: Context) -> str:
    """`x 32 (2 x 16)`, or nothing outside of loops."""
    if context.count == 1 and not context.trips:
        return ""
    return f" x {context.count} ({' x '.join(map(str, context.trips))})"


_SCAFFOLD = ("while", "body", "cond", "closed_call", "eval_jaxpr", "shard_map", "checkpoint")


def tail(op_name: str, parts: int = 5) -> str:
    """The last components of an op_name, without those that every operation in a loop or a function has."""
    told = [part for part in op_name.split("/") if part not in _SCAFFOLD and not part.startswith("jit(")]
    return "/".join(told[-parts:])


def matmul_lines(module: Module, runs: Executions) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """A line `matmul` for each phase, and what could not be placed."""
    lines, unexplained = [], []
    for computation, instruction in module.instructions():
        if instruction.opcode == "ragged-dot":
            unexplained.append(f"FLOPs of ragged-dot {instruction.name} ({module.source(instruction)}): not counted")
        if instruction.opcode not in ("dot", "convolution"):
            continue
        flops = instruction_flops(computation, instruction)
        for context in runs.of(computation):
            op_name = context.op_name(instruction)
            phase = phase_of(op_name)
            if not phase:
                unexplained.append(f"phase of {instruction.name} ({module.source(instruction)}, {op_name!r})")
            shapes = " . ".join(str(operand.shape) for operand in computation.operands(instruction)[:2])
            value = flops * context.count
            detail = f"{shapes} -> {instruction.shape}{describe_loops(context)}  {tail(op_name)}"
            term = Term(instruction.name, value, detail, module.source(instruction))
            lines.append(Line("flops", "matmul", value, phase=phase, count=context.count, terms=(term,)))
    return merge(lines), tuple(unexplained)
