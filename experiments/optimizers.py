"""What does training store, by optimizer and ZeRO stage?

    python experiments/optimizers.py [--out DIR]

A Llama 2 7B on 8 H100s, one sequence of 4,096 tokens on each, remat=full, bf16-master: parameters and gradients of 2 bytes,
a master copy of 4, and what the optimizer keeps: nothing (SGD) to two arrays of 4 (Adam), or two vectors in the place of a
matrix (Adafactor). The closed form gives all of it; XLA:GPU compiles every optimizer with stage 2. Exits with 1 when a line
that was compiled is not equal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.spec.optimizers import OPTIMIZERS

MODEL, MESH, DEVICES = "llama-2-7b", "h100:8", 8
SEQUENCE, PRECISION = 4096, "bf16-master"
STAGES = (0, 1, 2, 3)
COMPILED_STAGE = 2
HELD = ("parameters", "gradients", "optimizer", "residuals")

COLUMNS = {
    "name": "optimizer",
    "zero": "z",
    "kept": "kept B/Psi",
    "parameters": "param. GB",
    "gradients": "gradients",
    "optimizer": "state",
    "residuals": "residuals",
    "all": "in all",
    "compiled": "XLA:GPU",
    "equal": "lines equal",
}


def layout(zero: int) -> Layout:
    return Layout(data=DEVICES, zero=zero, remat="full")


def workload(optimizer: str) -> Workload:
    return Workload(DEVICES, SEQUENCE, PRECISION, optimizer)


def row(optimizer: str, zero: int) -> dict[str, Any]:
    """What the closed form says of one cell, in bytes; blanks for what a compiler says."""
    model = ModelConfig.load(MODEL)
    ledger = predict(model, layout(zero), workload(optimizer))
    whole = predict(model, layout(0), workload(optimizer)).line("optimizer").value
    return {
        "name": optimizer,
        "zero": zero,
        "kept": round(whole / model.parameters, 3),
        **{name: ledger.line(name).value for name in HELD},
        **{f"{name}_compiled": None for name in HELD},
        "peak": ledger.peak,
        "peak_compiled": None,
        "lines": None,
        "equal": None,
    }


def compiled(own: dict[str, Any]) -> dict[str, Any]:
    """The row with what XLA:GPU makes of its cell."""
    found = common.checked(
        MODEL, MESH, str(layout(own["zero"])), batch=DEVICES, sequence=SEQUENCE, precision=PRECISION,
        optimizer=own["name"],
    )  # fmt: skip
    lines = {line.name: line for line in found.rows if line.section == "memory"}
    return (
        own
        | {f"{name}_compiled": lines[name].compiled for name in HELD}
        | {"peak_compiled": found.peak.compiled}
        | common.lines_equal(found)
    )


def rows() -> Iterator[dict[str, Any]]:
    for optimizer in OPTIMIZERS:
        for zero in STAGES:
            own = row(optimizer, zero)
            if zero == COMPILED_STAGE:
                common.progress(f"compiling {MODEL} for {MESH}, {layout(zero)}, {optimizer}")
                own = compiled(own)
            yield own


def wrong(table: Sequence[common.Row]) -> list[str]:
    """The cells that were compiled and have a line that is not equal."""
    return [f"{row['name']}, stage {row['zero']}" for row in table if row["lines"] and row["equal"] != row["lines"]]


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table in GB, for a narrow screen."""
    return [
        dict(one)
        | {name: f"{one[name] / 1e9:.1f}" for name in HELD}
        | {"kept": f"{one['kept']:.3f}", "all": f"{total(one) / 1e9:.1f}"}
        | {
            "compiled": f"{total(one, '_compiled') / 1e9:.1f}" if one["lines"] else None,
            "equal": f"{one['equal']} of {one['lines']}" if one["lines"] else None,
        }
        for one in table
    ]


def total(one: common.Row, author: str = "") -> int:
    """What a row holds in all, in bytes."""
    return sum(one[f"{name}{author}"] for name in HELD)


def draw(table: Sequence[common.Row], path: Path) -> None:
    """A panel a stage, a bar an optimizer: what a device holds, in GB, with a mark where XLA:GPU's sum is."""
    figure = common.figure(9, 5.2)
    figure.suptitle(
        f"What a device holds of {MODEL}, by optimizer and ZeRO stage over {DEVICES}, {PRECISION}", x=0.01, ha="left",
        weight="bold",
    )  # fmt: skip
    colours = dict(zip(HELD, (common.FIRST, common.THIRD, common.SECOND, common.PALE), strict=True))
    for zero, axes in zip(STAGES, figure.subplots(2, 2, sharey=True).flat, strict=True):
        mine = [one for one in table if one["zero"] == zero]
        left = [0.0] * len(mine)
        for name, colour in colours.items():
            widths = [one[name] / 1e9 for one in mine]
            axes.barh(range(len(mine)), widths, 0.7, left=left, color=colour, label=name if not zero else None)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        known = [(place, total(one, "_compiled") / 1e9) for place, one in enumerate(mine) if one["lines"]]
        axes.plot([at for _, at in known], [place for place, _ in known], "|", color=common.INK, ms=11, mew=2,
                  label="XLA:GPU" if not zero else None)  # fmt: skip
        axes.set_yticks(range(len(mine)), [one["name"] for one in mine])
        axes.set_title(f"stage {zero}", loc="left", fontsize=9)
        axes.set(xlabel="GB", ylim=(len(mine) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside lower left", ncols=5)
    common.save_png(figure, path)


def main() -> int:
    options = common.options(__doc__)
    table = list(rows())
    common.show(shown(table), COLUMNS)
    common.write_csv(table, options.out / "optimizers.csv")
    draw(table, options.out / "optimizers.png")
    for text in wrong(table):
        print(f"not equal: {text}")
    return int(bool(wrong(table)))


if __name__ == "__main__":
    sys.exit(main())
