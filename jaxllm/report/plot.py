"""The comparison as a picture: what fills the memory of a device, and what travels, by both authors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.report.compare import Comparison, Setup
from jaxllm.report.drawing import LIMIT, ON_WHITE, in_bytes, picture, save, tidy
from jaxllm.report.layers import bars
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
# The same of a part of the model; host memory is hatched.
_PARTS = {
    "parameters": _STACK["parameters"], "gradients": _STACK["gradients"], "optimizer": _STACK["optimizer"],
    "activations": _STACK["residuals"], "other": _STACK["padding"], "host": _STACK["batch"],
}  # fmt: skip
_REST, _REST_COLOUR = "temporaries up to the peak", "#e3e0d8"
_PREDICTED, _COMPILED = "#9aa5b1", "#1d4e89"


def save_plot(comparison: Comparison, setup: Setup, path: Path, by: str | None = None) -> None:
    """Writes the picture, with the closed form taken apart by "layer" or "module" below it. Raises SpecError when the file
    cannot be written after all."""
    travels = _travels(comparison)
    height, below = max(5.2, 2.4 + 0.52 * len(travels)), 3.4 if by else 0
    with picture(11, height + below) as figure:
        work = setup.workload
        figure.suptitle(
            f"{setup.model.name} on {setup.mesh}, {setup.layout}\n"
            f"batch {work.batch:,}, sequence {work.sequence:,}, {work.precision}; one device, one step; "
            f"{setup.target}: {'compiled, not run' if comparison.run is None else 'compiled and run'}",
            x=0.012,
            ha="left",
            fontsize=11,
        )
        rows = {"height_ratios": (height, below)} if by else {}
        grid = figure.add_gridspec(2 if by else 1, 2, width_ratios=(1, 1.15), **rows)
        _draw_memory(figure.add_subplot(grid[0, 0]), comparison)
        _draw_wire(figure.add_subplot(grid[0, 1]), comparison, travels)
        if by:
            _draw_parts(figure.add_subplot(grid[1, :]), setup, by)
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


def _draw_parts(axes: Axes, setup: Setup, by: str) -> None:
    """A bar for each part, or stage of a pipeline, of what it holds; what is in host memory is hatched."""
    found = bars(setup, by)
    tops = [0] * len(found)
    for kind in found[0][1]:
        values = [sizes[kind] for _, sizes in found]
        if not any(values):
            continue
        label = "in host memory" if kind == "host" else kind
        axes.bar(
            range(len(found)), values, bottom=tops, width=0.62, color=_PARTS[kind], edgecolor="white", lw=0.8, label=label,
            hatch="//" if kind == "host" else None,
        )  # fmt: skip
        tops = [top + value for top, value in zip(tops, values, strict=True)]
    many = len(found) > 16  # stages
    for place, top in enumerate(() if many else tops):
        axes.annotate(human(top), (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8, bbox=ON_WHITE)
    axes.set_xticks(range(len(found)), [name.removeprefix("stage ") if many else name for name, _ in found])
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.set_ylim(0, 1.18 * max(*tops, 1))
    axes.set_title(f"By {'stage' if setup.layout.pipe > 1 else by}, closed form: what one device holds", loc="left", weight="bold", fontsize=10)
    in_bytes(axes.yaxis)
    tidy(axes, "y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


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
