"""What do sequence parallelism and selective recomputation leave of the activations, by formula, prediction and compiler?

    python experiments/activation_memory.py [--quick] [--out DIR]

Korthikanti et al. 2022 (arXiv:2205.05198) count the bytes that a block of a GPT saves for its backward pass (Table 2), draw
them for four models (Figures 1 and 7), and show that the two together leave a fifth of them. Here are their formulas, the
prediction for the same layouts, and for the smallest model what XLA:GPU saves in the compiled step. The program here has no
dropout and computes what is elementwise again, so that it saves less: 4 + 16/t + 2as/(ht) in the place of 10 + 24/t +
5as/(ht), in units of s b h. Exits with 1 when a compiled line is not the predicted one or a published figure is missed.
--quick compiles one of five.
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

PRECISION = "bf16-master"
GIB = 2**30
TENSOR = 8


@dataclass(frozen=True)
class Case:
    """A model of Table 3 of the paper: pipeline stages, chunks of layers on each, sequences in a step and in a microbatch."""

    model: str
    pipe: int
    chunks: int
    batch: int
    micro: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.load(self.model)


CASES = (
    Case("megatron-22b", 1, 1, 4, 4),
    Case("megatron-175b", 8, 3, 64, 1),
    Case("megatron-530b", 35, 3, 280, 1),
    Case("megatron-1t", 64, 1, 512, 1),
)
# The paper has A100s; for them XLA:GPU of jax 0.10.2 finds no tiles for a product of 6,144 x 768 and refuses the step.
COMPILED, MESH = CASES[0], f"h100:{TENSOR}"
SEQUENCE = 2048

# What a layout has to say for each row of Table 2.
SCHEMES = {
    "tensor": "remat=none",
    "sequence": "remat=none,sequence=true",
    "selective": "remat=selective",
    "both": "remat=selective,sequence=true",
    "full": "remat=full",
}

# Figure 1 as calculon-ai/calculon has it (calculon/llm/validation.py), whose digits are those of the formulas: GiB of parameters and optimizer, of activations with tensor parallelism, and with both.
FIGURE_1 = {
    "megatron-22b": (45.5625, 59.25, 9.5625),
    "megatron-175b": (45.5625, 66.84375, 12.3515625),
    "megatron-530b": (31.640625, 114.0234375, 23.076171875),
    "megatron-1t": (32.958984375, 131.25, 26.5625),
}
# Figure 7, read off a plot (by calculon-ai/calculon, validation/seqsel): percent of tensor parallelism alone.
FIGURE_7 = {
    "megatron-22b": {"sequence": 66.84, "selective": 49.42, "both": 16.18, "full": 7.64},
    "megatron-175b": {"sequence": 62.04, "selective": 56.53, "both": 18.49, "full": 8.71},
    "megatron-530b": {"sequence": 58.31, "selective": 62.04, "both": 20.27, "full": 9.42},
    "megatron-1t": {"sequence": 58.31, "selective": 62.04, "both": 20.27, "full": 9.42},
}
COLUMNS = {
    "model": "model",
    "scheme": "scheme",
    "paper": "Table 2, a layer",
    "predicted": "here",
    "compiled": "XLA:GPU",
    "share": "share",
    "figure_7": "Figure 7",
    "share_here": "share here",
}
TOTALS = {
    "model": "model",
    "scheme": "scheme",
    "state": "18 bytes a weight",
    "figure_1_state": "Figure 1",
    "in_flight": "activations",
    "figure_1": "Figure 1",
    "stash": "here",
}


def table_2(model: ModelConfig, scheme: str, micro: int) -> float:
    """Bytes that a layer saves of a microbatch on one of t devices (Korthikanti et al. 2022, Table 2)."""
    s, h, a, t = SEQUENCE, model.d_model, model.heads, TENSOR
    squares = 5 * a * s / (h * t)
    each = {
        "tensor": 10 + 24 / t + squares,
        "sequence": 34 / t + squares,
        "selective": 10 + 24 / t,
        "both": 34 / t,
        "full": 2,
    }
    return s * micro * h * each[scheme]


def in_flight(case: Case) -> float:
    """Layers whose activations the first stage keeps at most (Korthikanti et al. 2022, section 4.2.3 and appendix)."""
    more = (case.pipe - 1) / (case.pipe * case.chunks) if case.chunks > 1 else 0
    return case.config.layers * (1 + more)


def predicted(case: Case, scheme: str) -> int:
    """Bytes that a layer of this program saves of a microbatch."""
    ledger = predict(case.config, Layout.parse(layout(scheme)), Workload(case.micro, SEQUENCE, PRECISION))
    return ledger.line("residuals").value // case.config.layers


def stash(case: Case, scheme: str) -> int:
    """Bytes of activations that the first stage of the published layout keeps."""
    if case.pipe == 1:
        return predicted(case, scheme) * case.config.layers
    schedule = f"schedule=interleaved,virtual={case.chunks}" if case.chunks > 1 else "schedule=1f1b"
    text = f"pipe={case.pipe},microbatches={case.batch // case.micro},{schedule},{layout(scheme)}"
    return predict(case.config, Layout.parse(text), Workload(case.batch, SEQUENCE, PRECISION)).line("stash").value


def layout(scheme: str) -> str:
    return f"tensor={TENSOR},{SCHEMES[scheme]}"


def compiled(scheme: str) -> dict[str, int]:
    """What XLA:GPU saves of a layer, and how many lines of the ledgers are equal."""
    found = common.checked(
        COMPILED.model, MESH, layout(scheme), batch=COMPILED.micro, sequence=SEQUENCE, precision=PRECISION
    )
    residuals = next(row for row in found.section("memory") if row.name == "residuals")
    return {"compiled": residuals.compiled // COMPILED.config.layers, **common.lines_equal(found)}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each model and scheme: a layer by Table 2, as predicted, as compiled; in percent; and the whole stage."""
    for case in CASES:
        base = table_2(case.config, "tensor", case.micro), predicted(case, "tensor")
        weights = 12 * case.config.layers * case.config.d_model**2 / (TENSOR * case.pipe)
        for scheme in SCHEMES:
            paper, here = table_2(case.config, scheme, case.micro), predicted(case, scheme)
            found = {"compiled": None, "lines": None, "equal": None}
            if case == COMPILED and (not quick or scheme == "both"):
                common.progress(f"compiling {case.model}, {layout(scheme)}")
                found = compiled(scheme)
            published = dict(zip(("tensor", "both"), FIGURE_1[case.model][1:], strict=True)).get(scheme)
            yield {
                "model": case.model,
                "scheme": scheme,
                "paper": round(paper),
                "predicted": here,
                **found,
                "share": round(100 * paper / base[0], 2),
                "figure_7": FIGURE_7[case.model].get(scheme),
                "share_here": round(100 * here / base[1], 2),
                "state": 18 * weights / GIB,
                "figure_1_state": FIGURE_1[case.model][0],
                "in_flight": paper * in_flight(case) / GIB,
                "figure_1": published,
                "stash": round(stash(case, scheme) / GIB, 3),
            }


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    place = f"{row['model']}, {row['scheme']}"
    found = []
    if row["compiled"] is not None:
        pairs = (("predicted", "compiled"), ("lines", "equal"))
        found += [f"{place}: {a} {row[a]:,} and {b} {row[b]:,}" for a, b in pairs if row[a] != row[b]]
    if row["figure_7"] is not None and abs(row["share"] - row["figure_7"]) > 0.2:
        found.append(f"{place}: {row['share']} % of tensor parallelism alone, and Figure 7 has {row['figure_7']}")
    for ours, theirs in (("state", "figure_1_state"), ("in_flight", "figure_1")):
        if row[theirs] is not None and row[ours] != row[theirs]:
            found.append(f"{place}: {ours} {row[ours]} GiB, and Figure 1 has {row[theirs]}")
    return found


