"""Collectives of a module: payload and wire bytes by kind, mesh axes, phase and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxllm.hlo.flops import describe_loops, tail
from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape
from jaxllm.hlo.groups import UNKNOWN, axes_of, axes_of_pairs, groups_of, pairs_of
from jaxllm.hlo.loops import Context, Executions
from jaxllm.hlo.phases import phase_of
from jaxllm.hlo.rules import all_reduce_then_slice
from jaxllm.spec.ledger import Line, Rule, Term, merge, wire_bytes

KINDS = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
    "ragged-all-to-all": "ragged-all-to-all",
    "collective-broadcast": "broadcast",
    "send": "send",
}


@dataclass(frozen=True)
class Part:
    """What one collective does to one of its arrays, in one execution."""

    kind: str
    axes: tuple[str, ...]
    ranks: int  # devices in a group
    phase: str
    dtype: str
    payload: int
    shape: Shape


def kind_of(instruction: Instruction) -> str:
    """The ledger's name of a collective, of the start of an asynchronous one too; "" for anything else."""
    return KINDS.get(instruction.opcode.removesuffix("-start"), "")


def collectives(module: Module) -> list[tuple[Computation, Instruction]]:
    """Every collective of a module, and the start of each that is asynchronous."""
    opcodes = [opcode for opcode in module.by_opcode if opcode.removesuffix("-start") in KINDS]
    return [place for opcode in opcodes for place in module.by_opcode[opcode]]


