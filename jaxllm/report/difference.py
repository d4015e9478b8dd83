"""What changed between two programs: FLOPs, bytes, collectives, memory and warnings, and nothing that stayed the same.

Compilers number their instructions anew each time, and an edit moves the lines of the source. Buffers and warnings are
therefore told apart by what they are, of which operation, how large and in which file, not by number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from jaxllm.report.entries import Entry, print_entries, print_left_out, print_title, say, shown
from jaxllm.report.inspection import CLASSES, Buffer, Finding, Report, total
from jaxllm.report.inspection_document import buffer_json, finding_json, finite, heading
from jaxllm.report.inspection_lines import (
    COMPILERS,
    CollectiveLine,
    brief,
    collective_lines,
    mesh_text,
    phase_flops,
    phase_order,
    roofline,
)
from jaxllm.report.inspection_table import TOP, print_finding
from jaxllm.report.table import print_fields
from jaxllm.report.units import duration, exact, percent

Item = TypeVar("Item")


@dataclass(frozen=True)
class Change:
    """A figure that is another now: FLOPs, bytes, or seconds."""

    name: str
    before: int | float
    after: int | float

    @property
    def change(self) -> int | float:
        return self.after - self.before

    @property
    def fraction(self) -> float | None:
        """Of what it was before; None when there was nothing."""
        return self.change / self.before if self.before else None


@dataclass(frozen=True)
class CollectiveChange:
    """A line of collectives of which something is another now."""

    kind: str
    axes: tuple[str, ...]
    phase: str
    dtype: str
    payload: Change
    wire: Change
    count: Change

    @property
    def label(self) -> str:
        """As `check` has it: `all-gather/data/forward/bf16`."""
        return "/".join(part for part in (self.kind, "+".join(self.axes), self.phase, self.dtype) if part)


@dataclass(frozen=True)
class Difference:
    """Two reports, one against the other. Each tuple holds only what changed.

    before, after  names of the modules
    setting        (what, before, after): compiler, devices, mesh, machine, whether the memory is exact
    figures        FLOPs, bytes and seconds of a whole step
    flops          by phase
    memory         the peak and its classes, and what is no part of it
    came, went     buffers that are alive at the peak of the one program only
    warned, solved  warnings of the second program only, and of the first only
    """

    before: str
    after: str
    setting: tuple[tuple[str, str, str], ...]
    figures: tuple[Change, ...]
    flops: tuple[Change, ...]
    collectives: tuple[CollectiveChange, ...]
    memory: tuple[Change, ...]
    came: tuple[Buffer, ...]
    went: tuple[Buffer, ...]
    warned: tuple[Finding, ...]
    solved: tuple[Finding, ...]

    @property
    def changed(self) -> bool:
        """Whether anything did; the names of the modules alone do not count."""
        figures = self.figures or self.flops or self.collectives or self.memory
        return bool(self.setting or figures or self.came or self.went or self.warned or self.solved)

    def to_json(self) -> dict[str, Any]:
        """As docs/inspect.schema.json has it."""
        return {
            **heading("difference"),
            "before": self.before,
            "after": self.after,
            "changed": self.changed,
            "setting": [{"line": line, "before": before, "after": after} for line, before, after in self.setting],
            "figures": [_change(change) for change in self.figures],
            "flops": [_change(change) for change in self.flops],
            "collectives": [
                {
                    "kind": line.kind,
                    "axes": list(line.axes),
                    "phase": line.phase,
                    "dtype": line.dtype,
                    "compiled": _figures(line.payload),
                    "wire_compiled": _figures(line.wire),
                    "count": _figures(line.count),
                }
                for line in self.collectives
            ],
            "memory": [_change(change) for change in self.memory],
            "buffers": {
                "came": [buffer_json(buffer) for buffer in self.came],
                "went": [buffer_json(buffer) for buffer in self.went],
            },
            "warnings": {
                "came": [finding_json(finding) for finding in self.warned],
                "went": [finding_json(finding) for finding in self.solved],
            },
        }


def _change(change: Change) -> dict[str, Any]:
    return {"line": change.name, **_figures(change)}


def _figures(change: Change) -> dict[str, Any]:
    return {
        "before": change.before,
        "after": change.after,
        "change": change.change,
        "fraction": finite(change.fraction),
    }


# ---------------------------------------------------------------- what changed


def difference(before: Report, after: Report) -> Difference:
    """What is another in `after` than in `before`."""
    came, went = _apart(before.memory.live, after.memory.live, _which_buffer)
    warned, solved = _apart(before.warnings, after.warnings, _which_warning)
    return Difference(
        before=before.name,
        after=after.name,
        setting=tuple(_setting(before, after)),
        figures=_changes(_whole(before), _whole(after)),
        flops=_by_phase(phase_flops(before), phase_flops(after)),
        collectives=tuple(_collectives(collective_lines(before), collective_lines(after))),
        memory=_changes(_held(before), _held(after)),
        came=came,
        went=went,
        warned=warned,
        solved=solved,
    )


def _setting(before: Report, after: Report) -> Iterable[tuple[str, str, str]]:
    def told(report: Report) -> dict[str, str]:
        return {
            "compiler": COMPILERS.get(report.target, report.target or "unknown"),
            "devices": exact(report.devices),
            "mesh": mesh_text(report.mesh),
            "machine": report.machine.name if report.machine is not None else "none",
            "memory": "exact" if report.memory.exact else "a lower bound",  # the one is no measure for the other
        }

    first, second = told(before), told(after)
    return ((name, first[name], second[name]) for name in first if first[name] != second[name])


def _whole(report: Report) -> dict[str, int | float]:
    read, written = report.bytes
    least, most = report.matmul_flops_range
    figures: dict[str, int | float] = {
        "FLOPs": most,
        "FLOPs that branches leave open": most - least,
        "FLOPs that kernels declare": report.declared_flops,
        "bytes read": read,
        "bytes written": written,
        "payload of collectives": total(report.collectives, "payload"),
        "sent by collectives": total(report.collectives, "wire"),
        "not understood": len(report.not_understood),
    }
    bound = roofline(report)
    if bound is not None and report.machine is not None:
        figures[f"seconds on {report.machine.name}"] = bound.serial
    return figures


def _held(report: Report) -> dict[str, int | float]:
    memory = report.memory
    return {
        "peak": memory.peak,
        **{f"peak, {kind}": memory.classes.get(kind, 0) for kind in CLASSES},
        "aliased": memory.aliased,
        "in the host's memory": memory.host,
        "on the chip": memory.on_chip,
    }


def _changes(before: Mapping[str, int | float], after: Mapping[str, int | float]) -> tuple[Change, ...]:
    # times on two machines, or on one and on none, say nothing of the program
    seconds = {name for name in before.keys() ^ after.keys() if name.startswith("seconds on ")}
    names = [name for name in dict.fromkeys((*before, *after)) if name not in seconds]
    made = (Change(name, before.get(name, 0), after.get(name, 0)) for name in names)
    return tuple(change for change in made if change.before != change.after)


def _by_phase(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    order = sorted({*before, *after}, key=phase_order)
    return _changes({p: before.get(p, 0) for p in order}, {p: after.get(p, 0) for p in order})


def _collectives(before: Iterable[CollectiveLine], after: Iterable[CollectiveLine]) -> Iterable[CollectiveChange]:
    def by_key(lines: Iterable[CollectiveLine]) -> dict[tuple[str, tuple[str, ...], str, str], CollectiveLine]:
        return {(line.kind, line.axes, line.phase, line.dtype): line for line in lines}

    first, second = by_key(before), by_key(after)
    for key in dict.fromkeys((*first, *second)):
        one, other = first.get(key), second.get(key)
        figures = [
            Change(name, getattr(one, name, 0), getattr(other, name, 0)) for name in ("payload", "wire", "count")
        ]
        if any(change.before != change.after for change in figures):
            yield CollectiveChange(*key, *figures)


def _which_buffer(buffer: Buffer) -> tuple:
    return buffer.kind, buffer.bytes, buffer.shape, buffer.op_name


def _which_warning(finding: Finding) -> tuple:
    return finding.kind, finding.bytes, finding.op_name, re.sub(r":\d+", "", finding.source)


def _apart(
    before: Iterable[Item], after: Iterable[Item], which: Callable[[Item], tuple]
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Those of the second only, and of the first only; two that are alike are told from one."""
    first, second = list(before), list(after)
    return _beyond(second, Counter(map(which, first)), which), _beyond(first, Counter(map(which, second)), which)


