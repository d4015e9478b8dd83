"""Which efficiencies do measured steps on A100s tell, and are those of meshes/a100-80.toml the ones?

    python experiments/fit_a100.py [--out DIR]

Fits the shares of peaks and links that are reached, and what kernels, collectives and launches take, to the 190 calibration
rows of vTrain (docs/published), one and several nodes counting alike, and to nothing else. Where rows leave a constant open it
stays near what is known of the hardware: each has a prior. Errors are logarithmic, and far ones count little (Cauchy), as some
rows are measurements of something else. Then it reads the interval off what is left. Exits with 1 when the machine's file has
other figures than these.

The same fit on one node alone, as if it recomputed everything, wants more than the peak of an A100: so these rows are taken
to recompute nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize

from experiments import common, published
from jaxllm import Machine
from jaxllm.theory.rates import Rates
from jaxllm.theory.symbols import Symbols, stacked
from jaxllm.theory.time import StepTime, bubble, cells_of, distinct, of_symbols

WIDTH = 0.05  # of an error that counts half of what it would
# Figure -> what is known before, how sure that is (a factor e^x either way), and from where.
PRIORS = {
    "efficiency.matmul": (0.75, 0.1, "cuBLAS on large matrices under full power"),
    "efficiency.memory": (0.8, 0.1, "what STREAM-like kernels reach"),
    "efficiency.inside_node": (0.75, 0.15, "NCCL's bus bandwidth over NVLink"),
    "efficiency.between_nodes": (0.8, 0.2, "NCCL's bus bandwidth over InfiniBand"),
    "latency.collective": (8.4e-6, 0.7, "NVIDIA/nccl, src/graph/tuning.cc, baseLat"),
    "latency.kernel": (8e-6, 0.7, "an order of magnitude"),
    "latency.block": (1e-3, 1.0, "an order of magnitude"),
    "latency.issue": (1e-4, 1.0, "an order of magnitude"),
    "latency.step": (1e-2, 1.0, "an order of magnitude"),
}
FIXED = {"latency.hop": 3.4e-6, "latency.far_hop": 14e-6}  # NVIDIA/nccl, src/graph/tuning.cc, hwLat of a ring
TIMES = ("collective", "hop", "far_hop", "kernel", "block", "issue", "step")


@dataclass(frozen=True)
class Rows:
    """Many steps at once: all stages that differ of all of them, and to which each belongs."""

    seconds: np.ndarray
    weights: np.ndarray
    stages: Symbols
    first: np.ndarray
    longest: Symbols
    piped: np.ndarray
    chunks: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[published.Step]) -> Rows:
        each, first, longest = [], [], []
        for step in steps:
            s = step.symbols
            found = [s] if step.stages is None else [s.on_stage(step.stages, i) for i in range(step.stages.schedule.stages)]
            first.append(len(each))
            each += distinct(found)
            longest.append(max(found, key=lambda stage: stage.L))
        sizes = {source: len(found) for source, found in published.by_source(steps).items()}
        return cls(
            seconds=np.array([step.seconds for step in steps]),
            weights=np.array([math.sqrt(len(steps) / len(sizes) / sizes[step.source]) for step in steps]),
            stages=stacked(each),
            first=np.array(first),
            longest=stacked([replace(s, ticks=max(1, s.ticks)) for s in longest]),
            piped=np.array([step.stages is not None for step in steps]),
            chunks=np.array([1 if step.stages is None else step.stages.schedule.chunks for step in steps]),
        )

    def time(self, rates: Rates) -> tuple[np.ndarray, StepTime, np.ndarray]:
        """Seconds of each step, the times of all stages, and which of these is the slowest of its step."""
        found = of_symbols(self.stages, rates)
        stages = np.asarray(found.seconds)
        slowest = np.array([
            start + int(np.argmax(stages[start:end]))
            for start, end in zip(self.first, [*self.first[1:], len(stages)], strict=True)
        ])  # fmt: skip
        return stages[slowest] + bubble(self.longest, cells_of(self.longest, rates), "interleaved", self.chunks) * self.piped, found, slowest


def with_figures(rates: Rates, figures: dict[str, float], machine: Machine) -> Rates:
    """The rates of a machine that has these figures."""
    return replace(
        rates,
        matmul=figures["efficiency.matmul"],
        memory=machine.bandwidth * figures["efficiency.memory"],
        inside=machine.value("links.inside_node") * figures["efficiency.inside_node"],
        between=machine.value("links.between_nodes") * figures["efficiency.between_nodes"],
        **{name: figures[f"latency.{name}"] for name in TIMES},
    )


def fit(rows: Rows, rates: Rates, machine: Machine) -> dict[str, float]:
    """The figures under which the steps are nearest."""
    start = np.log([prior for prior, _, _ in PRIORS.values()])
    sure = np.array([factor for _, factor, _ in PRIORS.values()])

    def figures(x: np.ndarray) -> dict[str, float]:
        return dict(zip(PRIORS, map(float, np.exp(x)), strict=True)) | FIXED

    def errors(x: np.ndarray) -> np.ndarray:
        seconds, _, _ = rows.time(with_figures(rates, figures(x), machine))
        off = np.log(seconds / rows.seconds) * rows.weights / WIDTH
        return np.concatenate([np.sign(off) * np.sqrt(np.log1p(off**2)), (x - start) / sure])

    return figures(least_squares(errors, start).x)


def interval(rows: Rows, rates: Rates) -> tuple[float, float]:
    """Half a width, at least and for each share of a step that waits for tensor parallelism or the host: the quantile
    regression of what is left, at 80 %."""
    seconds, found, slowest = rows.time(rates)
    waits = np.asarray(found.launch + found.between)[slowest] / seconds
    off = np.abs(np.log(seconds / rows.seconds))

    def pinball(x: np.ndarray) -> float:
        beyond = off - np.abs(x[0]) - np.abs(x[1]) * waits
        return float(np.mean(np.where(beyond > 0, 0.8 * beyond, -0.2 * beyond)))

    tries = [minimize(pinball, [a, b], method="Nelder-Mead") for a in (0.02, 0.05, 0.1) for b in (0.1, 0.3, 0.6)]
    least, tensor = np.abs(min(tries, key=lambda tried: tried.fun).x)
    return float(least), float(tensor)


def rounded(value: float) -> float:
    """Three digits: what a machine's file states."""
    return float(f"{value:.3g}")


