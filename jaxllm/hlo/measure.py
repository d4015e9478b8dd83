"""measure: a compiler's dump -> Ledger."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from jaxllm.hlo.collectives import axes_and_ranks, collective_lines, collectives, kind_of
from jaxllm.hlo.dump import Dump
from jaxllm.hlo.emitted import emitted_payload, put_beside
from jaxllm.hlo.flops import all_work, matmul_lines
from jaxllm.hlo.graph import Module, read_module
from jaxllm.hlo.loops import Executions, executions
from jaxllm.hlo.memory import Buffers, argument_lines, fenced_line, peak_of, residuals
from jaxllm.hlo.protos import read
from jaxllm.hlo.transfers import transfer_lines
from jaxllm.spec.errors import TargetError
from jaxllm.spec.fp8 import MATMUL
from jaxllm.spec.ledger import MEMORY_LINES, TRANSFERS, Ledger, Line, Term, by_stage


def measure(
    dump: Dump,
    axes: dict[str, int],
    *,
    logical_bytes: dict[str, int] | None = None,
    needed_bytes: dict[str, tuple[int, ...]] | None = None,
) -> Ledger:
    """The ledger of a compiled program, per device and step, with loops multiplied out.

    FLOPs, collectives, gradients, residuals and the buffers of a pipeline come from the module after SPMD partitioning;
    arguments, padding and the peak from the buffer assignment of the optimized module, and transfers between memories from
    its instructions. Without an optimized module (a
    program that was refused for memory) the arguments come from the partitioned one, and padding and peak are None.

    Args:
        dump: the files of one compilation.
        axes: degree of each mesh axis, outermost first, over device ids 0 .. n-1 in row-major order. Where the first is
            `pipe`, each line is that of the stage with the most, and holds those of all stages where they differ.
        logical_bytes: op_name of an argument -> its bytes per device without vocabulary padding, where they differ.
        needed_bytes: op_name of an argument -> those of them that each stage of a pipeline needs.

    Raises TargetError when the dump has no partitioned module, or a file is not an HloProto.
    """
    if dump.partitioned is None:
        raise TargetError(
            f"{dump.target}: the dump has no module after SPMD partitioning; compile with xla_dump_hlo_as_proto."
        )
    partitioned = read_module(read(dump.partitioned).hlo_module)
    stages = _stages(partitioned, axes)
    runs = stages[0]
    (flops, sent), unexplained = _work(partitioned, stages, axes)

    notes: tuple[str, ...] = ()
    moved: tuple[Line, ...] = ()
    peak, peak_terms = None, ()
    buffered = [fenced_line(partitioned, runs, name) for name in ("stash", "weight_stash", "inbox")]
    # The stash is what the forward pass keeps; without one, what its loops hand to those of the backward pass.
    kept = () if any(line.value for line in buffered) else residuals(partitioned, runs)
    on_host = tuple(residual for residual in kept if residual.on_host)
    of_arguments = (logical_bytes or {}, needed_bytes or {}, tuple(residual.term for residual in on_host))
    if dump.optimized is None:
        arguments, unclassed = argument_lines(partitioned, None, *of_arguments)
        of_state = any(line.name == "host" and len(line.terms) > len(on_host) for line in arguments)
        moved = _unscheduled((*("f32",) * of_state, *(residual.shape.dtype for residual in on_host)))
    else:
        proto = read(dump.optimized)
        optimized = read_module(proto.hlo_module)
        buffers = Buffers(proto.buffer_assignment, optimized)
        arguments, unclassed = argument_lines(optimized, buffers, *of_arguments)
        peak, peak_terms = peak_of(buffers)
        emitted = _stages(optimized, axes)
        payload = [emitted_payload(optimized, each, axes) for each in emitted]
        most = {key: max(each.get(key, 0) for each in payload) for each in payload for key in each}
        sent, notes = put_beside(sent, most, dump.target)
        notes += (*_other_matmuls(flops, optimized, emitted), *_widened(flops, optimized, emitted[0]))
        moved, more_unclassed = _transfers(optimized, emitted)
        unclassed += more_unclassed
        told = dict.fromkeys(text for each in emitted for text in each.unexplained)
        notes += tuple(f"optimized module: {text}" for text in told)
        if buffers.on_chip:
            notes += (f"the peak counts HBM alone; {buffers.on_chip:,} bytes of this program lie in on-chip memory",)

    on_device = tuple(residual.term for residual in kept if not residual.on_host)
    saved = Line("memory", "residuals", sum(term.value for term in on_device), terms=on_device)
    memory = {line.name: line for line in (*arguments, fenced_line(partitioned, runs, "gradients"), saved)}
    more = [line for line in (*buffered, memory.get("uniform")) if line is not None and (line.value or line.stages)]
    return Ledger(
        author=f"XLA:{dump.target.upper()}",
        lines=(
            *(memory[name] for name in MEMORY_LINES), *more, *_ticks(partitioned, runs, axes), *flops, *sent, *moved
        ),
        peak=peak,
        peak_terms=peak_terms,
        unexplained=(*unexplained, *unclassed),
        notes=notes,
    )  # fmt: skip


def _unscheduled(dtypes: Iterable[str]) -> tuple[Line, ...]:
    """Lines of transfers between memories, without a value."""
    reason = "the compiler refused the program, so nothing was scheduled to be copied"
    each = dict.fromkeys(dtypes)
    return tuple(Line("transfers", name, None, dtype=dtype, reason=reason) for name in TRANSFERS for dtype in each)


def _transfers(module: Module, stages: list[Executions]) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Lines of transfers, and what could not be told of them."""
    each = [transfer_lines(module, runs) for runs in stages]
    return by_stage([lines for lines, _ in each]), tuple(dict.fromkeys(text for _, found in each for text in found))


