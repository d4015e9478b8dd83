"""A report as a trace in Chrome's trace-event format, which ui.perfetto.dev and chrome://tracing open.

No program ran. The slices stand in the order of the compiler's schedule, and are as long as the machine needs at least,
or one microsecond each where no machine is known. A loop's body is there once, with its count in the arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.report.inspection import Collective, Operation, Place, Report
from jaxllm.report.inspection_lines import COMPILERS
from jaxllm.report.trace_events import PROCESS, named, save, span
from jaxllm.report.units import one_line

_OPERATIONS, _COLLECTIVES = 1, 2  # numbers of tracks; further collectives at the same time get tracks of their own
_LEAST = 0.001  # microseconds: a slice without length could not be seen or clicked


@dataclass(frozen=True)
class _Slice:
    """An operation in time, in microseconds."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class _Sent:
    """What one instruction sends, from its start to its end."""

    collectives: tuple[Collective, ...]
    start: float
    end: float
    placed: bool  # whether an operation of the schedule tells when


def save_trace(report: Report, path: Path) -> None:
    """Writes the trace as JSON. Raises SpecError when the file cannot be written."""
    save(trace(report), path)


def trace(report: Report) -> dict[str, Any]:
    """The trace as plain dicts and lists. Times are microseconds."""
    slices, sent = _in_time(report)
    events = list(_names(report, sent))
    events += [_operation(slice_) for slice_ in slices]
    events += [_collective(one, track) for one, track in _tracks(sent)]
    events += _memory(report, slices)
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "module": one_line(report.name),
            "compiler": COMPILERS.get(report.target, "unknown"),
            "time": _time(report),
            "loops": "the body of a loop is there once; `executions` counts how often it runs",
        },
        "traceEvents": events,
    }


def _time(report: Report) -> str:
    if report.machine is None:
        return "not of a run: one microsecond for each operation, in the order of the schedule"
    return f"not of a run: what {report.machine.name} needs at least (roofline), in the order of the schedule"


# ---------------------------------------------------------------- when


def _in_time(report: Report) -> tuple[list[_Slice], list[_Sent]]:
    """One operation after another. An asynchronous collective runs beside those that follow it, up to the last of those
    that the schedule puts before its end; what comes then waits for it."""
    by_name: dict[str, list[Collective]] = {}
    for collective in report.collectives:
        by_name.setdefault(collective.place.name, []).append(collective)
    order = {operation.place.name: index for index, operation in enumerate(report.operations)}
    beside = {name: [o for o in sends[0].overlapped if o in order] for name, sends in by_name.items()}
    waits: dict[str, list[str]] = {}  # operation -> the collectives of which it is the last to run beside
    for name, others in beside.items():
        if others and name in order:
            waits.setdefault(max(others, key=order.__getitem__), []).append(name)

    slices: list[_Slice] = []
    began: dict[str, tuple[float, float]] = {}  # of each collective: when, and for how long at least
    ends: dict[str, float] = {}
    now = 0.0
    for operation in report.operations:
        name, length, begin = operation.place.name, _length(report, operation), now
        if name in by_name:
            began[name] = (begin, length)
        started = name in by_name and bool(beside[name]) and report.machine is not None
        now += _LEAST if started else length
        slices.append(_Slice(operation, begin, now))
        for waiting in waits.get(name, ()):
            if waiting in began:
                start, least = began[waiting]
                ends[waiting] = now = max(now, start + least)

    sent = []
    for name, collectives in by_name.items():
        parts = [slices[order[other]] for other in beside[name]]
        if name in began:
            start, length = began[name]
            end = ends.get(name, start + length)
        elif parts:  # fused with the operations that it runs beside, as XLA:TPU does
            start, end = min(part.start for part in parts), max(part.end for part in parts)
        else:
            start, end = 0.0, _LEAST
        sent.append(_Sent(tuple(collectives), start, end, bool(parts) or name in began))
    return slices, sorted(sent, key=lambda one: (one.start, one.end))


