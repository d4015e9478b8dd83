"""The grid: every layout of llama-tiny on every target, line by line. `make grid` runs all of it.

    python -m tests.grid            what is missing, in parallel processes; then writes docs/grid.md
    python -m tests.grid --fresh    all of it again

Each finished cell is kept under runs/, by its name and by the sources it depends on, so that an interrupted
run goes on where it stopped. The tests take a pairwise cover of the same cells.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "grid"
TABLE = ROOT / "docs" / "grid.md"

MODEL = "llama-tiny"
MESHES = {
    "cpu:8": ("f32",),
    "h100:8": ("bf16-f32", "bf16-master"),
    "v5e:2x4": ("bf16-f32",),
}
DEGREES = ("data=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8", "replica=2,data=2,tensor=2")
ZERO = (0, 1, 2, 3)
REMAT = ("none", "full")
MICROBATCHES = (1, 4)

WORKERS = 2
CELLS_A_PROCESS = 20  # starting jax is paid once for so many


@dataclass(frozen=True)
class Cell:
    mesh: str
    precision: str
    degrees: str
    zero: int
    remat: str
    microbatches: int

    @property
    def layout(self) -> str:
        return f"{self.degrees},zero={self.zero},remat={self.remat},microbatches={self.microbatches}"

    @property
    def name(self) -> str:
        return f"{self.mesh} {self.precision} {self.layout}"


def cells(mesh: str | None = None) -> list[Cell]:
    """All cells, or those of one mesh."""
    return [
        Cell(name, *values)
        for name, precisions in MESHES.items()
        if mesh in (None, name)
        for values in itertools.product(precisions, DEGREES, ZERO, REMAT, MICROBATCHES)
    ]


def pairwise(mesh: str) -> list[Cell]:
    """Few cells of a mesh in which every pair of values of two columns occurs: greedy, and the same each time."""
    everything = cells(mesh)
    columns = ("precision", "degrees", "zero", "remat", "microbatches")

    def pairs(cell: Cell) -> set[tuple]:
        values = [(column, getattr(cell, column)) for column in columns]
        return set(itertools.combinations(values, 2))

    missing = set().union(*map(pairs, everything))
    chosen: list[Cell] = []
    while missing:
        best = max(everything, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def run(cell: Cell) -> dict[str, Any]:
    """Checks one cell in this process, whose environment must be prepared for the cell's target."""
    from jaxllm.check import check, resolve
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig

    model, layout, mesh = ModelConfig.load(MODEL), Layout.parse(cell.layout), Machine.load(cell.mesh)
    workload = resolve(model, layout, mesh, None, None, cell.precision)
    comparison = check(model, layout, mesh, workload)
    return {
        "lines": len(comparison.rows),
        "equal": sum(row.status == "equal" for row in comparison.rows),
        "bad": [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"],
        "unexplained": list(comparison.unexplained),
        "rules": sorted({rule.name for row in comparison.rows for rule in row.rules}),
        "peak": [comparison.peak.predicted, comparison.peak.compiled],
        "seconds": dict(comparison.seconds),
    }


# ---------------------------------------------------------------- all of it, resumable


def _version() -> str:
    """Of everything that a cell's result depends on."""
    digest = hashlib.sha256(platform.python_version().encode())
    for path in sorted((*ROOT.glob("jaxllm/**/*.py"), *ROOT.glob("meshes/*.toml"), Path(__file__))):
        if "report" not in path.parts and path.name != "cli.py":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kept(cell: Cell) -> Path:
    return KEPT / _version() / (cell.name.replace(" ", "_").replace(":", "-").replace(",", "_") + ".json")


def _work(batch: list[Cell]) -> None:
    """In a process of its own: checks each cell and keeps its result."""
    from jaxllm.spec.machine import Machine
    from jaxllm.targets import start

    start.prepare(Machine.load(batch[0].mesh).target, 8)
    for cell in batch:
        path = _kept(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = json.dumps(run(cell))
        part = path.with_suffix(".part")
        part.write_text(result)
        part.replace(path)
        print(f"{cell.name}: {json.loads(result)['equal']} of {json.loads(result)['lines']} lines equal", flush=True)


def _spawn(batch: list[Cell]) -> int:
    names = json.dumps([cells().index(cell) for cell in batch])
    environment = os.environ | {"JAXLLM_CACHE": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "tests.grid", "--work", names], cwd=ROOT, env=environment).returncode


def table() -> str:
    """docs/grid.md, from the results that are kept."""
    rows, total, equal = [], 0, 0
    for mesh, precisions in MESHES.items():
        for precision in precisions:
            for degrees in DEGREES:
                found = [
                    json.loads(_kept(cell).read_text())
                    for cell in cells(mesh)
                    if (cell.precision, cell.degrees) == (precision, degrees)
                ]
                lines, same = sum(cell["lines"] for cell in found), sum(cell["equal"] for cell in found)
                rules = sorted({rule for cell in found for rule in cell["rules"]})
                unexplained = sum(len(cell["unexplained"]) for cell in found)
                total, equal = total + lines, equal + same
                rows.append(
                    f"| {mesh} | {precision} | {degrees} | {len(found)} | {same:,} of {lines:,} | {unexplained} "
                    f"| {', '.join(rules) or '-'} |"
                )
    import jax

    return "\n".join(
        [
            "# The grid",
            "",
            f"Written by `make grid` on Python {platform.python_version()} with jax {jax.__version__}: {MODEL}, each row "
            f"over ZeRO stages 0 to 3, remat none and full, 1 and 4 microbatches.",
            "",
            f"**{equal:,} of {total:,} lines are equal.** A line is one kind of memory, the matmuls of one phase, or one "
            "kind of collective over some mesh axes in one phase, in payload and wire bytes.",
            "",
            "| mesh | precision | degrees | cells | equal lines | unexplained | rules |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work([cells()[index] for index in json.loads(options.work)])
        return 0
    if options.fresh:
        for cell in cells():
            _kept(cell).unlink(missing_ok=True)
    missing = [cell for cell in cells() if not _kept(cell).exists()]
    batches = [
        group[start : start + CELLS_A_PROCESS]
        for mesh in MESHES
        for group in [[cell for cell in missing if cell.mesh == mesh]]
        for start in range(0, len(group), CELLS_A_PROCESS)
    ]
    print(f"{len(missing)} of {len(cells())} cells to run, in {WORKERS} processes at a time", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        failed = sum(bool(job.result()) for job in as_completed([pool.submit(_spawn, batch) for batch in batches]))
    if failed or any(not _kept(cell).exists() for cell in cells()):
        print(f"{failed} processes failed; run it again to go on", file=sys.stderr)
        return 1
    TABLE.write_text(table())
    bad = [cell for cell in cells() for kept in [json.loads(_kept(cell).read_text())] if kept["bad"] or kept["unexplained"]]
    for cell in bad[:20]:
        print(f"{cell.name}: {json.loads(_kept(cell).read_text())['bad']}")
    print(f"wrote {TABLE.relative_to(ROOT)}; {len(bad)} cells differ; {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