def _beyond(items: Iterable[Item], known: Counter[tuple], which: Callable[[Item], tuple]) -> tuple[Item, ...]:
    left = []
    for item in items:
        key = which(item)
        if known[key]:
            known[key] -= 1
        else:
            left.append(item)
    return tuple(left)


# ---------------------------------------------------------------- as text


def print_difference(made: Difference, out: Console) -> None:
    """What changed, in the sections of a report, or that nothing did."""
    names = (("before", made.before), ("after", made.after))
    print_fields(out, [(name, shown(module or "a module without a name", out)) for name, module in names])
    if not made.changed:
        out.print()
        say(out, "Nothing changed.")
        return
    if made.setting:
        print_title(out, "Compiled for")
        rows = [Entry(setting) for setting in made.setting]
        print_entries(out, ("", "before", "after"), rows)
    _print_changes("Of a step", made.figures, out)
    phases = tuple(Change(change.name or "no phase", change.before, change.after) for change in made.flops)
    _print_changes("FLOPs by phase", phases, out)
    _print_collectives(made.collectives, out)
    _print_changes("Memory, in bytes", made.memory, out)
    _print_buffers("Alive at the peak now", made.came, out)
    _print_buffers("Alive at the peak no more", made.went, out)
    for title, findings in (("New warnings", made.warned), ("Warnings that went", made.solved)):
        if findings:
            print_title(out, f"{title}, {len(findings):,}")
            for finding in findings[:TOP]:
                print_finding(finding, out)
            print_left_out(out, max(0, len(findings) - TOP), "warning")


