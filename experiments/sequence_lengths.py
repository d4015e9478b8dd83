"""How long may a sequence be, with and without context parallelism?

    python experiments/sequence_lengths.py [--quick] [--out DIR]

Llama 3.1 8B on 64 H100s, attention block by block, full recomputation, ZeRO 3 over all data and context ranks, one sequence
of 8,192 to 1,048,576 tokens on each data rank. Five layouts: data alone; tensor and sequence parallelism in each node; a ring
in each node; heads shared out in each node; and a ring of all 64. For each length and layout stand the predicted peak, and
what a device sends for each token of its own. The longest sequence that is predicted to fit and the one after it are compiled
by XLA:GPU. Exits with 1 when a compiled line is not the predicted one, or a verdict is another. --quick compiles one layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload, predict

MODEL, MESH, PRECISION = "llama-3.1-8b", "h100:8x8", "bf16-f32"
LENGTHS = tuple(2**power for power in range(13, 21))
WITH_ALL = "zero=3,remat=full,attention=blockwise"
LAYOUTS = {
    "data": "data=64",
    "tensor and sequence": "data=8,tensor=8,sequence=true",
    "ring of 8": "data=8,context=8",
    "heads over 8": "data=8,context=8,exchange=ulysses",
    "ring of 64": "context=64",
}
QUICK = "ring of 64"
COLUMNS = {
    "layout": "layout",
    "tokens": "tokens",
    "predicted": "predicted GB",
    "compiled": "XLA:GPU GB",
    "off": "off",
    "fits": "fits",
    "kilobytes": "kB sent a token",
    "attention": "attention, of FLOPs",
}


def workload(layout: Layout, tokens: int) -> Workload:
    """One sequence on each data rank."""
    return Workload(layout.data, tokens, PRECISION)


def predicted(name: str, tokens: int) -> dict[str, Any]:
    """A row by closed form."""
    layout = Layout.parse(f"{LAYOUTS[name]},{WITH_ALL}")
    ledger = predict(ModelConfig.load(MODEL), layout, workload(layout, tokens))
    flops = [term for line in ledger.section("flops") for term in line.terms]
    square = sum(term.value for term in flops if term.label in ("scores", "attention"))
    own = tokens * layout.data // layout.devices  # of all tokens of a step, those that a device is there for
    return {
        "layout": name,
        "tokens": tokens,
        "predicted": common.gigabytes(ledger.peak),
        "compiled": None,
        "off": None,
        "fits": "yes" if ledger.peak <= Machine.load(MESH).capacity else "no",
        "kilobytes": round(common.wire(ledger.section("collectives")) / own / 1e3, 1),
        "attention": f"{100 * square / ledger.total('flops'):.0f} %",
        "lines": None,
        "equal": None,
        "verdict": None,
    }


def compiled(row: common.Row) -> dict[str, Any]:
    """The same of what XLA:GPU has."""
    layout = f"{LAYOUTS[row['layout']]},{WITH_ALL}"
    batch = Layout.parse(layout).data
    found = common.checked(MODEL, MESH, layout, batch=batch, sequence=row["tokens"], precision=PRECISION)
    return {
        "compiled": common.gigabytes(found.peak.compiled),
        "off": common.off(found.peak.predicted, found.peak.compiled),
        "verdict": "yes" if found.peak.compiled <= Machine.load(MESH).capacity else "no",
        **common.lines_equal(found),
    }


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each layout and length; those on both sides of the limit are compiled."""
    for name in LAYOUTS:
        mine = [predicted(name, tokens) for tokens in LENGTHS]
        fitting = sum(row["fits"] == "yes" for row in mine)
        for place, row in enumerate(mine):
            if place in (fitting - 1, fitting) and (not quick or name == QUICK):
                common.progress(f"compiling {LAYOUTS[name]}, {row['tokens']:,} tokens")
                row |= compiled(row)
            yield row


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    place = f"{row['layout']}, {row['tokens']:,} tokens"
    found = []
    if row["lines"] != row["equal"]:
        found.append(f"{place}: {row['equal']} of {row['lines']} lines are equal")
    if row["verdict"] not in (None, row["fits"]):
        found.append(f"{place}: predicted to fit: {row['fits']}, and the compiler says {row['verdict']}")
    return found


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Peak of a device, and what it sends for a token, against the length of the sequence."""
    figure = common.figure(10, 4)
    figure.suptitle("What does not divide a sequence ends where one device does", x=0.01, ha="left", weight="bold")
    peak, sent = figure.subplots(1, 2)
    colours = (common.INK, common.PALE, common.FIRST, common.THIRD, common.SECOND)
    for name, colour in zip(LAYOUTS, colours, strict=True):
        mine = [row for row in table if row["layout"] == name]
        tokens = [row["tokens"] for row in mine]
        peak.plot(tokens, [row["predicted"] for row in mine], color=colour, label=name)
        here = [row for row in mine if row["compiled"] is not None]
        peak.plot([row["tokens"] for row in here], [row["compiled"] for row in here], "o", color=colour, markersize=4)
        sent.plot(tokens, [row["kilobytes"] for row in mine], color=colour)
    capacity = Machine.load(MESH).capacity / 1e9
    peak.axhline(capacity, color=common.INK, linewidth=0.8, linestyle=":")
    peak.annotate(f"usable {capacity:.1f} GB", (LENGTHS[0], capacity), xytext=(0, 4), textcoords="offset points", fontsize=8)
    peak.set_title("peak of a device, GB; dots compiled", loc="left", fontsize=9)
    sent.set_title("sent by a device for a token of its own, kB", loc="left", fontsize=9)
    for place in (peak, sent):
        place.set(xscale="log", yscale="log", xlabel="tokens of a sequence")
        place.set_xticks(LENGTHS[::2], [f"{tokens // 1024}k" for tokens in LENGTHS[::2]])
        place.minorticks_off()
    peak.legend(frameon=False)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compiles one layout of five")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows(options.quick))
    print(f"{MODEL} on {MESH}, one sequence on each data rank, {WITH_ALL}")
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "sequence_lengths.csv")
    draw(table, options.out / "sequence_lengths.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"sequence_lengths: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
