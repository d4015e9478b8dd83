"""What a schedule keeps and sends: buffers of each stage, slot by slot, and what travels between stages.

The program that runs a schedule has as many buffers as are counted here, and writes to those that are named here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from jaxllm.schedules.table import Cell, Schedule, Work

NONE = -1  # no slot
_UP, _DOWN, _SELF = "up", "down", "self"


@dataclass(frozen=True, slots=True)
class Peak:
    """Buffers of one stage, each of one microbatch and one chunk.

    inputs   what came in, or the stage handed on to itself, until the cell that uses it: activations and cotangents
    stash    what F keeps for B or BW
    weights  what B keeps for W
    """

    inputs: int
    stash: int
    weights: int


@dataclass(frozen=True, slots=True)
class Used:
    """The slots of one cell, -1 for none: that of its input, of its stash, and of what B keeps for W."""

    input: int = NONE
    stash: int = NONE
    weights: int = NONE


@dataclass(frozen=True, slots=True)
class Slots:
    """Buffers that a schedule needs: the largest number over the stages, each stage's own, and those of each cell.

    cells  ticks x stages, as the table; None where a stage is idle
    """

    inputs: int
    stash: int
    weights: int
    stages: tuple[Peak, ...]
    cells: tuple[tuple[Used | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What an interpreter does at one tick on one stage: run a cell, then store what arrives.

    kind                 "" idle, else F, B, W or BW
    microbatch, chunk    of the cell, 0 when idle
    first, last          whether it is the first or the last part of the model
    input_slot           where its input lies: the activation for F, the cotangent for B and BW; -1 for none
    stash_slot           where F keeps what B or BW takes
    weight_slot          where B keeps what W takes
    from_left            where to store, at the end of the tick, what stage s - 1 (modulo the stages) sent up, or -1
    from_right           the same for what stage s + 1 sent down
    from_self            the same for this cell's own output: at the turn of a V, and the loss's cotangent
    """

    kind: str = ""
    microbatch: int = 0
    chunk: int = 0
    first: bool = False
    last: bool = False
    input_slot: int = NONE
    stash_slot: int = NONE
    weight_slot: int = NONE
    from_left: int = NONE
    from_right: int = NONE
    from_self: int = NONE


@dataclass(frozen=True, slots=True)
class Message:
    """The output of a cell on its way: to which stage, "up", "down" or "self", and which work takes it."""

    to: int
    direction: str
    work: Work


@dataclass(frozen=True, slots=True)
class Sent:
    """What one stage sends in a step, in activations (or cotangents, which are as large) of one microbatch."""

    activations_up: int
    activations_down: int
    cotangents_up: int
    cotangents_down: int

    @property
    def total(self) -> int:
        return self.activations_up + self.activations_down + self.cotangents_up + self.cotangents_down


@lru_cache(maxsize=16)
def slots(schedule: Schedule) -> Slots:
    """Buffers of a valid schedule, or of its forwards alone, by interval assignment: in the order in which they are
    taken, each takes the lowest that is free.

    That needs no more of them than are taken at once at the worst tick (intervals make a perfect graph: Gavril 1972). A
    buffer that the cell of a tick reads last is free from the next tick on; what arrives at the end of that tick may
    already take it.
    """
    peaks, cells = [], []
    for stage in range(schedule.stages):
        intervals = _intervals(schedule, stage)
        inputs, stash, weights = (_assign(kept) for kept in intervals)
        peaks.append(Peak(*(1 + max(given.values(), default=NONE) for given in (inputs, stash, weights))))
        # F keeps where B or BW takes, and B where W takes
        stash |= {start: stash[end] for end, start in intervals[1].items()}
        weights |= {start: weights[end] for end, start in intervals[2].items()}
        used = {
            tick: Used(inputs.get(tick, NONE), stash.get(tick, NONE), weights.get(tick, NONE))
            for tick in schedule.starts[stage]
        }
        cells.append([used.get(tick) for tick in range(schedule.ticks)])
    return Slots(
        max(peak.inputs for peak in peaks),
        max(peak.stash for peak in peaks),
        max(peak.weights for peak in peaks),
        tuple(peaks),
        tuple(zip(*cells, strict=True)),
    )


