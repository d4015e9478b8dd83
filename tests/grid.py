"""The grid: every layout of llama-tiny on every target, and real models at real size. `make grid` runs all of it.

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

from jaxllm.report import document

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

# Real models, all with remat=full: model, mesh, degrees, ZeRO stages, sequence. One sequence a device.
REAL = (
    ("llama-2-7b", "h100:64", "data=64", (0, 3), 4096),
    ("llama-2-7b", "h100:64", "data=8,tensor=8", (1, 3), 4096),
    ("llama-2-7b", "v5p:4x4x4", "data=64", (1, 3), 4096),
    ("llama-2-7b", "v5p:4x4x4", "data=8,tensor=8", (0, 3), 4096),
    ("llama-3-70b", "h100:512", "data=512", (1, 3), 8192),
    ("llama-3-70b", "h100:512", "data=64,tensor=8", (0, 3), 8192),
    ("llama-3.1-405b", "h100:2048x8", "data=2048,tensor=8", (3,), 8192),
)

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
    model: str = MODEL
    sequence: int | None = None

    @property
    def layout(self) -> str:
        return f"{self.degrees},zero={self.zero},remat={self.remat},microbatches={self.microbatches}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.mesh} {self.precision} {self.layout}"


def real() -> list[Cell]:
    """The cells at real size."""
    return [
        Cell(mesh, "bf16-f32", degrees, stage, "full", 1, model, sequence)
        for model, mesh, degrees, stages, sequence in REAL
        for stage in stages
    ]


def cells(mesh: str | None = None) -> list[Cell]:
    """All cells, or those of one mesh."""
    return [
        Cell(name, *values)
        for name, precisions in MESHES.items()
        if mesh in (None, name)
        for values in itertools.product(precisions, DEGREES, ZERO, REMAT, MICROBATCHES)
    ]


def everything() -> list[Cell]:
    return cells() + real()


def pairwise(mesh: str) -> list[Cell]:
    """Few cells of a mesh in which every pair of values of two columns occurs: greedy, and the same each time."""
    candidates = cells(mesh)
    columns = ("precision", "degrees", "zero", "remat", "microbatches")

    def pairs(cell: Cell) -> set[tuple]:
        values = [(column, getattr(cell, column)) for column in columns]
        return set(itertools.combinations(values, 2))

    missing = set().union(*map(pairs, candidates))
    chosen: list[Cell] = []
    while missing:
        best = max(candidates, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def run(cell: Cell) -> dict[str, Any]:
    """Checks one cell in this process, whose environment must be prepared for the cell's target."""
    from jaxllm.check import check, resolve
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig

    model, layout, mesh = ModelConfig.load(cell.model), Layout.parse(cell.layout), Machine.load(cell.mesh)
    workload = resolve(model, layout, mesh, None, cell.sequence, cell.precision)
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


# What a cell's result does not depend on
APART = ("cli.py", "__main__.py", "cache.py", "reference.py", "run.py")


