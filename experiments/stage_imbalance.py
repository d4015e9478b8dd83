"""How uneven are the stages of a pipeline, and what does it help to share out layers by time or by memory?

    python experiments/stage_imbalance.py [--quick] [--out DIR]

The first stage also has the embedding, the last the head; with a large vocabulary these are as much as several layers.
For three models FLOPs and bytes of each stage are told by closed form, with layers shared out evenly, by time and by
memory: the heaviest stage over the mean. All stages run one program, which allocates on each what any of them needs: for
one of the models it is compiled by XLA:GPU, and what a stage needs and what it allocates are read out of the program.
Exits with 1 when a line differs. --quick compiles one partition.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.spec.layout import PARTITIONS
from jaxllm.theory.partition import load, runs, stages_of


@dataclass(frozen=True)
class Case:
    """A model and its layout, but for the partition. Batch in sequences, sequence in tokens."""

    model: str
    mesh: str
    layout: str
    batch: int
    sequence: int

    def nouns(self, partition: str) -> tuple[ModelConfig, Layout, Workload]:
        layout = Layout.parse(f"{self.layout},partition={partition}")
        return ModelConfig.load(self.model), layout, Workload(self.batch, self.sequence, PRECISION)

    def __str__(self) -> str:
        return f"{self.model}, {Layout.parse(self.layout).pipe} stages"


PRECISION = "bf16-f32"
CASES = (
    Case("llama-3-8b", "h100:8", "pipe=8,zero=0,remat=full,microbatches=16,schedule=1f1b", 16, 8192),
    # Llama team 2024, arXiv:2407.21783, Table 4, second row: 16 stages, 8 cards to a tensor group, 128 data ranks.
    Case("llama-3.1-405b", "h100:2048x8", "pipe=16,data=128,tensor=8,zero=2,remat=full,microbatches=16,schedule=1f1b", 2048, 8192),
    # Its head takes as many FLOPs of a step as three and a half of its twelve layers.
    Case("gpt2", "h100:4", "pipe=4,remat=full,microbatches=8,schedule=1f1b", 64, 1024),
)  # fmt: skip
COMPILED = CASES[0]
# What a stage needs of its own between steps, and what it allocates beside.
NEEDED = ("parameters", "optimizer")

IMBALANCE = {
    "model": "model",
    "partition": "partition",
    "time": "FLOPs",
    "memory": "bytes",
    "ends": "on stages",
    "peak": "peak GB",
    "peak_compiled": "XLA:GPU",
    "layers": "layers by stage",
}
STAGE = {
    "partition": "partition",
    "stage": "stage",
    "layers": "layers",
    "needed": "needed",
    "needed_compiled": "XLA:GPU",
    "uniform": "for others",
    "uniform_compiled": "XLA:GPU",
    "share": "more",
}


def shares(case: Case, partition: str) -> list[dict[str, Any]]:
    """A row for each stage: layers, FLOPs and bytes by closed form, and both over the mean of all stages."""
    model, layout, workload = case.nouns(partition)
    stages = stages_of(model, layout, workload)
    assert stages is not None  # every case has a pipeline
    here = load(model, layout, workload, stages)
    ledger = predict(model, layout, workload)
    memory = {line.name: line for line in ledger.section("memory")}
    return [
        {
            "model": case.model,
            "partition": partition,
            "stage": stage,
            "layers": sum(len(stages.layers(stage, chunk)) for chunk in range(stages.schedule.chunks)),
            "flops": here.time[stage],
            "bytes": here.memory[stage],
            "time": round(here.time[stage] * layout.pipe / sum(here.time), 6),
            "memory": round(here.memory[stage] * layout.pipe / sum(here.memory), 6),
            "needed": sum(memory[name].on_stage(stage) for name in NEEDED),
            "uniform": memory["uniform"].on_stage(stage),
            "peak": ledger.peak,
        }
        for stage in range(layout.pipe)
    ]


def compiled(case: Case, partition: str) -> list[dict[str, Any]]:
    """Of each stage what it needs and what it allocates for others, read from the program, and the lines of both ledgers."""
    _, layout, workload = case.nouns(partition)
    found = common.checked(
        case.model, case.mesh, str(layout), batch=workload.batch, sequence=workload.sequence, precision=PRECISION
    )
    memory = {row.name: row for row in found.section("memory")}
    return [
        {
            "needed_compiled": sum(memory[name].on_stage(stage)[1] for name in NEEDED),
            "uniform_compiled": memory["uniform"].on_stage(stage)[1] if "uniform" in memory else 0,
            "peak_compiled": found.peak.compiled,
            **common.lines_equal(found),
        }
        for stage in range(layout.pipe)
    ]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """All stages of all cases; of the compiled one with what is compiled."""
    for case in CASES[:1] if quick else CASES:
        for partition in PARTITIONS[:1] if quick else PARTITIONS:
            mine = shares(case, partition)
            if case == COMPILED:
                common.progress(f"compiling {case}, partition={partition}")
                mine = [row | more for row, more in zip(mine, compiled(case, partition), strict=True)]
            yield from mine


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    if row.get("lines") is None:
        return []
    pairs = (("needed", "needed_compiled"), ("uniform", "uniform_compiled"), ("lines", "equal"))
    place = f"{row['model']}, partition={row['partition']}, stage {row['stage']}"
    return [f"{place}: {a} {row[a]:,} and {b} {row[b]:,}" for a, b in pairs if row[a] != row[b]]


def of(table: Sequence[common.Row], model: str, partition: str) -> list[common.Row]:
    return [row for row in table if (row["model"], row["partition"]) == (model, partition)]


def imbalance(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """A row for each model and partition: the heaviest stage over the mean and which one it is, and the peak of a card."""
    found = []
    for model, partition in dict.fromkeys((row["model"], row["partition"]) for row in table):
        mine = of(table, model, partition)
        most = {kind: max(mine, key=lambda row: row[kind]) for kind in ("time", "memory")}
        found.append(
            {
                "model": model,
                "partition": partition,
                "time": f"{most['time']['time']:.3f}",
                "memory": f"{most['memory']['memory']:.3f}",
                "ends": f"{most['time']['stage']}, {most['memory']['stage']}",
                "peak": f"{mine[0]['peak'] / 1e9:.1f}",
                "peak_compiled": f"{mine[0]['peak_compiled'] / 1e9:.1f}" if mine[0].get("peak_compiled") else None,
                "layers": runs([row["layers"] for row in mine]),
            }
        )
    return found


def by_stage(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The compiled case, stage by stage, in MB: stages of the same numbers once."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = ("needed", "needed_compiled", "uniform", "uniform_compiled")
    for row in table:
        if row.get("lines") is None:
            continue
        key = (row["partition"], row["layers"], *(row[name] for name in names))
        if key in found:
            found[key]["stages"].append(row["stage"])
        else:
            found[key] = {"stages": [row["stage"]]} | {name: row[name] for name in STAGE if name in row}
    return [
        shown | {"stage": span(shown.pop("stages")), "share": f"{100 * shown['uniform'] / shown['needed']:.1f} %"}
        for shown in found.values()
    ]


def span(stages: Sequence[int]) -> str:
    """`3`, or `1 to 6`."""
    together = len(stages) > 2 and stages[-1] - stages[0] == len(stages) - 1
    return f"{stages[0]} to {stages[-1]}" if together else ", ".join(map(str, stages))


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Above FLOPs, below bytes of each stage over the mean, for each partition; right what one program allocates."""
    models = list(dict.fromkeys(row["model"] for row in table))
    figure = common.figure(12, 5.6)
    before, after = (
        max(float(row["time"]) for row in imbalance(table) if row["partition"] == partition) for partition in ("even", "time")
    )
    figure.suptitle(
        f"Layers shared out evenly leave the heaviest stage at up to {before:.2f} times the mean FLOPs; by time, {after:.2f}",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    grid = figure.add_gridspec(2, len(models) + 1)
    colours = dict(zip(PARTITIONS, (common.PALE, common.FIRST, common.SECOND), strict=True))
    for place, model in enumerate(models):
        for height, (kind, what) in enumerate((("time", "FLOPs"), ("memory", "bytes"))):
            axes = figure.add_subplot(grid[height, place])
            for number, (partition, colour) in enumerate(colours.items()):
                mine = of(table, model, partition)
                shift = 0.27 * (number - 1)
                axes.bar(
                    [row["stage"] + shift for row in mine], [row[kind] for row in mine], 0.27, color=colour,
                    label=f"partition={partition}" if not place and not height else None,
                )  # fmt: skip
            axes.axhline(1, color=common.INK, lw=0.8, ls=(0, (5, 3)))
            axes.set_title(model if not height else "", loc="left", fontsize=9)
            axes.set(xlabel="stage" if height else "", ylabel=f"{what} over the mean" if not place else "")
            axes.tick_params(axis="x", length=0)
    axes = figure.add_subplot(grid[:, len(models)])
    mine = of(table, COMPILED.model, "even")
    stages = [row["stage"] for row in mine]
    needed, others = ([row[name] / 1e9 for row in mine] for name in ("needed_compiled", "uniform_compiled"))
    axes.bar(stages, needed, 0.7, color=common.THIRD, label="needed by the stage")
    axes.bar(stages, others, 0.7, needed, color="white", edgecolor="#777777", hatch="////", lw=0.6, label="for other stages")
    axes.set_title(f"{COMPILED.model}, even, compiled:\nparameters and optimizer", loc="left", fontsize=9)
    axes.set(ylabel="GB of one card", xlabel="stage", xticks=stages)
    axes.tick_params(axis="x", length=0)
    figure.legend(frameon=False, loc="outside lower center", ncols=5)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"only {COMPILED.model}, layers shared out evenly")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows(options.quick))
    print("the heaviest stage over the mean of all, by closed form; and the peak of one card")
    common.show(imbalance(table), IMBALANCE)
    print(f"\n{COMPILED}, {COMPILED.mesh}: parameters and optimizer of one card, in bytes, and what it allocates for others")
    common.show(by_stage(table), STAGE)
    keys = dict.fromkeys(key for row in table for key in row)
    common.write_csv([dict.fromkeys(keys) | row for row in table], options.out / "stage_imbalance.csv")
    if not options.quick:
        draw(table, options.out / "stage_imbalance.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"stage_imbalance: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
