"""How fast is the step that Llama 3 405B was trained with, and what would a plan have chosen?

    python experiments/training_run.py [--out DIR]

The three configurations of table 4 (Llama Team 2024, arXiv:2407.21783), each in the nearest layout that there is here: seconds
of a step with the interval that holds four of five, MFU and memory beside what was published, and the days of 15.6 trillion
tokens. The paper shards gradients and yet accumulates them before they are reduced: between stages 1 and 2 of ZeRO, so that both
are shown. Then all layouts of the same model, mesh and workload are scored: the best of them, and where the published one stands.
Nothing is compiled. Exits with 1 when a step of 8,192 tokens a sequence that reduces gradients once took less or more than the
interval has, by the FLOPs of attention over all pairs or of a causal mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload, predict, step_time
from jaxllm.plan.conditions import parse
from jaxllm.plan.plan import Plan, plan
from jaxllm.spec.machine import Mesh
from jaxllm.theory.time import StepTime
from jaxllm.theory.training import SECONDS_A_DAY, flops_per_token

MODEL = "llama-3.1-405b"
TOKENS = 15.6e12  # section 1 of the paper
TERA = 1e12
# bf16 parameters; gradients accumulated and reduced in f32 (section 3.3.2); an f32 copy and two moments.
PRECISION, GRADIENTS = "bf16-master", "f32"
# What both configurations of 8,192 tokens share: no recomputation (section 3.3.2), a stream that is cut along the sequence, a
# fused attention kernel, and chunks of two layers: of one layer there would be more of them than layers.
SHARED = "pipe=16,tensor=8,sequence=true,attention=cudnn,schedule=interleaved,virtual=4,partition=time"

COLUMNS = {
    "devices": "devices", "sequence": "sequence", "zero": "zero", "step": "step, s", "interval": "four of five",
    "measured": "published, s", "mfu": "MFU", "published": "published", "peak": "peak, GB", "fits": "fits", "days": "days",
    "published_days": "published rate",
}  # fmt: skip
PARTS = {
    "devices": "devices", "sequence": "sequence", "zero": "zero", "products": "matmuls", "memory": "memory",
    "tensor": "tensor", "ranks": "data, context", "bubble": "bubble", "rest": "the rest",
}  # fmt: skip
PLANNED = {
    "devices": "devices", "sequence": "sequence", "zero": "zero", "scored": "scored", "fit": "fit",
    "seconds": "published layout, s", "best_seconds": "best, s", "over": "over the best", "rank": "rank",
    "tied": "within the interval",
}  # fmt: skip
BARS = {
    "products": ("matmuls", common.FIRST), "memory": ("what else goes through memory", common.THIRD),
    "tensor": ("collectives over tensor", "#8a6fb0"), "ranks": ("over data and context", common.SECOND),
    "bubble": ("bubble of the pipeline", "#d5d9de"), "rest": ("the rest", common.PALE),
}  # fmt: skip
FOUND = {
    "devices": "devices", "sequence": "sequence", "what": "what", "seconds": "step, s", "peak": "peak, GB", "layout": "layout",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A row of table 4: what was published of it, and the nearest layout here, but for its stage of ZeRO.

    each      sequences of a data rank in a step
    tflops    TFLOP/s of a GPU, and mfu the percent of the peak in bf16 that they are
    layout    of the degrees that the paper calls TP, CP, PP and DP, or as near to them as there is one
    """

    tensor: int
    context: int
    pipe: int
    data: int
    sequence: int
    each: int
    tflops: int
    mfu: int
    layout: str
    zeros: tuple[int, ...]

    @property
    def devices(self) -> int:
        return self.tensor * self.context * self.pipe * self.data

    @property
    def mesh(self) -> Mesh:
        return Machine.load(f"h100:{self.devices // 8}x8")

    @property
    def workload(self) -> Workload:
        return Workload(self.data * self.each, self.sequence, PRECISION, gradient_dtype=GRADIENTS)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.workload.batch * self.sequence

    def split(self, zero: int) -> Layout:
        return Layout.parse(f"{self.layout},zero={zero}")

    def measured(self, *, causal: bool) -> float:
        """Seconds of a step at the published FLOP/s: which FLOPs of attention these count the paper does not say."""
        flops = flops_per_token(ModelConfig.load(MODEL), self.sequence, causal=causal)
        return flops * self.tokens / (self.devices * self.tflops * TERA)

    @cached_property
    def plan(self) -> Plan:
        """All layouts of the same model, mesh and workload."""
        return plan(ModelConfig.load(MODEL), self.mesh, self.workload)

    @cached_property
    def same_degrees(self) -> Plan:
        """Those with the published degrees, as far as there are any."""
        split = self.split(self.zeros[0])
        fixed = parse(f"pipe={split.pipe},tensor={split.tensor},context={split.context}")
        return plan(ModelConfig.load(MODEL), self.mesh, self.workload, conditions=fixed)