def axes_and_ranks(instruction: Instruction, axes: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes of a collective, () when it moves nothing, and the size of its groups."""
    named = tuple(axes.items())
    if kind_of(instruction) in ("permute", "send"):
        pairs = pairs_of(instruction)
        return (axes_of_pairs(pairs, named) if pairs else UNKNOWN), 2
    devices = 1
    for degree in axes.values():
        devices *= degree
    groups = groups_of(instruction, devices)
    if len(groups[0]) == 1:
        return (), 1
    return axes_of(groups, named), len(groups[0])


def parts_of(
    module: Module, computation: Computation, instruction: Instruction, context: Context, axes: dict[str, int]
) -> Iterator[Part]:
    """One part for each array. The phase is the instruction's own, else that of the array's producer: a compiler
    that merges collectives, as operands of one or end to end in one array, keeps the name of one of them, or of none.
    """
    kind = kind_of(instruction)
    names, ranks = axes_and_ranks(instruction, axes)
    if not names:
        return
    operands = computation.operands(instruction)
    if kind in ("send", "ragged-all-to-all") or (kind == "permute" and _in_place(operands)):
        operands = operands[:1]  # the others are buffers, offsets and tokens
    arrays = [piece for operand in operands for piece in _pieces(module, computation, operand)]
    own = phase_of(context.op_name(instruction))
    for home, array in arrays:
        producer = _phase_of_producer(module, home, array, context)
        phase = (producer or own) if len(arrays) > 1 else (own or producer)
        payload = array.shape.bytes * ranks if kind == "all-gather" else array.shape.bytes
        yield Part(kind, names, ranks, phase, array.shape.leaves[0].dtype, payload, array.shape)


def _in_place(operands: list[Instruction]) -> bool:
    """Whether a permute is given where to read and write as numbers, behind its input and its output."""
    return len(operands) == 4 and all(not leaf.dims for operand in operands[2:] for leaf in operand.shape.leaves)


def emitted_parts(
    module: Module, runs: Executions, axes: dict[str, int]
) -> Iterator[tuple[Computation, Instruction, Context, Part]]:
    """The parts of every collective of an optimized module, in each context in which it runs: one that XLA:TPU spreads
    over several fusions once, and the all-reduce in a fusion that scatters its result as the reduce-scatter that it is.
    """
    chains = set()
    for computation, instruction in collectives(module):
        scatters = "all-reduce-scatter" in computation.name  # a TPU's reduce-scatter is a fusion of this name
        for context in runs.of(computation):
            chain = (chain_of(computation, instruction), context.trips)
            if chain[0] and chain in chains:
                continue
            chains.add(chain)
            for part in parts_of(module, computation, instruction, context, axes):
                yield computation, instruction, context, (
                    replace(part, kind="reduce-scatter") if scatters and part.kind == "all-reduce" else part
                )


def chain_of(computation: Computation, instruction: Instruction) -> str:
    """What the copies of one collective share that XLA:TPU spreads over several fusions, to overlap it with them: its
    start, the computations beside it, and its end each hold one. "" for a collective that stands once."""
    if not ("fused_computation" in computation.name or "async_collective_fusion" in computation.name):
        return ""
    return next((pair.value for pair in instruction.proto.frontend_attributes.map if pair.key == "chain_id"), "")


def _pieces(module: Module, computation: Computation, operand: Instruction) -> list[tuple[Computation, Instruction]]:
    """The arrays that were put end to end to make an operand, with the computations they are in; else the operand."""
    if operand.opcode == "fusion":
        fused = module.called(operand)[0]
        if fused.root.opcode == "concatenate":
            return [_from_outside(fused, piece, computation, operand) for piece in fused.operands(fused.root)]
    if operand.opcode == "concatenate":
        return [(computation, piece) for piece in computation.operands(operand)]
    return [(computation, operand)]


def _from_outside(
    fused: Computation, piece: Instruction, computation: Computation, fusion: Instruction
) -> tuple[Computation, Instruction]:
    """What a fusion is given for one of its arrays, when it only hands that array on."""
    given = piece
    while given.opcode in PASSES:
        given = fused.operand(given)
    if given.opcode != "parameter":
        return fused, piece
    return computation, computation.operand(fusion, given.proto.parameter_number)


def _phase_of_producer(module: Module, computation: Computation, operand: Instruction, context: Context) -> str:
    for _ in range(8):  # as far as a compiler's own copies, bitcasts and fusions go
        phase = phase_of(context.op_name(operand))
        producer = produced_by(module, computation, operand)
        if phase or producer is None:
            return phase
        computation, operand = producer
    return ""


def produced_by(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
    """What makes the first operand of an instruction; of a parameter of what runs asynchronously, what was given for it."""
    if instruction.opcode == "parameter" and computation.id in module.asynchronous:
        outer, start = module.asynchronous[computation.id]
        number = instruction.proto.parameter_number
        return (outer, outer.operand(start, number)) if number < len(start.operand_ids) else None
    return (computation, computation.operand(instruction)) if instruction.operand_ids else None


def start_of(module: Module, computation: Computation, instruction: Instruction) -> Instruction:
    """What starts an instruction that runs asynchronously, by whose name a text knows it; else the instruction."""
    return module.asynchronous[computation.id][1] if computation.id in module.asynchronous else instruction


def collective_lines(
    module: Module, runs: Executions, axes: dict[str, int]
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """A line for each kind, axes, phase and dtype, and what could not be placed. Groups of one device are dropped."""
    lines, unexplained = [], []
    for computation, instruction in collectives(module):
        for context in runs.of(computation):
            for part in parts_of(module, computation, instruction, context, axes):
                line = _line(module, computation, instruction, context, part)
                lines.append(line)
                where = f"{part.kind} {instruction.name} ({module.source(instruction)})"
                if part.axes == UNKNOWN:
                    unexplained.append(f"mesh axes of {where}")
                if not part.phase:
                    unexplained.append(f"phase of {where}, {context.op_name(instruction)!r}")
    return merge(lines), tuple(unexplained)


def _line(module: Module, computation: Computation, instruction: Instruction, context: Context, part: Part) -> Line:
    value = part.payload * context.count
    rules: tuple[Rule, ...] = ()
    if part.kind == "all-reduce" and all_reduce_then_slice(module, computation, instruction):
        why = "an all-reduce of which each device keeps a slice stands for a reduce-scatter"
        rules = (Rule("all-reduce+slice", value, why),)
    detail = f"{part.shape} over {'+'.join(part.axes)}{describe_loops(context)}  {tail(context.op_name(instruction))}"
    return Line(
        "collectives",
        part.kind,
        value,
        phase=part.phase,
        axes=part.axes,
        dtype=part.dtype,
        wire=wire_bytes(part.kind, part.payload, part.ranks) * context.count,
        count=context.count,
        terms=(Term(instruction.name, value, detail, module.source(instruction)),),
        rules=rules,
    )
