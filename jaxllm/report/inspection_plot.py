"""A report as a picture: the memory of one device over the schedule, and the largest of what is there at the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.report.drawing import INK, LIMIT, ON_WHITE, drawn, in_bytes, picture, save, tidy
from jaxllm.report.entries import clipped, fold
from jaxllm.report.inspection import CLASSES, Buffer, Memory, Report
from jaxllm.report.inspection_lines import COMPILERS, brief, largest, mesh_text
from jaxllm.report.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = dict(
    zip(
        CLASSES,
        (
            "#1d4e89", "#4a8fc7", "#a9cfe8", "#e07a1f", "#f2b14c", "#7b5ea7", "#6aa67a", "#c44e7b", "#b5a48b",
            "#2f7f86", "#5b6770", "#8a8a8a",
        ),
        strict=True,
    )
)  # fmt: skip
_STAYS = ("parameter", "optimizer", "argument", "constant", "output")
_STACK = (
    *_STAYS,
    *(kind for kind in CLASSES if kind not in _STAYS),
)  # from bottom to top: what stays all the time first
_PHASES = {"forward": "#e9f1f8", "recompute": "#f1ebf8", "backward": "#fcf1e3", "update": "#e8f4ea"}
_SHOWN = 8  # buffers
_COLUMNS = 1500  # moments that are drawn of a longer schedule
_NARROW = 0.005  # of the schedule: a phase that is shorter is not told from the one before it


@dataclass(frozen=True)
class Layers:
    """Memory from moment to moment: bytes by class, from bottom to top. `steps` are where anything changes, and what is
    there goes on until the next one."""

    steps: tuple[int, ...]
    classes: dict[str, tuple[int, ...]]

    @property
    def tops(self) -> tuple[int, ...]:
        """All bytes in use."""
        return tuple(map(sum, zip(*self.classes.values(), strict=True))) or (0,) * len(self.steps)


def layers(memory: Memory) -> Layers:
    """The memory as it is drawn: a long schedule by the highest of each stretch, so that no height is lost."""
    shown = _thinned(memory.timeline, memory.steps)
    steps = tuple(memory.timeline[index][0] for index in shown)
    kinds = [kind for kind in _STACK if kind in memory.by_class]
    return Layers(steps, {kind: tuple(memory.by_class[kind][index] for index in shown) for kind in kinds})


def _thinned(timeline: Sequence[tuple[int, int]], steps: int) -> list[int]:
    """Which points of a timeline are drawn."""
    if len(timeline) <= _COLUMNS:
        return list(range(len(timeline)))
    highest: dict[int, int] = {}
    for index, (step, level) in enumerate(timeline):
        stretch = step * _COLUMNS // steps
        if stretch not in highest or level > timeline[highest[stretch]][1]:
            highest[stretch] = index
    return list(highest.values())


def phase_spans(report: Report) -> list[tuple[str, int, int]]:
    """(phase, first step, end) along the schedule; none where operations do not tell their steps."""
    steps = report.memory.steps
    told = sorted(
        (operation.step, operation.place.phase)
        for operation in report.operations
        if operation.step is not None and operation.place.phase in _PHASES
    )
    spans: list[tuple[str, int, int]] = []
    ends = [step for step, _ in told[1:]] + [steps]
    for (step, phase), end in zip(told, ends, strict=False):
        if spans and (spans[-1][0] == phase or end - step < _NARROW * steps):
            spans[-1] = (spans[-1][0], spans[-1][1], end)
        else:
            spans.append((phase, step, end))
    merged: list[tuple[str, int, int]] = []
    for span in spans:
        if merged and merged[-1][0] == span[0]:
            merged[-1] = (span[0], merged[-1][1], span[2])
        else:
            merged.append(span)
    return merged


def save_timeline(report: Report, path: Path) -> None:
    """Writes the picture, as .png, .svg or .pdf. Raises SpecError when the file cannot be written."""
    memory = report.memory
    with picture(12, 5.8) as figure:
        compiler = COMPILERS.get(report.target, "unknown compiler")
        devices = f"{report.devices:,} device{'s' if report.devices != 1 else ''}"
        mesh = f" ({mesh_text(report.mesh)})" if report.mesh else ""
        truth = "exact: the compiler's own assignment" if memory.exact else "a lower bound, from lifetimes alone"
        for where, size in (("on the chip", memory.on_chip), ("in the host's memory", memory.host)):
            truth += f"; {human(size)} {where} not shown" if size else ""
        name = _clipped(report.name or "a module without a name", 110)
        about = f"{compiler}, {devices}{mesh}; one device; {truth}"
        figure.suptitle("\n".join((drawn(name), *fold(drawn(about), 125))), x=0.012, ha="left", fontsize=11)
        over, beside = figure.subplots(1, 2, width_ratios=(2.1, 1))
        _draw_timeline(over, report)
        _draw_largest(beside, memory)
        save(figure, path)


def _draw_timeline(axes: Axes, report: Report) -> None:
    memory = report.memory
    capacity = report.machine.capacity if report.machine is not None else None
    made = layers(memory)
    tops = made.tops
    height = float(max(memory.peak, *tops))
    title = "Memory over the schedule"
    if not height:
        axes.set_title(title, loc="left", weight="bold", fontsize=10)
        axes.text(0.5, 0.5, "nothing is held", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    end = max(1, memory.steps)
    handles: list[tuple[Any, str]] = _shade_phases(axes, report, end)

    edges = [*made.steps, end]
    bottom = [0.0] * len(made.steps)  # floats: NumPy knows no larger integers than 2^63
    parts = [(kind, values, _COLOURS[kind]) for kind, values in made.classes.items()]
    for name, values, colour in parts:
        top = [low + float(value) for low, value in zip(bottom, values, strict=True)]
        area = axes.fill_between(
            edges,
            [*bottom, bottom[-1]],
            [*top, top[-1]],
            step="post",
            facecolor=colour,
            edgecolor="none",
            lw=0,
            zorder=2,
        )
        share = memory.classes.get(name)
        handles.append((area, name if share is None else f"{name}, {human(share)}"))
        bottom = top
    axes.step(edges, [float(top) for top in (*tops, tops[-1])], where="post", color=INK, lw=0.9, zorder=3)
    # what the compiler asks for lasts as long as the program: the gaps in it are there at all times
    if memory.peak > max(tops) and "fragmentation" in memory.classes:
        gap = axes.fill_between(
            (0, end), float(max(tops)), float(memory.peak), facecolor="none", edgecolor=_COLOURS["fragmentation"],
            hatch="////", lw=0, zorder=2,
        )  # fmt: skip
        handles.append((gap, f"fragmentation, {human(memory.classes['fragmentation'])}"))

    shown = capacity is not None and capacity < 2.5 * height
    ceiling = max(height, capacity if shown and capacity is not None else 0)
    if shown:
        axes.axhline(capacity, color=LIMIT, lw=1.4, ls=(0, (5, 3)), zorder=4)
        low = height < 0.8 * ceiling  # nothing of the memory comes near: the name stands below the line
        axes.annotate(
            f"capacity {human(capacity)}", (0.99, capacity), xycoords=("axes fraction", "data"),
            xytext=(0, -4 if low else 4), textcoords="offset points", ha="right", va="top" if low else "bottom",
            color=LIMIT, bbox=ON_WHITE,
        )  # fmt: skip
    axes.set_xlim(0, end)
    axes.set_ylim(0, max(height * 1.24, ceiling * 1.08))
    _mark_peak(axes, memory, end)
    aside = "" if shown or capacity is None else f"; capacity {human(capacity)}"
    axes.set_title(title + aside, loc="left", weight="bold", fontsize=10)
    axes.set_xlabel(f"step of the schedule, of {memory.steps:,}; the body of a loop once")
    _in_steps(axes, end)
    in_bytes(axes.yaxis)
    tidy(axes, "y")
    axes.legend(
        [handle for handle, _ in reversed(handles)], [label for _, label in reversed(handles)], loc="upper center",
        bbox_to_anchor=(0.5, -0.13), ncols=4 if len(handles) > 9 else 3, frameon=False,
    )  # fmt: skip


def _in_steps(axes: Axes, end: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(min(8, end), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _shade_phases(axes: Axes, report: Report, end: int) -> list[tuple[Any, str]]:
    """Shades them, and returns what a legend has to tell: those too short to hold their name anywhere."""
    shades = {}
    named = set()
    for phase, start, stop in phase_spans(report):
        shades[phase] = axes.axvspan(start, stop, facecolor=_PHASES[phase], edgecolor="none", lw=0, zorder=0)
        if stop - start > 0.013 * len(phase) * end:
            axes.annotate(
                phase, ((start + stop) / 2, 1), (0, -5), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="top", fontsize=8, color="#666666",
            )  # fmt: skip
            named.add(phase)
    return [(shade, phase) for phase, shade in shades.items() if phase not in named]


def _mark_peak(axes: Axes, memory: Memory, end: int) -> None:
    at = min(memory.at + 0.5, end)
    left = at > 0.55 * end
    axes.plot((at, at), (0, float(memory.peak)), color=INK, lw=0.8, ls=(0, (2, 2)), zorder=4)
    axes.plot(at, float(memory.peak), "o", color=INK, ms=4.5, mec="white", mew=0.8, zorder=5, clip_on=False)
    where = memory.where
    place = [where.phase, where.source or where.name] if where is not None else []
    lines = [f"peak {human(memory.peak)}", drawn(_clipped(", ".join(filter(None, place)), 60))]
    for number, line in enumerate(reversed([line for line in lines if line])):
        axes.annotate(
            line, (at, float(memory.peak)), (-7 if left else 7, 5 + 12 * number), textcoords="offset points",
            ha="right" if left else "left", va="bottom", weight="bold" if line == lines[0] else "normal",
            fontsize=9 if line == lines[0] else 8, zorder=6, bbox=ON_WHITE | {"alpha": 0.65},
        )  # fmt: skip


def _draw_largest(axes: Axes, memory: Memory) -> None:
    axes.set_title("Largest buffers alive at the peak", loc="left", weight="bold", fontsize=10)
    shown = largest(memory, _SHOWN)
    if not shown:
        axes.text(0.5, 0.5, "none is known", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    most = float(shown[0].bytes or 1)
    axes.barh(range(len(shown)), [float(b.bytes) for b in shown], height=0.3, color=[_COLOURS[b.kind] for b in shown])
    for row, buffer in enumerate(shown):
        # name and place stand over their bar: beside it they would take its room
        axes.annotate(
            drawn(_clipped(brief(buffer.shape), 42)), (0, row - 0.2), (1, 9), textcoords="offset points", va="bottom",
            fontsize=8,
        )  # fmt: skip
        axes.annotate(
            drawn(_clipped(_origin(buffer), 52)), (0, row - 0.2), (1, 0), textcoords="offset points", va="bottom",
            fontsize=7, color="#666666",
        )  # fmt: skip
        axes.annotate(
            human(buffer.bytes), (float(buffer.bytes), row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    rest = memory.live[len(shown) :]
    if rest:
        left = f"and {len(rest):,} more, {human(sum(buffer.bytes for buffer in rest))} in all"
        axes.annotate(left, (0, len(shown) - 0.6), (1, 0), textcoords="offset points", va="top", fontsize=8)
    axes.set_ylim(max(len(shown), 4) - 0.4, -0.85)
    axes.set_xlim(0, most * 1.24)
    axes.set_xticks([])  # each bar tells its own bytes
    axes.set_yticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _origin(buffer: Buffer) -> str:
    # of the name of an argument the end tells most
    return f"{buffer.kind}, {buffer.source or clipped(buffer.op_name or buffer.name, 49 - len(buffer.kind))}"


def _clipped(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3] + "..."
