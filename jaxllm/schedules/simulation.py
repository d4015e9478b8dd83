"""A schedule in time: each stage runs its cells in order, each as soon as what it waits for is there."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.schedules.order import earliest
from jaxllm.schedules.table import Cell, Schedule
from jaxllm.schedules.times import Times


@dataclass(frozen=True, slots=True)
class Timed:
    """A cell in time, in the unit of the times."""

    cell: Cell
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A step of a schedule.

    stages  the cells of each stage, one after another
    spans   of each stage, from the start of its first cell to the end of its last
    """

    schedule: Schedule
    times: Times
    stages: tuple[tuple[Timed, ...], ...]
    spans: tuple[float, ...]

    @property
    def span(self) -> float:
        """The longest of the stages' spans: what a step costs (Qi et al. 2023, 2401.10241, section 5.3), as a stage
        that begins later also begins the next step later."""
        return max(self.spans)

    @property
    def bubble(self) -> float:
        """The share of the span in which the stage does nothing."""
        return bubble_of(self.span, self.schedule.microbatches, self.times)

    @property
    def in_step(self) -> float:
        """What a step costs when all stages meet at the end of each tick, which lasts as long as its longest cell: one
        program for all stages sends there. Latency comes on top."""
        lasts = self.times.of_kinds(self.schedule)
        return sum(max((lasts[cell.kind] for cell in row if cell), default=0.0) for row in self.schedule.table)

    @property
    def end(self) -> float:
        """When the last stage is done, from the start of the first."""
        return max(timed[-1].end for timed in self.stages if timed)


def simulate(schedule: Schedule, times: Times | None = None) -> Simulation:
    """Runs a schedule in time. Its ticks do not matter, only the order on each stage.

    Raises SpecError, which names the cells that wait for each other, when it cannot run.
    """
    times = Times() if times is None else times
    lasts = times.of_kinds(schedule)
    stages = tuple(
        tuple(Timed(cell, start, start + lasts[cell.kind]) for cell, start in zip(order, starts, strict=True))
        for order, starts in zip(schedule.orders, earliest(schedule, schedule.orders, lambda stage, cell: lasts[cell.kind], times.comm), strict=True)
    )
    return Simulation(
        schedule, times, stages, tuple(timed[-1].end - timed[0].start if timed else 0.0 for timed in stages)
    )


def bubble_of(span: float, microbatches: int, times: Times) -> float:
    """The share of a span that is not work: (span - m (f + b + w)) / span."""
    idle = span - microbatches * times.stage
    # sums of fractions of a stage do not come out even
    return 0.0 if abs(idle) < 1e-9 * span else idle / span
