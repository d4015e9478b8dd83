"""Draws idea.svg: four nouns, two authors, two ledgers, one comparison. Run it in this folder: python idea.py"""

from __future__ import annotations

import sys

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, BLUE, ORANGE = "#222222", "#9aa5b1", "#1d4e89", "#e07a1f"


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, note: str = "", height: float = 0.9) -> None:
    """A box centred at (x, y) with a name and a smaller note below it."""
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor="white", edgecolor=colour, linewidth=1.6,
    )  # fmt: skip
    axes.add_patch(patch)
    axes.text(x, y + (0.16 if note else 0), text, ha="center", va="center", fontsize=11, color=INK, weight="bold")
    if note:
        axes.text(x, y - 0.2, note, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=1.6, shrinkA=2, shrinkB=2)
    )


def draw() -> Figure:
    figure = Figure(figsize=(10.6, 4.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10.6), ylim=(0, 4.1))
    axes.axis("off")

    nouns = (
        ("ModelConfig", "what"), ("Layout", "how it is split"), ("Machine", "on what"), ("Workload", "how much"),
    )  # fmt: skip
    for i, (name, note) in enumerate(nouns):
        box(axes, 1.05, 3.5 - 0.92 * i, 1.7, name, GREY, note, height=0.78)

    # a bracket: all four go to both authors
    for y in (3.89, 0.35):
        axes.plot((1.98, 2.1), (y, y), color=GREY, linewidth=1.6)
    axes.plot((2.1, 2.1), (0.35, 3.89), color=GREY, linewidth=1.6)

    top, middle, bottom = 3.12, 2.12, 1.12
    box(axes, 4.8, top, 3.0, "predict", BLUE, "the closed form, in integers; no JAX")
    steps = (("build", "a jitted step"), ("compile", "cpu, gpu, tpu, local"), ("measure", "XLA's own protos"))
    for i, (name, note) in enumerate(steps):
        box(axes, 3.27 + 1.64 * i, bottom, 1.42, name, ORANGE, note)
    box(axes, 8.1, top, 1.3, "Ledger", BLUE, "what should be")
    box(axes, 8.1, bottom, 1.3, "Ledger", ORANGE, "what is")
    box(axes, 9.72, middle, 1.5, "compare", INK, "", height=0.8)
    axes.text(9.72, 1.5, "equal, differs,\nnot comparable", ha="center", va="center", fontsize=8.5, color=INK)

    arrow(axes, (2.1, top), (3.28, top), BLUE)
    arrow(axes, (2.1, bottom), (2.54, bottom), ORANGE)
    arrow(axes, (6.32, top), (7.43, top), BLUE)
    for x in (4.0, 5.64):
        arrow(axes, (x, bottom), (x + 0.19, bottom), ORANGE)
    arrow(axes, (7.28, bottom), (7.43, bottom), ORANGE)
    arrow(axes, (8.77, top - 0.1), (9.2, middle + 0.44), BLUE)
    arrow(axes, (8.77, bottom + 0.1), (9.05, middle - 0.42), ORANGE)
    axes.text(9.72, 0.72, "table, JSON, plot,\nexit code", ha="center", va="center", fontsize=8.5, color=INK)
    return figure


if __name__ == "__main__":
    with rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "jaxllm", "svg.fonttype": "path"}):
        draw().savefig(sys.argv[1] if len(sys.argv) > 1 else "idea.svg", metadata={"Date": None} if len(sys.argv) < 2 else None, dpi=130)
