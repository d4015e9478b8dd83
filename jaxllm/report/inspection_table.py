"""A report as text: what one device computes, moves, sends and holds, what to try, and what is not known."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console

from jaxllm.report.entries import Entry, print_entries, print_left_out, print_title, say, shown
from jaxllm.report.inspection import CLASSES, Buffer, Finding, Memory, Place, Report, total
from jaxllm.report.inspection_lines import (
    COMPILERS,
    CollectiveLine,
    FlopsLine,
    OperationLine,
    brief,
    collective_lines,
    flops_lines,
    largest,
    mesh_text,
    operation_lines,
    phase_flops,
    roofline,
    times,
)
from jaxllm.report.table import console, print_fields
from jaxllm.report.units import duration, exact, human

TOP = 10  # of each list


def text(report: Report) -> str:
    """The report as plain text, as wide as the terminal and at least 80 columns."""
    file = io.StringIO()
    print_report(report, console(file))
    return file.getvalue().rstrip("\n")


def print_report(report: Report, out: Console) -> None:
    """Header, then a section for each thing that a device has too little of, warnings, and what is not known."""
    print_fields(out, [(name, shown(value, out)) for name, value in _header(report)])
    _print_flops(report, out)
    _print_bytes(report, out)
    _print_roofline(report, out)
    _print_collectives(report, out)
    _print_memory(report, out)
    _print_warnings(report.warnings, out)
    _print_sentences("Not understood, and not counted", report.not_understood, out, "yellow")
    _print_sentences("Taken for granted", report.assumed, out)
    out.print()
    print_fields(out, [(name, shown(value, out)) for name, value in _summary(report)])


def _header(report: Report) -> Iterable[tuple[str, str]]:
    yield "module", report.name or "a module without a name"
    yield "compiler", COMPILERS.get(report.target, report.target or "unknown")
    yield "devices", exact(report.devices)
    yield "mesh", mesh_text(report.mesh)
    if report.machine is not None:
        yield "machine", f"{report.machine.name}: {report.machine.description}"


def _summary(report: Report) -> Iterable[tuple[str, str]]:
    """What a reader looks for first, where a terminal stands when all is printed."""
    flops, wire = report.matmul_flops, total(report.collectives, "wire")
    yield "FLOPs", f"{exact(flops)} ({human(flops, 'FLOP')})"
    yield "sent", f"{exact(wire)} bytes ({human(wire)}) on the wire"
    kind = "exact" if report.memory.exact else "a lower bound"
    yield "peak", f"{exact(report.peak_bytes)} bytes ({human(report.peak_bytes)}), {kind}"
    yield "warnings", f"{len(report.warnings):,}" if report.warnings else "none"
    if report.not_understood:
        yield "unknown", f"{len(report.not_understood):,} not understood"
    if report.seconds:
        yield "time", ", ".join(f"{name} {duration(value)}" for name, value in report.seconds.items())


def _share(part: float, whole: float) -> str:
    """`33 %`, `0.4 %`; nothing where there is no part of a whole."""
    if whole <= 0 or part <= 0:
        return ""
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %" if share >= 0.05 else "<0.1 %"


# ---------------------------------------------------------------- FLOPs


def _print_flops(report: Report, out: Console) -> None:
    print_title(out, "Multiplied by one device in a step, in FLOPs")
    phases, (least, most) = phase_flops(report), report.matmul_flops_range
    if not most and not report.products:
        say(out, "nothing", indent="  ")
        return
    rows = [(phase or "no phase", flops) for phase, flops in phases.items()]
    if len(rows) == 1 and rows[0][1] == least == most:
        rows = [(f"{rows[0][0]}, all", most)]
    else:
        # of the branches of a conditional one runs, and the products of all of them are listed
        if excess := most - sum(phases.values()):
            rows.append(("branches instead of which others run", excess))
        rows += [("total", most)] if least == most else [("total, at least", least), ("total, at most", most)]
    listed = max(most, sum(phases.values()))  # what branches do that do not run together is listed too
    entries = [Entry((name, flops, human(flops, "").strip(), _share(flops, listed))) for name, flops in rows]
    print_entries(out, ("", ">", ">", ">"), entries)

    lines = flops_lines(report)
    known = [line for line in lines if not line.declared]
    if known:
        out.print()
        say(out, "By line of the source", indent="  ")
        _print_flops_lines(known, listed, out)
    declared = [line for line in lines if line.declared]
    if declared:
        out.print()
        figure = exact(report.declared_flops)
        say(out, f"Declared by kernels of themselves, {figure} in all, and no part of the total", indent="  ")
        _print_flops_lines(declared, report.declared_flops, out)


def _print_flops_lines(lines: Sequence[FlopsLine], whole: int, out: Console) -> None:
    entries = [
        Entry(
            (
                line.flops,
                _share(line.flops, whole),
                times([p.place for p in line.products]),
                line.phase,
                line.kind,
                line.dtype,
            ),
            (
                line.source or "no source line",
                _alike([p.shapes for p in line.products]),
                _branch(line.products[0].place),
            ),
            _same([p.place.op_name for p in line.products]),
        )
        for line in lines[:TOP]
    ]
    print_entries(out, (">FLOPs", ">share", "times", "phase", "kind", "of", "where"), entries)
    rest = lines[TOP:]
    print_left_out(out, len(rest), "line", f" of {exact(sum(line.flops for line in rest))} FLOPs in all")


def _alike(texts: Sequence[str]) -> str:
    """The first of different texts, and how many others there are."""
    different = list(dict.fromkeys(filter(None, texts)))
    if len(different) < 2:
        return different[0] if different else ""
    return f"{different[0]} and {len(different) - 1:,} other{'s' if len(different) > 2 else ''}"


def _same(op_names: Sequence[str]) -> str:
    """The name of an operation, when all have it."""
    return op_names[0] if len(set(op_names)) == 1 else ""


def _branch(place: Place) -> str:
    return "in a branch that may not be taken" if place.conditional else ""


# ---------------------------------------------------------------- bytes and time


def _print_bytes(report: Report, out: Console) -> None:
    print_title(out, "Moved by one device in a step, in bytes of its memory")
    read, written = report.bytes
    if not read + written:
        say(out, "nothing", indent="  ")
        return
    rows = (("read", read), ("written", written), ("total", read + written))
    print_entries(out, ("", ">", ">"), [Entry((name, value, human(value))) for name, value in rows])
    flops = report.matmul_flops
    say(out, f"Arithmetic intensity: {_ratio(flops / (read + written))} FLOPs a byte{_balance(report)}", indent="  ")
    if any(operation.place.conditional for operation in report.operations):
        say(out, "All branches of conditionals are counted, so that this is the most there can be.", indent="  ")


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _balance(report: Report) -> str:
    """From which intensity on a machine computes longer than it moves, in the dtype that most FLOPs are of."""
    machine = report.machine
    by_dtype: dict[str, int] = {}
    for product in report.products:
        by_dtype[product.dtype] = by_dtype.get(product.dtype, 0) + product.flops * product.place.count
    if machine is None or not machine.bandwidth or not by_dtype:
        return ""
    dtype = max(by_dtype, key=lambda name: (by_dtype[name], name))
    if dtype == "f32" and "tf32" in machine.peak_flops:
        dtype = "tf32"  # in which GPUs multiply f32 unless told otherwise
    peak = machine.peak_flops.get(dtype)
    return f"; {machine.name} has {_ratio(peak / machine.bandwidth)} in {dtype}" if peak else ""


def _print_roofline(report: Report, out: Console) -> None:
    lines = operation_lines(report)
    bound = roofline(report)
    if bound is None or not bound.serial:
        if bound is not None:
            print_title(out, f"Time of a step on {shown(report.machine.name if report.machine else '', out)}")
            say(out, "no bound is known: the machine's file states nothing of what the step uses", indent="  ")
        if lines:
            out.print()
            say(out, "By line of the source", indent="  ")
            _print_movers(lines, out)
        return
    assert report.machine is not None
    print_title(out, f"Time of a step on {shown(report.machine.name, out)}, at least, one operation after another")
    rows = [(f"bound by {name}", seconds) for name, seconds in bound.bounds.items()]
    rows.append(("total", bound.serial))
    entries = [Entry((name, duration(seconds), _share(seconds, bound.serial))) for name, seconds in rows]
    print_entries(out, ("", ">", ">"), entries)
    if bound.hidden < bound.serial:
        hidden = f"{duration(bound.hidden)} when asynchronous collectives run beside all else, one after another."
        say(out, hidden, indent="  ")
    if bound.unknown:
        unknown = f"{bound.unknown:,} operation{'s' if bound.unknown > 1 else ''}"
        say(out, f"Without {unknown} for which the machine's file states no peak.", indent="  ")
    out.print()
    say(out, "What takes most of it, by line of the source", indent="  ")
    slow = [line for line in lines if line.seconds]
    entries = [
        Entry(
            (
                duration(line.seconds),
                _share(line.seconds, bound.serial),
                _times(line),
                line.bound,
                line.phase,
                line.opcode,
            ),
            (_where(line), _work(line)),
            _same([o.place.op_name for o in line.operations]),
        )
        for line in slow[:TOP]
    ]
    print_entries(out, (">time", ">share", "times", "bound", "phase", "operation", "where"), entries)
    rest = sum(line.seconds for line in slow[TOP:])
    print_left_out(out, len(slow[TOP:]), "line", f" of {duration(rest)} in all")


def _print_movers(lines: Sequence[OperationLine], out: Console) -> None:
    """Without a machine: what moves most bytes."""
    lines = sorted(lines, key=lambda line: (-line.moved, line.source, line.opcode, line.phase))
    whole = sum(line.moved for line in lines)
    entries = [
        Entry(
            (line.moved, _share(line.moved, whole), _times(line), line.phase, line.opcode),
            (
                _where(line),
                f"{human(line.flops, 'FLOP')}, {_ratio(line.flops / line.moved)} FLOPs a byte" if line.flops else "",
            ),
            _same([o.place.op_name for o in line.operations]),
        )
        for line in lines[:TOP]
    ]
    print_entries(out, (">bytes", ">share", "times", "phase", "operation", "where"), entries)
    rest = lines[TOP:]
    print_left_out(out, len(rest), "line", f" of {exact(sum(line.moved for line in rest))} bytes in all")


def _work(line: OperationLine) -> str:
    """What it does in a step: `8.59 GFLOP, 160 MB, 53.7 FLOPs a byte`."""
    parts = [human(line.flops, "FLOP")] if line.flops else []
    parts += [human(line.moved)] if line.moved else []
    if line.flops and line.moved:
        parts.append(f"{_ratio(line.flops / line.moved)} FLOPs a byte")
    return ", ".join(parts)


def _times(line: OperationLine) -> str:
    return times([operation.place for operation in line.operations])


def _where(line: OperationLine) -> str:
    """The source line, or the names of the instructions when there is none."""
    return line.source or _alike([operation.place.name for operation in line.operations])


# ---------------------------------------------------------------- collectives


def _print_collectives(report: Report, out: Console) -> None:
    print_title(out, "Sent by one device in a step, in bytes")
    lines = collective_lines(report)
    entries = [Entry((line.payload, line.wire, line.count, line.label), tuple(_of_collective(line))) for line in lines]
    if len(lines) > 1:
        sums = (
            sum(line.payload for line in lines),
            sum(line.wire for line in lines),
            sum(line.count for line in lines),
        )
        entries.append(Entry((*sums, "total")))
    print_entries(out, (">payload", ">wire", ">times", "collective"), entries, empty="no collectives")


def _of_collective(line: CollectiveLine) -> Iterable[str]:
    groups = f"in groups of {' or '.join(f'{ranks:,}' for ranks in line.ranks)}"
    loops = {collective.place.trips for collective in line.collectives if collective.place.trips}
    if len(loops) == 1 and len({collective.place.trips for collective in line.collectives}) == 1:
        trips = loops.pop()
        groups += f", in {_loops(len(trips))} of {' x '.join(f'{trip:,}' for trip in trips)}"
    elif loops:
        groups += f", some in {_loops(line.depth)}"
    yield groups
    if line.overlapped:
        yield f"overlaps with compute{_part(line.overlapped, line)}"
    elif any(collective.asynchronous for collective in line.collectives):
        yield "asynchronous, overlaps with nothing"
    else:
        yield "synchronous"
    if line.disguise:
        hidden = sum(collective.place.count for collective in line.collectives if collective.disguise)
        yield f"{line.disguise} in disguise{_part(hidden, line)}"
    if any(collective.place.conditional for collective in line.collectives):
        yield "in branches that may not be taken, counted as the most there can be"
    if not line.sources:
        yield "no source line"
    yield from line.sources[:3]
    if len(line.sources) > 3:
        left = len(line.sources) - 3
        yield f"and {left:,} more line{'s' if left > 1 else ''}"


def _part(number: int, line: CollectiveLine) -> str:
    return "" if number == line.count else f" ({number:,} of {line.count:,})"


def _loops(depth: int) -> str:
    return "a loop" if depth == 1 else f"{depth} nested loops"


# ---------------------------------------------------------------- memory


def _print_memory(report: Report, out: Console) -> None:
    memory = report.memory
    print_title(out, "Memory of one device at the peak, in bytes")
    order = {kind: index for index, kind in enumerate(CLASSES)}
    kinds = sorted(memory.classes, key=lambda kind: (order.get(kind, len(order)), kind))
    rows = [(kind, memory.classes[kind]) for kind in kinds] + [("peak", memory.peak)]
    entries = [Entry((name, value, human(value), _share(value, memory.peak))) for name, value in rows]
    print_entries(out, ("", ">", ">", ">"), entries)
    say(
        out,
        "Exact: the compiler's own assignment of buffers."
        if memory.exact
        else "A lower bound, from lifetimes alone: no assignment of buffers was given.",
        "" if memory.exact else "yellow",
        indent="  ",
    )
    for line in _capacity(report):
        say(out, line, indent="  ")
    for what, value in (
        ("of outputs that take an argument's place (donated)", memory.aliased),
        ("in the host's memory, no part of the peak", memory.host),
        ("on the chip, no part of the peak", memory.on_chip),
    ):
        if value:
            say(out, f"{exact(value)} bytes ({human(value)}) {what}.", indent="  ")
    if memory.where is not None:
        place = f"The peak is at step {memory.at:,} of {memory.steps:,}: {_place(memory.where)}"
        say(out, place, indent="  ", more="  ")
    if memory.live:
        out.print()
        say(out, f"Largest of the {len(memory.live):,} buffers that are alive there", indent="  ")
        _print_buffers(memory, out)


def _capacity(report: Report) -> Iterable[str]:
    capacity = report.machine.capacity if report.machine is not None else None
    if report.machine is None or capacity is None:
        return
    peak = report.memory.peak
    outcome = "fits" if peak <= capacity else f"does not fit, {human(peak - capacity)} too much"
    share = _share(peak, capacity) or "0 %"
    yield f"{share} of the {human(capacity)} that {report.machine.name} has for use: {outcome}."


def _place(place: Place) -> str:
    often = "" if place.count == 1 else times([place])
    parts = (place.name, place.phase, often, place.source or "no source line", place.op_name)
    return ", ".join(part for part in parts if part)


def _print_buffers(memory: Memory, out: Console) -> None:
    listed = largest(memory, TOP)
    entries = [
        Entry(
            (buffer.bytes, _share(buffer.bytes, memory.peak), buffer.kind, _alive(buffer, memory)),
            (brief(buffer.shape), buffer.source or buffer.name),
            buffer.op_name,
        )
        for buffer in listed
    ]
    print_entries(out, (">bytes", ">share", "class", "steps", "what"), entries)
    rest = memory.live[len(listed) :]
    print_left_out(out, len(rest), "buffer", f" of {exact(sum(buffer.bytes for buffer in rest))} bytes in all")


def _alive(buffer: Buffer, memory: Memory) -> str:
    return "all" if buffer.start <= 0 and buffer.end >= memory.steps - 1 else f"{buffer.start:,} to {buffer.end:,}"


# ---------------------------------------------------------------- what to do, and what is not known


def _print_warnings(warnings: Sequence[Finding], out: Console) -> None:
    number = f", {len(warnings):,}" if warnings else ""
    print_title(out, f"Warnings{number}")
    if not warnings:
        say(out, "none", indent="  ")
    ordered = sorted(warnings, key=lambda finding: -finding.bytes)
    for finding in ordered[:TOP]:
        print_finding(finding, out)
    print_left_out(out, len(ordered) - TOP if len(ordered) > TOP else 0, "warning")


def print_finding(finding: Finding, out: Console, sign: str = "") -> None:
    """What it is, where it is, and what to try."""
    # the name of the operation is for those who look it up: it stands in the JSON, and here where no line is known
    say(out, f"{sign}{finding.kind}: {finding.message}", "yellow", indent="  ", more="  ")
    where = finding.source or finding.op_name
    if where:
        say(out, f"at {where}", indent="    ", more="   ")
    if finding.advice:
        say(out, f"try: {finding.advice}", indent="    ", more="     ")


def _print_sentences(title: str, sentences: Sequence[str], out: Console, style: str = "") -> None:
    if not sentences:
        return
    print_title(out, f"{title}, {len(sentences):,}")
    numbers: dict[str, int] = {}
    for sentence in sentences:
        numbers[sentence] = numbers.get(sentence, 0) + 1
    listed = list(numbers.items())
    for sentence, number in listed[:TOP]:
        say(out, sentence + (f" ({number:,} times)" if number > 1 else ""), style, indent="  ", more="  ")
    print_left_out(out, len(listed) - TOP if len(listed) > TOP else 0, "sentence")
