"""What do the ten models of Megatron-LM's Table 1 take, at the layouts they were trained with?

    python experiments/megatron_3d.py [--quick] [--out DIR]

Narayanan et al. 2021 (arXiv:2104.04473), Table 1: GPTs of 1.7 billion to a trillion parameters on 32 to 3,072 A100s of
80 GB, by tensor, pipeline and data parallelism. Each is compiled by XLA:GPU for as many cards that are not there, with
the published layout, the whole batch, and each block computed again in the backward pass. For each: parameters beside
the paper's equation 2, FLOPs of a step beside its equation 3, memory by both authors, and whether it fits. Exits with 1
when a line differs, or when FLOPs are left unexplained. --quick compiles the smallest of those with a pipeline.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, predict

SEQUENCE = 2048
# The paper trains in fp16 with an optimizer's state in f32, 2 + 2 + 12 bytes a parameter: in bf16 that is bf16-master.
PRECISION = "bf16-master"
CARDS_OF_A_NODE = 8

TABLE_1 = "arXiv:2104.04473, Table 1"
# Micro batches and layers of a chunk are not in the paper, but in the script that ran its table.
OPTIONS = "NVIDIA/Megatron-LM, examples/sc21/run_table_1.sh, at 79a3bb6bf2c85b748c46749dd0695e23310d4e16"


@dataclass(frozen=True)
class Published:
    """One row of Table 1, with the options of the script that ran it.

    billions     of parameters, as printed
    batch        sequences in a step
    micro_batch  sequences of a microbatch on a data rank
    virtual      chunks of layers on each stage
    """

    billions: str
    tensor: int
    pipe: int
    cards: int
    batch: int
    micro_batch: int
    virtual: int = 1

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.load(f"megatron-{self.billions}b")

    @property
    def mesh(self) -> str:
        return f"a100-80:{self.cards // CARDS_OF_A_NODE}x{CARDS_OF_A_NODE}"

    @property
    def layout(self) -> Layout:
        data = self.cards // (self.tensor * self.pipe)
        schedule = ("interleaved" if self.virtual > 1 else "1f1b") if self.pipe > 1 else ""
        return Layout(
            pipe=self.pipe,
            data=data,
            tensor=self.tensor,
            remat="full",
            microbatches=self.batch // (data * self.micro_batch),
            schedule=schedule,
            virtual=self.virtual if schedule == "interleaved" else 0,
        )

    @property
    def workload(self) -> Workload:
        return Workload(self.batch, SEQUENCE, PRECISION)


RUNS = (
    Published("1.7", 1, 1, 32, 512, 16),
    Published("3.6", 2, 1, 64, 512, 16),
    Published("7.5", 4, 1, 128, 512, 16),
    Published("18.4", 8, 1, 256, 1024, 8),
    Published("39.1", 8, 2, 512, 1536, 4),
    Published("76.1", 8, 4, 1024, 1792, 2, virtual=3),
    Published("145.6", 8, 8, 1536, 2304, 2, virtual=2),
    Published("310.1", 8, 16, 1920, 2160, 1, virtual=2),
    Published("529.6", 8, 35, 2520, 2520, 1, virtual=3),
    Published("1008", 8, 64, 3072, 3072, 1),
)
QUICK = RUNS[4:5]

STATE = ("parameters", "gradients", "optimizer")
# Activations: saved for the backward pass, and on their way between stages.
SAVED = ("residuals", "stash", "inbox")
PHASES = ("forward", "recompute", "backward")

LAYOUT = {
    "model": "billions",
    "cards": "cards",
    "pipe": "p",
    "virtual": "v",
    "data": "d",
    "tensor": "t",
    "microbatches": "m",
    "micro_batch": "b",
    "layers_of_a_chunk": "layers of a chunk",
}
PARAMETERS = {
    "model": "billions",
    "parameters": "parameters",
    "equation_2": "equation 2",
    "more": "more",
    "final_norm": "final norm, 2 h",
}
FLOPS = {
    "model": "billions",
    "equation_3": "equation 3",
    "flops_compiled": "XLA:GPU",
    "down": "8 B s l h^2",
    "rest": "left",
}
MEMORY = {
    "model": "billions",
    "state": "state",
    "saved": "saved",
    "peak": "peak",
    "peak_compiled": "XLA:GPU",
    "off": "off",
    "fits": "fits",
    "equal": "lines",
    "uniform": "for others",
}


def equation_2(model: ModelConfig) -> int:
    """Parameters: 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h))."""
    layers, h = model.layers, model.d_model
    return 12 * layers * h**2 + 13 * layers * h + (model.vocab + SEQUENCE) * h


def equation_3(model: ModelConfig, batch: int) -> int:
    """FLOPs of a step: 96 B s l h^2 (1 + s / (6 h) + V / (16 l h))."""
    layers, h, tokens = model.layers, model.d_model, batch * SEQUENCE
    return 96 * tokens * layers * h**2 + 16 * tokens * SEQUENCE * layers * h + 6 * tokens * model.vocab * h


def down(model: ModelConfig, batch: int) -> int:
    """FLOPs of the last matmul of each block, h x 4 h, which nobody needs to compute again."""
    return 8 * batch * SEQUENCE * model.layers * model.d_model**2


def of_all(values: Sequence[int], devices: int) -> int:
    """What all devices compute: each stage's share, times the devices of a stage."""
    return sum(values) * (devices // len(values))


def closed_form(run: Published) -> dict[str, Any]:
    """A row but for what is compiled. Memory is that of a card of the first stage, in bytes."""
    model, layout = run.model, run.layout
    ledger = predict(model, layout, run.workload)
    lines = {line.name: line.on_stage(0) for line in ledger.section("memory")}
    flops = {
        line.phase: of_all(line.stages or (line.value,), layout.devices) for line in ledger.section("flops")
    }
    parts = layout.pipe * run.virtual
    return {
        "model": run.billions,
        "mesh": run.mesh,
        "layout": str(layout),
        "cards": run.cards,
        "pipe": run.pipe,
        "virtual": run.virtual,
        "data": layout.data,
        "tensor": run.tensor,
        "microbatches": layout.microbatches,
        "micro_batch": run.micro_batch,
        "batch": run.batch,
        "layers_of_a_chunk": f"{model.layers} / {parts} = {model.layers / parts:g}",
        "parameters": model.parameters,
        "equation_2": equation_2(model),
        "final_norm": 2 * model.d_model,
        "equation_3": equation_3(model, run.batch),
        "down": down(model, run.batch),
        **{phase: flops[phase] for phase in PHASES},
        "flops": sum(flops.values()),
        "state": sum(lines[name] for name in STATE),
        "saved": sum(lines.get(name, 0) for name in SAVED),
        "uniform": max((line.value for line in ledger.section("memory") if line.name == "uniform"), default=0),
        "peak": ledger.peak,
    }


def cell(run: Published) -> dict[str, Any]:
    """A row of the table: the paper, the closed form, and what XLA:GPU made of the step."""
    found = common.checked(
        run.model, run.mesh, str(run.layout), batch=run.batch, sequence=SEQUENCE, precision=PRECISION
    )
    memory = {row.name: row.on_stage(0)[1] for row in found.section("memory")}
    uniform = [row.compiled for row in found.section("memory") if row.name == "uniform"]
    computed = sum(
        of_all(row.compiled_stages or (row.compiled,), run.cards) for row in found.section("flops")
    )
    return closed_form(run) | {
        "flops_compiled": computed,
        "state_compiled": sum(memory[name] for name in STATE),
        "saved_compiled": sum(memory.get(name, 0) for name in SAVED),
        "uniform_compiled": max(uniform, default=0),
        "peak_compiled": found.peak.compiled,
        "capacity": found.peak.capacity,
        "fits": "yes" if found.fits else "no",
        **common.lines_equal(found),
    }


def wrong(row: common.Row) -> list[str]:
    """What does not agree in a row, in words."""
    pairs = [(name, f"{name}_compiled") for name in ("flops", "state", "saved", "uniform")] + [("lines", "equal")]
    told = [f"{row['model']} billion: {a} {row[a]:,} and {b} {row[b]:,}" for a, b in pairs if row[a] != row[b]]
    if rest(row):
        told.append(f"{row['model']} billion: {rest(row):,} FLOPs of equation 3 are unexplained")
    return told


def rest(row: common.Row) -> int:
    """FLOPs of equation 3 that are neither compiled nor a block's last matmul."""
    return row["equation_3"] - row["flops_compiled"] - row["down"]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    for run in QUICK if quick else RUNS:
        common.progress(f"compiling {run.model.name} for {run.mesh}, {run.layout}")
        yield cell(run)


def leave_products_to_cublas() -> None:
    """Has XLA:GPU call cuBLAS for matmuls, as Megatron-LM does, and not Triton. Without a card nothing is tuned, and
    the tiles that Triton then takes do not go with heads of 96 features: the compiler gives up."""
    flag = "--xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table with memory in GB, for a narrow screen."""
    in_gb = ("state", "uniform", "saved", "peak", "peak_compiled")
    return [
        dict(row)
        | {name: f"{row[name] / 1e9:.1f}" for name in in_gb}
        | {
            "more": row["parameters"] - row["equation_2"],
            "off": common.off(row["peak"], row["peak_compiled"]),
            "equal": f"{row['equal']} of {row['lines']}",
        }
        for row in table
    ]


def tall(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """FLOPs in units of 10^15, for a narrow screen, and what is left of the difference as it is."""
    names = ("equation_3", "flops_compiled", "down")
    return [dict(row) | {name: f"{row[name] / 1e15:,.3f}" for name in names} | {"rest": rest(row)} for row in table]


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Left FLOPs as shares of equation 3, right the memory of a card of the first stage, against what it has."""
    figure = common.figure(11, 4.6)
    fitting, low = sum(row["fits"] == "yes" for row in table), min(row["flops_compiled"] / row["equation_3"] for row in table)
    high = max(row["flops_compiled"] / row["equation_3"] for row in table)
    figure.suptitle(
        f"Megatron-LM's Table 1, compiled: {fitting} of {len(table)} fit the card; {100 * low:.1f} to {100 * high:.1f} % of "
        "the FLOPs of its equation 3",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    flops, memory = figure.subplots(1, 2)
    places = range(len(table))
    stack(flops, table, {phase: [100 * row[phase] / row["equation_3"] for row in table] for phase in PHASES})
    missing = [100 * row["down"] / row["equation_3"] for row in table]
    bottom = [100 * row["flops_compiled"] / row["equation_3"] for row in table]
    flops.bar(
        places, missing, 0.66, bottom, color="white", edgecolor="#777777", hatch="////", lw=0.6,
        label="last matmul of a block, not computed again",
    )  # fmt: skip
    flops.set(ylabel="FLOPs of a step, % of equation 3", ylim=(0, 128))
    flops.set_yticks(range(0, 101, 20))
    held = {
        "parameters, gradients, optimizer": [row["state"] / 1e9 for row in table],
        "saved activations": [row["saved"] / 1e9 for row in table],
        "for a moment": [(row["peak"] - row["state"] - row["saved"]) / 1e9 for row in table],
    }
    stack(memory, table, held, (common.FIRST, common.SECOND, "#d9dee3"))
    memory.plot(places, [row["peak_compiled"] / 1e9 for row in table], "D", color=common.INK, ms=5, label="peak by XLA:GPU")
    capacity = table[0]["capacity"] / 1e9
    memory.axhline(capacity, color=common.INK, lw=1, ls=(0, (5, 3)))
    memory.annotate(f"usable {capacity:.1f} GB", (-0.4, capacity), (0, 4), textcoords="offset points")
    memory.set(ylabel="memory of one card, GB", ylim=(0, 1.55 * capacity))
    for axes in (flops, memory):
        axes.set_xticks(places, [f"{row['model']}\n{row['cards']:,}" for row in table], fontsize=8)
        axes.set_xlabel("billions of parameters, cards")
        axes.tick_params(axis="x", length=0)
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=8)
    common.save_png(figure, path)


def stack(
    axes: Any, table: Sequence[common.Row], heights: dict[str, list[float]],
    colours: Sequence[str] = (common.FIRST, common.SECOND, common.THIRD),
) -> None:  # fmt: skip
    """Bars of the rows, cut into parts."""
    bottom = [0.0] * len(table)
    for (label, values), colour in zip(heights.items(), colours, strict=True):
        axes.bar(range(len(table)), values, 0.66, bottom, color=colour, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"only the model of {QUICK[0].billions} billion parameters")


def show_all(table: Sequence[common.Row]) -> None:
    print(f"layouts: {TABLE_1}; micro batches and chunks: {OPTIONS}")
    common.show(table, LAYOUT)
    print("\nparameters, and what equation 2 leaves out")
    common.show(shown(table), PARAMETERS)
    print("\nFLOPs of all cards in a step, in 10^15, and what is left of the difference")
    common.show(tall(table), FLOPS)
    print("\none card of the first stage, in GB; and the most that another stage allocates for others")
    common.show(shown(table), MEMORY)


def main() -> int:
    options = common.options(__doc__, add_quick)
    leave_products_to_cublas()
    table = list(rows(options.quick))
    show_all(table)
    common.write_csv(table, options.out / "megatron_3d.csv")
    draw(table, options.out / "megatron_3d.png")
    problems = [problem for row in table for problem in wrong(row)]
    for problem in problems:
        print(f"megatron_3d: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
