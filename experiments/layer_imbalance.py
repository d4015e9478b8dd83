"""How uneven are the embedding, the blocks and the head, and what evens them out?

    python experiments/layer_imbalance.py [--quick] [--out DIR]

What one device holds, computes and sends for each part of a model, by closed form: for a short and a long sequence, and with
one remedy after the other for what is held most. Whether it is so is asked of XLA:GPU: a model of three blocks is compiled, and
one of two, and what the third has added to every line is one block; what two blocks leave is the embedding and the head. Exits
with 1 when a line of either program is not the predicted one, or a difference is not a block. --quick compiles one layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload
from jaxllm.report.layers import uneven
from jaxllm.theory.parts import Part, parts

PRECISION, MESH = "bf16-f32", "h100:8"
# Llama 2 has a small vocabulary for its size, Llama 3.2 1B a large one, which is its head too.
MODELS = ("llama-2-7b", "llama-3-8b", "llama-3.2-1b")
TOKENS = (1024, 4096, 16384)
# Each has a remedy more than the one before it for what is held most there.
LAYOUTS = (
    "data=8",
    "data=8,attention=blockwise",
    "data=8,attention=blockwise,zero=3",
    "data=8,attention=blockwise,zero=3,remat=full",
    "data=2,context=4,attention=blockwise,zero=3,remat=full",
    "tensor=8,sequence=true,attention=blockwise,zero=3,remat=full",
)
COMPILED, COMPILED_TOKENS = "llama-2-7b", 4096
QUICK = LAYOUTS[2]
ENDS = ("embedding", "head")
FIGURES = ("parameters", "gradients", "optimizer", "activations")
WORK = ("forward", "recompute", "backward")
COLUMNS = {
    "model": "model",
    "layout": "layout",
    "tokens": "tokens",
    "held": "GB held",
    "weights": "weights",
    "gradients": "gradients",
    "state": "state",
    "saved": "saved",
    "ends": "ends, in blocks",
    "square": "attention, of a block's FLOPs",
}


def batch(layout: Layout) -> int:
    """One sequence on each data rank."""
    return layout.data


def row(name: str, text: str, tokens: int) -> dict[str, Any]:
    """By closed form: GB of one device by kind, the ends in blocks, and the share of attention in a block's FLOPs."""
    layout = Layout.parse(text)
    work = Workload(batch(layout), tokens, PRECISION)
    by_module = {part.name: part for part in parts(ModelConfig.load(name), layout, work, "module")}
    found = parts(ModelConfig.load(name), layout, work)
    block = next(part for part in found if part.name == "block")
    held = lambda kind: common.gigabytes(sum(getattr(part, kind) for part in found))  # noqa: E731
    flops = lambda part: sum(getattr(part, kind) for kind in WORK)  # noqa: E731
    ends = sum(part.held for part in found if part.name in ENDS)
    return {
        "model": name,
        "layout": text,
        "tokens": tokens,
        "held": common.gigabytes(sum(part.held for part in found)),
        "weights": held("parameters"),
        "gradients": held("gradients"),
        "state": held("optimizer"),
        "saved": held("activations"),
        "ends": round(ends * block.times / block.held, 2),
        "square": f"{100 * flops(by_module['block.attention']) / flops(block):.0f} %",
        "advice": dict(uneven(found, layout))["most"].partition("; ")[2],
    }


def rows() -> Iterator[dict[str, Any]]:
    """A row for each model and layout at the middle length, and for each length of the first two layouts of one model."""
    for name in MODELS:
        for text in LAYOUTS:
            for tokens in TOKENS if name == COMPILED and text in LAYOUTS[:2] else (COMPILED_TOKENS,):
                yield row(name, text, tokens)


