"""The comparison as a picture: what fills the memory of a device, and what travels, by both authors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.report.compare import Comparison, Setup
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
    "padding": "#8a8a8a",
}
_REST, _REST_COLOUR = "temporaries up to the peak", "#e3e0d8"
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # numbers are not crossed by grid lines
_PREDICTED, _COMPILED, _INK, _LIMIT = "#9aa5b1", "#1d4e89", "#222222", "#b3261e"


def check_path(text: str) -> Path:
    """The path of a picture that can be written, so that no long work is done in vain. Raises SpecError."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"--plot {text!r}: {path.suffix or 'no suffix'} is not a picture; end it in .png, .svg or .pdf.")
    if path.is_dir():
        raise SpecError(f"--plot {text} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise SpecError(f"--plot {text}: there is no folder {path.parent}; make it first or name another.")
    try:  # os.access would believe that root may write to a file system that is read-only
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SpecError(f"--plot {text} cannot be written: {error.strerror}; name a file elsewhere.") from None
    return path


def save_plot(comparison: Comparison, setup: Setup, path: Path) -> None:
    """Writes the picture. Raises SpecError when the file cannot be written after all."""
    # Figure instead of pyplot: no window system is asked for, and no state is left behind
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.8,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxllm",
    }
    with rc_context(style):
        travels = _travels(comparison)
        figure = Figure(figsize=(11, max(5.2, 2.4 + 0.52 * len(travels))), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.06)
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
        try:
            figure.savefig(path, metadata=_no_date(path))
        except OSError as error:
            raise SpecError(f"--plot {path} cannot be written: {error.strerror or error}; name another file.") from None


def _no_date(path: Path) -> dict[str, Any] | None:
    """The same comparison gives the same file: vector formats would store the time of day."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())


def memory_stack(comparison: Comparison) -> list[tuple[str, int, int]]:
    """(part, closed form, compiled) from bottom to top, in bytes; unknown parts are 0, the rest reaches the peak."""
    held = {row.name: (row.predicted or 0, row.compiled or 0) for row in comparison.section("memory")}
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
        axes.axhline(limit, color=_LIMIT, lw=1.4, ls=(0, (5, 3)))
        axes.annotate(
            f"capacity {human(limit)}", (0.99, limit), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", ha="right", color=_LIMIT,
        )  # fmt: skip
        height = max(height, limit)
    for x, top, value in zip((0, 1), tops, (peak.predicted, peak.compiled), strict=True):
        text = "peak unknown" if value is None else f"peak {human(value)}"
        if value is not None and value < top:  # a TPU keeps what it can on the chip
            text += " of HBM,\nthe rest is on chip"
        axes.annotate(
            text, (x, max(top, value or 0)), (0, 5), textcoords="offset points", ha="center", weight="bold",
            bbox=_ON_WHITE,
        )  # fmt: skip
    axes.set_xticks((0, 1), comparison.authors)
    axes.set_xlim(-0.55, 1.55)
    axes.set_ylim(0, height * 1.1)
    aside = "" if shown or limit is None else f"; capacity {human(limit)}"
    axes.set_title(f"Memory of one device{aside}", loc="left", weight="bold", fontsize=10)
    _in_bytes(axes.yaxis)
    _tidy(axes, "y")
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
                bbox=_ON_WHITE,
            )
    axes.set_yticks(range(len(travels)), [label for label, *_ in travels])
    axes.set_ylim(len(travels) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.18)
    _in_bytes(axes.xaxis)
    _tidy(axes, "x")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)


def _in_bytes(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_formatter(EngFormatter(unit="B"))
    axis.set_major_locator(MaxNLocator(6))


def _tidy(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
