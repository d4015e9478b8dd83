"""Matrix-multiply FLOPs of a module: dots, convolutions and what stands for them, times the loops around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from jaxllm.hlo import library
from jaxllm.hlo.convolution import convolution_flops
from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module
from jaxllm.hlo.loops import Context, Executions
from jaxllm.hlo.phases import phase_of
from jaxllm.spec.fp8 import MATMUL
from jaxllm.spec.ledger import Line, Term, merge


def instruction_flops(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one execution, a multiply and an add counted as two; 0 for anything but a dot or a convolution.

    dot: 2 x elements of the result x product of the contracted dims. ragged-dot: the same, as each row meets one of the
    groups only. convolution: as XLA's own cost analysis has it, 2 x batch x output features x input features of a group x
    the pairs of kernel and output positions that meet an element of the input and not its padding.
    """
    if instruction.opcode in ("dot", "scaled-dot"):
        left = computation.operand(instruction).shape
        contracted = instruction.proto.dot_dimension_numbers.lhs_contracting_dimensions
        return 2 * instruction.shape.size * prod(left.dims[dim] for dim in contracted)
    if instruction.opcode == "ragged-dot":
        return _ragged_flops(computation, instruction)
    if instruction.opcode == "convolution":
        image, kernel = (computation.operand(instruction, position).shape.dims for position in (0, 1))
        return convolution_flops(instruction, image, kernel, instruction.shape.dims)
    return 0


def _ragged_flops(computation: Computation, instruction: Instruction) -> int:
    """Of lhs [rows, k], rhs [groups, k, n] or, with a ragged contraction, lhs [k, rows], rhs [k, n]: 2 rows k n."""
    left, right = (computation.operand(instruction, position).shape for position in (0, 1))
    numbers = instruction.proto.ragged_dot_dimension_numbers
    contracted = prod(left.dims[dim] for dim in numbers.dot_dimension_numbers.lhs_contracting_dimensions)
    batched = prod(left.dims[dim] for dim in numbers.dot_dimension_numbers.lhs_batch_dimensions)
    groups = prod(right.dims[dim] for dim in numbers.rhs_group_dimensions)
    columns = right.size // max(1, groups * contracted * batched)
    return 2 * left.size * columns


def multiplied(computation: Computation, instruction: Instruction, op_name: str) -> Instruction | None:
    """The product of arrays that a reduction sums, where a compiler wrote a dot so; None for any other reduction.

    XLA does so where an operand is a vector. Told by the primitive's name, and by a sum that directly takes a product.
    """
    if instruction.opcode != "reduce" or "dot_general" not in op_name.rpartition("/")[2]:
        return None
    made_by = computation.operand(instruction)
    while made_by.opcode in PASSES and made_by.operand_ids:
        made_by = computation.operand(made_by)
    return made_by if made_by.opcode == "multiply" else None


@dataclass(frozen=True)
class Work:
    """FLOPs of one instruction, one execution, and what kind of thing it is. `reason`: why they are not known. `narrow`:
    whether both operands are of 8 bits."""

    kind: str
    flops: int
    dtype: str
    shapes: str
    declared: bool = False
    reason: str = ""
    narrow: bool = False