def difference(text: str) -> list[dict[str, Any]]:
    """What a third block adds to each line of memory and FLOPs that XLA:GPU has, beside the closed form's block."""
    layout = Layout.parse(text)
    programs, whole = [], []
    for layers in (2, 3):
        model = dataclasses.replace(ModelConfig.load(COMPILED), name=f"{COMPILED} of {layers} blocks", layers=layers)
        common.progress(f"compiling {model.name}, {text}")
        found = common.checked(model, MESH, text, batch=batch(layout), sequence=COMPILED_TOKENS, precision=PRECISION)
        whole.append(common.lines_equal(found))
        programs.append({line.label: line.compiled for line in found.rows if line.section in ("memory", "flops")})
    work = Workload(batch(layout), COMPILED_TOKENS, PRECISION)
    block = next(part for part in parts(model, layout, work) if part.name == "block")
    expected = {name: getattr(block, name) // block.times for name in (*FIGURES, *WORK)}
    labels = {"activations": "residuals"} | {phase: f"matmul/{phase}" for phase in WORK}
    return [
        {
            "layout": text,
            "line": labels.get(name, name),
            "block": size,
            "third": programs[1].get(labels.get(name, name), 0) - programs[0].get(labels.get(name, name), 0),
            "equal": sum(each["equal"] for each in whole),
            "lines": sum(each["lines"] for each in whole),
        }
        for name, size in expected.items()
    ]


DIFFERENCES = {"layout": "layout", "line": "line", "block": "block by closed form", "third": "what a third block adds"}


def wrong(table: Sequence[common.Row]) -> list[str]:
    """Differences that are not a block, in words."""
    found = [
        f"{row['layout']}: a third block adds {row['third']:,} to {row['line']}, and a block has {row['block']:,}"
        for row in table
        if row["third"] != row["block"]
    ]
    return found + sorted(
        {f"{row['layout']}: {row['equal']} of {row['lines']} lines are equal" for row in table if row["equal"] != row["lines"]}
    )


def held_by_part(name: str, text: str) -> list[Part]:
    layout = Layout.parse(text)
    return [
        part
        for part in parts(ModelConfig.load(name), layout, Workload(batch(layout), COMPILED_TOKENS, PRECISION), "module")
        if part.name != "step"
    ]


def draw(path: Path) -> None:
    """For each layout of one model, GB of each part of a device as bars of what they are."""
    figure = common.figure(10, 4.2)
    figure.suptitle(f"One remedy after the other: {COMPILED} on {MESH}, {COMPILED_TOKENS:,} tokens", x=0.01, ha="left", weight="bold")
    places = figure.subplots(1, len(LAYOUTS), sharey=False)
    colours = dict(zip(FIGURES, (common.FIRST, common.THIRD, common.PALE, common.SECOND), strict=True))
    for place, text, before in zip(places, LAYOUTS, ("", *LAYOUTS[:-1]), strict=True):
        found = held_by_part(COMPILED, text)
        names = [part.name.removeprefix("block.") for part in found]
        bottom = [0.0] * len(found)
        for kind, colour in colours.items():
            sizes = [getattr(part, kind) / 1e9 for part in found]
            place.bar(names, sizes, bottom=bottom, color=colour, label={"optimizer": "state", "activations": "saved"}.get(kind, kind))
            bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
        new = [item for item in text.split(",") if item not in before.split(",")]
        place.set_title("\n".join(new), loc="left", fontsize=8)
        place.tick_params(axis="x", rotation=90, labelsize=8)
        place.set_ylim(0, 1.06 * max(bottom))
    places[0].set_ylabel("GB of a device")
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compiles one layout of six")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows())
    print(f"GB of one device, {PRECISION}, one sequence on each data rank, all blocks together")
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "layer_imbalance.csv")
    third = [each for text in LAYOUTS if not options.quick or text == QUICK for each in difference(text)]
    common.show(third, DIFFERENCES)
    common.write_csv(third, options.out / "layer_imbalance_third.csv")
    draw(options.out / "layer_imbalance.png")
    problems = wrong(third)
    for problem in problems:
        print(f"layer_imbalance: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