def _length(report: Report, operation: Operation) -> float:
    if report.machine is None:
        return 1.0
    return max(_LEAST, 1e6 * (operation.seconds or 0.0))


def _tracks(sent: Iterable[_Sent]) -> Iterable[tuple[_Sent, int]]:
    """Slices of a track must not overlap: those that do get tracks of their own."""
    free: list[float] = []  # when each track is
    for one in sent:
        track = next((index for index, end in enumerate(free) if end <= one.start), len(free))
        free[track : track + 1] = [one.end]
        yield one, _COLLECTIVES + track


# ---------------------------------------------------------------- events


def _names(report: Report, sent: list[_Sent]) -> Iterable[dict[str, Any]]:
    name = f"{one_line(report.name) or 'a module without a name'}, one of {report.devices:,} devices; {_time(report)}"
    yield named("process_name", 0, name=name)
    tracks = {_OPERATIONS: "operations", _COLLECTIVES: "collectives"}
    for _, track in _tracks(sent):
        tracks.setdefault(track, f"collectives beside those, {track - _COLLECTIVES}")
    for track, title in sorted(tracks.items()):
        yield named("thread_name", track, name=title)
        yield named("thread_sort_index", track, sort_index=track)


def _operation(slice_: _Slice) -> dict[str, Any]:
    operation = slice_.operation
    args = _where(operation.place) | {
        "opcode": operation.opcode,
        "FLOPs": operation.flops,
        "bytes read": operation.read,
        "bytes written": operation.written,
        "FLOPs a byte": round(operation.intensity, 3),
    }
    if operation.bound:
        args["bound by"] = operation.bound
    return span(operation.place.name, operation.opcode, _OPERATIONS, slice_.start, slice_.end, args)


def _collective(one: _Sent, track: int) -> dict[str, Any]:
    first = one.collectives[0]
    args = _where(first.place) | {
        "devices of a group": first.ranks,
        "payload bytes": sum(collective.payload for collective in one.collectives),
        "wire bytes": sum(collective.wire for collective in one.collectives),
        "dtypes": ", ".join(dict.fromkeys(collective.dtype for collective in one.collectives)),
        "asynchronous": first.asynchronous,
        "operations beside it": len(first.overlapped),
    }
    if first.disguise:
        args["stands for"] = first.disguise
    if not one.placed:
        args["when"] = "unknown: no operation of the schedule has its name"
    return span(f"{first.kind} over {'+'.join(first.axes)}", first.kind, track, one.start, one.end, args)


def _where(place: Place) -> dict[str, Any]:
    args = {
        "instruction": one_line(place.name),
        "op_name": one_line(place.op_name),
        "source": one_line(place.source),
        "phase": place.phase or "unknown",
        "executions": place.count,
    }
    if place.trips:
        args["loops"] = " x ".join(map(str, place.trips))
    if place.conditional:
        args["conditional"] = "in a branch that may not be taken"
    return args


def _memory(report: Report, slices: list[_Slice]) -> list[dict[str, Any]]:
    """The counter of live memory. Between two operations, the most of the steps there, so that the peak is not lost."""
    memory = report.memory
    end = slices[-1].end if slices else float(max(1, memory.steps))
    known = [(slice_.operation.step, slice_.start) for slice_ in slices if slice_.operation.step is not None]
    levels: dict[float, int] = {}
    place = -1
    for step, level in sorted(memory.timeline):
        if known:
            while place + 1 < len(known) and known[place + 1][0] <= step:
                place += 1
            moment = known[place][1] if place >= 0 else 0.0
        else:  # no operation tells its step: steps are spread evenly
            moment = end * step / max(1, memory.steps)
        moment = round(moment, 3)
        levels[moment] = max(levels.get(moment, 0), level)
    return [
        {"ph": "C", "name": "live memory", "pid": PROCESS, "tid": 0, "ts": moment, "args": {"bytes": level}}
        for moment, level in sorted(levels.items())
    ]
