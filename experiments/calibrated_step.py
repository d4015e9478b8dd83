"""How far off is the predicted time of a step on a device that was calibrated?

    python experiments/calibrated_step.py [--out DIR]

Calibrates one device that is here, as `jaxllm calibrate` does, and then times steps that it has not seen: deeper models, another
family, a large vocabulary, recomputation, attention block by block, microbatches, other optimizers. Each is compiled by the
device's own XLA and lies beside what the closed form says of it with the calibrated machine. Likewise products of shapes between
those that were measured, with the curve of these and by the rule of tiles alone. Without an accelerator it is the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from jaxllm import Layout, ModelConfig, Workload, calibrate, step_time
from jaxllm.spec.machine import Mesh
from jaxllm.theory.rates import Rates
from jaxllm.theory.matmul import product

COLUMNS = {
    "step": "step", "width": "width", "layers": "layers", "tokens": "tokens", "layout": "layout", "optimizer": "optimizer",
    "predicted": "predicted, ms", "interval": "four of five", "measured": "measured, ms", "off": "off",
}  # fmt: skip
PRODUCTS = {"rule": "products between", "count": "shapes", "median": "off, median", "most": "four of five", "worst": "worst"}
LEAST_INSIDE = 0.5  # of the steps; four of five are expected, and of so few less is no surprise


@dataclass(frozen=True)
class Step:
    """A step on one device; `scale` is what widths and tokens are multiplied by on an accelerator."""

    name: str
    width: int = 256
    layers: int = 4
    sequences: int = 4
    tokens: int = 128
    vocab: int = 512
    layout: str = ""
    optimizer: str = "adamw"
    family: str = "llama"

    def nouns(self, dtype: str, scale: int) -> tuple[ModelConfig, Layout, Workload]:
        """Model, layout and workload, of the precision that is calibrated."""
        tokens = self.tokens * scale
        _, known = calibrate.nouns((64, 1, 1), dtype)
        width, heads = self.width * scale, self.width * scale // 64
        own = {"kv_heads": heads // 2, "d_ff": 3 * width} if self.family == "llama" else {"kv_heads": heads, "d_ff": 4 * width}
        model = replace(
            ModelConfig.load(f"{self.family}-tiny"), layers=self.layers, d_model=width, heads=heads, head_dim=64, vocab=self.vocab,
            max_sequence=4096, **own,
        )  # fmt: skip
        layout = Layout.parse(self.layout or "data=1")
        return model, layout, Workload(self.sequences * layout.microbatches, tokens, known.precision, self.optimizer)


STEPS = (
    Step("deeper"),
    Step("wider", 512, sequences=8),
    Step("one long sequence", 512, 2, sequences=1, tokens=512),
    Step("a large vocabulary", 256, 2, vocab=16384),
    Step("full recomputation", layout="remat=full"),
    Step("attention recomputed", tokens=256, layout="remat=selective"),
    Step("block by block", 256, 2, sequences=1, tokens=1024, layout="attention=blockwise"),
    Step("microbatches", layout="microbatches=4"),
    Step("momentum", optimizer="momentum"),
    Step("gpt", family="gpt"),
)


def measured() -> tuple[calibrate.Found, Mesh, list[dict[str, Any]]]:
    """What was measured of the first device here, the machine that this makes, and a row for each step."""
    from jaxllm.targets import start

    start.prepare("local", 1)
    import jax

    with start.quiet():
        found = calibrate.measure(common.progress)
        mesh = machine(found)
        rows = []
        for each in STEPS:
            common.progress(each.name)
            nouns = each.nouns(found.dtype, 1 if found.platform == "cpu" else 8)
            rows.append(row(each.name, mesh, nouns, calibrate.step_seconds(*nouns, jax.devices()[0])))
    return found, mesh, rows


def machine(found: calibrate.Found) -> Mesh:
    """One device of the machine that `jaxllm calibrate` would write."""
    return Mesh(calibrate.read_back(calibrate.machine_file(found, None)), (1,) if found.platform == "cpu" else (1, 1), "calibrated:1")


def row(name: str, mesh: Mesh, nouns: tuple[ModelConfig, Layout, Workload], seconds: float) -> dict[str, Any]:
    """A step as it was predicted and measured, in ms."""
    model, layout, workload = nouns
    time = step_time(model, layout, mesh, workload)
    low, high = time.interval
    return {
        "step": name, "width": model.d_model, "layers": model.layers, "tokens": f"{workload.batch} x {workload.sequence}",
        "layout": "" if layout == Layout() else f"{layout}".removeprefix("data=1,"), "optimizer": workload.optimizer,
        "predicted": round(1e3 * float(time.seconds), 2), "low": round(1e3 * float(low), 2), "high": round(1e3 * float(high), 2),
        "measured": round(1e3 * seconds, 2),
    }  # fmt: skip


def products(found: calibrate.Found, mesh: Mesh) -> list[dict[str, Any]]:
    """How far products between the measured shapes are off, in percent."""
    rates = Rates.of(mesh, calibrate.nouns((64, 1, 1), found.dtype)[1])
    size = {"f32": 4, "bf16": 2}[found.dtype]
    rows = []
    for rule, own in (("the rule of tiles alone", replace(rates, curve=None)), ("the curve", rates)):
        off = np.abs([float(product(own, *shape, size)) / seconds - 1 for shape, seconds in found.between.items()])
        parts = {"median": np.median(off), "most": np.quantile(off, 0.8), "worst": off.max()}
        rows.append({"rule": rule, "count": len(off)} | {name: f"{100 * value:.0f} %" for name, value in parts.items()})
    return rows


def off(row: Mapping[str, Any]) -> float:
    """By how much the predicted time is more than the measured one, as a share of it."""
    return row["predicted"] / row["measured"] - 1


def inside(row: Mapping[str, Any]) -> bool:
    return row["low"] <= row["measured"] <= row["high"]


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as they are printed."""
    return [
        {**row, "interval": f"{row['low']:.0f} to {row['high']:.0f}" + ("" if inside(row) else " (not)"), "off": f"{100 * off(row):+.0f} %"}
        for row in rows
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The errors of all steps in a sentence."""
    each = [abs(off(row)) for row in rows]
    return (
        f"{len(rows)} steps: {100 * np.mean(each):.0f} % off in the mean, {100 * max(each):.0f} % at most; "
        f"{sum(map(inside, rows))} of them within the interval"
    )


def wrong(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not as it is claimed."""
    few = sum(map(inside, rows)) < LEAST_INSIDE * len(rows)
    return ["fewer than half of the steps are within the interval"] if few else []


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured steps beside the predicted ones with their intervals."""
    figure = common.figure(9, 4.2)
    axes = figure.subplots()
    for place, each in enumerate(rows):
        scale = 1 / each["measured"]
        axes.plot([each["low"] * scale, each["high"] * scale], [place, place], color=common.PALE, linewidth=6, solid_capstyle="butt")
        axes.plot(each["predicted"] * scale, place, "o", color=common.FIRST)
    axes.axvline(1, color=common.INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [each["step"] for each in rows])
    axes.invert_yaxis()
    axes.set_xlabel("predicted time of the step over the measured one, with the interval of four in five")
    common.save_png(figure, path)


def main() -> int:
    given = common.options(__doc__)
    found, mesh, rows = measured()
    between = products(found, mesh)
    common.show(between, PRODUCTS)
    print()
    common.show(shown(rows), COLUMNS)
    print(f"\n{summary(rows)}, on {found.devices} x {found.kind}")
    common.write_csv(rows, given.out / "calibrated_step.csv")
    common.write_csv(between, given.out / "calibrated_products.csv")
    draw(rows, given.out / "calibrated_step.png")
    problems = wrong(rows)
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
