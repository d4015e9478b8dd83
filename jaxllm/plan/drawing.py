"""A plan as a picture: seconds of a step against bytes of a device, the front marked."""

from __future__ import annotations

from pathlib import Path

from jaxllm.plan.plan import Plan
from jaxllm.report.drawing import LIMIT, picture, save, tidy
from jaxllm.report.units import duration, human

_ALL, _FRONT, _BEST = "#9aa5b1", "#1d4e89", "#e07a1f"


def save_plan(plan: Plan, path: Path) -> None:
    """Writes the picture. Raises SpecError when the file cannot be written after all."""
    found, work, capacity = plan.found, plan.workload, plan.mesh.capacity
    from matplotlib.ticker import EngFormatter

    with picture(10, 6) as figure:
        figure.suptitle(
            f"{plan.space.model.name} on {plan.mesh}, batch {work.batch:,}, sequence {work.sequence:,}, {work.precision}\n"
            f"{found.scored:,} layouts scored, {found.fits:,} fit; predicted, not compiled",
            x=0.012,
            ha="left",
            fontsize=11,
        )
        axes = figure.add_subplot()
        cloud = found.cloud
        axes.scatter(cloud[:, 0], cloud[:, 1], s=9, color=_ALL, linewidths=0, label="the fastest and the smallest, by degrees and microbatches")
        front = found.front
        axes.plot(
            [each.peak for each in front], [each.seconds for each in front], "o-", color=_FRONT, drawstyle="steps-post",
            label="nothing is both faster and smaller",
        )  # fmt: skip
        if plan.best:
            best = plan.best[0]
            low, high = best.interval
            axes.errorbar(
                [best.peak], [best.seconds], [[best.seconds - low], [high - best.seconds]], fmt="D", color=_BEST, capsize=4,
                label=f"the best, {duration(best.seconds)}; four of five between {duration(low)} and {duration(high)}",
            )  # fmt: skip
        if capacity is not None:
            axes.axvline(capacity, color=LIMIT, linestyle="--", label=f"{human(capacity)} of a device")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("memory of a device at the peak")
        axes.set_ylabel("seconds of a step")
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.yaxis.set_major_formatter(lambda value, place: duration(value))
        tidy(axes, "both")
        axes.legend(loc="upper right", fontsize=9)
        save(figure, path)
