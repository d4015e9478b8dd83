"""From the order of the cells on each stage to when they run: as early as what they wait for allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxllm.schedules.table import Cell, Schedule, Work
from jaxllm.spec.errors import SpecError

Orders = Sequence[Sequence[Cell]]
Time = TypeVar("Time", int, float)


def lay_out(
    name: str, stages: int, microbatches: int, chunks: int, orders: Orders, placement: str = "ring"
) -> Schedule:
    """The schedule in which each stage runs its cells in order, each at the first tick that is possible.

    Cells of microbatches beyond the last are left out. That keeps an order valid, as no cell waits for another
    microbatch: schedules that are published for certain counts serve all smaller ones so.

    Raises SpecError, which names the cells that wait for each other, when the orders cannot run.
    """
    orders = [[cell for cell in order if cell.microbatch < microbatches] for order in orders]
    shape = Schedule(name, stages, microbatches, chunks, placement, ())
    begins = earliest(shape, orders, lambda stage, cell: 1)
    ticks = 1 + max((begin[-1] for begin in begins if begin), default=-1)
    table: list[list[Cell | None]] = [[None] * stages for _ in range(ticks)]
    for stage, (order, begin) in enumerate(zip(orders, begins, strict=True)):
        for cell, tick in zip(order, begin, strict=True):
            table[tick][stage] = cell
    return Schedule(name, stages, microbatches, chunks, placement, tuple(map(tuple, table)))


def earliest(
    schedule: Schedule, orders: Orders, lasts: Callable[[int, Cell], Time], latency: Time = 0
) -> list[list[Time]]:
    """When each cell begins, for each stage in its order.

    Args: `lasts` tells how long a cell of a stage takes; `latency` is how long a result travels between two stages,
    while both of them go on.

    Raises SpecError, which names the cells that wait for each other, when some never begin.
    """
    ends: dict[Work, tuple[Time, int]] = {}
    asleep: dict[Work, list[int]] = {}  # the stages that wait for a piece of work
    begins: list[list[Time]] = [[] for _ in orders]
    clocks: list[Time] = [0] * len(orders)
    awake = deque(range(len(orders)))
    while awake:
        stage = awake.popleft()
        order, begun = orders[stage], begins[stage]
        while len(begun) < len(order):
            cell = order[len(begun)]
            needs = schedule.needs(stage, cell)
            missing = next((need for need in needs if need not in ends), None)
            if missing is not None:
                asleep.setdefault(missing, []).append(stage)
                break
            arrivals = (end if at == stage else end + latency for end, at in map(ends.__getitem__, needs))
            begin = max(clocks[stage], *arrivals) if needs else clocks[stage]
            begun.append(begin)
            clocks[stage] = begin + lasts(stage, cell)
            for work in schedule.works(stage, cell):
                ends[work] = clocks[stage], stage
                awake.extend(asleep.pop(work, ()))
    if asleep:
        raise SpecError(_deadlock(schedule, orders, [len(begun) for begun in begins]))
    return begins


def _deadlock(schedule: Schedule, orders: Orders, heads: Sequence[int]) -> str:
    """From a cell that never begins to the one that it waits for, until they come round."""
    at = {
        work: (stage, place)
        for stage, order in enumerate(orders)
        for place, cell in enumerate(order)
        for work in schedule.works(stage, cell)
    }
    stage = next(stage for stage, order in enumerate(orders) if heads[stage] < len(order))
    path: list[int] = []
    waits: list[str] = []
    while stage not in path:
        path.append(stage)
        cell = orders[stage][heads[stage]]
        need = next(
            need for need in schedule.needs(stage, cell) if need not in at or at[need][1] >= heads[at[need][0]]
        )
        if need not in at:
            kind, microbatch, part = need
            owner, chunk = schedule.owner(part)
            return (
                f"schedule {schedule.name}: {cell} on stage {stage} waits for {Cell(kind, microbatch, chunk)} on stage "
                f"{owner}, which is nowhere in the table; add it."
            )
        there, place = at[need]
        head, wanted = orders[there][heads[there]], orders[there][place]
        behind = "" if place == heads[there] else f", which comes after {head} there"
        waits.append(f"{cell} on stage {stage} waits for {wanted} on stage {there}{behind}")
        stage = there
    around = waits[path.index(stage) :]
    return f"schedule {schedule.name}: these wait for each other: {'; '.join(around)}; change the order of one of them."
