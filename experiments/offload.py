"""Do the rows of DeepSpeed's estimators for ZeRO with offload follow from closed forms, and what does a compiler keep where?

    python experiments/offload.py [--quick] [--out DIR]

DeepSpeed's documentation (Memory Requirements: estimate_zero2_model_states_mem_needs and the same of zero3) prints what
t5-3b takes on a node of 8 cards, by stage and by what is offloaded: GB of 2^30 bytes of a card and of the host. Beside each
row stand the estimator's formula, and for the same layout of a GPT of about that size what `predict` says and XLA:GPU keeps,
per weight times t5-3b's weights: bytes of state in a card's memory, and in host memory of all 8 cards. Exits with 1 when a
formula is more than one unit of the last printed digit off, or a compiled line is not the predicted one. --quick compiles
one layout of five.

The two are not the same scheme. DeepSpeed's host computes the update: gradients leave the card as they are made, and the host
has a buffer of half as much again. Here the card computes it: gradients stay until the state comes by.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict

CARDS = 8
UNIT = 0.01  # of the last digit that is printed
BUFFER = 1.5  # the estimator's additional_buffer_factor

# t5-3b (Raffel et al. 2020; Hugging Face's config.json): V 32128, D 1024, 32 heads of 128, F 16384, 24 + 24 layers.
VOCABULARY, WIDTH, HEADS, INNER, FEED_FORWARD, LAYERS, BUCKETS = 32128, 1024, 32, 4096, 16384, 24, 32
ATTENTION, MLP = 4 * WIDTH * INNER + WIDTH, 2 * WIDTH * FEED_FORWARD + WIDTH  # each with its norm
LARGEST = VOCABULARY * WIDTH  # the estimator's largest layer: the embedding
WEIGHTS = LARGEST + LAYERS * (3 * ATTENTION + 2 * MLP) + 2 * (BUCKETS * HEADS + WIDTH)

# As printed: stage, what is offloaded, whether the model is made in slices (zero.Init), GB of a card, GB of the host.
PRINTED = (
    (2, "none", None, "15.93", "127.45"),
    (2, "optimizer", None, "5.31", "127.45"),
    (3, "none", True, "6.10", "1.47"),
    (3, "none", False, "6.10", "127.48"),
    (3, "optimizer", True, "0.79", "63.74"),
    (3, "optimizer", False, "0.79", "127.48"),
    (3, "optimizer+parameters", True, "0.12", "71.71"),
    (3, "optimizer+parameters", False, "0.12", "127.48"),
)
ROUNDED = 2851e6  # the rows of stage 2 are printed for t5-3b's weights as given, in millions

MODEL, MESH, SEQUENCE, PRECISION = "megatron-3.6b", f"h100:{CARDS}", 1024, "bf16-master"
STATE = ("parameters", "gradients", "optimizer")

COLUMNS = {
    "stage": "ZeRO", "offload": "offload", "sliced_init": "zero.Init", "card_printed": "card printed",
    "card_formula": "formula", "card_predicted": "predicted", "card_compiled": "XLA:GPU", "host_printed": "host printed",
    "host_formula": "formula", "host_predicted": "predicted", "host_compiled": "XLA:GPU",
    "moved_predicted": "moved predicted", "moved_compiled": "XLA:GPU",
}  # fmt: skip


def formula(stage: int, offload: str, sliced_init: bool | None) -> tuple[float, float]:
    """Bytes of a card and of the host by DeepSpeed's estimator, for one node: 2 bytes of a weight, 2 of its gradient and 16
    of the optimizer with a gradient in 4."""
    if stage == 2:
        if offload == "none":
            return 4 * ROUNDED + 16 * ROUNDED / CARDS, 4 * CARDS * ROUNDED * BUFFER
        return 2 * ROUNDED, max(4 * CARDS, 16) * ROUNDED * BUFFER
    kept = {"none": 18 / CARDS, "optimizer": 2 / CARDS, "optimizer+parameters": 0}[offload] * WEIGHTS
    on_host = {"none": 0, "optimizer": 16, "optimizer+parameters": 18}[offload] * WEIGHTS
    whole = 4 * CARDS * (WEIGHTS if not sliced_init else LARGEST if offload == "none" else 0)
    return kept + 4 * LARGEST, max(whole, on_host) * BUFFER


@cache
def ours(stage: int, offload: str, compiled: bool) -> dict[str, Any]:
    """Of the same layout of our model: bytes in a card's memory, of 8 cards in host memory, and copied in a step both ways,
    per weight times t5-3b's weights; predicted, and compiled too where asked for."""
    model = ModelConfig.load(MODEL)
    text = f"data={CARDS},zero={stage},remat=full" + (f",offload={offload}" if offload != "none" else "")
    ledger = predict(model, Layout.parse(text), Workload(CARDS, SEQUENCE, PRECISION))
    each = {(line.section, line.label): line.value for line in ledger.lines if line.section in ("memory", "transfers")}
    found = _of_weights(each, model.parameters, "predicted")
    missing = dict.fromkeys(("card_compiled", "host_compiled", "moved_compiled", "lines", "equal"))
    if not compiled:
        return found | missing
    common.progress(f"compiling {MODEL}, {text}")
    checked = common.checked(model, MESH, text, batch=CARDS, sequence=SEQUENCE, precision=PRECISION)
    each = {(row.section, row.label): row.compiled for row in checked.rows if row.section in ("memory", "transfers")}
    return found | _of_weights(each, model.parameters, "compiled") | common.lines_equal(checked)


