"""A report added up: what the table, the JSON and the difference of two reports show of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from jaxllm.report.inspection import Buffer, Collective, Memory, Operation, Place, Product, Report, total
from jaxllm.spec.ledger import COLLECTIVES, PHASES

Item = TypeVar("Item")

COMPILERS = {"cpu": "XLA:CPU", "gpu": "XLA:GPU", "tpu": "XLA:TPU"}


@dataclass(frozen=True)
class FlopsLine:
    """The products that a line of the source makes in one phase."""

    phase: str
    source: str
    kind: str
    dtype: str
    declared: bool
    products: tuple[Product, ...]

    @property
    def flops(self) -> int:
        """In a step."""
        return total(self.products, "flops")

    @property
    def count(self) -> int:
        """Executions in a step."""
        return sum(product.place.count for product in self.products)


@dataclass(frozen=True)
class CollectiveLine:
    """The collectives of one kind over the same axes, in one phase and dtype: a line of the ledger."""

    kind: str
    axes: tuple[str, ...]
    phase: str
    dtype: str
    collectives: tuple[Collective, ...]

    @property
    def label(self) -> str:
        """As `check` has it: `all-gather/data/forward/bf16`."""
        return "/".join(part for part in (self.kind, "+".join(self.axes), self.phase, self.dtype) if part)

    @property
    def payload(self) -> int:
        """Bytes in a step."""
        return total(self.collectives, "payload")

    @property
    def wire(self) -> int:
        """Bytes that a device sends in a step."""
        return total(self.collectives, "wire")

    @property
    def count(self) -> int:
        """Executions in a step."""
        return sum(collective.place.count for collective in self.collectives)

    @property
    def overlapped(self) -> int:
        """Executions during which something else is computed."""
        return sum(collective.place.count for collective in self.collectives if collective.overlapped)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The sizes of their groups."""
        return tuple(sorted({collective.ranks for collective in self.collectives}))

    @property
    def depth(self) -> int:
        """Loops around the innermost of them."""
        return max(len(collective.place.trips) for collective in self.collectives)

    @property
    def disguise(self) -> str:
        """What they stand for; "" when they are what they say."""
        return ", ".join(sorted({collective.disguise for collective in self.collectives if collective.disguise}))

    @property
    def sources(self) -> tuple[str, ...]:
        """Lines of the program, those that send most first."""
        sent: dict[str, int] = {}
        for collective in self.collectives:
            source = collective.place.source
            sent[source] = sent.get(source, 0) + collective.wire * collective.place.count
        return tuple(source for source in sorted(sent, key=lambda source: (-sent[source], source)) if source)


def _grouped(items: Iterable[Item], key: Callable[[Item], tuple]) -> dict[tuple, list[Item]]:
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def flops_lines(report: Report) -> list[FlopsLine]:
    """One for each phase, source line, kind and dtype, the largest first."""
    groups = _grouped(report.products, lambda p: (p.place.phase, p.place.source, p.kind, p.dtype, p.declared))
    lines = [FlopsLine(*key, tuple(products)) for key, products in groups.items()]
    return sorted(lines, key=lambda line: (-line.flops, line.source, line.phase, line.kind))


def phase_order(phase: str) -> tuple[int, str]:
    """Sorts phases in the order of a step; what no phase is known of comes last."""
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def phase_flops(report: Report) -> dict[str, int]:
    """FLOPs in a step by phase, kernels' own declarations left out. Branches of a conditional are all counted, so that
    the sum may be more than `matmul_flops`."""
    sums: dict[str, int] = {}
    for product in report.products:
        if not product.declared:
            sums[product.place.phase] = sums.get(product.place.phase, 0) + product.flops * product.place.count
    return {phase: sums[phase] for phase in sorted(sums, key=phase_order)}


def collective_lines(report: Report) -> list[CollectiveLine]:
    """One for each kind, axes, phase and dtype, in the order of a step and then as `check` has the kinds."""
    groups = _grouped(report.collectives, lambda c: (c.kind, c.axes, c.place.phase, c.dtype))
    lines = [CollectiveLine(*key, tuple(collectives)) for key, collectives in groups.items()]
    kinds = {kind: index for index, kind in enumerate(COLLECTIVES)}
    return sorted(
        lines,
        key=lambda line: (*phase_order(line.phase), kinds.get(line.kind, len(kinds)), line.kind, line.axes, line.dtype),
    )


