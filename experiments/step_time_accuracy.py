"""How far is the closed form of a step's time from published measurements, beside the best constant share of the peak?

    python experiments/step_time_accuracy.py [--out DIR]

The constants of the machine are fitted on the calibration rows alone (experiments/fit_a100.py); these are shown apart. The
best constant share is found for each source by looking at its answers, which no prediction may: a bar to clear. Printed are
errors by source, and how many steps lie within the interval that should hold four of five. Exits with 1 when a source outside
of the calibration is off by more than its best constant share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, published
from jaxllm import step_time

COLUMNS = {
    "model": "model", "mesh": "mesh", "layout": "layout", "measured": "measured, s", "predicted": "predicted, s",
    "error": "error",
}  # fmt: skip
SUMMARY = {
    "source": "source", "rows": "rows", "mean": "mean error", "median": "median", "plain": "of jaxllm time",
    "constant": "best constant", "covered": "within the interval", "width": "its width, median",
}  # fmt: skip
WIDTHS = {"rows": "rows", "count": "count", "ratio": "width over error, medians", "range": "80 % of draws"}


def row(step: published.Step) -> dict[str, Any]:
    """A step as it was measured and as it is predicted; `plain`: by `jaxllm time`, without the matmul that Megatron-LM computes
    again and XLA does not; `share`: of the peak that its hardware FLOPs took."""
    time = step.time()
    low, high = time.interval
    seconds = float(time.seconds)
    return {
        "source": step.source, "calibration": int(step.calibration), "model": step.model.name, "mesh": f"{step.mesh}",
        "layout": f"{step.layout}", "batch": step.workload.batch, "measured": step.seconds, "predicted": round(seconds, 4),
        "low": round(float(low), 4), "high": round(float(high), 4),
        "plain": round(float(step_time(step.model, step.layout, step.mesh, step.workload).seconds), 4),
        "share": round(float(time.hardware_flops / step.rates.peak / step.seconds), 5),
    }  # fmt: skip


def errors(rows: Sequence[common.Row], by: str = "predicted") -> np.ndarray:
    return np.array([each[by] / each["measured"] - 1 for each in rows])


def best_constant(rows: Sequence[common.Row]) -> float:
    """The least mean error of a step's time by one share of the peak for all rows: the seconds are then the row's own share
    over it, times what was measured."""
    shares = np.array([each["share"] for each in rows])
    constants = np.linspace(shares.min(), shares.max(), 1001)
    return min(float(np.mean(np.abs(shares / constant - 1))) for constant in constants)


def summary(rows: Sequence[common.Row]) -> list[dict[str, Any]]:
    """A row for each source."""
    found = []
    for source in dict.fromkeys(each["source"] for each in rows):
        mine = [each for each in rows if each["source"] == source]
        off = np.abs(errors(mine))
        covered = np.mean([each["low"] <= each["measured"] <= each["high"] for each in mine])
        width = np.median([(each["high"] - each["low"]) / each["predicted"] for each in mine])
        found.append({
            "source": source + (", calibration" if mine[0]["calibration"] else ""), "rows": len(mine),
            "mean": f"{off.mean():.1%}", "median": f"{np.median(off):.1%}", "plain": f"{np.abs(errors(mine, 'plain')).mean():.1%}",
            "constant": f"{best_constant(mine):.1%}",
            "covered": f"{covered:.0%}", "width": f"{width:.0%}",
        })  # fmt: skip
    return found


def widths(rows: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The interval's median width over the median error: of the rows that it is read off, of the others, and of all. `range` is
    where that lies in 80 of 100 draws of as many rows (bootstrap)."""

    def ratio(mine: Sequence[common.Row]) -> float:
        wide = [(each["high"] - each["low"]) / each["predicted"] for each in mine]
        return float(np.median(wide) / np.median(np.abs(errors(mine))))

    found, drawn = [], np.random.default_rng(0)
    for what, held in (("calibration", {1}), ("the others", {0}), ("all", {0, 1})):
        mine = [each for each in rows if each["calibration"] in held]
        draws = [ratio([mine[place] for place in drawn.integers(0, len(mine), len(mine))]) for _ in range(1000)]
        low, high = np.quantile(draws, (0.1, 0.9))
        found.append({"rows": what, "count": len(mine), "ratio": f"{ratio(mine):.1f}", "range": f"{low:.1f} to {high:.1f}"})
    return found


def wrong(rows: Sequence[common.Row]) -> list[str]:
    """Sources outside of the calibration where a constant share of the peak would have been nearer."""
    problems = []
    for source in dict.fromkeys(each["source"] for each in rows if not each["calibration"]):
        mine = [each for each in rows if each["source"] == source]
        bar = best_constant(mine)
        for by in ("predicted", "plain"):
            mean = float(np.mean(np.abs(errors(mine, by))))
            if mean > bar:
                problems.append(f"{source}, {by}: off by {mean:.1%}, and the best constant share of the peak by {bar:.1%}")
    return problems


def draw(rows: Sequence[common.Row], path: Path) -> None:
    """Predicted over measured, with the intervals; those of the calibration pale."""
    sources = dict.fromkeys(each["source"] for each in rows)
    colours = dict(zip(sources, (common.PALE, "#d5d9de", common.FIRST, common.SECOND), strict=True))
    picture = common.figure(8.6, 4.6)
    axes = picture.subplots()
    for source, colour in colours.items():
        mine = [each for each in rows if each["source"] == source]
        seconds = np.array([each["measured"] for each in mine])
        ratios = np.array([each["predicted"] for each in mine]) / seconds
        bars = np.array([[each["predicted"] - each["low"], each["high"] - each["predicted"]] for each in mine]).T / seconds
        held_out = not mine[0]["calibration"]
        axes.errorbar(
            seconds, ratios, yerr=bars if held_out else None, fmt="o", markersize=4, color=colour, elinewidth=0.8,
            label=source, zorder=3 if held_out else 2,
        )  # fmt: skip
    axes.axhline(1, color=common.INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0.4, 1.6)
    axes.set_xlabel("measured seconds of a step")
    axes.set_ylabel("predicted / measured")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    common.save_png(picture, path)


def main() -> int:
    found = common.options(__doc__)
    rows = []
    for step in published.steps():
        rows.append(row(step))
        if len(rows) % 50 == 0:
            common.progress(f"{len(rows)} steps")
    held_out = [each for each in rows if not each["calibration"]]
    common.show(
        [dict(each) | {"error": f"{e:+.1%}"} for each, e in zip(held_out, errors(held_out), strict=True)], COLUMNS
    )
    print()
    common.show(summary(rows), SUMMARY)
    print()
    common.show(widths(rows), WIDTHS)
    problems = wrong(rows)
    for problem in problems:
        print(problem)
    common.write_csv(rows, found.out / "step_time_accuracy.csv")
    draw(rows, found.out / "step_time_accuracy.png")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