def _version() -> str:
    """Of everything that a cell's result depends on."""
    versions = [document.versions(target) for target in ("cpu", "gpu", "tpu")]
    digest = hashlib.sha256(repr((platform.python_version(), versions)).encode())
    for path in sorted((*ROOT.glob("jaxllm/**/*.py"), *ROOT.glob("meshes/*.toml"))):
        if path.name not in APART and ("report" not in path.parts or path.name == "compare.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kept(cell: Cell) -> Path:
    return KEPT / _version() / (cell.name.replace(" ", "_").replace(":", "-").replace(",", "_") + ".json")


def _work(batch: list[Cell]) -> None:
    """In a process of its own: checks each cell and keeps its result."""
    from jaxllm.spec.machine import Machine
    from jaxllm.targets import start

    mesh = Machine.load(batch[0].mesh)
    start.prepare(mesh.target, mesh.devices)
    for cell in batch:
        path = _kept(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = json.dumps(run(cell))
        part = path.with_suffix(".part")
        part.write_text(result)
        part.replace(path)
        print(f"{cell.name}: {json.loads(result)['equal']} of {json.loads(result)['lines']} lines equal", flush=True)


def _spawn(batch: list[Cell]) -> int:
    names = json.dumps([everything().index(cell) for cell in batch])
    environment = os.environ | {"JAXLLM_CACHE": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "tests.grid", "--work", names], cwd=ROOT, env=environment).returncode


def _result(cell: Cell) -> dict[str, Any]:
    return json.loads(_kept(cell).read_text())


def table() -> str:
    """docs/grid.md, from the results that are kept."""
    import jax

    small, total, equal = [], 0, 0
    for mesh, precisions in MESHES.items():
        for precision, degrees in itertools.product(precisions, DEGREES):
            found = [_result(c) for c in cells(mesh) if (c.precision, c.degrees) == (precision, degrees)]
            lines, same = sum(cell["lines"] for cell in found), sum(cell["equal"] for cell in found)
            rules = sorted({rule for cell in found for rule in cell["rules"]})
            unexplained = sum(len(cell["unexplained"]) for cell in found)
            total, equal = total + lines, equal + same
            small.append(
                f"| {mesh} | {precision} | {degrees} | {len(found)} | {same:,} of {lines:,} | {unexplained} "
                f"| {', '.join(rules) or '-'} |"
            )
    large = []
    for cell in real():
        found = _result(cell)
        predicted, compiled = found["peak"]
        large.append(
            f"| {cell.model} | {cell.mesh} | {cell.degrees},zero={cell.zero} | {cell.sequence:,} "
            f"| {found['equal']} of {found['lines']} | {len(found['unexplained'])} | {predicted / 1e9:.1f} GB "
            f"| {compiled / 1e9:.1f} GB | {(predicted - compiled) / compiled:+.1%} | {found['seconds']['compile']:.0f} s |"
        )
    return "\n".join(
        [
            "# The grid",
            "",
            f"Written by `make grid` on Python {platform.python_version()} with jax {jax.__version__}.",
            "",
            f"**{MODEL}: {equal:,} of {total:,} lines are equal.** A line is one kind of memory, the matmuls of one "
            "phase, or one kind of collective over some mesh axes in one phase, in payload and wire bytes. Each row is "
            "over ZeRO stages 0 to 3, remat none and full, 1 and 4 microbatches.",
            "",
            "| mesh | precision | degrees | cells | equal lines | unexplained | rules |",
            "|---|---|---|---|---|---|---|",
            *small,
            "",
            "**Real models**, bf16-f32, remat=full, one sequence for each device along data. The peak of the closed "
            "form is an estimate; every other line is exact. Compiled, not run.",
            "",
            "| model | mesh | layout | T | equal lines | unexplained | peak, closed form | peak, XLA | | compile |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *large,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work([everything()[index] for index in json.loads(options.work)])
        return 0
    if options.fresh:
        for cell in everything():
            _kept(cell).unlink(missing_ok=True)
    missing = [cell for cell in everything() if not _kept(cell).exists()]
    batches = [
        group[start : start + CELLS_A_PROCESS]
        for mesh in dict.fromkeys(cell.mesh for cell in missing)
        for group in [[cell for cell in missing if cell.mesh == mesh]]
        for start in range(0, len(group), CELLS_A_PROCESS)
    ]
    print(f"{len(missing)} of {len(everything())} cells to run, in {WORKERS} processes at a time", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        failed = sum(bool(job.result()) for job in as_completed([pool.submit(_spawn, batch) for batch in batches]))
    if failed or any(not _kept(cell).exists() for cell in everything()):
        print(f"{failed} processes failed; run it again to go on", file=sys.stderr)
        return 1
    TABLE.write_text(table())
    bad = [cell for cell in everything() if _result(cell)["bad"] or _result(cell)["unexplained"]]
    for cell in bad[:20]:
        print(f"{cell.name}: {_result(cell)['bad'] or _result(cell)['unexplained']}")
    print(f"wrote {TABLE.relative_to(ROOT)}; {len(bad)} cells differ; {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