def _of_weights(lines: dict[tuple[str, str], int], weights: int, author: str) -> dict[str, float]:
    scale = WEIGHTS / weights
    sums = {
        "card": sum(lines["memory", name] for name in STATE),
        "host": CARDS * lines["memory", "host"],
        "moved": sum(value for (section, _), value in lines.items() if section == "transfers"),
    }
    return {f"{name}_{author}": gib(value * scale) for name, value in sums.items()}


def gib(count: float) -> float:
    """In GB of 2^30 bytes, as DeepSpeed prints them, four digits behind the point."""
    return round(count / 2**30, 4)


def rows(quick: bool, compiled: bool = True) -> list[dict[str, Any]]:
    """A row for each that is printed."""
    table = []
    for stage, offload, sliced_init, card, host in PRINTED:
        chosen = compiled and (not quick or (stage, offload) == (3, "optimizer"))
        known = dict(zip(("card_formula", "host_formula"), map(gib, formula(stage, offload, sliced_init)), strict=True))
        asked = {"stage": stage, "offload": offload, "sliced_init": {None: "-", True: "yes", False: "no"}[sliced_init]}
        table.append(asked | {"card_printed": card, "host_printed": host} | known | ours(stage, offload, chosen))
    return table


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    place = f"stage {row['stage']}, offload {row['offload']}"
    found = [
        f"{place}: the formula has {row[f'{where}_formula']} GB on the {where}, and {row[f'{where}_printed']} is printed"
        for where in ("card", "host")
        if abs(row[f"{where}_formula"] - float(row[f"{where}_printed"])) > UNIT
    ]
    if row["lines"] != row["equal"]:
        found.append(f"{place}: {row['equal']} of {row['lines']} lines are equal")
    return found


def draw(table: Sequence[common.Row], path: Path) -> None:
    """State of a card and of the host for each layout: DeepSpeed's rows beside ours."""
    layouts = list(dict.fromkeys((row["stage"], row["offload"]) for row in table))
    figure = common.figure(9, 3.6)
    figure.suptitle("What leaves the card is in the memory of its host", x=0.01, ha="left", weight="bold")
    titles = {"card": "GB of a card", "host": "GB of the host of 8"}
    ticks = [f"ZeRO {stage}\n" + offload.replace("+", "+\n") for stage, offload in layouts]
    for place, (where, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for side, (column, colour, label) in enumerate(
            ((f"{where}_printed", common.PALE, "DeepSpeed's estimator"), (f"{where}_predicted", common.FIRST, "jaxllm"))
        ):
            values = [next(float(row[column]) for row in table if (row["stage"], row["offload"]) == each) for each in layouts]
            place.bar([i + (side - 0.5) * 0.4 for i in range(len(layouts))], values, 0.38, color=colour, label=label)
        place.set_xticks(range(len(layouts)), ticks, fontsize=7)
        place.set_title(title, loc="left", fontsize=9)
    figure.axes[0].legend(frameon=False)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compiles one layout of five")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = rows(options.quick)
    print(f"GB (2^30 bytes) of t5-3b's {WEIGHTS:,} weights on a node of {CARDS} cards")
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "offload.csv")
    draw(table, options.out / "offload.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"offload: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
