"""Whether a table is a schedule: every cell there, once, and after what it waits for."""

from __future__ import annotations

from jaxllm.schedules.order import earliest
from jaxllm.schedules.table import KINDS, Cell, Schedule, Work
from jaxllm.spec.errors import SpecError


def validate(schedule: Schedule, memory: int | None = None) -> None:
    """Raises SpecError, which names the cell that is wrong, unless every stage can run its cells at their ticks.

    That parts which follow each other are on one stage or on neighbours holds for both placements.

    Args: `memory` is the most activations of one chunk and microbatch that a stage may keep for its backwards.
    """
    if memory is not None and (not isinstance(memory, int) or isinstance(memory, bool) or memory < 1):
        raise SpecError(f"schedule {schedule.name}: memory={memory!r} is no number of activations; choose 1 or more.")
    _check_each(schedule)
    _check_once(schedule)
    _check_all(schedule)
    # stages that wait for each other are told as such, and not as a cell that comes too early
    earliest(schedule, schedule.orders, lambda stage, cell: 1)
    _check_ticks(schedule)
    if memory is not None:
        _check_memory(schedule, memory)


def place(tick: int, stage: int, cell: Cell) -> str:
    """`F3.1 at tick 5, stage 2`."""
    return f"{cell} at tick {tick}, stage {stage}"


def _check_each(schedule: Schedule) -> None:
    for tick, stage, cell in schedule.cells():
        if cell.kind not in KINDS:
            where = f"schedule {schedule.name}: {place(tick, stage, cell)}"
            raise SpecError(f"{where} is none of F, B, W and BW; make it one of them.")
        for what, value, count in (
            ("microbatch", cell.microbatch, schedule.microbatches),
            ("chunk", cell.chunk, schedule.chunks),
        ):
            if not 0 <= value < count:
                many = f"{count:,} {what}{'es' if what == 'microbatch' else 's'}" if count > 1 else f"1 {what}"
                raise SpecError(
                    f"schedule {schedule.name}: {place(tick, stage, cell)} is of {what} {value}, and there "
                    f"{'is' if count == 1 else 'are'} {many}; count from 0 to {count - 1}."
                )


def _check_once(schedule: Schedule) -> None:
    seen: dict[Work, tuple[int, int, Cell]] = {}
    for tick, stage, cell in schedule.cells():
        for work in schedule.works(stage, cell):
            if work in seen:
                raise SpecError(
                    f"schedule {schedule.name}: {place(tick, stage, cell)} does again what {place(*seen[work])} has "
                    "done; keep one of them."
                )
            seen[work] = tick, stage, cell


def _check_all(schedule: Schedule) -> None:
    done = schedule.ticks_of
    for stage in range(schedule.stages):
        for chunk in range(schedule.chunks):
            part = schedule.part(stage, chunk)
            for microbatch in range(schedule.microbatches):
                missing = "".join(kind for kind in "FBW" if (kind, microbatch, part) not in done)
                if missing:
                    kind = missing if missing in KINDS else missing[0]
                    raise SpecError(
                        f"schedule {schedule.name}: {Cell(kind, microbatch, chunk)} is missing on stage {stage}; "
                        "add it at a tick at which the stage is idle, or at a new one."
                    )


def _check_ticks(schedule: Schedule) -> None:
    done = schedule.ticks_of
    for tick, stage, cell in schedule.cells():
        needs = schedule.needs(stage, cell)
        last = max(needs, key=done.__getitem__, default=None)
        if last is not None and done[last] >= tick:
            before = done[last]
            owner, _ = schedule.owner(last[2])
            found = schedule.table[before][owner]
            assert found is not None  # ticks_of is made of the table
            raise SpecError(
                f"schedule {schedule.name}: {place(tick, stage, cell)} comes too early: {place(before, owner, found)} "
                f"must be done by then; tick {before + 1} would do."
            )


def _check_memory(schedule: Schedule, memory: int) -> None:
    kept = [0] * schedule.stages
    for tick, row in enumerate(schedule.table):
        for stage, cell in enumerate(row):
            if cell is not None and cell.kind == "F":
                kept[stage] += 1
                if kept[stage] > memory:
                    raise SpecError(
                        f"schedule {schedule.name}: {place(tick, stage, cell)} is activation {kept[stage]} that the "
                        f"stage keeps at once, and {memory} is the most; run a backward before it."
                    )
        for stage, cell in enumerate(row):  # what a backward frees is free from the next tick on
            if cell is not None and cell.kind in ("B", "BW"):
                kept[stage] -= 1
