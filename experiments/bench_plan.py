"""How many layouts a second does a plan score, and how long does a plan take?

    python experiments/bench_plan.py [--repeat N] [--out DIR]

Two searches, each scored in a process that does nothing else: layouts whose memory and time were computed, over the seconds
of one core that it took. Beside it scoring layouts one at a time, by `predict` and `step_time` in the same process. `wall` is
what `jaxllm plan` takes from start-up to exit. The fastest of the repetitions counts, for what else a machine does only adds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from experiments import common

ROOT = common.ROOT
SEARCHES = {
    "llama-3-70b, h100:64x8": ("llama-3-70b", "h100:64x8", 1024, 8192),
    "llama-3.1-405b, h100:2048x8": ("llama-3.1-405b", "h100:2048x8", 2048, 8192),
    "llama-3-70b, v5p:8x16x16": ("llama-3-70b", "v5p:8x16x16", 2048, 8192),
}
ALONE = 12  # layouts that are scored one at a time
COLUMNS = {
    "search": "search", "scored": "layouts", "seconds": "core seconds", "per_second": "a second", "alone_per_second": "one by one",
    "wall": "wall, s",
}  # fmt: skip

SCORE = """
import json, sys, time
from jaxllm import Machine, ModelConfig, Workload, predict, step_time
from jaxllm.plan.search import keep_memory, search
from jaxllm.plan.space import Space
model, mesh, batch, sequence = json.loads(sys.argv[1])
model, mesh, work = ModelConfig.load(model), Machine.load(mesh), Workload(batch, sequence, "bf16-f32")
keep_memory()
began = time.process_time()
found = search(Space.of(model, mesh, work))
seconds = time.process_time() - began
few = [scored.layout for scored in found.front[: int(sys.argv[2])]]
began = time.process_time()
for layout in few:
    predict(model, layout, work, target=mesh.target), step_time(model, layout, mesh, work)
alone = len(few) / (time.process_time() - began)
assert "jax" not in sys.modules
print(json.dumps({"scored": found.scored, "seconds": seconds, "alone_per_second": alone}))
"""


def measured(name: str, repeat: int) -> common.Row:
    """One search: the fastest of so many repetitions of each figure."""
    model, mesh, batch, sequence = SEARCHES[name]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    plan = [
        sys.executable, "-m", "jaxllm", "plan", model, "--mesh", mesh, "--batch", str(batch), "--seq", str(sequence), "--json",
    ]  # fmt: skip
    scores, walls = [], []
    for _ in range(repeat):
        asked = [sys.executable, "-c", SCORE, json.dumps(SEARCHES[name]), str(ALONE)]
        scores.append(json.loads(subprocess.run(asked, env=own, capture_output=True, text=True, check=True).stdout))
        began = time.perf_counter()
        subprocess.run(plan, env=own, capture_output=True, check=True)
        walls.append(time.perf_counter() - began)
    best = min(scores, key=lambda score: score["seconds"])
    return {
        "search": name,
        "scored": best["scored"],
        "seconds": best["seconds"],
        "per_second": best["scored"] / best["seconds"],
        "alone_per_second": max(score["alone_per_second"] for score in scores),
        "wall": min(walls),
    }


def rounded(row: common.Row) -> common.Row:
    """Three digits of what is measured."""
    return {
        name: value if isinstance(value, (int, str)) else round(value) if value > 1000 else round(value, 2) for name, value in row.items()
    }


def draw(rows: Sequence[common.Row], path: Path) -> None:
    """Layouts a second, at once and one at a time."""
    figure = common.figure(9, 1.6 + 0.6 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for shift, name, colour in ((-0.18, "per_second", common.FIRST), (0.18, "alone_per_second", common.PALE)):
            axes.barh(place + shift, row[name], height=0.34, color=colour, label=LABELS[name] if not place else None)
            axes.annotate(f" {row[name]:,.0f}", (row[name], place + shift), va="center")
    axes.axvline(1e6, color=common.SECOND, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(1, 3e8)
    axes.set_yticks(range(len(rows)), [f"{row['search']}\n{row['scored']:,} layouts" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("layouts scored a second by one core, memory and time")
    axes.legend(loc="lower right", frameon=False)
    common.save_png(figure, path)


LABELS = {"per_second": "all at once, in vectors", "alone_per_second": "one at a time, by predict and step_time"}


def main() -> int:
    def repeat(parser: ArgumentParser) -> None:
        parser.add_argument("--repeat", type=int, default=3, help="repetitions of each search, 3 by default")

    options = common.options(__doc__, repeat)
    rows = []
    for name in SEARCHES:
        common.progress(f"{name}, {max(1, options.repeat)} times")
        rows.append(rounded(measured(name, max(1, options.repeat))))
    common.show(rows, COLUMNS)
    common.write_csv(rows, options.out / "bench_plan.csv")
    draw(rows, options.out / "bench_plan.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
