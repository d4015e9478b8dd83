"""Where does the time of a check go? Wall time, its parts and memory, from llama-tiny to 405B.

    python experiments/bench_check.py [--repeat N] [--out DIR]

Each check runs cold: in a process of its own, with the cache of ledgers off. `start` is what a process pays before it
does anything, imports of jax, flax and optax, measured in a process that does nothing else; `own` is what is left of
the wall time after that, tracing and lowering, and XLA: our own share. The median of the repetitions is shown. The
first row is what `jaxllm --help` takes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from experiments import common

ROOT = common.ROOT

HELP = "jaxllm --help"
CHECKS = {
    "llama-tiny, cpu:8": "llama-tiny --mesh cpu:8 --layout data=4,tensor=2,zero=3",
    "llama-2-7b, h100:8": "llama-2-7b --mesh h100:8 --layout data=4,tensor=2,zero=3,remat=full --batch 8 --seq 4096",
    "llama-3-70b, h100:512": "llama-3-70b --mesh h100:512 --layout data=64,tensor=8,zero=3,remat=full --seq 8192",
    "llama-3.1-405b, h100:2048x8": "llama-3.1-405b --mesh h100:2048x8 --layout data=2048,tensor=8,zero=3,remat=full "
    "--batch 2048 --seq 8192",
}  # fmt: skip

COLUMNS = ("check", "wall", "start", "lower", "compile", "measure", "own", "peak_gb")
# What the wall time is made of; `measure` is a part of our own.
PARTS = {"start": "imports", "lower": "tracing and lowering", "compile": "XLA", "own": "jaxllm's own"}


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak memory in GB and standard output of a process. Raises CalledProcessError when it fails."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"JAXLLM_CACHE": ""}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9, output


def measured(name: str) -> dict[str, float | str]:
    """One check, taken apart; of the help, wall time and memory."""
    if name == HELP:
        wall, memory, _ = timed([sys.executable, "-m", "jaxllm", "--help"])
        return {"check": name, "wall": wall, "peak_gb": memory}
    start, _, _ = timed([sys.executable, "-c", "import jax, flax.nnx, optax; jax.devices()"])
    wall, memory, output = timed([sys.executable, "-m", "jaxllm", "check", *CHECKS[name].split(), "--json"])
    parts = json.loads(output)["seconds"]
    own = wall - start - parts["lower"] - parts["compile"]
    return {"check": name, "wall": wall, "start": start, **parts, "own": own, "peak_gb": memory}


def draw(rows: Sequence[common.Row], path: Path) -> None:
    """A bar a check, cut into what its wall time is made of."""
    figure = common.figure(9, 1.2 + 0.5 * len(rows))
    axes = figure.subplots()
    colours = (common.PALE, common.THIRD, common.FIRST, common.SECOND)
    for place, row in enumerate(rows):
        left = 0.0
        for part, colour in zip(PARTS, colours, strict=True):
            # The help has no parts: all of it is our own.
            seconds = row.get(part) or (row["wall"] if part == "own" and row.get("start") is None else 0.0)
            axes.barh(place, seconds, left=left, height=0.6, color=colour)
            left += seconds
        axes.annotate(f" {row['wall']:.1f} s", (left, place), va="center")
    for label, colour in zip(PARTS.values(), colours, strict=True):
        axes.barh(0, 0, color=colour, label=label)
    axes.set_yticks(range(len(rows)), [row["check"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="seconds, cold, on two cores", title="The time of a check goes into XLA")
    axes.legend(frameon=False, loc="upper right")
    common.save_png(figure, path)


def main() -> int:
    def repeat(parser: ArgumentParser) -> None:
        parser.add_argument("--repeat", type=int, default=3, help="repetitions of each check, 3 by default")

    options = common.options(__doc__, repeat)
    rows = []
    for name in (HELP, *CHECKS):
        common.progress(f"{name}, {max(1, options.repeat)} times")
        runs = [measured(name) for _ in range(max(1, options.repeat))]
        medians = {c: statistics.median(run[c] for run in runs) for c in COLUMNS[1:] if c in runs[0]}
        rows.append(dict.fromkeys(COLUMNS) | {"check": name} | {c: round(value, 2) for c, value in medians.items()})
    common.show(rows, {column: column for column in COLUMNS})
    common.write_csv(rows, options.out / "bench_check.csv")
    draw(rows, options.out / "bench_check.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