def draw(table: Sequence[common.Row], path: Path) -> None:
    """The share that each scheme leaves of tensor parallelism alone: Figure 7, and the program here."""
    models = list(dict.fromkeys(row["model"] for row in table))
    figure = common.figure(10, 4.2)
    figure.suptitle(
        "Sequence parallelism and selective recomputation together leave a fifth to a quarter of the activations",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    axes = figure.subplots(1, len(models), sharey=True)
    names = {"sequence": "sequence", "selective": "selective", "both": "both", "full": "full"}
    for place, model in zip(axes, models, strict=True):
        mine = {row["scheme"]: row for row in table if row["model"] == model}
        for shift, (key, colour, label) in enumerate(
            (("figure_7", common.PALE, "Figure 7"), ("share", common.FIRST, "Table 2"), ("share_here", common.SECOND, "here"))
        ):
            place.bar(
                [number + 0.27 * (shift - 1) for number in range(len(names))], [mine[name][key] for name in names], 0.27,
                color=colour, label=label if place is axes[0] else None,
            )  # fmt: skip
        place.set_title(model, loc="left", fontsize=9)
        place.set_xticks(range(len(names)), names.values(), rotation=20)
        place.tick_params(axis="x", length=0)
    axes[0].set_ylabel("% of tensor parallelism alone")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    common.save_png(figure, path)


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compiles one of five")


def main() -> int:
    options = common.options(__doc__, add_quick)
    table = list(rows(options.quick))
    print(f"bytes that a layer saves of a microbatch, tensor={TENSOR}; shares in % of tensor parallelism alone")
    common.show(table, COLUMNS)
    print("\nGiB on the first stage of the published layout")
    common.show([shown(row) for row in table if row["figure_1"] is not None], TOTALS)
    common.write_csv(table, options.out / "activation_memory.csv")
    draw(table, options.out / "activation_memory.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"activation_memory: {problem}", file=sys.stderr)
    return 1 if problems else 0


def shown(row: common.Row) -> dict[str, Any]:
    """A row with its GiB to three digits."""
    return dict(row) | {key: f"{row[key]:.3f}" for key in ("state", "figure_1_state", "in_flight", "figure_1", "stash")}


if __name__ == "__main__":
    sys.exit(main())
