"""What a compiled program is, as data: FLOPs, bytes, collectives, memory over its schedule, and warnings.

All figures are of one device. A figure of an operation, a product or a collective is of one execution, and `count` says
how many there are in a step, loops multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.spec.machine import Machine

# Classes of memory, in the order of the stack: what stays between steps first.
CLASSES = (
    "parameter", "optimizer", "argument", "gradient", "residual", "gathered weight", "activation", "logits",
    "temporary", "output", "constant", "fragmentation",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where in the program an instruction comes from, and how often it runs."""

    name: str  # of the instruction
    op_name: str  # JAX's path of scopes and primitives
    source: str  # file:line of the user's code, and who called it; "" when nothing was kept
    phase: str  # forward, recompute, backward, update, or "" when nothing tells it
    count: int  # executions in a step; of a branch of a conditional, the most there can be
    trips: tuple[int, ...] = ()  # of the loops around it, outermost first
    conditional: bool = False  # in a branch that may not be taken


@dataclass(frozen=True)
class Product:
    """A dot, a convolution, or what stands for one."""

    place: Place
    kind: str  # dot, convolution, ragged-dot, multiply+reduce, or the target of a custom call
    dtype: str  # of its operands
    shapes: str  # `f32[8,16] . f32[16,4] -> f32[8,4]`
    flops: int  # of one execution, a multiply and an add counted as two
    declared: bool = False  # the kernel says so itself; nothing else is known of it


@dataclass(frozen=True)
class Operation:
    """What the device runs as one: a kernel, a fusion, a collective. Bytes are those of HBM."""

    place: Place
    opcode: str
    flops: int
    read: int
    written: int
    seconds: float | None = None  # of one execution, never less (roofline); None without a machine
    bound: str = ""  # compute, memory or network: what sets those seconds
    step: int | None = None  # of the schedule, as Memory counts them; None when nothing tells

    @property
    def intensity(self) -> float:
        """FLOPs per byte; 0 where nothing is moved."""
        moved = self.read + self.written
        return self.flops / moved if moved else 0.0


@dataclass(frozen=True)
class Collective:
    """A collective, once for each dtype and phase of its arrays."""

    place: Place
    kind: str  # all-gather, reduce-scatter, all-reduce, all-to-all, permute, ragged-all-to-all, broadcast, send
    axes: tuple[str, ...]  # mesh axes, or ("unknown",)
    ranks: int  # devices in a group
    dtype: str
    payload: int  # bytes: output of an all-gather, input of a reduce-scatter, else the buffer
    wire: int  # bytes that a device sends in a ring
    asynchronous: bool = False
    overlapped: tuple[str, ...] = ()  # operations that run between its start and its end
    disguise: str = ""  # reduce-scatter, for an all-reduce of which each device keeps a slice


@dataclass(frozen=True)
class Buffer:
    """A piece of memory and when it is in use, in steps of the schedule (both ends included)."""

    name: str  # of the instruction that makes it
    kind: str  # one of CLASSES
    bytes: int
    shape: str
    op_name: str
    source: str
    start: int
    end: int


@dataclass(frozen=True)
class Memory:
    """Memory of one device over the schedule.

    exact         from XLA's buffer assignment; else a lower bound, from lifetimes alone
    peak          bytes of HBM: the sum of `classes`
    classes       bytes at the peak by class, fragmentation included; none of 0
    at            the step of the schedule at which the temporaries take the most room
    where         the place of that step
    live          every buffer alive there, largest first
    timeline      bytes of live buffers after each step of the schedule in which they change: (step, bytes)
    by_class      the same bytes apart: class -> bytes at each point of the timeline
    steps         how many steps the schedule has
    aliased       bytes of outputs that take an argument's place (donated)
    host          bytes in the host's memory
    on_chip       bytes in a TPU's own memories, which are no part of the peak
    """

    exact: bool
    peak: int
    classes: dict[str, int]
    at: int
    where: Place | None
    live: tuple[Buffer, ...]
    timeline: tuple[tuple[int, int], ...]
    by_class: dict[str, tuple[int, ...]]
    steps: int
    aliased: int = 0
    host: int = 0
    on_chip: int = 0


@dataclass(frozen=True)
class Finding:
    """Something that costs, with the line that causes it and what to try."""

    kind: str  # as `all-reduce-then-slice`
    message: str  # one sentence with the bytes or FLOPs at stake
    advice: str  # what to try
    source: str = ""  # file:line
    op_name: str = ""
    bytes: int = 0  # at stake


@dataclass(frozen=True)
class Report:
    """The ledger of one compiled program. `print(report)` shows it.

    matmul_flops_range  least and most, where conditionals leave it open
    not_understood      what was met and not counted, one sentence each
    assumed             what was taken for granted, as "a loop whose trip count is unknown counts once"
    """

    name: str  # of the module
    target: str  # whose compiler: cpu, gpu, tpu, or "" when nothing tells
    devices: int
    mesh: dict[str, int]  # axes with their degrees, outermost first; {} when unknown
    products: tuple[Product, ...]
    operations: tuple[Operation, ...]  # in the order of the schedule
    collectives: tuple[Collective, ...]
    memory: Memory
    warnings: tuple[Finding, ...]
    not_understood: tuple[str, ...]
    assumed: tuple[str, ...]
    matmul_flops_range: tuple[int, int]
    machine: Machine | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of the work: compile, read, measure

    @property
    def matmul_flops(self) -> int:
        """FLOPs of dots, convolutions and library calls in a step, at most; kernels' own declarations left out."""
        return self.matmul_flops_range[1]

    @property
    def declared_flops(self) -> int:
        """FLOPs that custom kernels declare of themselves."""
        return sum(product.flops * product.place.count for product in self.products if product.declared)

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of HBM read and written in a step."""
        return (
            sum(operation.read * operation.place.count for operation in self.operations),
            sum(operation.written * operation.place.count for operation in self.operations),
        )

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak

    def __str__(self) -> str:
        from jaxllm.report.inspection_table import text

        return text(self)

    def to_json(self) -> dict[str, Any]:
        """As docs/inspect.schema.json has it."""
        from jaxllm.report.inspection_document import document

        return document(self)

    def plot(self, path: str | Path) -> None:
        """Draws the memory over the schedule, as .png, .svg or .pdf. Raises SpecError when it cannot be written."""
        from jaxllm.report.files import plot_path
        from jaxllm.report.inspection_plot import save_timeline

        save_timeline(self, plot_path(str(path)))

    def trace(self, path: str | Path) -> None:
        """Writes the schedule as a trace that ui.perfetto.dev opens."""
        from jaxllm.report.trace import save_trace

        save_trace(self, Path(path))


def total(items: Iterable[Any], figure: str) -> int:
    """The sum over a step of a figure of products, operations or collectives."""
    return sum(getattr(item, figure) * item.place.count for item in items)
