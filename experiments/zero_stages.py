"""Does a compiled step hold and send what the ZeRO paper says of its stages?

Figure 1 of the paper (Rajbhandari et al. 2020, arXiv:1910.02054) says that a model of 7.5 billion parameters on 64
devices holds 120, 31.4, 16.6 and 1.9 GB of model states with stages 0 to 3: parameters, gradients and optimizer. Its
section 7 says that a device sends 2, 2, 2 and 3 times the parameters. Here XLA:GPU compiles the step of a Llama of
7.49 billion parameters for 64 H100s that are not there, and both numbers are read out of what it made: in the paper's
precision, and in JAX's habit of bf16 compute over f32 parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.theory.parameters import OUTER

MODEL = ModelConfig(
    name="llama-7.49b",
    layers=36,
    d_model=4096,
    d_ff=10880,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32000,
    tied=False,
    rope_theta=1e4,
    rope_scaling=None,
    norm_epsilon=1e-5,
    max_sequence=4096,
    source="a Llama of about the 7.5 billion parameters of the ZeRO paper's Figure 1; not a published model",
)
MESH, DEVICES, SEQUENCE = "h100:64", 64, 4096
PRECISIONS = ("bf16-master", "bf16-f32")
STAGES = (0, 1, 2, 3)
STATES = ("parameters", "gradients", "optimizer")

# Figure 1 of the paper, as printed: GB of model states a device; its parameters, and their bytes by STATES.
PAPER_GB = {0: "120", 1: "31.4", 2: "16.6", 3: "1.9"}
PAPER_PARAMETERS = 7_500_000_000
PAPER_BYTES = {"parameters": 2, "gradients": 2, "optimizer": 12}
SLICED_FROM = {"parameters": 3, "gradients": 2, "optimizer": 1}  # the stage; sections 5.1 to 5.3
# Sections 7.1, 7.2.1 and 7.2.2: what a device sends, in times the parameters.
PAPER_SENT = {0: 2, 1: 2, 2: 2, 3: 3}

MEMORY = {
    "zero": "z",
    "paper_gb": "paper",
    "gb": "ours",
    "state": "closed form",
    "state_compiled": "XLA:GPU",
    "state_reason": "why",
}
TRAFFIC = {
    "zero": "z",
    "paper_psi": "paper",
    "psi": "ours",
    "sent": "closed form",
    "sent_compiled": "XLA:GPU",
    "sent_reason": "why",
}


def layout(zero: int) -> Layout:
    return Layout(data=DEVICES, zero=zero, remat="full")


def closed_form(precision: str, zero: int) -> dict[str, Any]:
    """What one device holds and sends, by closed form: bytes, elements, and wire bytes of everything."""
    ledger = predict(MODEL, layout(zero), Workload(DEVICES, SEQUENCE, precision))
    held = {name: ledger.line(name).value for name in STATES}
    sent = ledger.section("collectives")
    return held | {"state": sum(held.values()), "sent": common.elements(sent), "wire": common.wire(sent)}


def cell(precision: str, zero: int) -> dict[str, Any]:
    """A row of the table: the closed form, the paper's numbers, and what XLA:GPU made of the step."""
    found = common.checked(
        MODEL, MESH, str(layout(zero)), batch=DEVICES, sequence=SEQUENCE, precision=precision
    )
    own = closed_form(precision, zero)
    held = {row.name: row.compiled for row in found.section("memory")}
    state = sum(held[name] for name in STATES)
    sent = found.section("collectives")
    return {
        "precision": precision,
        "zero": zero,
        **own,
        "state_compiled": state,
        "sent_compiled": common.elements(sent, "wire_compiled"),
        "wire_compiled": common.wire(sent, "wire_compiled"),
        **common.lines_equal(found),
        "paper_gb": PAPER_GB[zero],
        "gb": rounded(state, PAPER_GB[zero]),
        "state_reason": why_state(zero, own),
        "paper_psi": PAPER_SENT[zero],
        "psi": round(own["sent"] / MODEL.parameters, 4),
        "sent_reason": why_sent(zero, own["sent"]),
    }


def rounded(count: int, like: str) -> str:
    """Bytes in GB, with as many digits as the paper prints."""
    return f"{count / 1e9:.{len(like.partition('.')[2])}f}"


def why_state(zero: int, own: dict[str, Any]) -> str:
    """Where the paper's bytes and ours differ, or why they do not: parameters + gradients + optimizer."""
    ours = " + ".join(f"{own[name] / MODEL.parameters:.4g}" for name in STATES)
    sliced = {name: DEVICES if zero >= stage else 1 for name, stage in SLICED_FROM.items()}
    papers = " + ".join(f"{PAPER_BYTES[name] / sliced[name]:.4g}" for name in STATES)
    if rounded(own["state"], PAPER_GB[zero]) != PAPER_GB[zero]:
        return f"{ours} bytes a parameter, the paper's {papers}"
    same = f"{ours} bytes" if ours == papers else f"{own['state'] / MODEL.parameters:.4g} bytes in all"
    return f"as printed: {same}, {100 * (1 - MODEL.parameters / PAPER_PARAMETERS):.2f} % fewer parameters"


