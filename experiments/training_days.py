"""How many days does training take, and which count of FLOPs and which rate do the published figures stand on?

    python experiments/training_days.py [--out DIR]

Narayanan et al. 2021 (section 5.1) give 34 days for GPT-3 and 84 for a model of a trillion parameters, by 8TP/(nX) with a
rate X that was measured; the exact count of the same runs stands beside. Llama-2-7B on a thousand RTX 4090s shows what the
rate does: 82.58 TFLOP/s is their vector rate, in which no matmul of bf16 is done, and 165.2 that of their tensor cores.
Nothing is compiled; the exact count is the one that `check` compares with compilers line by line. Exits with 1 when 8TP/(nX)
is a day or more off a published figure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import common
from jaxllm import Machine, ModelConfig
from jaxllm.theory.training import counts, training_days

NARAYANAN = "arXiv:2104.04473"
TERA = 10**12


@dataclass(frozen=True)
class Run:
    """A training run: `rate` in FLOP/s on one device, `source` of the rate and of the days, published or None."""

    model: str
    tokens: float
    devices: int
    rate: float
    remat: str
    source: str
    published: float | None = None

    @property
    def sequence(self) -> int:
        return min(4096, ModelConfig.load(self.model).max_sequence)


CARD = Machine.read("rtx4090").peak_flops
RUNS = (
    Run("gpt3-175b", 300e9, 1024, 140 * TERA, "full", NARAYANAN, 34),
    Run("megatron-1t", 450e9, 3072, 163 * TERA, "full", NARAYANAN, 84),
    *(
        Run("llama-2-7b", 2e12, 1000, CARD[dtype], remat, f"the whole {kind} rate")
        for dtype, kind in (("f32", "vector"), ("bf16", "tensor"))
        for remat in ("none", "full")
    ),
)
COLUMNS = {
    "model": "model",
    "billions": "10^9 tokens",
    "devices": "devices",
    "rate": "TFLOP/s",
    "remat": "remat",
    "thumb": "6TP/(nX) or 8TP/(nX)",
    "exact": "exact",
    "causal": "causal",
    "published": "published",
}


def rows() -> Iterator[dict[str, Any]]:
    """A row for each run: days by the rule of thumb, by the exact count, and with causal attention."""
    for run in RUNS:
        found = counts(ModelConfig.load(run.model), run.sequence, run.remat)
        days = [training_days(count.hardware, run.tokens, run.devices, run.rate) for count in found]
        yield {
            "model": run.model,
            "billions": round(run.tokens / 1e9),
            "devices": run.devices,
            "rate": round(run.rate / TERA, 2),
            "remat": run.remat,
            **{name: round(value, 2) for name, value in zip(("thumb", "exact", "causal"), days, strict=True)},
            "published": run.published,
            "source": run.source,
        }


def wrong(table: Sequence[common.Row]) -> list[str]:
    """The published figures that 8TP/(nX) is a day or more off."""
    return [
        f"{row['model']}: {row['thumb']} days, {row['published']} published"
        for row in table
        if row["published"] is not None and abs(row["thumb"] - row["published"]) >= 1
    ]


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Days of each run as three bars, with what is published as a mark."""
    figure = common.figure(9, 1.2 + 0.55 * len(table))
    figure.suptitle("Days of training: a rule of thumb, the exact count, and what is published", x=0.01, ha="left", weight="bold")
    axes = figure.subplots()
    for offset, (name, colour) in enumerate((("thumb", common.PALE), ("exact", common.FIRST), ("causal", common.THIRD))):
        label = {"thumb": "6TP/(nX) or 8TP/(nX)", "exact": "exact count", "causal": "causal attention"}[name]
        places = [place + 0.25 * (offset - 1) for place in range(len(table))]
        axes.barh(places, [row[name] for row in table], 0.23, color=colour, label=label)
    for place, row in enumerate(table):
        if row["published"] is not None:
            mark = axes.vlines(row["published"], place - 0.42, place + 0.42, color=common.SECOND, lw=2)
            mark.set_label("published" if not place else "")
    names = [
        f"{row['model']}, {row['billions']:,} billion tokens\n"
        f"{row['devices']:,} x {row['rate']:g} TFLOP/s, remat={row['remat']}"
        for row in table
    ]
    axes.set_yticks(range(len(table)), names)
    axes.set(xlabel="days", ylim=(len(table) - 0.45, -0.55))
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside lower left", ncols=4)
    common.save_png(figure, path)


def main() -> int:
    options = common.options(__doc__)
    table = list(rows())
    common.show(table, COLUMNS)
    common.write_csv(table, options.out / "training_days.csv")
    draw(table, options.out / "training_days.png")
    for text in wrong(table):
        print(text)
    return int(bool(wrong(table)))


if __name__ == "__main__":
    sys.exit(main())