@dataclass(frozen=True)
class Roofline:
    """What a step takes at least on a machine, in seconds.

    hidden      when collectives that are asynchronous run beside all else, one after another
    serial      when nothing runs beside anything
    bounds      the serial seconds by what sets them: compute, memory or network
    unknown     operations whose seconds the machine's file does not tell
    """

    hidden: float
    serial: float
    bounds: dict[str, float]
    unknown: int


def roofline(report: Report) -> Roofline | None:
    """None without a machine. Every branch of a conditional is counted."""
    if report.machine is None:
        return None
    behind = {collective.place.name for collective in report.collectives if collective.asynchronous}
    front = back = 0.0
    bounds: dict[str, float] = {}
    unknown = 0
    for operation in report.operations:
        if operation.seconds is None:
            unknown += bool(operation.flops or operation.read or operation.written)
            continue
        seconds = operation.seconds * operation.place.count
        if not seconds:
            continue
        bounds[operation.bound] = bounds.get(operation.bound, 0.0) + seconds
        if operation.place.name in behind:
            back += seconds
        else:
            front += seconds
    return Roofline(max(front, back), front + back, dict(sorted(bounds.items())), unknown)


@dataclass(frozen=True)
class OperationLine:
    """The operations of one opcode that a line of the source makes in one phase."""

    phase: str
    source: str
    opcode: str
    bound: str
    operations: tuple[Operation, ...]

    @property
    def seconds(self) -> float:
        """In a step; 0 where nothing is known."""
        return sum((operation.seconds or 0.0) * operation.place.count for operation in self.operations)

    @property
    def moved(self) -> int:
        """Bytes read and written in a step."""
        return sum((o.read + o.written) * o.place.count for o in self.operations)

    @property
    def flops(self) -> int:
        """In a step."""
        return total(self.operations, "flops")


def operation_lines(report: Report) -> list[OperationLine]:
    """One for each phase, source line, opcode and bound: those that take most time first, or move the most bytes."""
    groups = _grouped(report.operations, lambda o: (o.place.phase, o.place.source, o.opcode, o.bound))
    lines = [OperationLine(*key, tuple(operations)) for key, operations in groups.items()]
    lines = [line for line in lines if line.seconds or line.moved]
    return sorted(lines, key=lambda line: (-line.seconds, -line.moved, line.source, line.opcode, line.phase))


def times(places: Sequence[Place]) -> str:
    """How often: `x 32 (2 x 16)` in two loops, `4 x 32 (2 x 16)` for four instructions there, `x 131` for a mixture."""
    loops = {(place.count, place.trips) for place in places}
    if len(loops) > 1:
        return f"x {sum(place.count for place in places):,}"
    count, trips = loops.pop()
    # of a branch that may not be taken, or a function called from several places, the loops do not tell the count
    inside = (
        f" ({' x '.join(f'{trip:,}' for trip in trips)})" if len(trips) > 1 or (trips and prod(trips) != count) else ""
    )
    return f"{f'{len(places):,} ' if len(places) > 1 else ''}x {count:,}{inside}"


def mesh_text(mesh: dict[str, int]) -> str:
    """`data=4, tensor=2`, or that it is unknown."""
    return ", ".join(f"{axis}={degree}" for axis, degree in mesh.items()) or "unknown"


def largest(memory: Memory, number: int) -> tuple[Buffer, ...]:
    """So many of the buffers that are alive at the peak, without those below 1/200 of it: programs have many arrays
    of a few bytes, which nobody looks for."""
    return tuple(b for index, b in enumerate(memory.live[:number]) if not index or 200 * b.bytes >= memory.peak)


def brief(shape: str) -> str:
    """A shape on one line: of a long tuple, the first array and how many there are."""
    if len(shape) <= 36 or not shape.startswith("("):
        return shape
    first, arrays = shape.partition("], ")[0].rstrip("])"), shape.count("[")
    return f"{first}], ...) of {arrays:,} arrays"