def why_sent(zero: int, sent: int) -> str:
    """The number of elements taken apart: the paper's, less what is not gathered twice, less the ring's own share."""
    whole, rest = divmod(sent * DEVICES, DEVICES - 1)
    missing = PAPER_SENT[zero] * MODEL.parameters - whole
    table = MODEL.parameter_table()
    outer = sum(table.get(name, 0) for name in OUTER)
    ring = f"x {DEVICES - 1}/{DEVICES}, a ring's share"
    if rest or missing not in (0, outer):
        return f"unexplained: {missing:,} elements"
    if not missing:
        return f"{PAPER_SENT[zero]} Psi {ring}"
    return f"({PAPER_SENT[zero]} Psi - {missing:,}) {ring}; embedding, last norm and head are gathered once, not twice"


def rows() -> Iterator[dict[str, Any]]:
    for precision in PRECISIONS:
        for zero in STAGES:
            common.progress(f"compiling {MODEL.name} for {MESH}, {layout(zero)}, {precision}")
            yield cell(precision, zero)


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left what a device holds, right what it sends; the paper's numbers as marks across the bars."""
    figure = common.figure(9, 4.6)
    paper = of(table, PRECISIONS[0])
    same = all(rounded(row["state_compiled"], PAPER_GB[row["zero"]]) == PAPER_GB[row["zero"]] for row in paper)
    figure.suptitle(
        f"Compiled, ZeRO's stages hold {'what its paper prints' if same else 'other than its paper prints'}: "
        f"{MODEL.parameters / 1e9:.2f} billion parameters on {DEVICES} H100s",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    memory, traffic = figure.subplots(1, 2, width_ratios=(1.3, 1))
    draw_memory(memory, table)
    draw_traffic(traffic, paper)
    for axes, printed, unit in ((memory, PAPER_GB, "GB"), (traffic, PAPER_SENT, "$\\Psi$")):
        axes.set_xticks(STAGES, [f"stage {zero}\npaper {printed[zero]} {unit}" for zero in STAGES])
        axes.tick_params(length=0)
        axes.legend(frameon=False, loc="upper right" if axes is memory else "upper left")
    common.save_png(figure, path)


def of(table: Sequence[common.Row], precision: str) -> list[common.Row]:
    return [row for row in table if row["precision"] == precision]


def draw_memory(axes: Any, table: Sequence[common.Row]) -> None:
    colours = dict(zip(STATES, (common.FIRST, common.SECOND, common.THIRD), strict=True))
    for precision, shift, alpha in zip(PRECISIONS, (-0.19, 0.19), (1, 0.45), strict=True):
        for row in of(table, precision):
            bottom = 0.0
            for name, colour in colours.items():
                height = row[name] / 1e9
                label = name if precision == PRECISIONS[0] and row["zero"] == 0 else None
                axes.bar(row["zero"] + shift, height, 0.34, bottom, color=colour, alpha=alpha, label=label)
                bottom += height
            text = rounded(row["state"], PAPER_GB[row["zero"]])
            axes.annotate(
                text, (row["zero"] + shift, bottom), (0, 4), textcoords="offset points", ha="center",
                color=common.INK if alpha == 1 else "#777777",
            )  # fmt: skip
    for zero in STAGES:
        label = "the paper's Figure 1" if zero == 0 else None
        axes.hlines(float(PAPER_GB[zero]), zero - 0.4, zero + 0.02, color=common.INK, lw=1.8, label=label)
    axes.set(ylabel="model states of one device, GB", ylim=(0, 135))
    axes.set_title("full colour: 2 + 2 + 12 bytes, as the paper; pale: 4 + 4 + 8, bf16-f32", loc="left", fontsize=9)


def draw_traffic(axes: Any, table: Sequence[common.Row]) -> None:
    for row in table:
        zero, first = row["zero"], row["zero"] == 0
        axes.bar(zero, row["psi"], 0.55, color=common.FIRST, label="XLA:GPU" if first else None)
        axes.annotate(
            f"{row['psi']:.2f}", (zero, row["psi"]), (0, -13), textcoords="offset points", ha="center", color="white"
        )
        label = "the paper's section 7" if first else None
        axes.hlines(row["paper_psi"], zero - 0.36, zero + 0.36, color=common.INK, lw=1.8, label=label)
    axes.set(ylabel="sent by one device in a step, times the parameters $\\Psi$", ylim=(0, 3.5))
    axes.set_title("in elements, so the same in both precisions", loc="left", fontsize=9)


def main() -> int:
    out = common.options(__doc__).out
    table = list(rows())
    for precision in PRECISIONS:
        print(f"{precision}: {' + '.join(STATES)} of one device, the paper and ours in GB, then bytes")
        common.show(of(table, precision), MEMORY)
        print(f"\n{precision}: sent by one device in a step, the paper and ours in Psi, then elements")
        common.show(of(table, precision), TRAFFIC)
        print()
    common.write_csv(table, out / "zero_stages.csv")
    draw(table, out / "zero_stages.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
