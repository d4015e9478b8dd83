"""What the finders of warnings look at: one program, and what has been measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.hlo.graph import Module
from jaxllm.hlo.loops import Executions
from jaxllm.report.inspection import Buffer, Collective, Memory, Operation, Product


@dataclass(frozen=True)
class View:
    """A program and its measure.

    module     the optimized module
    runs       how often each computation runs
    axes       mesh axes with their degrees, outermost first; {} when unknown
    target     cpu, gpu, tpu, or "" when nothing tells
    buffers    every buffer of the program with its class, not only those alive at the peak
    messages   what the compiler said while it compiled; "" for a file
    unmatched  of each remat or offload policy, the names in it that no checkpoint_name gives, as (name, source)
    """

    module: Module
    runs: Executions
    axes: dict[str, int]
    target: str
    products: tuple[Product, ...]
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    memory: Memory
    buffers: tuple[Buffer, ...]
    messages: str = ""
    unmatched: tuple[tuple[str, str], ...] = ()
