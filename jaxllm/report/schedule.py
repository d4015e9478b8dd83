"""A pipeline schedule for people and for programs: its table in the terminal, its counts, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxllm.report.table import print_fields
from jaxllm.report.units import one_line
from jaxllm.schedules.closed_forms import CLOSED_FORMS, closed_bubble
from jaxllm.schedules.counts import slots, traffic, transfers
from jaxllm.schedules.simulation import Simulation
from jaxllm.schedules.table import Cell, Schedule

_IDLE = "."
MOST_SHOWN = 10_000  # cells, as in a picture
_MEANING = {"F": "forward", "B": "gradient of the inputs", "W": "gradient of the weights", "BW": "both gradients"}
# what a terminal adds; the letters tell the same
_STYLES = {
    "F": "black on bright_blue",
    "B": "black on bright_green",
    "W": "black on bright_yellow",
    "BW": "black on green",
}


def print_schedule(simulation: Simulation, out: Console) -> None:
    """What it costs and keeps, then its table: a row for each stage, in blocks of ticks that fit the console."""
    schedule = simulation.schedule
    print_fields(out, _summary(simulation))
    out.print()
    cells = sum(map(len, schedule.orders))
    if cells > MOST_SHOWN:
        out.print(Text(f"{cells:,} cells are too many to read here; --json has all of them, and --trace draws them", "dim"))
        return
    for line in _blocks(schedule, out.width):
        out.print(line, soft_wrap=True)
    kinds = [kind for kind in _MEANING if any(cell.kind == kind for _, _, cell in schedule.cells())]
    legend = ", ".join(f"{kind} {_MEANING[kind]}" for kind in kinds)
    chunk = "; F3.1 is chunk 1 of microbatch 3" if schedule.chunks > 1 else ""
    print_fields(out, [("cells", f"{legend}; {_IDLE} idle{chunk}")])


def document(simulation: Simulation) -> dict[str, Any]:
    """All of it as plain dicts and lists, for --json. Activations are those of one chunk and microbatch."""
    schedule, times = simulation.schedule, simulation.times
    kept, sent = slots(schedule), transfers(schedule)
    return {
        "schema": 1,
        "name": one_line(schedule.name),
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "chunks": schedule.chunks,
        "placement": schedule.placement,
        "ticks": schedule.ticks,
        "table": [[None if cell is None else str(cell) for cell in row] for row in schedule.table],
        "times": {"f": times.f, "b": times.b, "w": times.w, "comm": times.comm},
        "span": simulation.span,
        "bubble": simulation.bubble,
        "in_step": simulation.in_step,
        "closed_form_bubble": closed_bubble(schedule, times),
        "stash": [
            {
                "stage": stage,
                "activations": peak.stash,
                "whole_stage_activations": peak.stash / schedule.chunks,
                "weight_stash": peak.weights,
            }
            for stage, peak in enumerate(kept.stages)
        ],
        "slots": {"inputs": kept.inputs, "stash": kept.stash, "weights": kept.weights},
        "transfers": {
            "stages": [
                {
                    "stage": stage,
                    "activations_up": one.activations_up,
                    "activations_down": one.activations_down,
                    "cotangents_up": one.cotangents_up,
                    "cotangents_down": one.cotangents_down,
                }
                for stage, one in enumerate(sent)
            ],
            "relative_to_1f1b": traffic(sent, schedule.stages, schedule.microbatches),
        },
    }


def title(simulation: Simulation) -> str:
    """`1f1b, 4 stages, 8 microbatches`."""
    schedule = simulation.schedule
    parts = [one_line(schedule.name), _many(schedule.stages, "stage"), _many(schedule.microbatches, "microbatch")]
    if schedule.chunks > 1:
        parts.append(f"{schedule.chunks} chunks on each stage")
    return ", ".join(parts)


def cost(simulation: Simulation) -> str:
    """`a step spans 33, 24 of it work: bubble 27.3 %`."""
    work = simulation.schedule.microbatches * simulation.times.stage
    return f"a step spans {simulation.span:g}, {work:g} of it work: bubble {100 * simulation.bubble:.2f} %"


def timing(simulation: Simulation) -> str:
    """The times that were asked for, as they are typed."""
    times = simulation.times
    return f"f={times.f:g}, b={times.b:g}, w={times.w:g}, comm={times.comm:g}"


def _summary(simulation: Simulation) -> list[tuple[str, str]]:
    schedule = simulation.schedule
    kept, sent = slots(schedule), transfers(schedule)
    lines = [
        ("schedule", title(simulation)),
        ("ticks", f"{schedule.ticks:,}; a result can be used from the next tick on"),
        ("times", f"{timing(simulation)}, for one microbatch on a whole stage"),
        ("span", cost(simulation)),
        ("", _closed(simulation)),
        ("", f"with all stages in step, as in one program: {simulation.in_step:g}"),
        ("stash", f"{_runs([peak.stash for peak in kept.stages])}; {_unit(schedule)}"),
    ]
    if kept.weights:
        lines.append(("", f"{_runs([peak.weights for peak in kept.stages])}; kept from B to W"))
    lines.append(("inputs", f"{_runs([peak.inputs for peak in kept.stages])}; what came in and waits for its cell"))
    share = traffic(sent, schedule.stages, schedule.microbatches)
    lines.append(("sent", f"{_runs([one.total for one in sent])}; {share:.3g} x what 1f1b sends"))
    return lines


def _unit(schedule: Schedule) -> str:
    if schedule.chunks == 1:
        return "activations of a stage and microbatch, kept from F to its backward"
    most = max(peak.stash for peak in slots(schedule).stages) / schedule.chunks
    return f"activations of a chunk and microbatch, kept from F to its backward; at most {most:g} of a whole stage"


def _closed(simulation: Simulation) -> str:
    schedule, times = simulation.schedule, simulation.times
    value, form = closed_bubble(schedule, times), CLOSED_FORMS.get(schedule.name)
    if form is None:
        return "closed form: none is known"
    if value is None:
        return f"closed form: idle {form.formula} holds not here, but where {form.when}"
    same = "the same" if abs(value - simulation.bubble) < 1e-9 else "not the same"
    return f"closed form: idle {form.formula}, bubble {100 * value:.2f} %: {same}"


def _runs(values: Sequence[int]) -> str:
    """Numbers of the stages in order, with runs of the same number put together: `8 on each`, `4, 3, 2, 1 by stage`."""
    if len(set(values)) == 1:
        return f"{values[0]:,} on each stage"
    steps = [after - before for before, after in pairwise(values)]
    if len(values) > 8 and set(steps) == {-1}:
        return f"{values[0]:,} down to {values[-1]:,} by stage"
    shown = [
        f"{value:,}" if count == 1 else f"{count} x {value:,}"
        for value, count in ((value, len(list(group))) for value, group in groupby(values))
    ]
    return f"{', '.join(shown)} by stage" if len(values) > 2 else f"{' and '.join(shown)} by stage"


def _many(count: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{count:,} {what if count == 1 else plural}"


def _blocks(schedule: Schedule, width: int) -> Iterable[Text]:
    """The table with time to the right."""
    names = [f"stage {stage}" for stage in range(schedule.stages)]
    left = max(map(len, names))
    wide = max(len(str(schedule.ticks - 1)), *(len(str(cell)) for _, _, cell in schedule.cells()))
    # `wide` characters and one between two ticks
    ticks = max(1, (width - left) // (wide + 1))
    for start in range(0, schedule.ticks, ticks):
        rows = schedule.table[start : start + ticks]
        if start:
            yield Text()
        yield Text(f"{'tick':<{left}}" + "".join(f" {tick:>{wide}}" for tick in range(start, start + len(rows))), "dim")
        for stage, name in enumerate(names):
            line = Text.assemble((f"{name:<{left}}", "bold"))
            for row in rows:
                line.append(" ")
                line.append_text(_drawn(row[stage], wide))
            line.rstrip()
            yield line


def _drawn(cell: Cell | None, wide: int) -> Text:
    if cell is None:
        return Text(f"{_IDLE:>{wide}}", "dim")
    return Text(f"{cell!s:>{wide}}", _STYLES[cell.kind])
