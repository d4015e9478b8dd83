"""Which layout does Llama 3.1 405B need on 16,384 H100s?

The step is compiled by XLA:GPU for 2,048 nodes of eight H100s, with 1, 2, 4 and 8 cards to a tensor group and with
ZeRO stages 0 to 3, one sequence of 8,192 tokens to a group. For each layout: what a card holds, whether it fits and by
how much it does not, and what it sends over each axis. Beside it stands, compiled as well, the layout that the model was
trained with (Llama team 2024, arXiv:2407.21783, Table 4), which has a pipeline of 16 stages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict

MODEL, MESH, CARDS = "llama-3.1-405b", "h100:2048x8", 16384
SEQUENCE, PRECISION = 8192, "bf16-f32"
TENSOR, STAGES = (1, 2, 4, 8), (0, 1, 2, 3)
AXES = ("data", "tensor", "pipe")
STATES = ("parameters", "gradients", "optimizer")

# Table 4, second row: 16,384 cards, sequences of 8,192 tokens, 16 sequences to a data rank, 16 million tokens a step.
# `zero` is by section 3.3.2: optimizer and gradients are sharded, the model is not again after the forward pass.
PAPER = Layout(pipe=16, data=128, tensor=8, zero=2, remat="full", microbatches=16, schedule="1f1b")
PAPER_BATCH, PAPER_TOKENS = 128 * 16, "16M"

LAYOUT = {"pipe": "pipe", "data": "data", "tensor": "t", "zero": "z"}
MEMORY = {
    **LAYOUT,
    "state": "state",
    "residuals": "residuals",
    "peak": "peak",
    "peak_compiled": "XLA:GPU",
    "off": "off",
    "fits": "fits",
    "equal": "lines",
}
REASONS = {**LAYOUT, "why": "why it fits or not, in GB"}
BATCH = {**LAYOUT, "tokens": "tokens", "paper_tokens": "paper", "why_tokens": "why"}
TRAFFIC = {
    **LAYOUT,
    "wire_data": "data",
    "wire_data_compiled": "XLA:GPU",
    "wire_tensor": "tensor",
    "wire_tensor_compiled": "XLA:GPU",
    "wire_pipe": "pipe",
    "wire_pipe_compiled": "XLA:GPU",
    "per_token": "MB/token",
}


def layout(tensor: int, zero: int) -> Layout:
    return Layout(data=CARDS // tensor, tensor=tensor, zero=zero, remat="full")


def batch(split: Layout) -> int:
    """Sequences of a step: one for each data rank and microbatch."""
    return split.data * split.microbatches


def closed_form(split: Layout) -> dict[str, Any]:
    """What a card holds and sends, by closed form, in bytes; in a pipeline one of the stage with the most."""
    ledger = predict(ModelConfig.load(MODEL), split, Workload(batch(split), SEQUENCE, PRECISION))
    held = {name: ledger.line(name).value for name in (*STATES, saved(split))}
    sent = {f"wire_{axes}": common.wire(over(ledger.section("collectives"), axes)) for axes in AXES}
    return _held(held, split) | {"peak": ledger.peak} | sent


def saved(split: Layout) -> str:
    """The line of what the forward pass keeps for the backward pass."""
    return "stash" if split.pipe > 1 else "residuals"


def _held(lines: dict[str, int], split: Layout, suffix: str = "") -> dict[str, int]:
    kept = {"residuals": lines[saved(split)], "state": sum(lines[name] for name in STATES)}
    return {f"{name}{suffix}": value for name, value in ({name: lines[name] for name in STATES} | kept).items()}


def over(lines: Sequence[Any], axes: str) -> list[Any]:
    """The collectives over one axis. Over several there is but a number of 4 bytes, the norm of all gradients."""
    return [line for line in lines if line.axes == (axes,)]


def cell(split: Layout) -> dict[str, Any]:
    """A row of the table: the closed form, and what XLA:GPU makes of the step."""
    found = common.checked(MODEL, MESH, str(split), batch=batch(split), sequence=SEQUENCE, precision=PRECISION)
    own = closed_form(split)
    held = _held({row.name: row.compiled for row in found.section("memory")}, split, "_compiled")
    sent = found.section("collectives")
    return {
        "pipe": split.pipe,
        "data": split.data,
        "tensor": split.tensor,
        "zero": split.zero,
        "tokens": batch(split) * SEQUENCE,
        "paper_tokens": PAPER_TOKENS,
        **own,
        "state_compiled": held["state_compiled"],
        "residuals_compiled": held["residuals_compiled"],
        "peak_compiled": found.peak.compiled,
        **{f"wire_{axes}_compiled": common.wire(over(sent, axes), "wire_compiled") for axes in AXES},
        **common.lines_equal(found),
        "capacity": found.peak.capacity,
        "fits": "yes" if found.fits else "no",
        "why": why_fits(found.peak, own),
        "why_tokens": why_tokens(split),
        "temporaries": common.largest_temporaries(found, 2),
    }


def why_fits(peak: Any, own: dict[str, Any]) -> str:
    """The verdict in GB, and the largest of what a card holds."""
    if peak.fits:
        return f"{(peak.capacity - peak.decisive) / 1e9:.1f} GB to spare"
    name = max((*STATES, "residuals"), key=lambda name: own[name])
    if own[name] > peak.capacity:
        why = f"{name} alone are {own[name] / 1e9:,.1f}"
    else:
        working = peak.decisive - own["state"] - own["residuals"]
        why = f"residuals are {own['residuals'] / 1e9:.1f}, and {working / 1e9:.1f} live for a moment"
    return f"{(peak.decisive - peak.capacity) / 1e9:,.1f} GB too much: {why}"


def why_tokens(split: Layout) -> str:
    """The global batch beside the published one."""
    if split.microbatches > 1:
        return f"published: {split.microbatches} sequences to a data rank"
    if split.data == PAPER_BATCH:
        return "the same batch"
    return f"{split.data // PAPER_BATCH} times: each data rank takes a sequence of its own"


def layouts() -> list[Layout]:
    """Those without a pipeline, then the published one."""
    return [*(layout(tensor, zero) for tensor in TENSOR for zero in STAGES), PAPER]


def rows() -> Iterator[dict[str, Any]]:
    for split in layouts():
        common.progress(f"compiling {MODEL} for {MESH}, {split}")
        yield cell(split)


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table in GB, for a narrow screen; blank is what is not known."""
    wires = [f"wire_{axes}" for axes in AXES]
    in_gb = ("state", "residuals", "peak", "peak_compiled", *wires, *(f"{name}_compiled" for name in wires))
    return [
        dict(row)
        | {name: f"{row[name] / 1e9:,.1f}" for name in in_gb}
        | {
            "off": common.off(row["peak"], row["peak_compiled"]),
            "equal": f"{row['equal']} of {row['lines']}",
            "per_token": f"{per_token(row):.0f}",
        }
        for row in table
    ]


