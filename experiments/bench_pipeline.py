"""What does a pipeline's step take on an emulated mesh: its work, or its bubbles as well?

    python experiments/bench_pipeline.py [--pairs N] [--quick] [--out DIR]

On the emulated mesh cpu:8 the stages share the processors of one host: what a stage leaves idle another one uses. So
the wall time of a step must follow the FLOPs that all stages execute, whatever the schedule, and not its bubbles; where
it does not, the program does what its ledger does not tell. Steps of several schedules and microbatch counts, of the
same work and of other, are taken in pairs with 1F1B, in one process and warm, in turn first and second; the median over
the pairs of seconds over work is what counts. What a bubble costs on devices of their own, and how long a tick takes,
this cannot tell. Exits with 1 when a median is off by more than 15 %. --quick tries one of them on a small model.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import bench_step, common
from experiments.bench_step import Runner, Taken
from experiments.megatron_3d import of_all
from jaxllm.schedules import default_chunks, make
from jaxllm.schedules.simulation import simulate
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload

DEVICES = 8
# As wide as keeps a step at a few seconds on two cores: matmuls outweigh what the stash costs to write and to read, and
# the threads' waiting for each other. Two layers on a stage, and one in a chunk where there are two.
MODEL = dataclasses.replace(bench_step.MODEL, name="llama-55m", layers=16, vocab=512)
SMALL = dataclasses.replace(MODEL, name="llama-55k", d_model=16, d_ff=48, heads=4, kv_heads=4, head_dim=4, vocab=32)
SEQUENCE, SEQUENCES = 64, 8  # the tokens of every case; one of twice the work takes them twice
PAIRS = 5
LIMIT = 0.15  # how far a median of seconds over work may be off that of the base


@dataclass(frozen=True)
class Case:
    """A layout on all devices as stages, and how often the tokens are taken."""

    schedule: str
    microbatches: int
    remat: str = "none"
    times: int = 1

    @property
    def layout(self) -> Layout:
        return Layout(pipe=DEVICES, schedule=self.schedule, microbatches=self.microbatches, remat=self.remat)

    @property
    def workload(self) -> Workload:
        return Workload(SEQUENCES * self.times, SEQUENCE, "f32")

    @property
    def span(self) -> float:
        """How long a step would take on devices of their own, in the time of F for one sequence, by simulation."""
        sequences = SEQUENCES * self.times / self.microbatches
        return sequences * simulate(make(self.schedule, DEVICES, self.microbatches, default_chunks(self.schedule))).span

    def __str__(self) -> str:
        return ", ".join((self.schedule, f"m={self.microbatches}", *(("remat=full",) if self.remat == "full" else ())))


BASE = Case("1f1b", 8)
CASES = (
    Case("1f1b", 4),
    Case("gpipe", 8),
    Case("interleaved", 8),
    Case("circular", 8),
    Case("zb-h1", 8),
    Case("zb-h2", 8),
    Case("zb-v", 8),
    Case("dualpipev", 8),
    Case("1f1b", 8, remat="full"),
    Case("interleaved", 8, remat="full"),
    Case("zb-v", 8, remat="full"),
    Case("1f1b", 16, times=2),
    Case("zb-h1", 16, times=2),
)
QUICK = (Case("zb-h1", 8),)

COLUMNS = {
    "case": "step",
    "work": "work",
    "span": "span",
    "wall": "seconds",
    "ratio": "seconds / work",
    "least": "least",
    "most": "most",
    "processor": "CPU / work",
    "off": "off",
}


@dataclass(frozen=True)
class Step:
    """A compiled step, with the FLOPs of all its stages and how many lines of both ledgers are equal."""

    case: Case
    built: Any
    executable: Any
    flops: int
    lines: dict[str, int]

    def runner(self) -> Runner:
        """The step from its start: the same parameters and the same tokens for every case."""
        import jax
        import numpy as np

        from jaxllm.program.run import random_batch

        parameters = self.built.init_parameters(0)
        tokens = random_batch(self.built.model, SEQUENCES, SEQUENCE, np.random.default_rng(0))
        batch = {
            name: jax.device_put(np.tile(tokens[name], (self.case.times, 1)).reshape(leaf.shape), leaf.sharding)
            for name, leaf in self.built.arguments[2].items()
        }
        state = (parameters, self.built.init_optimizer(parameters))
        return Runner(self.executable, state, (batch,), lambda told: float(told["loss"]))


def compiled(case: Case, model: ModelConfig) -> Step:
    from jaxllm import build, compare, compile, measure, predict

    common.progress(f"compiling {case}")
    built = build(model, case.layout, Machine.load(f"cpu:{DEVICES}"), case.workload)
    made = compile(built)
    ledger = measure(made)
    flops = sum(of_all(line.stages or (line.value,), DEVICES) for line in ledger.section("flops"))
    lines = common.lines_equal(compare(predict(model, case.layout, case.workload), ledger))
    return Step(case, built, made.executable, flops, lines)


def summary(taken: Sequence[tuple[Taken, Taken]], work: float) -> dict[str, Any]:
    """Of pairs of a step and the base, which does `work` times less: medians, and the extremes of seconds over work."""
    ratios = [a.seconds / b.seconds / work for a, b in taken]
    return {
        "pairs": len(taken),
        "seconds": round(statistics.median(a.seconds for a, _ in taken), 4),
        "base_seconds": round(statistics.median(b.seconds for _, b in taken), 4),
        "wall": round(statistics.median(a.seconds / b.seconds for a, b in taken), 3),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "processor": round(statistics.median(a.processor / b.processor / work for a, b in taken), 3),
    }


def rows(cases: Sequence[Case], model: ModelConfig, count: int) -> Iterator[dict[str, Any]]:
    base = compiled(BASE, model)
    for case in cases:
        step = compiled(case, model)
        work = step.flops / base.flops
        common.progress(f"taking {count} pairs of steps")
        yield {
            "model": model.name,
            "sequence": SEQUENCE,
            "batch": case.workload.batch,
            "case": str(case),
            "base": str(BASE),
            "flops": step.flops,
            "work": round(work, 3),
            # With recomputation F, B and W are not equal any more.
            "span": round(case.span / BASE.span, 3) if case.remat == "none" else None,
            **summary(bench_step.pairs(step.runner(), base.runner(), count), work),
            **step.lines,
        }


def outside(table: Sequence[common.Row]) -> list[str]:
    """The cases whose seconds do not follow their work."""
    return [row["case"] for row in table if abs(row["ratio"] - 1) > LIMIT]


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table with as many digits as mean something."""
    digits = {"work": 2, "span": 2, "wall": 2, "ratio": 2, "least": 2, "most": 2, "processor": 2}
    return [
        dict(row)
        | {name: f"{row[name]:.{places}f}" for name, places in digits.items() if row[name] is not None}
        | {"off": f"{100 * (row['ratio'] - 1):+.0f} %"}
        for row in table
    ]


