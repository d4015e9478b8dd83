"""A pipeline schedule as a trace in Chrome's trace-event format: a track for each stage, a slice for each cell.

One unit of the times that were asked for is one microsecond of the trace, or a power of ten more where cells are short:
a viewer tells nanoseconds apart, and no less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxllm.report.schedule import cost, timing, title
from jaxllm.report.trace_events import PROCESS, named, save, span
from jaxllm.schedules.simulation import Simulation


def save_trace(simulation: Simulation, path: Path) -> None:
    """Writes the trace as JSON. Raises SpecError when the file cannot be written."""
    save(trace(simulation), path)


def trace(simulation: Simulation) -> dict[str, Any]:
    """The trace as plain dicts and lists. Times are microseconds."""
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "schedule": title(simulation),
            "cost": cost(simulation),
            "times": timing(simulation),
            "time": f"simulated, not of a run: one unit of the times is {_scale(simulation):,} microseconds",
        },
        "traceEvents": list(events(simulation)),
    }


def _scale(simulation: Simulation) -> int:
    """Microseconds of a unit of the times: 1, or so many that the shortest cell has one."""
    lengths = (one.end - one.start for timed in simulation.stages for one in timed)
    shortest = min((length for length in lengths if length > 0), default=1.0)
    return 10 ** max(0, math.ceil(-math.log10(shortest)))


def events(simulation: Simulation, process: int = PROCESS) -> Iterable[dict[str, Any]]:
    """The tracks and the cells, as one process of a trace."""
    yield named("process_name", 0, process=process, name=f"{title(simulation)}; {cost(simulation)}")
    for stage in range(simulation.schedule.stages):
        yield named("thread_name", stage + 1, process=process, name=f"stage {stage}")
        yield named("thread_sort_index", stage + 1, process=process, sort_index=stage + 1)
    yield from _cells(simulation, process)


def _cells(simulation: Simulation, process: int) -> Iterable[dict[str, Any]]:
    schedule, scale = simulation.schedule, _scale(simulation)
    for stage, timed in enumerate(simulation.stages):
        for one, tick in zip(timed, schedule.starts[stage], strict=True):
            cell = one.cell
            args = {
                "microbatch": cell.microbatch,
                "chunk": cell.chunk,
                "part of the model": schedule.part(stage, cell.chunk),
                "tick": tick,
            }
            yield span(str(cell), cell.kind, stage + 1, scale * one.start, scale * one.end, args, process=process)