def work_of(module: Module, computation: Computation, instruction: Instruction, op_name: str) -> Work | None:
    """The matrix work of an instruction, or None when it has none."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("dot", "scaled-dot", "convolution", "ragged-dot"):
        return _work(computation, instruction, opcode, instruction_flops(computation, instruction))
    if opcode == "reduce":
        product = multiplied(computation, instruction, op_name)
        if product is None:
            return None
        shapes = f"{' . '.join(str(o.shape) for o in computation.operands(product))} -> {instruction.shape}"
        return Work("multiply+reduce", 2 * product.shape.size, product.shape.dtype, shapes)
    if opcode in ("cholesky", "triangular-solve"):
        return _work(computation, instruction, opcode, 0, reason=f"{opcode} is no product of matrices, and not counted")
    if opcode == "custom-call":
        known = library.flops_of(computation, instruction)
        if known is None:
            return None
        return _work(computation, instruction, known.kind, known.flops, known.declared, known.reason)
    return None


def _work(
    computation: Computation, instruction: Instruction, kind: str, flops: int, declared: bool = False, reason: str = ""
) -> Work:
    operands = [operand.shape for operand in computation.operands(instruction)]
    result = next((leaf for leaf in instruction.shape.leaves if leaf.dtype), instruction.shape)
    shapes = f"{' . '.join(str(shape) for shape in operands[:2])} -> {result}"
    dtype = next((leaf.dtype for shape in operands for leaf in shape.leaves if leaf.dtype), result.dtype)
    narrow = len(operands) > 1 and all(leaf.dtype.startswith("f8") for shape in operands[:2] for leaf in shape.leaves)
    return Work(kind, flops, dtype, shapes, declared, reason, narrow)


def all_work(module: Module, runs: Executions) -> Iterator[tuple[Computation, Instruction, Context, Work]]:
    """Everything that multiplies matrices, once for each context in which it runs."""
    for opcode in sorted(WORKERS & module.by_opcode.keys()):
        for computation, instruction in module.by_opcode[opcode]:
            for context in runs.of(computation):
                work = work_of(module, computation, instruction, context.op_name(instruction))
                if work is not None:
                    yield computation, instruction, context, work


WORKERS = frozenset(
    f"{opcode}{start}"
    for opcode in (
        "dot", "scaled-dot", "convolution", "ragged-dot", "reduce", "custom-call", "cholesky", "triangular-solve"
    )  # fmt: skip
    for start in ("", "-start")
)


Range = tuple[int | Fraction, int | Fraction]  # a part of one where what is counted runs in some turns of a loop only


def ranges(module: Module, runs: Executions, own: Mapping[int, int]) -> dict[int, Range]:
    """For each computation the least and the most that one execution of it does, with all that it runs: of a
    conditional's branches one runs, the cheapest or the dearest.

    `own` is what one execution of an instruction does by itself, by its id. A loop whose trip count is unknown counts once.
    """
    found: dict[int, Range] = {}
    for computation in module.computations.values():  # callees first
        least = most = 0
        for instruction in computation.instructions:
            if instruction.called_ids:
                low, high = range_of(module, runs, computation, instruction, found)
                least, most = least + low, most + high
            if here := own.get(instruction.id):
                least, most = least + here, most + here
        found[computation.id] = least, most
    return found


def range_of(
    module: Module, runs: Executions, computation: Computation, instruction: Instruction, found: dict[int, Range]
) -> Range:
    """The least and the most of what an instruction calls."""
    inner = [found.get(called, (0, 0)) for called in instruction.called_ids]
    if instruction.opcode == "conditional":
        return min(low for low, _ in inner), max(high for _, high in inner)
    times = _times(module, runs, computation, instruction)
    return times * sum(low for low, _ in inner), times * sum(high for _, high in inner)


def _times(module: Module, runs: Executions, computation: Computation, instruction: Instruction) -> Fraction | int:
    """How often what an instruction calls runs in one execution of its own computation: on average, where a table
    tells it for each."""
    if instruction.opcode != "while":
        return 1
    body, _ = module.while_parts(instruction)
    inside, outside = (sum(context.count for context in runs.of(part)) for part in (body, computation))
    if not outside:
        return 0
    return Fraction(inside, outside) if inside % outside else inside // outside


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
    """A line `matmul` for each phase, those whose operands are of 8 bits apart, and what could not be placed."""
    lines, unexplained = [], []
    for computation, instruction, context, work in all_work(module, runs):
        if work.reason:
            unexplained.append(f"FLOPs of {instruction.name} ({module.source(instruction)}): {work.reason}")
            continue
        op_name = context.op_name(instruction)
        phase = phase_of(op_name)
        if not phase:
            unexplained.append(f"phase of {instruction.name} ({module.source(instruction)}, {op_name!r})")
        value = work.flops * context.count
        detail = f"{work.shapes}{describe_loops(context)}  {tail(op_name)}"
        term = Term(instruction.name, value, detail, module.source(instruction))
        dtype = MATMUL if work.narrow else ""
        lines.append(Line("flops", "matmul", value, phase=phase, dtype=dtype, count=context.count, terms=(term,)))
    return merge(lines), tuple(unexplained)
