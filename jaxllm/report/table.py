"""The comparison as text: what each device holds, computes and sends, by both authors, and the verdict.

Columns are laid out by hand, because a number that is cut off is worse than a line that is too long: at 80 columns
everything fits, and where it cannot, lines grow.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from jaxllm.report.compare import DIFFERS, EQUAL, NOT_COMPARABLE, Comparison, Row, Setup, worst
from jaxllm.report.units import exact, human, percent, wrap

if TYPE_CHECKING:
    from typing import TextIO

STYLES = {EQUAL: "green", DIFFERS: "bold red", "n/c": "yellow"}
_TITLES = {
    "memory": "Memory of one device, in bytes",
    "pipeline": "Schedule of the pipeline",
    "flops": "Computed by one device in a step, in FLOPs",
    "collectives": "Collectives of one device in a step, in bytes",
    "transfers": "Copied between device and host memory in a step, in bytes",
}
_FIELD = 10  # width of the names in the header and in the verdict

Cell = tuple[str, str, str, str, str]  # name, closed form, compiler, short form, status


class _Console(Console):
    """rich's console ends the process with 1 when the reader has gone, which here means that something differs."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(file: TextIO | None = None) -> Console:
    """A console that writes at least 80 columns, plain text when the file is not a terminal."""
    # a notebook shows what is printed, and rich would show it a second time; a text in memory is no terminal
    plain = False if isinstance(file, io.StringIO) else None
    made = _Console(
        file=file, highlight=False, markup=False, emoji=False, soft_wrap=False, force_jupyter=False, force_terminal=plain
    )
    if made.width < 80:
        made.width = 80
    return made


def print_comparison(comparison: Comparison, setup: Setup, out: Console) -> None:
    """Header, one table with the three sections, notes, verdict."""
    print_fields(out, header(comparison, setup))
    _print_sections(comparison, out)
    _print_notes(comparison, out)
    out.print()
    for name, value, style in verdict(comparison, setup):
        _print_field(out, name, value, style)


def header(comparison: Comparison, setup: Setup) -> list[tuple[str, str]]:
    """What was asked, as (name, value)."""
    work, mesh = setup.workload, setup.mesh
    done = "compiled, not run" if comparison.run is None else "compiled and run"
    return [
        ("model", f"{setup.model.name}, {setup.model.parameters:,} parameters"),
        ("mesh", f"{mesh}, {mesh.devices:,} device{'s' if mesh.devices > 1 else ''}"),
        ("layout", str(setup.layout)),
        ("workload", f"batch {work.batch:,}, sequence {work.sequence:,}"),
        ("precision", f"{work.precision}, gradients in {work.dtypes.gradients}, optimizer {work.optimizer}"),
        ("target", f"{setup.target}: {done}"),
    ]


def verdict(comparison: Comparison, setup: Setup) -> list[tuple[str, str, str]]:
    """The outcome, as (name, sentence, style)."""
    lines = [("lines", *_line_verdict(comparison))]
    if comparison.unexplained:
        lines.append(("", f"{len(comparison.unexplained)} unexplained", "bold red"))
    lines.append(("peak", *_peak_verdict(comparison)))
    lines.append(("capacity", *_capacity_verdict(comparison, setup)))
    if comparison.run is not None:
        lines.append(("run", *_run_verdict(comparison)))
    if comparison.seconds:
        parts = [f"{name} {value:.1f}" for name, value in comparison.seconds.items()]
        lines.append(("seconds", ", ".join(parts) + ("; all but the first from the cache" if comparison.cached else ""), ""))
    return lines


def _line_verdict(comparison: Comparison) -> tuple[str, str]:
    rows = [row for row in comparison.rows if not row.empty]
    number = {status: sum(row.status == status for row in rows) for status in (EQUAL, DIFFERS, NOT_COMPARABLE)}
    text = f"equal line by line: {number[EQUAL]} of {len(rows)}"
    for status in (DIFFERS, NOT_COMPARABLE):
        if number[status]:
            text += f", {number[status]} {status}"
    return text, "bold red" if number[DIFFERS] else "green"


def _peak_verdict(comparison: Comparison) -> tuple[str, str]:
    peak = comparison.peak
    text = "; ".join(
        f"{author} {exact(value)} ({human(value)})" if value is not None else f"{author} unknown"
        for author, value in zip(comparison.authors, (peak.predicted, peak.compiled), strict=True)
    )
    if peak.error is None:
        return f"{text}; not comparable", "yellow"
    place = "within" if peak.within else "outside"
    text += f"; an estimate, off by {percent(peak.error)}, {place} the tolerance of {100 * peak.tolerance:.0f} %"
    return text, "green" if peak.within else "yellow"