_HEADS = ("", ">before", ">after", ">change", ">")


def _print_changes(title: str, changes: Iterable[Change], out: Console) -> None:
    entries = [_entry(change) for change in changes]
    if entries:
        print_title(out, title)
        print_entries(out, _HEADS, entries)


def _entry(change: Change, name: str = "", inset: str = "") -> Entry:
    if isinstance(change.before, int) and isinstance(change.after, int):
        figures = (exact(change.before), exact(change.after), f"{change.change:+,}")
    else:
        sign = "+" if change.change > 0 else "-"
        figures = (duration(change.before), duration(change.after), f"{sign}{duration(abs(change.change))}")
    # 0 before: a percentage of nothing is no number
    share = "new" if change.fraction is None else "gone" if not change.after else percent(change.fraction)
    return Entry((name or change.name, *figures, share), inset=inset)


def _print_collectives(lines: Iterable[CollectiveChange], out: Console) -> None:
    entries = []
    for line in lines:
        entries.append(Entry((line.label,)))
        figures = (("payload", line.payload), ("wire", line.wire), ("times", line.count))
        entries += [_entry(change, name, "  ") for name, change in figures if change.before != change.after]
    if entries:
        print_title(out, "Collectives, in bytes")
        print_entries(out, _HEADS, entries)


def _print_buffers(title: str, buffers: tuple[Buffer, ...], out: Console) -> None:
    if not buffers:
        return
    print_title(out, f"{title}, {len(buffers):,} buffer{'s' if len(buffers) > 1 else ''}")
    listed = [buffer for buffer in buffers[:TOP] if 200 * buffer.bytes >= buffers[0].bytes]
    entries = [
        Entry((buffer.bytes, buffer.kind), (brief(buffer.shape), buffer.source or buffer.name), buffer.op_name)
        for buffer in listed
    ]
    print_entries(out, (">bytes", "class", "what"), entries)
    rest = buffers[len(listed) :]
    print_left_out(out, len(rest), "buffer", f" of {exact(sum(buffer.bytes for buffer in rest))} bytes in all")
