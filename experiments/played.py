"""Where does the time of a compiled step differ from its closed form?

    python experiments/played.py [--out DIR]

Llama 2 7B in nine layouts on H100s, A100s and TPU v5p. The closed form of a step's time, and the program that the machine's
compiler makes of the step, played at the same rates: what each part takes, waited for, in milliseconds, and the instruction
that takes most of the part in which they differ most. Exits with 1 when something could not be played.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import common
from jaxllm import Layout, Machine, ModelConfig, Workload, step_time

if TYPE_CHECKING:
    from jaxllm.report.played import Played
    from jaxllm.theory.time import StepTime

MODEL = "llama-2-7b"


@dataclass(frozen=True)
class Step:
    name: str
    mesh: str
    layout: str
    batch: int
    sequence: int
    precision: str = "bf16-f32"


STEPS = (
    Step("ZeRO 1", "h100:8", "data=8,zero=1,remat=full", 8, 4096, "bf16-master"),
    Step("ZeRO 2", "h100:8", "data=8,zero=2,remat=full,microbatches=2", 16, 4096),
    Step("ZeRO 3", "h100:8", "data=8,zero=3,remat=full", 8, 4096),
    Step("ZeRO 3, two nodes", "a100-80:16", "data=16,zero=3,remat=full", 16, 4096),
    Step("blockwise attention", "h100:8", "data=8,zero=3,remat=full,attention=blockwise", 8, 4096),
    Step("tensor, selective", "a100-80:16", "data=2,tensor=8,remat=selective", 16, 2048, "bf16-master"),
    Step("tensor, sequence", "h100:8", "tensor=8,sequence=true,remat=full", 8, 4096, "bf16-master"),
    Step("pipeline", "a100-80:16", "pipe=4,tensor=4,microbatches=8,remat=full", 8, 2048, "bf16-master"),
    Step("ZeRO 3 on TPUs", "v5p:2x2x2", "data=8,zero=3,remat=full", 8, 2048),
)

# Parts of StepTime; collectives are those over all axes, waited for.
PARTS = ("products", "memory", "collectives", "bubble", "optimizer", "other")

COLUMNS = {"name": "step", "mesh": "mesh", "closed": "closed, ms", "played": "played, ms", "more": "more"} | {
    part: title
    for part, title in zip(PARTS, ("matmuls", "memory", "collectives", "bubble", "optimizer", "other"), strict=True)
}

HIDDEN = {
    "name": "step",
    "hidden_closed": "hidden, closed form",
    "hidden_played": "hidden, played",
    "kernels": "kernels",
    "kernels_least": "their least time",
}


def nouns(step: Step) -> tuple[ModelConfig, Layout, Machine, Workload]:
    return (
        ModelConfig.load(MODEL), Layout.parse(step.layout), Machine.load(step.mesh),
        Workload(step.batch, step.sequence, step.precision),
    )  # fmt: skip


def milliseconds(seconds: float) -> float:
    return round(1e3 * float(seconds), 2)


def closed(step: Step) -> dict[str, Any]:
    """The step's columns by closed form."""
    time = step_time(*nouns(step))
    return {
        "name": step.name,
        "mesh": step.mesh,
        "layout": step.layout,
        "batch": step.batch,
        "sequence": step.sequence,
        "precision": step.precision,
        "closed": milliseconds(time.seconds),
        **{f"{part}_closed": milliseconds(seconds) for part, seconds in parts_of(time).items()},
        "hidden_closed": milliseconds(sum(float(each.hidden) for each in time.traffic)),
    }


def parts_of(time: StepTime) -> dict[str, float]:
    """Seconds by PARTS: nothing here is offloaded, and no device waits for its host."""
    own = {part: float(getattr(time, part)) for part in PARTS if part != "collectives"}
    return {part: own.get(part, sum(float(each.exposed) for each in time.traffic)) for part in PARTS}


def played(one: Played) -> dict[str, Any]:
    """The same of the compiled program, and what makes the largest difference."""
    from jaxllm.report.played import MEET, largest

    most = one.differences[0]
    found = largest(one, most.part, 1)
    return {
        "played": milliseconds(one.seconds),
        **{
            f"{part}_played": milliseconds(one.parts.get(part, sum(each.exposed for each in one.traffic))) for part in PARTS
        },
        "hidden_played": milliseconds(sum(each.hidden for each in one.traffic)),
        "kernels": one.kernels,
        "kernels_least": milliseconds(one.kernels * one.closed.rates.kernel),
        "differs_most": most.what,
        "longest": str(found[0]) if found else MEET,
        "not_played": "; ".join(one.notes),
    }


def rows() -> Iterator[dict[str, Any]]:
    from jaxllm.played import played_time
    from jaxllm.targets import start

    for step in STEPS:  # all of them before the first compile: jax starts once
        mesh = nouns(step)[2]
        start.prepare(mesh.target, mesh.devices)
    for step in STEPS:
        common.progress(f"compiling {MODEL} for {step.mesh}, {step.layout}")
        with start.quiet():
            yield closed(step) | played(played_time(*nouns(step)))


def shown(table: Sequence[common.Row]) -> list[dict[str, Any]]:
    """Both in a cell, closed form first, for a narrow screen."""
    return [
        {"name": one["name"], "mesh": one["mesh"], "closed": f"{one['closed']:.0f}", "played": f"{one['played']:.0f}"}
        | {"more": f"{100 * (one['played'] / one['closed'] - 1):+.0f} %"}
        | {part: f"{one[f'{part}_closed']:.0f} {one[f'{part}_played']:.0f}" for part in PARTS}
        for one in table
    ]


def wrong(table: Sequence[common.Row]) -> list[str]:
    """The steps of which something could not be played."""
    return [f"{one['name']}: {one['not_played']}" for one in table if one["not_played"]]


def draw(table: Sequence[common.Row], path: Path) -> None:
    """Two bars a step, by closed form above and played below, in their parts."""
    figure = common.figure(9, 5.5)
    axes = figure.subplots()
    title = f"A step of {MODEL}: by closed form (above) and as its program is played (below)"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    colours = (common.FIRST, common.THIRD, common.SECOND, common.PALE, "#8a5a83", "#d9d9d9")
    for which, place in (("closed", -0.2), ("played", 0.2)):
        left = [0.0] * len(table)
        for part, colour in zip(PARTS, colours, strict=True):
            widths = [one[f"{part}_{which}"] for one in table]
            label = COLUMNS[part] if which == "closed" else None
            axes.barh([number + place for number in range(len(table))], widths, 0.36, left=left, color=colour, label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(table)), [f"{one['name']}\n{one['mesh']}" for one in table])
    axes.set(xlabel="ms", ylim=(len(table) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside lower left", ncols=6)
    common.save_png(figure, path)


def main() -> int:
    options = common.options(__doc__)
    table = list(rows())
    common.show(shown(table), COLUMNS)
    common.write_csv(table, options.out / "played.csv")
    draw(table, options.out / "played.png")
    for text in wrong(table):
        print(f"not played: {text}")
    return int(bool(wrong(table)))


if __name__ == "__main__":
    sys.exit(main())