def _stages(module: Module, axes: dict[str, int]) -> list[Executions]:
    """How often everything runs, on one device of each stage of a pipeline; on any device, where there is none."""
    stages = axes.get("pipe", 1)
    devices = prod(axes.values())
    return [executions(module, stage * devices // stages) for stage in range(stages)]


def _other_matmuls(lines: tuple[Line, ...], optimized: Module, stages: list[Executions]) -> tuple[str, ...]:
    """A note when what the compiler emitted does not multiply as much as the lines say: a matmul that it took out of a
    loop runs once where the loop does not turn at all."""
    notes = []
    for stage, runs in enumerate(stages):
        found = [(work, context.count) for _, _, context, work in all_work(optimized, runs)]
        if any(work.reason for work, _ in found):
            return ()  # hidden in a call: nobody knows
        emitted = sum(work.flops * count for work, count in found)
        told = sum(line.stages[stage] if line.stages else line.value for line in lines)
        if emitted != told:
            where = f" on stage {stage}" if len(stages) > 1 else ""
            notes.append(f"emitted: matmuls of {emitted:,} FLOPs{where}, where the partitioned program has {told:,}")
    return tuple(notes)


def _widened(lines: tuple[Line, ...], optimized: Module, runs: Executions) -> tuple[str, ...]:
    """A note when the compiler does not multiply in 8 bits all that the program does: for a device that cannot, it converts
    the operands."""
    told = sum(line.value for line in lines if line.dtype == MATMUL)
    emitted = sum(work.flops * context.count for _, _, context, work in all_work(optimized, runs) if work.narrow)
    if emitted >= told:  # more: operands are padded
        return ()
    return (
        f"emitted: matmuls of {emitted:,} FLOPs multiply in 8 bits, where the partitioned program has {told:,}; the operands of "
        "those that do not are converted to a wider dtype before",
    )


def _work(
    module: Module, stages: list[Executions], axes: dict[str, int]
) -> tuple[tuple[tuple[Line, ...], tuple[Line, ...]], tuple[str, ...]]:
    """Lines of matmuls and of collectives, and what could not be placed. Stages that run all alike are read once."""
    known: dict[tuple, tuple] = {}
    each = []
    for runs in stages:
        counts = tuple((key, tuple(context.count for context in found)) for key, found in runs.contexts.items())
        if counts not in known:
            known[counts] = (matmul_lines(module, runs), collective_lines(module, runs, axes))
        each.append(known[counts])
    lines = tuple(by_stage([read[kind][0] for read in each]) for kind in (0, 1))
    unexplained = [*(text for runs in stages for text in runs.unexplained)]
    unexplained += [text for read in known.values() for kind in (0, 1) for text in read[kind][1]]
    return lines, tuple(dict.fromkeys(unexplained))


def _ticks(module: Module, runs: Executions, axes: dict[str, int]) -> tuple[Line, ...]:
    """The turns of the loop in which the stages of a pipeline send to each other: a line where there is such a loop."""
    for computation, instruction in collectives(module):
        for context in runs.of(computation):
            if context.trips and kind_of(instruction) == "permute":
                if axes_and_ranks(instruction, axes)[0] == ("pipe",):
                    ticks = context.trips[0]
                    term = Term(instruction.name, ticks, "turns of the loop around it", module.source(instruction))
                    return (Line("pipeline", "ticks", ticks, terms=(term,)),)
    return ()