RUNS = (
    Run(8, 1, 16, 64, 8192, 32, 430, 43, f"{SHARED},data=64,microbatches=32", (1, 2)),
    Run(8, 1, 16, 128, 8192, 16, 400, 41, f"{SHARED},data=128,microbatches=16", (1, 2)),
    # No ring goes through a pipeline here, and ulysses has no 16 key/value heads to share out: a ring without a pipeline, whose
    # weights take stage 3 to fit.
    Run(8, 16, 16, 8, 131072, 16, 380, 38, "data=128,context=16,tensor=8,sequence=true,attention=blockwise", (3,)),
)


def step(run: Run, zero: int) -> dict[str, Any]:
    """What is said of a published configuration: seconds, MFU in percent, bytes, days."""
    model, mesh, split = ModelConfig.load(MODEL), run.mesh, run.split(zero)
    time: StepTime = step_time(model, split, mesh, run.workload)
    low, high = time.interval
    seconds, peak = float(time.seconds), predict(model, split, run.workload, target=mesh.target).peak
    parts = {name: float(value) for name, value in time.parts.items()}
    ranks = sum(value for name, value in parts.items() if {"data", "context"} & {*name.split("+")})
    split_up = {name: parts.get(name, 0.0) for name in ("products", "memory", "tensor", "bubble")} | {"ranks": ranks}
    return {
        "devices": run.devices, "tp": run.tensor, "cp": run.context, "pp": run.pipe, "dp": run.data,
        "sequence": run.sequence, "each": run.each, "tokens": run.tokens, "tflops": run.tflops, "published_mfu": run.mfu,
        "zero": zero, "layout": f"{split}",
        "seconds": round(seconds, 3), "low": round(float(low), 3), "high": round(float(high), 3),
        "measured": round(run.measured(causal=False), 2), "measured_causal": round(run.measured(causal=True), 2),
        "mfu": round(100 * float(time.mfu), 1), "peak": peak, "capacity": mesh.capacity,
        "fits": "yes" if peak <= (mesh.capacity or 0) else "no",
        "days": round(days(seconds, run.tokens), 1), "published_days": round(days(run.measured(causal=False), run.tokens), 1),
        "published_days_causal": round(days(run.measured(causal=True), run.tokens), 1),
        **{name: round(value, 3) for name, value in split_up.items()}, "rest": round(seconds - sum(split_up.values()), 3),
    }  # fmt: skip


def days(seconds: float, tokens: int) -> float:
    """Of all of the training tokens, with steps of so many seconds and tokens, one after the other."""
    return TOKENS / tokens * seconds / SECONDS_A_DAY


def planned(run: Run, seconds: float) -> dict[str, Any]:
    """What a plan finds, and where a layout of so many seconds stands: `faster` of those that fit, None for more than are
    remembered."""
    found, same = run.plan, run.same_degrees.best[0]
    first = found.best[0]
    remembered = found.found.near
    return {
        "scored": found.found.scored, "fit": found.found.fits, "tied_all": found.near, "best": f"{first.layout}",
        "best_seconds": round(first.seconds, 3), "best_low": round(first.interval[0], 3),
        "best_high": round(first.interval[1], 3), "best_peak": first.peak,
        "faster": int((remembered < seconds).sum()) if seconds <= remembered.max() else None,
        "tied": "yes" if seconds <= first.interval[1] else "no",
        "same": f"{same.layout}", "same_seconds": round(same.seconds, 3), "same_peak": same.peak,
    }  # fmt: skip


