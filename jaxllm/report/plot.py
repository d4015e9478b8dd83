"""The comparison as a picture: what fills the memory of a device, and what travels, by both authors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.report.compare import Comparison, Setup
from jaxllm.report.drawing import LIMIT, ON_WHITE, in_bytes, picture, save, tidy
from jaxllm.report.files import output_path
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

# Bottom to top: what stays between steps, then what a step needs. Host memory is not the device's.
_STACK = {
    "parameters": "#1d4e89",
    "optimizer": "#4a8fc7",
    "batch": "#a9cfe8",
    "gradients": "#e07a1f",
    "residuals": "#f2b14c",
    "stash": "#f2b14c",
    "weight_stash": "#f7cf8d",
    "inbox": "#c98a2b",
    "uniform": "#b9b4a6",
    "padding": "#8a8a8a",
}
_REST, _REST_COLOUR = "temporaries up to the peak", "#e3e0d8"
_PREDICTED, _COMPILED = "#9aa5b1", "#1d4e89"


def check_path(text: str) -> Path:
    """The path of a picture that can be written. Raises SpecError."""
    return output_path("--plot", text, SUFFIXES, "a picture")


def save_plot(comparison: Comparison, setup: Setup, path: Path) -> None:
    """Writes the picture. Raises SpecError when the file cannot be written after all."""
    travels = _travels(comparison)
    with picture(11, max(5.2, 2.4 + 0.52 * len(travels))) as figure:
        work = setup.workload
        figure.suptitle(
            f"{setup.model.name} on {setup.mesh}, {setup.layout}\n"
            f"batch {work.batch:,}, sequence {work.sequence:,}, {work.precision}; one device, one step; "
            f"{setup.target}: {'compiled, not run' if comparison.run is None else 'compiled and run'}",
            x=0.012,
            ha="left",
            fontsize=11,
        )
        memory, wire = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_memory(memory, comparison)
        _draw_wire(wire, comparison, travels)
        save(figure, path)


def memory_stack(comparison: Comparison) -> list[tuple[str, int, int]]:
    """(part, closed form, compiled) from bottom to top, in bytes; unknown parts are 0, the rest reaches the peak.

    In a pipeline they are those of the stage with the most parameters."""
    rows = comparison.section("memory")
    stages = next((row.predicted_stages for row in rows if row.name == "parameters" and row.predicted_stages), (0,))
    fullest = stages.index(max(stages))
    held = {row.name: tuple(value or 0 for value in row.on_stage(fullest)) for row in rows}
    parts = [(name, *held.get(name, (0, 0))) for name in _STACK]
    peaks = (comparison.peak.predicted or 0, comparison.peak.compiled or 0)
    rest = [max(0, peak - sum(part[side] for part in parts)) for side, peak in enumerate(peaks, start=1)]
    return [part for part in (*parts, (_REST, *rest)) if part[1] or part[2]]


def _draw_memory(axes: Axes, comparison: Comparison) -> None:
    parts = memory_stack(comparison)
    tops = [0, 0]
    handles = []
    for name, *values in parts:
        bars = axes.bar(
            (0, 1), values, bottom=tops, width=0.62, color=_STACK.get(name, _REST_COLOUR), edgecolor="white", lw=0.8
        )
        known = values[1] or values[0]
        handles.append((bars, f"{name}, {human(known)}"))
        tops = [top + value for top, value in zip(tops, values, strict=True)]
    peak, height = comparison.peak, max(*tops, 1)
    limit = peak.capacity
    shown = limit is not None and limit < 5 * height
    if shown:
        axes.axhline(limit, color=LIMIT, lw=1.4, ls=(0, (5, 3)))
        axes.annotate(
            f"capacity {human(limit)}", (0.99, limit), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", ha="right", color=LIMIT,
        )  # fmt: skip
        height = max(height, limit)
    for x, top, value in zip((0, 1), tops, (peak.predicted, peak.compiled), strict=True):
        text = "peak unknown" if value is None else f"peak {human(value)}"
        if value is not None and value < top:  # a TPU keeps what it can on the chip
            text += " of HBM,\nthe rest is on chip"
        axes.annotate(
            text, (x, max(top, value or 0)), (0, 5), textcoords="offset points", ha="center", weight="bold",
            bbox=ON_WHITE,
        )  # fmt: skip
    axes.set_xticks((0, 1), comparison.authors)
    axes.set_xlim(-0.55, 1.55)
    axes.set_ylim(0, height * 1.1)
    aside = "" if shown or limit is None else f"; capacity {human(limit)}"
    axes.set_title(f"Memory of one device{aside}", loc="left", weight="bold", fontsize=10)
    in_bytes(axes.yaxis)
    tidy(axes, "y")
    bars, labels = [bars for bars, _ in reversed(handles)], [label for _, label in reversed(handles)]
    if bars:
        axes.legend(bars, labels, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)


def _travels(comparison: Comparison) -> list[tuple[str, int, int]]:
    """(axes and phase, closed form, compiled): wire bytes, in the order of the step."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row in comparison.section("collectives"):
        both = sums.setdefault((row.phase, "+".join(row.axes)), [0, 0])
        both[0] += row.wire_predicted or 0
        both[1] += row.wire_compiled or 0
    order = {phase: index for index, phase in enumerate(PHASES)}
    keys = sorted(sums, key=lambda key: (order.get(key[0], len(order)), key[1]))
    return [(f"{phase}\nover {axes}", *sums[phase, axes]) for phase, axes in keys if any(sums[phase, axes])]


def _draw_wire(axes: Axes, comparison: Comparison, travels: Sequence[tuple[str, int, int]]) -> None:
    axes.set_title("Sent by one device in a step, on the wire", loc="left", weight="bold", fontsize=10)
    if not travels:
        axes.text(0.5, 0.5, "nothing is sent", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    largest = max(max(values) for _, *values in travels)
    for side, (author, colour) in enumerate(zip(comparison.authors, (_PREDICTED, _COMPILED), strict=True)):
        places = [index + (side - 0.5) * 0.36 for index in range(len(travels))]
        values = [travel[1 + side] for travel in travels]
        axes.barh(places, values, height=0.34, color=colour, label=author)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                human(value),
                (value, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox=ON_WHITE,
            )
    axes.set_yticks(range(len(travels)), [label for label, *_ in travels])
    axes.set_ylim(len(travels) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.18)
    in_bytes(axes.xaxis)
    tidy(axes, "x")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)