def _intervals(schedule: Schedule, stage: int) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """The ticks, both inclusive, from which and to which buffers of a stage are taken, as {to: from}, by kind."""
    ticks, last = schedule.ticks_of, schedule.parts - 1
    inputs: dict[int, int] = {}
    stash: dict[int, int] = {}
    weights: dict[int, int] = {}
    for tick, cell in zip(schedule.starts[stage], schedule.orders[stage], strict=True):
        part, microbatch = schedule.part(stage, cell.chunk), cell.microbatch
        if cell.kind == "F":
            if part:
                inputs[tick] = ticks["F", microbatch, part - 1] + 1
        elif cell.kind == "W":
            weights[tick] = ticks["B", microbatch, part]
        else:
            stash[tick] = ticks["F", microbatch, part]
            made = stash[tick] if part == last else ticks["B", microbatch, part + 1]
            inputs[tick] = made + 1
    return inputs, stash, weights


def _assign(intervals: dict[int, int]) -> dict[int, int]:
    """A slot for each interval, by the tick to which it is taken."""
    given: dict[int, int] = {}
    free: list[int] = []
    taken: list[tuple[int, int]] = []  # (last tick, slot)
    for end, start in sorted(intervals.items(), key=lambda item: (item[1], item[0])):
        while taken and taken[0][0] < start:
            heapq.heappush(free, heapq.heappop(taken)[1])
        slot = heapq.heappop(free) if free else len(taken)
        given[end] = slot
        heapq.heappush(taken, (end, slot))
    return given


@lru_cache(maxsize=16)
def plan(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """A valid schedule, or the forwards of one alone, as an interpreter needs it: ticks x stages."""
    cells = slots(schedule).cells
    rows = []
    for used, row in zip(cells, schedule.table, strict=True):
        arrivals: list[dict[str, int]] = [{} for _ in row]
        for stage, cell in enumerate(row):
            sent = None if cell is None else sends(schedule, stage, cell)
            if sent is not None and sent.work in schedule.ticks_of:  # forwards alone do not take the loss's cotangent
                taker = cells[schedule.ticks_of[sent.work]][sent.to]
                assert taker is not None  # the tick is that of its work
                arrivals[sent.to][sent.direction] = taker.input
        rows.append(
            tuple(
                _step(schedule, stage, cell, slot, arrived)
                for stage, (cell, slot, arrived) in enumerate(zip(row, used, arrivals, strict=True))
            )
        )
    return tuple(rows)


def _step(schedule: Schedule, stage: int, cell: Cell | None, used: Used | None, arrived: dict[str, int]) -> Step:
    stored = arrived.get(_UP, NONE), arrived.get(_DOWN, NONE), arrived.get(_SELF, NONE)
    if cell is None or used is None:
        return Step("", 0, 0, False, False, NONE, NONE, NONE, *stored)
    part = schedule.part(stage, cell.chunk)
    first, last = part == 0, part == schedule.parts - 1
    return Step(cell.kind, cell.microbatch, cell.chunk, first, last, used.input, used.stash, used.weights, *stored)


def sends(schedule: Schedule, stage: int, cell: Cell) -> Message | None:
    """Where the output of a cell goes; None for what stays: all of W, and the gradient of the model's input."""
    part, microbatch, forward = schedule.part(stage, cell.chunk), cell.microbatch, cell.kind == "F"
    if cell.kind == "W" or not (forward or part):
        return None
    if forward and part == schedule.parts - 1:  # the loss is computed there, and its cotangent stays there
        return Message(stage, _SELF, ("B", microbatch, part))
    taker = part + 1 if forward else part - 1
    to, _ = schedule.owner(taker)
    if to == stage:
        direction = _SELF
    else:
        # told by the placement and not by the stages' numbers: of two stages, each is on both sides of the other
        direction = _UP if forward == (schedule.placement == "ring" or cell.chunk == 0) else _DOWN
    return Message(to, direction, ("F" if forward else "B", microbatch, taker))


def transfers(schedule: Schedule) -> tuple[Sent, ...]:
    """What each stage sends to others in a step."""
    counted = [dict.fromkeys((("F", _UP), ("F", _DOWN), ("B", _UP), ("B", _DOWN)), 0) for _ in range(schedule.stages)]
    for _, stage, cell in schedule.cells():
        sent = sends(schedule, stage, cell)
        if sent is not None and sent.direction != _SELF:
            counted[stage][cell.kind[0], sent.direction] += 1
    return tuple(Sent(*count.values()) for count in counted)


def traffic(sent: Iterable[Sent], stages: int, microbatches: int) -> float:
    """What all stages send, relative to 1F1B, whose stages pass each microbatch up and down once."""
    return sum(stage.total for stage in sent) / (2 * microbatches * (stages - 1))