def verdict(table: Sequence[common.Row]) -> str:
    """What was found, in a sentence."""
    beyond = outside(table)
    return (
        f"the wall time follows the work within {100 * LIMIT:.0f} % in {len(table) - len(beyond)} of {len(table)} steps"
        + (f", but not in {'; '.join(beyond)}" if beyond else "")
    )


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Seconds over those of 1F1B: measured, as the work has it, and as the simulated spans have it."""
    figure = common.figure(9, 1.6 + 0.36 * len(table))
    beyond = outside(table)
    held = f"in {len(table) - len(beyond)} of {len(table)} steps" if beyond else "in every step"
    figure.suptitle(
        f"On the emulated mesh wall time follows the work executed within {100 * LIMIT:.0f} %, {held}",
        x=0.01, ha="left", weight="bold", fontsize=10,
    )  # fmt: skip
    axes = figure.subplots()
    for place, row in enumerate(table):
        work = row["work"]
        axes.barh(place, 2 * LIMIT * work, 0.62, work * (1 - LIMIT), color="#e4e8ec", zorder=0)
        axes.vlines(work, place - 0.31, place + 0.31, color=common.INK, lw=1.4)
        axes.hlines(place, row["least"] * work, row["most"] * work, color=common.PALE, lw=3)
        axes.plot(row["wall"], place, "o", color=common.FIRST, ms=7)
        if row["span"] is not None:
            axes.plot(row["span"], place, "D", mfc="none", mec=common.SECOND, ms=6)
    axes.barh(-9, 0, color="#e4e8ec", label=f"work within {100 * LIMIT:.0f} %")
    axes.plot([], [], "|", color=common.INK, ms=11, mew=1.4, label="work")
    axes.plot([], [], "o", color=common.FIRST, ms=7, label=f"seconds, median of {table[0]['pairs']} pairs")
    axes.plot([], [], "D", mfc="none", mec=common.SECOND, ms=6, label="span with bubbles, f = b = w")
    axes.set_yticks(range(len(table)), [row["case"] for row in table])
    axes.set(xlabel=f"times {table[0]['base']}", ylim=(len(table) - 0.4, -0.6), xlim=(0, None))
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside lower left", ncols=4)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one step of a small model, whose times say nothing")


def add_pairs(parser: argparse.ArgumentParser) -> None:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more, as in --pairs {PAIRS}")
        return int(text)

    parser.add_argument("--pairs", type=whole, default=PAIRS, metavar="N", help=f"pairs of steps, {PAIRS} by default")


def main() -> int:
    options = common.options(__doc__, add_pairs, add_quick)
    from jaxllm.targets import start

    start.prepare("cpu", DEVICES)
    cases, model = (QUICK, SMALL) if options.quick else (CASES, MODEL)
    table = list(rows(cases, model, options.pairs))
    print(f"{model.name}, {model.parameters:,} parameters, {SEQUENCES} sequences of {SEQUENCE} tokens, cpu:{DEVICES}; times {BASE}")
    common.show(shown(table), COLUMNS)
    print(f"\n{verdict(table)}")
    common.write_csv(table, options.out / "bench_pipeline.csv")
    draw(table, options.out / "bench_pipeline.png")
    return 0 if options.quick else int(bool(outside(table)))


if __name__ == "__main__":
    sys.exit(main())