def _capacity_verdict(comparison: Comparison, setup: Setup) -> tuple[str, str]:
    peak = comparison.peak
    if peak.refused:
        return f"does not fit: the compiler says {peak.refused}", "bold red"
    if peak.capacity is None:
        return "no limit is known for this machine: fits", "green"
    if peak.decisive is None:
        return f"{human(peak.capacity)} usable{_share(setup)}; no peak is known, so nothing is said", "yellow"
    used = peak.decisive / peak.capacity
    # 100.0 % of a card that is too small by a byte would read like a fit: the sentence says which it is
    outcome = "fits" if peak.fits else f"does not fit, {human(peak.decisive - peak.capacity)} too much"
    by = "" if peak.compiled is not None else ", by closed form only"
    text = f"{human(peak.decisive)} is {100 * used:.1f} % of {human(peak.capacity)} usable"
    return f"{text}{_share(setup)}: {outcome}{by}", "green" if peak.fits else "bold red"


def _share(setup: Setup) -> str:
    """How the usable bytes follow from the card's: a fraction and a reserve, from the machine's file."""
    machine = setup.mesh.machine
    reserve = f" - {human(machine.reserve_bytes)}" if machine.reserve_bytes else ""
    return f" ({machine.usable_fraction:g} x {human(machine.memory_bytes)}{reserve})"


def _run_verdict(comparison: Comparison) -> tuple[str, str]:
    run = comparison.run
    assert run is not None
    outcome = "agree with" if run.agrees else "differ from"
    whole = f", of a tensor as a whole {_within(run.sizes, run.size_tolerance)}" if run.sizes else ""
    losses = ", ".join(f"{loss:.6g}" for loss in run.losses)
    text = (
        f"{run.steps} steps {outcome} the unsharded reference: largest relative error "
        f"{_within(run.errors, run.tolerance)}{whole}; losses {losses}"
    )
    return text, "green" if run.agrees else "bold red"


def _within(errors: Mapping[str, float], limit: float) -> str:
    """The worst of some errors, and whether it is within its limit."""
    name = worst(errors)
    return f"{errors[name]:.1e} in {name} {'<=' if errors[name] <= limit else '>'} {limit:.0e}"


def print_fields(out: Console, fields: Iterable[tuple[str, str]]) -> None:
    """Names to the left, values beside them, wrapped."""
    for name, value in fields:
        _print_field(out, name, value)


def _print_field(out: Console, name: str, value: str, style: str = "") -> None:
    for index, line in enumerate(wrap(value, out.width - _FIELD)):
        field = f"{name if not index else '':<{_FIELD}}"
        out.print(Text.assemble((field, "bold"), (line, style)), soft_wrap=True)


def _print_sections(comparison: Comparison, out: Console) -> None:
    blocks: list[tuple[str, list[Cell | str]]] = []
    for section, title in _TITLES.items():
        rows = [row for row in comparison.section(section) if not row.empty]
        if section in ("pipeline", "transfers") and not rows:
            continue  # there is none
        cells = [cell for row in rows for cell in _cells(row)]
        blocks.append((title, cells or ["  nothing"]))
    heads = ("", *comparison.authors, "", "")
    print_columns(out, blocks, heads)


def print_columns(out: Console, blocks: Sequence[tuple[str, Sequence[Cell | str]]], heads: Cell) -> None:
    """Titles, each with its rows in columns that are shared by all titles; a bare string is a row of its own."""
    cells = [heads, *(cell for _, rows in blocks for cell in rows if not isinstance(cell, str))]
    widths = [max(len(cell[column]) for cell in cells) for column in range(4)]
    for title, rows in blocks:
        out.print()
        out.print(Text(title, "bold"), soft_wrap=True)
        out.print(Text(_columns(heads, widths), "dim"), soft_wrap=True)
        for cell in rows:
            if isinstance(cell, str):
                out.print(Text(cell), soft_wrap=True)
            else:
                line = Text(_columns(cell, widths))
                line.append(f" {cell[4]}" if cell[4] else "", STYLES.get(cell[4], ""))
                out.print(line, soft_wrap=True)


def _columns(cell: Cell, widths: Sequence[int]) -> str:
    name, predicted, compiled, short, _ = cell
    return f"{name:<{widths[0]}} {predicted:>{widths[1]}} {compiled:>{widths[2]}} {short:>{widths[3]}}".rstrip()


def _cells(row: Row) -> Iterable[Cell | str]:
    status = "n/c" if row.status == NOT_COMPARABLE else row.status
    unit = "B" if row.section in ("memory", "collectives", "transfers") else ""

    def cell(name: str, predicted: int | None, compiled: int | None, state: str) -> Cell:
        known = predicted if compiled is None else compiled
        return name, exact(predicted), exact(compiled), human(known, unit).strip(), state

    if row.section != "collectives":
        yield cell(f"  {row.label}", row.predicted, row.compiled, status)
        yield from _by_stage(row, unit)
        return
    yield f"  {row.label}" + (f", {row.count:,} times" if (row.count or 0) > 1 else "")
    yield cell("    payload", row.predicted, row.compiled, status)
    yield cell("    wire", row.wire_predicted, row.wire_compiled, "")
    if row.emitted is not None and row.emitted != row.compiled:
        yield cell("    emitted", None, row.emitted, "")
    yield from _by_stage(row, unit)