def per_token(row: common.Row) -> float:
    """What all cards send for a token of the batch, in MB."""
    return sum(row[f"wire_{axes}"] for axes in AXES) * CARDS / row["tokens"] / 1e6


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left the peak against the card, on a log scale; right what the layouts of the highest stage send, by axis."""
    ours = [row for row in table if row["pipe"] == 1]
    fitting = [row for row in ours if row["fits"] == "yes"]
    stages, groups = (dict.fromkeys(str(row[name]) for row in fitting) for name in ("zero", "tensor"))
    figure = common.figure(9, 4.6)
    figure.suptitle(
        f"405B on {CARDS:,} H100s: without a pipeline {len(fitting)} of {len(ours)} layouts fit, ZeRO {' or '.join(stages)} "
        f"with {' or '.join(groups)} cards to a tensor group",
        x=0.01, ha="left", weight="bold", fontsize=10,
    )  # fmt: skip
    memory, traffic = figure.subplots(1, 2, width_ratios=(1.35, 1))
    draw_memory(memory, ours, next(row for row in table if row["pipe"] > 1))
    draw_traffic(traffic, [row for row in ours if row["zero"] == STAGES[-1]])
    common.save_png(figure, path)


def draw_memory(axes: Any, ours: Sequence[common.Row], paper: common.Row) -> None:
    colours = dict(zip(STAGES, (common.PALE, common.FIRST, common.SECOND, common.THIRD), strict=True))
    for zero, colour in colours.items():
        mine = [row for row in ours if row["zero"] == zero]
        places = [TENSOR.index(row["tensor"]) for row in mine]
        axes.plot(places, [row["peak"] / 1e9 for row in mine], color=colour, lw=1.6, label=f"stage {zero}, closed form")
        axes.plot(places, [row["peak_compiled"] / 1e9 for row in mine], "o", color=colour, ms=5)
    axes.plot([], [], "o", color="#555555", ms=5, label="XLA:GPU")
    place, peak = TENSOR.index(paper["tensor"]), paper["peak_compiled"] / 1e9
    axes.plot(place, peak, "D", mfc="none", mec=common.INK, ms=8)
    told = f"published, {paper['pipe']} pipeline stages: {peak:.1f} GB"
    axes.annotate(told, (place, peak), (-10, 3), textcoords="offset points", ha="right", va="center")
    capacity = ours[0]["capacity"] / 1e9
    axes.axhline(capacity, color=common.INK, lw=1, ls=(0, (5, 3)))
    axes.annotate(f"usable {capacity:.1f} GB", (-0.1, capacity), (0, -11), textcoords="offset points")
    axes.set(yscale="log", ylim=(8, 40000), ylabel="peak of memory of one card, GB", xlabel="cards in a tensor group")
    axes.set_xticks(range(len(TENSOR)), TENSOR)
    axes.set_yticks((10, 100, 1000, 10000), (10, 100, "1,000", "10,000"))
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper right", ncols=2)


def draw_traffic(axes: Any, mine: Sequence[common.Row]) -> None:
    for place, row in enumerate(mine):
        bottom = 0.0
        for axis, colour in zip(AXES[:2], (common.FIRST, common.SECOND), strict=True):
            height = row[f"wire_{axis}_compiled"] * CARDS / row["tokens"] / 1e6
            axes.bar(place, height, 0.6, bottom, color=colour, label=f"over {axis}" if not place else None)
            if height:
                middle = (place, bottom + height / 2)
                axes.annotate(f"{height:.0f}", middle, ha="center", va="center", color="white")
            bottom += height
    axes.set_xticks(range(len(mine)), [f"{row['tensor']}\n{row['tokens'] / 1e6:.0f} M" for row in mine])
    axes.set(ylabel="sent by all cards for a token, MB", xlabel="cards in a tensor group, tokens a step", ylim=(0, 800))
    axes.set_title(f"stage {STAGES[-1]}, by mesh axis", loc="left", fontsize=9)
    axes.legend(frameon=False, loc="upper left", ncols=2)


def main() -> int:
    out = common.options(__doc__).out
    table = list(rows())
    print(f"{MODEL} on {MESH}, {PRECISION}, remat=full, sequences of {SEQUENCE:,} tokens; one card, in GB")
    common.show(shown(table), MEMORY)
    print()
    common.show(table, REASONS)
    print(f"\nTokens in a step beside the paper's, with stage {STAGES[-1]}")
    common.show([row for row in table if row["zero"] == STAGES[-1] or row["pipe"] > 1], BATCH)
    print("\nSent by one card in a step over each axis, in GB; and by all cards for a token")
    common.show(shown(table), TRAFFIC)
    common.write_csv(table, out / "llama_405b.csv")
    draw(table, out / "llama_405b.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
