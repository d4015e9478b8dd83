"""A pipeline schedule as a picture: when each stage does what, in the times that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.report.drawing import drawn, picture, save, tidy
from jaxllm.report.schedule import cost, timing, title
from jaxllm.schedules.simulation import Simulation, Timed
from jaxllm.spec.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

MOST_CELLS = 10_000  # hatched bars of less than a dot show nothing, and take as long to draw
_MOST_NAMED = 4_000  # of more cells only the hatches tell the kind: a name on each would take minutes

_HEIGHT = 0.84
_LETTER = 0.075  # inches of a letter of a cell's name
_MARGIN = 1.2  # inches that the names of the stages take
# Kind: colour of chunk 0, and a hatch that tells it without colour. Later chunks are lighter.
_KINDS = {
    "F": ("#4a8fc7", ""),
    "B": ("#e07a1f", "////"),
    "W": ("#f2d14c", "...."),
    "BW": ("#c9571c", "xxxx"),
}
_MEANING = {"F": "F: forward", "B": "B: gradient of the inputs", "W": "W: gradient of the weights", "BW": "BW: both gradients"}


def check_cells(simulation: Simulation) -> None:
    """Raises SpecError when there are more cells than a picture can show."""
    cells = sum(map(len, simulation.stages))
    if cells > MOST_CELLS:
        raise SpecError(
            f"--png: {cells:,} cells are more than a picture can show, and {MOST_CELLS:,} is the most; take fewer "
            "microbatches."
        )


def save_picture(simulation: Simulation, path: Path) -> None:
    """Writes the picture. Raises SpecError when the file cannot be written after all, or could show nothing."""
    check_cells(simulation)
    cells = [one for timed in simulation.stages for one in timed if one.end > one.start]
    # as wide as the names of the cells need, within what can still be looked at
    inches = max(len(str(one.cell)) * _LETTER / (one.end - one.start) for one in cells)
    width = min(24.0, max(8.0, _MARGIN + inches * simulation.end))
    with picture(width, min(24.0, max(2.6, 1.7 + 0.34 * simulation.schedule.stages))) as figure:
        figure.suptitle(
            f"{drawn(title(simulation))}\n{cost(simulation)}\nsimulated with {timing(simulation)}",
            x=0.012, ha="left", fontsize=11,
        )  # fmt: skip
        axes = figure.subplots()
        figure.legend(
            handles=_draw(axes, simulation, (width - _MARGIN) / simulation.end),
            loc="outside lower center", ncols=4, frameon=False,
        )  # fmt: skip
        try:
            save(figure, path)
        except SpecError as error:
            raise SpecError(str(error).replace("--plot", "--png", 1)) from None


def _draw(axes: Axes, simulation: Simulation, inches: float) -> list[Patch]:
    """Draws the cells and returns the keys of a legend. Args: `inches` that a unit of time is wide."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    handles = []
    for kind, (colour, hatch) in _KINDS.items():
        for chunk in range(simulation.schedule.chunks):
            lighter = tuple(1 - (1 - part) * 0.55**chunk for part in to_rgb(colour))
            look = {"facecolor": lighter, "edgecolor": "#555555", "hatch": hatch, "linewidth": 0.5}
            bars = 0
            for stage, timed in enumerate(simulation.stages):
                mine = [one for one in timed if (one.cell.kind, one.cell.chunk) == (kind, chunk)]
                if mine:
                    axes.broken_barh(
                        [(one.start, one.end - one.start) for one in mine], (stage - _HEIGHT / 2, _HEIGHT), **look
                    )
                bars += len(mine)
            if bars:
                name = _MEANING[kind] + (f", chunk {chunk}" if simulation.schedule.chunks > 1 else "")
                handles.append(Patch(**look, label=name))
    if sum(map(len, simulation.stages)) <= _MOST_NAMED:
        for stage, timed in enumerate(simulation.stages):
            for one in timed:
                _write(axes, stage, one, inches)
    axes.set_yticks(range(simulation.schedule.stages), [f"stage {s}" for s in range(simulation.schedule.stages)])
    axes.set_ylim(simulation.schedule.stages - 0.4, -0.6)
    axes.set_xlim(0, simulation.end)
    axes.set_xlabel("time, in the unit of f, b and w")
    tidy(axes, "x")
    return handles


def _write(axes: Axes, stage: int, one: Timed, inches: float) -> None:
    """The name of a cell, on white, where it fits; else, where that fits, its kind."""
    room = (one.end - one.start) * inches
    for text in (str(one.cell), one.cell.kind):
        if len(text) * _LETTER <= room:
            axes.text(
                (one.start + one.end) / 2, stage, text, ha="center", va="center", fontsize=6.5, clip_on=True,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )  # fmt: skip
            return
