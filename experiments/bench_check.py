"""Where does the time of a check go? Wall time, its parts and memory, from llama-tiny to 405B.

    python experiments/bench_check.py [--repeat N] [--csv FILE]

Each check runs cold: in a process of its own, with the cache of ledgers off. `start` is what a process pays before it
does anything, imports of jax, flax and optax, measured in a process that does nothing else; `own` is what is left of
the wall time after that, tracing and lowering, and XLA: our own share. The median of the repetitions is shown. The
first row is what `jaxllm --help` takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

HELP = "jaxllm --help"
CHECKS = {
    "llama-tiny, cpu:8": "llama-tiny --mesh cpu:8 --layout data=4,tensor=2,zero=3",
    "llama-2-7b, h100:8": "llama-2-7b --mesh h100:8 --layout data=4,tensor=2,zero=3,remat=full --batch 8 --seq 4096",
    "llama-3-70b, h100:512": "llama-3-70b --mesh h100:512 --layout data=64,tensor=8,zero=3,remat=full --seq 8192",
    "llama-3.1-405b, h100:2048x8": "llama-3.1-405b --mesh h100:2048x8 --layout data=2048,tensor=8,zero=3,remat=full "
    "--batch 2048 --seq 8192",
}  # fmt: skip

COLUMNS = ("check", "wall", "start", "lower", "compile", "measure", "own", "peak_gb")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each check, 3 by default")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    options = parser.parse_args()
    rows = []
    print("  ".join(f"{column:>10}" if column != "check" else f"{column:28}" for column in COLUMNS))
    for name in (HELP, *CHECKS):
        runs = [measured(name) for _ in range(max(1, options.repeat))]
        medians = {c: statistics.median(run[c] for run in runs) for c in COLUMNS[1:] if c in runs[0]}
        row = {"check": name} | {c: round(value, 2) for c, value in medians.items()}
        rows.append(row)
        print("  ".join(f"{row.get(c, ''):>10}" if c != "check" else f"{name:28}" for c in COLUMNS), flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