def _by_stage(row: Row, unit: str) -> Iterable[str]:
    """What each stage of a pipeline has, where they are not alike: `0: 4.2 MB; 1 to 7: 3.1 MB`. In whole numbers where
    stages that are not alike would look so with three digits."""
    stages = row.predicted_stages or row.compiled_stages
    if not stages:
        return
    short = {value: human(value, unit).strip() for value in stages}
    if len(set(short.values())) < len(short):
        short = {value: f"{value:,} {unit}".strip() for value in stages}
    runs: list[list[int]] = []
    for stage, value in enumerate(stages):
        if runs and stages[runs[-1][0]] == value:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    named = (f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    parts = [f"{name}: {short[stages[run[0]]]}" for name, run in zip(named, runs, strict=True)]
    shown = parts if len(parts) <= 8 else [*parts[:4], "...", *parts[-3:]]
    yield f"    by stage {'; '.join(shown)}"


def _print_notes(comparison: Comparison, out: Console) -> None:
    notes = list(_notes(comparison))
    if notes:
        out.print()
    for note, style in notes:
        for line in wrap(note, out.width, "  "):
            out.print(Text(line, style), soft_wrap=True)


def _notes(comparison: Comparison) -> Iterable[tuple[str, str]]:
    for row in comparison.rows:
        if row.status == DIFFERS:
            yield f"differs: {row.label}: {_difference(row)}", "bold red"
    for row in comparison.rows:
        if row.status == NOT_COMPARABLE:
            yield f"n/c, not comparable: {row.label}: {row.reason}", "yellow"
    seen: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for row in comparison.rows:
        for rule in row.rules:
            seen.setdefault((rule.name, rule.why), []).append((row.label, rule.bytes))
    for (name, why), touched in seen.items():
        where = ", ".join(f"{label} ({human(moved)})" for label, moved in touched)
        yield f"rule {name}: {why}; on {where}", ""
    for text in comparison.unexplained:
        yield f"unexplained: {text}", "bold red"
    for text in comparison.notes:
        yield f"note: {text}", ""


def _difference(row: Row) -> str:
    unit = "FLOPs" if row.section == "flops" else "bytes"
    parts = []
    for name, predicted, compiled in (
        ("payload " if row.section == "collectives" else "", row.predicted, row.compiled),
        ("wire ", row.wire_predicted, row.wire_compiled),
    ):
        if predicted is not None and compiled is not None and predicted != compiled:
            share = f" ({percent((compiled - predicted) / predicted)})" if predicted else ""
            parts.append(f"{name}{compiled - predicted:+,} {unit}{share}")
    for stage in range(len(row.predicted_stages or row.compiled_stages)):
        predicted, compiled = row.on_stage(stage)
        if predicted is not None and compiled is not None and predicted != compiled:
            parts.append(f"{compiled - predicted:+,} {unit} on stage {stage}")
    return f"the compiler has {' and '.join(parts)}"


def print_listing(out: Console, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table: text to the left, numbers to the right with thousands separators; the last column is wrapped."""
    shown = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(heads), *shown]) for column in range(len(heads))]
    numbers = [all(isinstance(row[column], int) for row in rows) for column in range(len(heads))]

    room = max(20, out.width - sum(widths[:-1]) - 2 * len(widths[:-1]))

    def lines(cells: Sequence[str]) -> str:
        parts = [f"{c:>{w}}" if number else f"{c:<{w}}" for c, w, number in zip(cells, widths, numbers, strict=True)]
        if numbers[-1] or len(cells[-1]) <= room:
            return "  ".join(parts).rstrip()
        before = "  ".join(parts[:-1]) + "  "
        return before + f"\n{'':<{len(before)}}".join(wrap(cells[-1], room))

    out.print(Text(lines(heads), "bold"), soft_wrap=True)
    for row in shown:
        out.print(Text(lines(row)), soft_wrap=True)


def print_figures(out: Console, name: str, figures: Iterable[tuple[str, str, str]]) -> None:
    """All figures of a model or machine as (figure, value, source); each source is written once and numbered."""
    figures = list(figures)
    sources = list(dict.fromkeys(source for _, _, source in figures if source))
    wide = max(len(figure) for figure, _, _ in figures) + 4
    # numbers line up on the right as long as all values are short; descriptions are wrapped instead
    short = [len(value) for _, value, _ in figures if len(value) <= 24]
    long = max(short, default=0)
    out.print(Text(name, "bold"), soft_wrap=True)
    for figure, value, source in figures:
        mark = f"  [{sources.index(source) + 1}]" if source else ""
        first, *more = wrap(value, out.width - wide - len(mark))
        line = Text(f"  {figure:<{wide - 2}}" + (f"{first:>{long}}" if len(value) <= 24 else first))
        for extra in more:
            line.append(f"\n{'':<{wide}}{extra}")
        out.print(line + Text(mark, "dim"), soft_wrap=True)
    for number, source in enumerate(sources, start=1):
        for text in wrap(f"[{number}] {source}", out.width, "    "):
            out.print(Text(text, "dim"), soft_wrap=True)