def rows() -> Iterator[dict[str, Any]]:
    for run in RUNS:
        common.progress(f"{run.devices:,} devices, sequences of {run.sequence:,} tokens")
        for zero in run.zeros:
            own = step(run, zero)
            yield own | planned(run, own["seconds"])


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The table for a narrow screen, memory in GB."""
    return [
        dict(row)
        | {
            "step": f"{row['seconds']:.2f}",
            "interval": f"{row['low']:.1f} to {row['high']:.1f}",
            "measured": f"{row['measured_causal']:.1f} to {row['measured']:.1f}",
            "mfu": f"{row['mfu']:.1f} %",
            "published": f"{row['published_mfu']} %",
            "peak": f"{row['peak'] / 1e9:.1f}",
            "days": f"{row['days']:,.0f}",
            "published_days": f"{row['published_days_causal']:.0f} to {row['published_days']:.0f}",
            "over": f"{row['seconds'] / row['best_seconds']:.2f} x",
            "rank": rank(row),
        }
        | {name: f"{row[name]:.2f}" for name in ("products", "memory", "tensor", "ranks", "bubble", "rest", "best_seconds")}
        | {"seconds": f"{row['seconds']:.2f}"}
        for row in table
    ]


def rank(row: common.Row) -> str:
    """Among those that fit; what does not fit would have it."""
    if row["faster"] is None:
        return "far behind"
    return f"{row['faster'] + 1:,}" if row["fits"] == "yes" else f"({row['faster'] + 1:,}), does not fit"


def best(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """The best of each plan, and the best with the published degrees."""
    return [
        dict(row)
        | {"what": what, "layout": row[key], "seconds": f"{row[f'{key}_seconds']:.2f}", "peak": f"{row[f'{key}_peak'] / 1e9:.1f}"}
        for row in table
        if row["zero"] == next(other["zero"] for other in table if _same(row, other))
        for key, what in (("best", "best"), ("same", "best of these degrees"))
    ]  # fmt: skip


def _same(one: common.Row, other: common.Row) -> bool:
    return (one["devices"], one["sequence"]) == (other["devices"], other["sequence"])


def wrong(table: Sequence[common.Row]) -> list[str]:
    """Steps that reduce gradients once, as published, and whose measured seconds are outside of the interval however the FLOPs
    are counted."""
    return [
        f"{row['devices']:,} devices: {row['low']} to {row['high']} s, published {row['measured_causal']} to {row['measured']} s"
        for row in table
        if row["zero"] == 1 and not (row["low"] <= row["measured"] and row["measured_causal"] <= row["high"])
    ]


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Each step by its parts, with the interval, what was published, and the best of a plan."""
    picture = common.figure(9, 5.2)
    sure = [row for row in table if row["zero"] == 1]
    texts = [f"{row['seconds']:.1f} s, published {row['measured_causal']:.1f} to {row['measured']:.1f} s" for row in sure]
    title = f"Llama 3 405B, gradients reduced once: {'; '.join(texts)}"
    picture.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    lengths = dict.fromkeys(row["sequence"] for row in table)
    parts = [[row for row in table if row["sequence"] == length] for length in lengths]
    for axes, mine in zip(picture.subplots(len(parts), 1, height_ratios=[len(mine) for mine in parts]), parts, strict=True):
        for place, row in enumerate(mine):
            draw_step(axes, place, row, labelled=row is table[0])
        axes.set_yticks(range(len(mine)), [told(row) for row in mine])
        axes.set_ylim(len(mine) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, None)
    axes.set_xlabel("seconds of a step of 16.8 million tokens; the last one on another scale")
    picture.legend(frameon=False, loc="outside lower left", ncols=3)
    common.save_png(picture, path)


def told(row: common.Row) -> str:
    held = f"{row['peak'] / 1e9:.0f} GB{'' if row['fits'] == 'yes' else ', too much'}"
    return f"{row['devices']:,} GPUs, {row['sequence']:,} tokens\nzero={row['zero']}, {held}"


def draw_step(axes: Any, place: int, row: common.Row, *, labelled: bool) -> None:
    def once(label: str) -> str | None:
        return label if labelled else None

    left = 0.0
    for part, (label, colour) in BARS.items():
        axes.barh(place, row[part], 0.6, left, color=colour, label=once(label))
        left += row[part]
    bars = np.array([[row["seconds"] - row["low"]], [row["high"] - row["seconds"]]])
    predicted = once("predicted: four of five")
    axes.errorbar(row["seconds"], place, xerr=bars, color=common.INK, capsize=3, elinewidth=1, label=predicted)
    width = row["measured"] - row["measured_causal"]
    label = once("published, attention's FLOPs of a causal mask to all")
    axes.barh(place, width, 0.84, row["measured_causal"], fc="#c1121f30", ec="#c1121f", lw=1.4, label=label, zorder=4)
    best_of = once("the best of a plan")
    axes.plot(row["best_seconds"], place, "D", mfc="white", mec=common.INK, ms=6, ls="none", label=best_of, zorder=5)


def main() -> int:
    out = common.options(__doc__).out
    table = list(rows())
    common.show(shown(table), COLUMNS)
    print("\nSeconds that a step waits for each part")
    common.show(shown(table), PARTS)
    print("\nThe published layout among all others")
    common.show(shown(table), PLANNED)
    print()
    common.show(best(table), FOUND)
    problems = wrong(table)
    for problem in problems:
        print(problem)
    common.write_csv(table, out / "training_run.csv")
    draw(table, out / "training_run.png")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
