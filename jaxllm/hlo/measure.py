"""measure: a compiler's dump -> Ledger."""

from __future__ import annotations

from jaxllm.hlo.collectives import collective_lines
from jaxllm.hlo.dump import Dump
from jaxllm.hlo.emitted import emitted_payload, put_beside
from jaxllm.hlo.flops import matmul_lines
from jaxllm.hlo.graph import read_module
from jaxllm.hlo.loops import executions
from jaxllm.hlo.memory import Buffers, argument_lines, gradient_line, peak_of, residual_line
from jaxllm.hlo.protos import read
from jaxllm.spec.errors import TargetError
from jaxllm.spec.ledger import MEMORY_LINES, Ledger


def measure(dump: Dump, axes: dict[str, int], *, logical_bytes: dict[str, int] | None = None) -> Ledger:
    """The ledger of a compiled program, per device and step, with loops multiplied out.

    FLOPs, collectives, gradients and residuals come from the module after SPMD partitioning; arguments, padding and
    the peak from the buffer assignment of the optimized module. Without an optimized module (a program that was refused
    for memory) the arguments come from the partitioned one, and padding and peak are None.

    Args:
        dump: the files of one compilation.
        axes: degree of each mesh axis, outermost first, over device ids 0 .. n-1 in row-major order.
        logical_bytes: op_name of an argument -> its bytes per device without vocabulary padding, where they differ.

    Raises TargetError when the dump has no partitioned module, or a file is not an HloProto.
    """
    if dump.partitioned is None:
        raise TargetError(
            f"{dump.target}: the dump has no module after SPMD partitioning; compile with xla_dump_hlo_as_proto."
        )
    partitioned = read_module(read(dump.partitioned).hlo_module)
    runs = executions(partitioned)
    flops, flops_unexplained = matmul_lines(partitioned, runs)
    collectives, collectives_unexplained = collective_lines(partitioned, runs, axes)

    notes: tuple[str, ...] = ()
    peak, peak_terms = None, ()
    if dump.optimized is None:
        arguments, unclassed = argument_lines(partitioned, None, logical_bytes or {})
    else:
        proto = read(dump.optimized)
        optimized = read_module(proto.hlo_module)
        buffers = Buffers(proto.buffer_assignment, optimized)
        arguments, unclassed = argument_lines(optimized, buffers, logical_bytes or {})
        peak, peak_terms = peak_of(buffers)
        emitted_runs = executions(optimized)
        collectives, notes = put_beside(collectives, emitted_payload(optimized, emitted_runs, axes), dump.target)
        notes += tuple(f"optimized module: {text}" for text in emitted_runs.unexplained)
        if buffers.on_chip:
            notes += (f"the peak counts HBM alone; {buffers.on_chip:,} bytes of this program lie in on-chip memory",)

    arguments += [gradient_line(partitioned, runs), residual_line(partitioned, runs)]
    memory = {line.name: line for line in arguments}
    return Ledger(
        author=f"XLA:{dump.target.upper()}",
        lines=(*(memory[name] for name in MEMORY_LINES), *flops, *collectives),
        peak=peak,
        peak_terms=peak_terms,
        unexplained=(*runs.unexplained, *flops_unexplained, *collectives_unexplained, *unclassed),
        notes=notes,
    )