def main() -> int:
    out = common.options(__doc__).out
    steps = published.steps(calibration=True)
    machine, rates = Machine.read("a100-80"), steps[0].rates
    alone = [step for step in steps if step.layout.remat == "none"]
    again = [replace(step, layout=replace(step.layout, remat="full")) for step in alone]
    recomputed = fit(Rows.of(again), rates, machine)
    print(f"one node alone, as if all were computed again: matmuls at {recomputed['efficiency.matmul']:.2f} of the peak")
    rows = Rows.of(steps)
    found = {name: rounded(value) for name, value in fit(rows, rates, machine).items()}
    least, tensor = interval(rows, with_figures(rates, found, machine))
    found |= {"interval.least": rounded(least), "interval.tensor": rounded(tensor)}
    stated = {name: machine.value(name) for name in found}
    table = [{"figure": name, "fitted": value, "stated": rounded(stated[name] or 0)} for name, value in found.items()]
    common.show(table, {"figure": "figure", "fitted": "fitted", "stated": "meshes/a100-80.toml"})
    seconds, _, _ = rows.time(with_figures(rates, found, machine))
    off = seconds / rows.seconds - 1
    for source in published.by_source(steps):
        mine = np.array([step.source == source for step in steps])
        print(f"{source}: {mine.sum()} rows, mean error {np.mean(abs(off[mine])):.1%}, median {np.median(abs(off[mine])):.1%}")
    common.write_csv(table, out / "fit_a100.csv")
    same = all(stated[name] and math.isclose(value, stated[name], rel_tol=0.02) for name, value in found.items())
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
