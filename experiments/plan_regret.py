"""How much slower than the best measured layout is the one that the predicted time picks?

    python experiments/plan_regret.py [--out DIR]

Steps that others measured (docs/published), in groups of at least four layouts of one model, number of devices and batch. Of each
group the closed form picks the layout that it says is the fastest, and the regret is what that one took over what the fastest
took, less one. Beside it stand what picking at random takes in the mean, and a plain rule: the least tensor x pipe. All these
groups are calibration rows, so that the pick is made once more with constants that are fitted on all rows but the group's. Exits
with 1 when the regret is above 1 % in a group on several nodes, or in the mean above 5 % in those on one node.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments import common, published
from experiments.fit_a100 import Rows, fit, with_figures
from jaxllm import Machine
from jaxllm.report.time import NAMES
from jaxllm.theory.rates import Rates

LEAST = 4  # layouts of a group
BARS = {"several nodes": 0.01, "one node": 0.05}  # of the worst group, and of the mean over groups
TERMS = 4  # of a step's parts that are told

COLUMNS = {
    "model": "model", "devices": "devices", "batch": "batch", "layouts": "layouts", "best": "best measured", "pick": "picked",
    "regret": "regret", "without": "refitted", "correlation": "rank", "random": "random", "rule": "rule",
}  # fmt: skip
ORDER = {
    "model": "model", "devices": "devices", "layout": "layout", "measured": "measured, s", "predicted": "predicted, s",
    "off": "off", "tied": "may be as fast as the picked",
}  # fmt: skip
SUMMARY = {
    "where": "where", "groups": "groups", "layouts": "layouts", "regret": "picked, mean", "worst": "worst",
    "without": "refitted, mean", "without_worst": "worst", "random": "random, mean", "random_worst": "worst",
    "rule": "rule, mean", "rule_worst": "worst", "full": "largest microbatch, mean", "full_worst": "worst",
}  # fmt: skip
KINDS = ("regret", "without", "random", "rule", "full")


@dataclass(frozen=True)
class Group:
    """Measured layouts of one model, number of devices and batch, of one source."""

    steps: tuple[published.Step, ...]

    @cached_property
    def measured(self) -> np.ndarray:
        """Seconds of each."""
        return np.array([step.seconds for step in self.steps])

    @property
    def where(self) -> str:
        return "several nodes" if self.steps[0].mesh.devices > 8 else "one node"

    def predicted(self, rates: Rates | None = None) -> np.ndarray:
        """Seconds of each, as the closed form has them."""
        return np.array([float(step.time(rates).seconds) for step in self.steps])

    def regret(self, seconds: np.ndarray) -> float:
        """Of the layout that takes the least of `seconds`."""
        return float(self.measured[np.argmin(seconds)] / self.measured.min() - 1)

    def random(self) -> float:
        """In the mean over all layouts."""
        return float(self.measured.mean() / self.measured.min() - 1)

    def rule(self, *, full: bool = False) -> float:
        """Of the least tensor x pipe, in the mean over all of those; with `full` over those with the fewest microbatches. All of
        a group fit, for they were measured."""
        keys = [(step.layout.tensor * step.layout.pipe, full * step.layout.microbatches) for step in self.steps]
        left = [seconds for seconds, key in zip(self.measured, keys, strict=True) if key == min(keys)]
        return float(np.mean(left) / self.measured.min() - 1)


def groups() -> list[Group]:
    """All groups of the published steps that have enough layouts, the most devices first."""
    found: dict[tuple[Any, ...], list[published.Step]] = {}
    for step in published.steps():
        model, work = step.model, step.workload
        key = (step.source, model.layers, model.d_model, model.heads, work.sequence, step.mesh.devices, work.batch)
        found.setdefault(key, []).append(step)
    enough = [Group(tuple(steps)) for steps in found.values() if len(steps) >= LEAST]
    return sorted(enough, key=lambda group: (-group.steps[0].mesh.devices, -len(group.steps)))


def refitted(group: Group) -> Rates:
    """What the constants would be if the group had never been measured."""
    rest = [step for step in published.steps(calibration=True) if step not in group.steps]
    machine, rates = Machine.read("a100-80"), group.steps[0].rates
    return with_figures(rates, fit(Rows.of(rest), rates, machine), machine)


def row(group: Group) -> dict[str, Any]:
    """A group: its best layout, the picked one, and what they took and should have taken in seconds."""
    seconds = group.predicted()
    best, pick = int(np.argmin(group.measured)), int(np.argmin(seconds))
    first, chosen = group.steps[best], group.steps[pick]
    return {
        "source": first.source, "calibration": int(first.calibration), "where": group.where, "model": first.model.name,
        "devices": first.mesh.devices, "batch": first.workload.batch, "sequence": first.workload.sequence,
        "layouts": len(group.steps), "best": f"{first.layout}", "best_measured": first.seconds,
        "best_predicted": round(seconds[best], 4), "pick": f"{chosen.layout}", "pick_measured": chosen.seconds,
        "pick_predicted": round(seconds[pick], 4), "pick_high": round(float(chosen.time().interval[1]), 4),
        "regret": round(group.regret(seconds), 4), "without": round(group.regret(group.predicted(refitted(group))), 4),
        "correlation": round(float(spearmanr(group.measured, seconds).statistic), 3), "random": round(group.random(), 4),
        "rule": round(group.rule(), 4), "full": round(group.rule(full=True), 4), "why": why(first, chosen),
    }  # fmt: skip


def why(best: published.Step, pick: published.Step) -> str | None:
    """The parts of a step of which the picked layout is said to have less than the best, and more: largest first, in ms."""
    if pick is best:
        return None
    one, other = pick.time().parts, best.time().parts
    less = {name: 1e3 * float(one.get(name, 0) - other.get(name, 0)) for name in {**one, **other}}
    largest = sorted(less.items(), key=lambda item: (-abs(item[1]), item[0]))[:TERMS]
    return "; ".join(f"{NAMES.get(name, f'collectives over {name}')} {value:+.1f}" for name, value in largest)


def shown(rows: Sequence[common.Row]) -> list[dict[str, Any]]:
    """Shares as percent."""
    return [dict(each) | {kind: f"{each[kind]:.1%}" for kind in KINDS} for each in rows]


def missed(rows: Sequence[common.Row]) -> Iterator[dict[str, Any]]:
    """The best layout and the picked one of groups where these differ."""
    for each in rows:
        if each["regret"]:
            for kind in ("best", "pick"):
                measured, predicted = each[f"{kind}_measured"], each[f"{kind}_predicted"]
                yield dict(each) | {
                    "layout": each[kind], "measured": f"{measured:.4f}", "predicted": f"{predicted:.4f}",
                    "off": f"{predicted / measured - 1:+.1%}", "tied": "yes" if predicted <= each["pick_high"] else "no",
                }  # fmt: skip


def summary(rows: Sequence[common.Row]) -> list[dict[str, Any]]:
    """A row for the groups on several nodes, and one for those on one."""
    found = []
    for where in BARS:
        mine = [each for each in rows if each["where"] == where]
        entry: dict[str, Any] = {"where": where, "groups": len(mine), "layouts": sum(each["layouts"] for each in mine)}
        for kind in KINDS:
            values = [each[kind] for each in mine]
            entry |= {kind: f"{np.mean(values):.1%}", "worst" if kind == "regret" else f"{kind}_worst": f"{max(values):.1%}"}
        found.append(entry)
    return found


def wrong(rows: Sequence[common.Row], kind: str = "regret") -> list[str]:
    """The bars that are missed."""
    regrets = {where: [each[kind] for each in rows if each["where"] == where] for where in BARS}
    found = {"several nodes": max(regrets["several nodes"]), "one node": float(np.mean(regrets["one node"]))}
    return [
        f"{where}: regret {found[where]:.1%}, and at most {bar:.0%} is asked for"
        for where, bar in BARS.items()
        if found[where] > bar
    ]  # fmt: skip


def draw(rows: Sequence[common.Row], found: Sequence[Group], path: Path) -> None:
    """Each group a line: all its layouts by what they took over the best of them, and which were picked."""
    picture = common.figure(9, 5.4)
    means = {where: np.mean([each["regret"] for each in rows if each["where"] == where]) for where in BARS}
    picture.suptitle(
        f"The layout that is predicted to be the fastest took {means['several nodes']:.1%} more than the fastest on several "
        f"nodes, {means['one node']:.1%} on one",
        x=0.01, ha="left", weight="bold", fontsize=10,
    )  # fmt: skip
    axes = picture.subplots()
    for place, (each, group) in enumerate(zip(rows, found, strict=True)):
        over = group.measured / group.measured.min()
        axes.plot([1, over.max()], [place, place], color="#e3e6ea", lw=1, zorder=1)
        label = ("any layout", "picked by a rule: least tensor x pipe,\nlargest microbatch", "picked by the predicted time")
        labels = label if not place else (None, None, None)
        axes.plot(over, [place] * len(over), "o", color=common.PALE, ms=3.5, zorder=2, label=labels[0])
        axes.plot(1 + each["full"], place, "o", mfc="none", mec=common.SECOND, mew=1.4, ms=11, zorder=3, label=labels[1])
        axes.plot(1 + each["regret"], place, "o", color=common.FIRST, ms=6, zorder=4, label=labels[2])
    axes.set_xscale("log")
    ticks = (1, 1.2, 1.5, 2, 3, 5, 8)
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(
        range(len(rows)),
        [f"{each['model']}, {each['devices']} devices, batch {each['batch']}" for each in rows],
    )  # fmt: skip
    axes.set(xlabel="measured seconds over those of the fastest layout of the group", xlim=(0.97, 9))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower right")
    common.save_png(picture, path)


def main() -> int:
    out = common.options(__doc__).out
    found, rows = groups(), []
    for group in found:
        first = group.steps[0]
        common.progress(f"{first.model.name} on {first.mesh}, batch {first.workload.batch}: {len(group.steps)} layouts")
        rows.append(row(group))
    common.show(shown(rows), COLUMNS)
    print()
    common.show(summary(rows), SUMMARY)
    print()
    common.show(list(missed(rows)), ORDER)
    problems = wrong(rows)
    for problem in problems:
        print(problem)
    common.write_csv(rows, out / "plan_regret.csv")
    draw(rows, found, out / "plan_regret.png")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
