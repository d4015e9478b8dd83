"""When is ZeRO 1 better than ZeRO 2, and 2 than 3, if gradients are accumulated over microbatches?

The ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, section 7) counts what a step of one microbatch sends: 2
times the parameters in stages 0, 1 and 2, and 3 times in stage 3. A global batch that does not fit is cut into
microbatches: then stage 2, whose accumulator is sliced, has to reduce in each of them, and stage 3 gathers in each as
well. Here the batch of 256 sequences of a Llama 2 7B on 8 H100s is cut into 1 to 32 microbatches: what is held, what
fits, and what is sent, by one closed form over arrays. XLA:GPU compiles each cell.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from experiments.zero_stages import PAPER_SENT
from jaxllm import Layout, ModelConfig, Workload
from jaxllm.theory.parameters import OUTER

MODEL, MESH, DEVICES = "llama-2-7b", "h100:8", 8
BATCH, SEQUENCE, PRECISION = 256, 4096, "bf16-f32"
STAGES = (0, 1, 2, 3)
MICROBATCHES = (1, 2, 4, 8, 16, 32)
HELD = ("parameters", "optimizer", "gradients", "residuals")

MEMORY = {
    "zero": "z",
    "microbatches": "m",
    "state": "state GB",
    "gradients": "gradients",
    "residuals": "residuals",
    "peak": "peak",
    "peak_compiled": "XLA:GPU",
    "off": "off",
    "fits": "fits",
    "equal": "lines equal",
}
TRAFFIC = {
    "zero": "z",
    "microbatches": "m",
    "paper_psi": "paper",
    "psi": "ours",
    "wire": "GB",
    "wire_compiled": "XLA:GPU",
    "reason": "why",
}


def layout(zero: int, microbatches: int) -> Layout:
    return Layout(data=DEVICES, zero=zero, remat="full", microbatches=microbatches)


def closed_forms() -> list[dict[str, Any]]:
    """All cells at once: one ledger whose figures are arrays over stages and microbatches."""
    import numpy as np

    from jaxllm.theory.predict import of_symbols
    from jaxllm.theory.symbols import Symbols

    one = Symbols.of(ModelConfig.load(MODEL), layout(0, 1), Workload(BATCH, SEQUENCE, PRECISION))
    z, m = (axis.ravel() for axis in np.meshgrid(STAGES, MICROBATCHES, indexing="ij"))
    ledger = of_symbols(dataclasses.replace(one, z=z, m=m, b=BATCH // (DEVICES * m)))
    held = {name: ledger.line(name).value for name in HELD}
    sent = ledger.section("collectives")
    columns = held | {"peak": ledger.peak, "sent": common.elements(sent), "wire": common.wire(sent)}
    columns = {name: np.broadcast_to(values, z.shape).tolist() for name, values in columns.items()}
    return [
        {"zero": stage, "microbatches": parts} | {name: values[index] for name, values in columns.items()}
        for index, (stage, parts) in enumerate(zip(z.tolist(), m.tolist(), strict=True))
    ]


def cell(own: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: the closed form of a cell, and what XLA:GPU makes of it."""
    zero, microbatches = own["zero"], own["microbatches"]
    model = ModelConfig.load(MODEL)
    found = common.checked(
        model, MESH, str(layout(zero, microbatches)), batch=BATCH, sequence=SEQUENCE, precision=PRECISION
    )
    held = {row.name: row.compiled for row in found.section("memory")}
    sent = found.section("collectives")
    return {
        **own,
        **{f"{name}_compiled": held[name] for name in HELD},
        "peak_compiled": found.peak.compiled,
        "sent_compiled": common.elements(sent, "wire_compiled"),
        "wire_compiled": common.wire(sent, "wire_compiled"),
        **common.lines_equal(found),
        "capacity": found.peak.capacity,
        "fits": "yes" if found.fits else "no",
        "temporaries": common.largest_temporaries(found, 5),
        "paper_psi": PAPER_SENT[zero],
        "psi": round(own["sent"] / model.parameters, 2),
        "reason": why(model, zero, microbatches, own["sent"]),
    }


def why(model: ModelConfig, zero: int, microbatches: int, sent: int) -> str:
    """What is sent, in times the parameters, taken apart into what is reduced and what is gathered."""
    reduced = {0: 2, 1: 1}.get(zero, microbatches)
    gathered = {0: 0, 3: 2 * microbatches}.get(zero, 1)
    whole, rest = divmod(sent * DEVICES, DEVICES - 1)
    missing = (reduced + gathered) * model.parameters - whole
    table = model.parameter_table()
    outer = sum(table.get(name, 0) for name in OUTER)
    ring = f"{DEVICES - 1}/{DEVICES}"
    if rest or missing != outer * (zero == 3) * microbatches:
        return f"unexplained: {missing:,} elements less than ({reduced} + {gathered}) Psi"
    spared = f" - {microbatches} x {outer:,}" if missing else ""
    once = "" if microbatches == 1 else "; once a step" if zero < 2 else "; the paper counts one microbatch"
    parts = f"({reduced} + {gathered}) Psi"
    return f"{ring} x ({parts}{spared}){once}" if spared else f"{ring} x {parts}{once}"


