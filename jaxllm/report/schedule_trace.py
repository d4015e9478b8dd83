"""A pipeline schedule as a trace in Chrome's trace-event format: a track for each stage, a slice for each cell.

One unit of the times that were asked for is one microsecond of the trace, or a power of ten more where cells are short:
a viewer tells nanoseconds apart, and no less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxllm.report.schedule import cost, timing, title
from jaxllm.schedules.simulation import Simulation
from jaxllm.spec.errors import SpecError

_PROCESS = 1


def save_trace(simulation: Simulation, path: Path) -> None:
    """Writes the trace as JSON. Raises SpecError when the file cannot be written."""
    text = json.dumps(trace(simulation), separators=(",", ":"), allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--trace {path} cannot be written: {error.strerror or error}; name another file.") from None


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
        "traceEvents": [*_names(simulation), *_cells(simulation)],
    }


def _scale(simulation: Simulation) -> int:
    """Microseconds of a unit of the times: 1, or so many that the shortest cell has one."""
    lengths = (one.end - one.start for timed in simulation.stages for one in timed)
    shortest = min((length for length in lengths if length > 0), default=1.0)
    return 10 ** max(0, math.ceil(-math.log10(shortest)))


def _names(simulation: Simulation) -> Iterable[dict[str, Any]]:
    yield _named("process_name", 0, name=f"{title(simulation)}; {cost(simulation)}")
    for stage in range(simulation.schedule.stages):
        yield _named("thread_name", stage + 1, name=f"stage {stage}")
        yield _named("thread_sort_index", stage + 1, sort_index=stage + 1)


def _named(event: str, track: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": event, "pid": _PROCESS, "tid": track, "args": args}


def _cells(simulation: Simulation) -> Iterable[dict[str, Any]]:
    schedule, scale = simulation.schedule, _scale(simulation)
    for stage, timed in enumerate(simulation.stages):
        for one, tick in zip(timed, schedule.starts[stage], strict=True):
            cell = one.cell
            begin, end = round(scale * one.start, 3), round(scale * one.end, 3)
            yield {
                "ph": "X", "name": str(cell), "cat": cell.kind, "pid": _PROCESS, "tid": stage + 1, "ts": begin,
                "dur": round(end - begin, 3),
                "args": {
                    "microbatch": cell.microbatch,
                    "chunk": cell.chunk,
                    "part of the model": schedule.part(stage, cell.chunk),
                    "tick": tick,
                },
            }  # fmt: skip
