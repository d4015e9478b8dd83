"""Are the 54 cells of the ZeRO paper's Table 1 what its formulas, our prediction and a compiler say?

    python experiments/zero_table.py [--quick] [--out DIR]

Rajbhandari et al. 2020 (arXiv:1910.02054), Table 1: gigabytes of model state on a device, for three models, 1 to 1,024 data
ranks and three stages, at 2 + 2 + 12 bytes a weight. Beside each cell stand the paper's formula, and what `predict` says of
a GPT of about that size, per weight times the paper's number of weights: the prediction counts weight by weight what
divides. The smallest model is compiled by XLA:GPU for 1,024 cards at each stage. Exits with 1 when a cell is more than one
unit of its last printed digit off, or a compiled line is not the predicted one. --quick compiles one stage of three.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict

PRECISION = "bf16-master"
SEQUENCE = 1024
STATE = ("parameters", "gradients", "optimizer")
RANKS = (1, 4, 16, 64, 256, 1024)
COMPILED, MESH = ("7.5B", 1024), "h100:128x8"

# As printed, a row for each number of ranks: stage 1, 2 and 3 of each model.
TABLE_1 = {
    "7.5B": ("120 120 120", "52.5 41.3 30", "35.6 21.6 7.5", "31.4 16.6 1.88", "30.4 15.4 0.47", "30.1 15.1 0.12"),
    "128B": ("2048 2048 2048", "896 704 512", "608 368 128", "536 284 32", "518 263 8", "513 257 2"),
    "1T": ("16000 16000 16000", "7000 5500 4000", "4750 2875 1000", "4187 2218 250", "4046 2054 62.5", "4011 2013 15.6"),
}
WEIGHTS = {"7.5B": 7.5e9, "128B": 128e9, "1T": 1e12}
COLUMNS = {
    "model": "model",
    "ranks": "ranks",
    "stage": "ZeRO",
    "printed": "printed",
    "formula": "formula",
    "predicted": "predicted",
    "compiled": "XLA:GPU",
}


@cache
def config(name: str) -> ModelConfig:
    """A GPT of about that many weights."""
    if name == "128B":
        return dataclasses.replace(ModelConfig.load("gpt3-175b"), name="gpt-128b", layers=70)
    return ModelConfig.load({"7.5B": "megatron-7.5b", "1T": "megatron-1t"}[name])


def formula(weights: float, ranks: int, stage: int) -> float:
    """Bytes of model state on a device: 4P + 12P/n, 2P + 14P/n and 16P/n (section 5)."""
    return {1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage] * weights


def predicted(name: str, ranks: int, stage: int) -> float:
    """What `predict` says of our model, for each of its weights, times the paper's number of weights."""
    ledger = predict(config(name), Layout(data=ranks, zero=stage), Workload(ranks, SEQUENCE, PRECISION))
    state = sum(ledger.line(line).value for line in STATE)
    return state / config(name).parameters * WEIGHTS[name]


def compiled(name: str, stage: int) -> dict[str, Any]:
    """The same of what XLA:GPU has, and how many lines of the ledgers are equal."""
    layout = f"data={COMPILED[1]},zero={stage},remat=full"
    found = common.checked(config(name), MESH, layout, batch=COMPILED[1], sequence=SEQUENCE, precision=PRECISION)
    state = sum(row.compiled for row in found.section("memory") if row.name in STATE)
    return {"compiled": giga(state / config(name).parameters * WEIGHTS[name]), **common.lines_equal(found)}


def giga(count: float) -> float:
    """In GB of 10^9 bytes, four digits behind the point."""
    return round(count / 1e9, 4)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each cell."""
    for name, printed in TABLE_1.items():
        for ranks, cells in zip(RANKS, printed, strict=True):
            for stage, cell in enumerate(cells.split(), 1):
                found = {"compiled": None, "lines": None, "equal": None}
                if (name, ranks) == COMPILED and (not quick or stage == 3):
                    common.progress(f"compiling {config(name).name}, data={ranks}, zero={stage}")
                    found = compiled(name, stage)
                yield {
                    "model": name,
                    "ranks": ranks,
                    "stage": stage,
                    "printed": cell,
                    "formula": giga(formula(WEIGHTS[name], ranks, stage)),
                    "predicted": giga(predicted(name, ranks, stage)),
                    **found,
                }


def unit(printed: str) -> float:
    """One unit of the last digit: 0.1 of `41.3`."""
    return 10.0 ** -len(str(printed).partition(".")[2])


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    place = f"{row['model']}, {row['ranks']} ranks, stage {row['stage']}"
    found = [
        f"{place}: {column} {row[column]} GB, and the paper prints {row['printed']}"
        for column in ("formula", "predicted", "compiled")
        if row[column] is not None and abs(row[column] - float(row["printed"])) > unit(row["printed"])
    ]
    if row["lines"] != row["equal"]:
        found.append(f"{place}: {row['equal']} of {row['lines']} lines are equal")
    return found


def draw(table: Sequence[common.Row], path: Path) -> None:
    """State of a device against the number of ranks, printed cells as marks on the predicted lines."""
    figure = common.figure(10, 4)
    figure.suptitle("All 54 cells of Table 1 lie on what is predicted weight by weight", x=0.01, ha="left", weight="bold")
    for place, name in zip(figure.subplots(1, len(TABLE_1)), TABLE_1, strict=True):
        for stage, colour in zip((1, 2, 3), (common.FIRST, common.SECOND, common.PALE), strict=True):
            mine = [row for row in table if (row["model"], row["stage"]) == (name, stage)]
            ranks = [row["ranks"] for row in mine]
            place.plot(ranks, [row["predicted"] for row in mine], color=colour, label=f"stage {stage}")
            place.plot(ranks, [float(row["printed"]) for row in mine], "o", color=colour, markersize=4)
        place.set(xscale="log", yscale="log", xlabel="data ranks", title="")
        place.set_title(f"{name} weights", loc="left", fontsize=9)
        place.set_xticks(RANKS, RANKS)
        place.minorticks_off()
    figure.axes[0].set_ylabel("GB of a device")
    figure.axes[0].legend(frameon=False)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compiles one stage of three")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows(options.quick))
    print("GB of model state on a device, at 2 + 2 + 12 bytes a weight")
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "zero_table.csv")
    draw(table, options.out / "zero_table.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"zero_table: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