def rows() -> Iterator[dict[str, Any]]:
    for own in closed_forms():
        common.progress(f"compiling {MODEL} for {MESH}, {layout(own['zero'], own['microbatches'])}")
        yield cell(own)


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table in GB, for a narrow screen. State is what is held between steps."""
    in_gb = ("gradients", "residuals", "peak", "peak_compiled", "wire", "wire_compiled")
    return [
        dict(row)
        | {name: f"{row[name] / 1e9:,.1f}" for name in in_gb}
        | {
            "state": f"{(row['parameters'] + row['optimizer']) / 1e9:.1f}",
            "off": common.off(row["peak"], row["peak_compiled"]),
            "equal": f"{row['equal']} of {row['lines']}",
        }
        for row in table
    ]


def cheapest(table: Sequence[common.Row]) -> list[common.Row]:
    """Of each stage that fits at all, the row that fits with the fewest microbatches."""
    fitting = [row for row in table if row["fits"] == "yes"]
    stages = dict.fromkeys(row["zero"] for row in fitting)
    return [min((r for r in fitting if r["zero"] == zero), key=lambda r: r["microbatches"]) for zero in stages]


def verdict(table: Sequence[common.Row]) -> str:
    """One sentence for each stage that fits: its fewest microbatches, and what it sends with them."""
    found = cheapest(table)
    least = min(row["wire"] for row in found)
    return "\n".join(
        f"stage {row['zero']} fits from {row['microbatches']} microbatches on: "
        f"sends {row['wire'] / 1e9:.1f} GB a step, {row['wire'] / least:.2f} times the least"
        for row in found
    )


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left what a device sends, right its peak of memory, over microbatches: lines closed form, dots compiled."""
    figure = common.figure(9, 4.6)
    chosen = cheapest(table)
    sent = ", ".join(f"stage {row['zero']} {row['wire_compiled'] / 1e9:.0f} GB" for row in chosen)
    figure.suptitle(
        f"With the fewest microbatches that fit, a device sends: {sent}", x=0.01, ha="left", weight="bold"
    )
    traffic, memory = figure.subplots(1, 2)
    colours = dict(zip(STAGES, (common.PALE, common.FIRST, common.SECOND, common.THIRD), strict=True))
    for axes, what in ((traffic, "wire"), (memory, "peak")):
        for zero, colour in colours.items():
            mine = [row for row in table if row["zero"] == zero]
            m = [row["microbatches"] for row in mine]
            wide = 5 if zero == 0 and what == "wire" else 1.6  # stage 1 lies on it
            axes.plot(m, [row[what] / 1e9 for row in mine], color=colour, lw=wide, label=f"stage {zero}, closed form")
            axes.plot(m, [row[f"{what}_compiled"] / 1e9 for row in mine], "o", color=colour, ms=4.5)
        frame = {"ms": 12, "mfc": "none", "color": common.INK, "mew": 1.4}
        for row in chosen:
            axes.plot(row["microbatches"], row[f"{what}_compiled"] / 1e9, "s", **frame)
        axes.plot([], [], "o", color="#555555", ms=4.5, label="XLA:GPU")
        axes.plot([], [], "s", label="the fewest that fit", **frame | {"ms": 9})
        axes.set(xscale="log", yscale="log", xlabel="microbatches")
        axes.set_xticks(MICROBATCHES, MICROBATCHES)
        axes.minorticks_off()
    capacity = table[0]["capacity"] / 1e9
    memory.axhline(capacity, color=common.INK, lw=1, ls=(0, (5, 3)))
    memory.annotate(f"usable {capacity:.1f} GB", (0.9, capacity), (0, -11), textcoords="offset points")
    traffic.set_yticks((50, 100, 200, 400, 800, 1600), (50, 100, 200, 400, 800, "1,600"))
    memory.set_yticks((20, 40, 80, 160, 320), (20, 40, 80, 160, 320))
    traffic.set(ylabel="sent by one device in a step, GB")
    memory.set(ylabel="peak of memory of one device, GB")
    traffic.legend(frameon=False, loc="upper left")
    common.save_png(figure, path)


def main() -> int:
    out = common.options(__doc__).out
    table = list(rows())
    print(f"{MODEL} on {MESH}, {BATCH} sequences of {SEQUENCE:,}, {PRECISION}, remat=full")
    common.show(shown(table), MEMORY)
    print("\nSent by one device in a step; the paper and ours in Psi, reduced + gathered")
    common.show(shown(table), TRAFFIC)
    print(f"\n{verdict(table)}")
    common.write_csv(table, out / "why_zero2.csv")
    draw(table, out / "why_zero2.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
