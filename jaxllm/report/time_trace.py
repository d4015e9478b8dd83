"""The time of a step as a trace in Chrome's trace-event format: by closed form, and of the compiled program as it is played.

No program ran. By closed form the parts stand one after another, each as long as all of it takes in the step: what blocks
hide runs beside them, what is waited for has the device idle. Of a compiled program each instruction stands where it was
played, those of a loop once, and then the loop's other turns as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jaxllm.report.played import OTHER, Played, PlayedOperation
from jaxllm.report.schedule_trace import events
from jaxllm.report.time import NAMES, ROUNDING, Timed
from jaxllm.report.trace_events import named, span
from jaxllm.report.units import one_line
from jaxllm.theory.time import Timeline

_COMPUTE = 1
_STAGES = 2  # the process of a pipeline's stages
_LEAST = 1e-9  # seconds: a slice without length could not be seen or clicked

# What a device does when the blocks are through, in this order, and what of it is no work of its own.
AFTER = ("launch", "bubble", "optimizer", "host", "other")


def closed(timed: Timed, line: Timeline) -> dict[str, Any]:
    """The closed form: a track of what computes, one for the collectives over each set of mesh axes, and in a pipeline those of
    its stages. Times are microseconds."""
    time = timed.time
    lanes = ["+".join(each.axes) for each in time.traffic]
    found = list(_tracks(timed, "closed form", lanes))
    now = 0.0
    for what, seconds in line.computed:
        if seconds > ROUNDING:
            found.append(_span(what, "blocks", _COMPUTE, now, now + seconds, {}))
            now += seconds
    for track, each in enumerate(time.traffic, _COMPUTE + 1):
        name, waited, hidden = f"collectives over {'+'.join(each.axes)}", float(each.exposed), float(each.hidden)
        if hidden > ROUNDING:
            found.append(_span(f"{name}, hidden", "hidden", track, 0.0, hidden, {"behind": "what blocks compute"}))
        if waited > ROUNDING:
            begin = max(now, hidden)
            found.append(_span(f"{name}, waited for", "waited for", track, begin, begin + waited, {}))
            now = begin + waited
    for part in AFTER:
        seconds = float(getattr(time, part))
        if seconds > ROUNDING:
            found.append(_span(NAMES[part], part, _COMPUTE, now, now + seconds, {}))
            now += seconds
    if line.simulation is not None:
        found += events(line.simulation, _STAGES)
    return _trace(timed, found, "the parts one after another, each as long as all of it takes in the step")


def played(timed: Timed, one: Played) -> dict[str, Any]:
    """The compiled program: a track of what computes, and one for each lane beside it. Times are microseconds."""
    lanes = [lane for lane in dict.fromkeys(slice_.lane for slice_ in one.slices) if lane != "compute"]
    found = list(_tracks(timed, f"XLA:{one.compiler.upper()}'s program", lanes))
    by_name = {operation.name: operation for operation in one.operations}
    tracks = {"compute": _COMPUTE} | {lane: track for track, lane in enumerate(lanes, _COMPUTE + 1)}
    for slice_ in one.slices:
        operation = by_name.get(slice_.operation)
        args = {} if operation is None else _of_operation(operation)
        category = "loop" if operation is None else operation.opcode
        found.append(_span(slice_.name, category, tracks[slice_.lane], slice_.start, slice_.end, args))
    end = max((slice_.end for slice_ in one.slices), default=0.0)
    if (rest := one.parts[OTHER]) > ROUNDING:
        found.append(_span(NAMES[OTHER], OTHER, _COMPUTE, end, end + rest, {}))
    return _trace(timed, found, "each instruction as long as the machine takes for it, in the order of the compiler's schedule")


def _trace(timed: Timed, found: Iterable[dict[str, Any]], time: str) -> dict[str, Any]:
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "model": one_line(timed.model.name),
            "mesh": timed.mesh.text,
            "layout": f"{timed.layout}",
            "time": f"not of a run: {time}",
        },
        "traceEvents": list(found),
    }


def _tracks(timed: Timed, author: str, lanes: Iterable[str]) -> Iterator[dict[str, Any]]:
    yield named("process_name", 0, name=f"a step of {one_line(timed.model.name)} on {timed.mesh.text}, {author}")
    titles = ["compute", *(lane if lane in ("host", "copies") else f"collectives over {lane}" for lane in lanes)]
    for track, title in enumerate(titles, _COMPUTE):
        yield named("thread_name", track, name=title)
        yield named("thread_sort_index", track, sort_index=track)


def _of_operation(operation: PlayedOperation) -> dict[str, Any]:
    args = {
        "instruction": one_line(operation.name),
        "source": one_line(operation.source),
        "phase": operation.phase or "unknown",
        "runs in a step": operation.runs,
        "FLOPs": operation.flops,
        "bytes read": operation.read,
        "bytes written": operation.written,
    }
    if operation.wire:
        waited = operation.waited / operation.seconds if operation.seconds else 0.0
        args |= {"wire bytes": operation.wire, "waited for": f"{100 * min(1.0, waited):.0f} %"}
    return args | ({"bytes copied": operation.copied} if operation.copied else {})


def _span(name: str, category: str, track: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return span(name, category, track, 1e6 * start, 1e6 * max(end, start + _LEAST), args)
