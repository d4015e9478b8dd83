"""The grid: every layout of a small Llama on every target, pairs of values for a small model of each other family,
pipelines, and real models at real size.

`make grid` runs all of it.

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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxllm import schedules
from jaxllm.report import document
from jaxllm.spec.layout import Layout

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "grid"
TABLE = ROOT / "docs" / "grid.md"

MODELS = ("llama-tiny", "gpt-tiny")
MESHES = {
    "cpu:8": ("f32",),
    "h100:8": ("bf16-f32", "bf16-master"),
    "v5e:2x4": ("bf16-f32",),
}
DEGREES = ("data=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8", "replica=2,data=2,tensor=2")
ZERO = (0, 1, 2, 3)
REMAT = ("none", "full")
MICROBATCHES = (1, 4)

# Pipelines: every schedule that has a name, on these meshes and degrees. On cpu each is run as well.
PIPELINE_MESHES = {"cpu:8": "f32", "h100:8": "bf16-f32", "v5p:2x2x2": "bf16-f32"}
PIPELINE_DEGREES = ("pipe=8", "pipe=4,data=2", "pipe=2,data=2,tensor=2", "pipe=4,tensor=2")
# Microbatches of P stages: as many, twice as many, and a number that P does not divide.
FILLS = {"P": lambda P: P, "2P": lambda P: 2 * P, "P+1": lambda P: P + 1}
PIPELINE_SEQUENCE = 32

# Real models, all with remat=full: model, mesh, degrees, ZeRO stages, sequence. One sequence a device.
REAL = (
    ("llama-2-7b", "h100:64", "data=64", (0, 3), 4096),
    ("llama-2-7b", "h100:64", "data=8,tensor=8", (1, 3), 4096),
    ("llama-2-7b", "v5p:4x4x4", "data=64", (1, 3), 4096),
    ("llama-2-7b", "v5p:4x4x4", "data=8,tensor=8", (0, 3), 4096),
    ("llama-3-70b", "h100:512", "data=512", (1, 3), 8192),
    ("llama-3-70b", "h100:512", "data=64,tensor=8", (0, 3), 8192),
    ("llama-3.1-405b", "h100:2048x8", "data=2048,tensor=8", (3,), 8192),
    ("gpt3-175b", "a100-80:64", "data=8,tensor=8", (1, 3), 2048),
)

# For the tests as well. Lines are settled before machine code is written, which need not be fast for small programs; and
# where XLA:CPU still has older emitters of it, they take 2.6 times less for a whole compilation than those of today.
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
QUICK = "--xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    QUICK += f" {OLDER_EMITTERS}"
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
    model: str = MODELS[0]
    sequence: int | None = None
    schedule: str = ""
    fill: str = ""  # of a pipeline: what the microbatches are to its stages

    @property
    def layout(self) -> str:
        text = f"{self.degrees},zero={self.zero},remat={self.remat},microbatches={self.microbatches}"
        return text + (f",schedule={self.schedule}" if self.schedule else "")

    @property
    def where(self) -> str:
        return f"{self.mesh} {self.precision}"

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


@cache
def cells(mesh: str | None = None) -> list[Cell]:
    """All cells without a pipeline, or those of one mesh: every combination for the first model; for the others, whose
    blocks meet the same rules of layout, a pairwise cover on each mesh."""
    found = []
    for name, precisions in MESHES.items():
        if mesh in (None, name):
            values = list(itertools.product(precisions, DEGREES, ZERO, REMAT, MICROBATCHES))
            first, *others = ([Cell(name, *each, model) for each in values] for model in MODELS)
            found += first + [cell for other in others for cell in cover(other, 2)]
    return found


@cache
def pipelines(mesh: str | None = None) -> list[Cell]:
    """All cells with a pipeline, or those of one mesh, with remat and the models in turns: where they run every one of
    ZeRO stages 0 to 2 and a pairwise cover of stage 3; for compilers of absent devices a pairwise cover."""
    found = []
    for name, precision in PIPELINE_MESHES.items():
        if mesh in (None, name):
            here = [
                Cell(
                    name, precision, degrees, zero, REMAT[(zero + f) % 2], FILLS[fill](Layout.parse(degrees).pipe),
                    MODELS[(d + f) % len(MODELS)], PIPELINE_SEQUENCE, schedule, fill,
                )
                for schedule, (d, degrees), zero, (f, fill) in itertools.product(
                    schedules.names(), enumerate(PIPELINE_DEGREES), ZERO, enumerate(FILLS)
                )
            ]  # fmt: skip
            whole = [cell for cell in here if name == "cpu:8" and cell.zero < 3]
            rest = [cell for cell in here if cell.zero == 3] if whole else here
            found += whole + cover(rest, 2, PIPELINE_COLUMNS)
    return found


@cache
def everything() -> list[Cell]:
    return cells() + pipelines() + real()


COLUMNS = ("where", "degrees", "zero", "remat", "microbatches", "model")
PIPELINE_COLUMNS = ("schedule", "degrees", "zero", "remat", "fill")


def cover(candidates: list[Cell], together: int, columns: tuple[str, ...] = COLUMNS) -> list[Cell]:
    """Few of some cells in which all values of so many columns together occur: greedy, and the same each time."""

    def met(cell: Cell) -> set[tuple]:
        values = [(column, getattr(cell, column)) for column in columns]
        return set(itertools.combinations(values, together))

    missing = set().union(*map(met, candidates))
    used: Counter[tuple] = Counter()  # where several are as good, what has been met least comes first
    chosen: list[Cell] = []

    def values(cell: Cell) -> set[tuple]:
        return {(column, getattr(cell, column)) for column in (*columns, "model")}

    while missing:
        best = max(
            candidates, key=lambda cell: (len(met(cell) & missing), -sum(used[value] for value in values(cell)))
        )
        chosen.append(best)
        missing -= met(best)
        used.update(values(best))
    return chosen


def tested() -> list[Cell]:
    """The cells that the tests take: each pair of values."""
    return cover(cells(), together=2)


def staged() -> list[str]:
    """Rows of the table: of each mesh and schedule all its cells."""
    rows = []
    for mesh, schedule in itertools.product(PIPELINE_MESHES, schedules.names()):
        found = [_result(cell) for cell in pipelines(mesh) if cell.schedule == schedule]
        lines, same = sum(cell["lines"] for cell in found), sum(cell["equal"] for cell in found)
        errors = [cell["error"] for cell in found if cell["error"] is not None]
        rows.append(
            f"| {schedule} | {mesh} | {len(found)} | {same:,} of {lines:,} | {sum(len(c['unexplained']) for c in found)} "
            f"| {f'{max(errors):.1e}' if errors else 'not run'} |"
        )
    return rows


def tested_pipelines(mesh: str) -> list[Cell]:
    """The cells with a pipeline that the tests take: where they run every pair of values, elsewhere every value."""
    return cover(pipelines(mesh), 2 if mesh == "cpu:8" else 1, PIPELINE_COLUMNS)


def run(cell: Cell) -> dict[str, Any]:
    """Checks one cell in this process, whose environment must be prepared for the cell's target."""
    from jaxllm.check import check, resolve
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig

    model, layout, mesh = ModelConfig.load(cell.model), Layout.parse(cell.layout), Machine.load(cell.mesh)
    workload = resolve(model, layout, mesh, None, cell.sequence, cell.precision)
    comparison = check(model, layout, mesh, workload, run=bool(cell.schedule) and mesh.target == "cpu")
    return {
        "lines": len(comparison.rows),
        "equal": sum(row.status == "equal" for row in comparison.rows),
        "bad": [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"],
        "unexplained": list(comparison.unexplained),
        "matmuls": [note for note in comparison.notes if note.startswith("emitted: matmuls")],
        "rules": sorted({rule.name for row in comparison.rows for rule in row.rules}),
        "peak": [comparison.peak.predicted, comparison.peak.compiled],
        "error": comparison.run.max_relative_error if comparison.run else None,
        "seconds": dict(comparison.seconds),
    }


# ---------------------------------------------------------------- all of it, resumable


# What a cell's result does not depend on
APART = ("cli.py", "__main__.py", "cache.py", "reference.py", "run.py")


@cache
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
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    environment = os.environ | {"JAXLLM_CACHE": "", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-m", "tests.grid", "--work", names], cwd=ROOT, env=environment).returncode


def _result(cell: Cell) -> dict[str, Any]:
    return json.loads(_kept(cell).read_text())


def table() -> str:
    """docs/grid.md, from the results that are kept."""
    import jax

    small, total, equal = [], 0, 0
    for model, (mesh, precisions) in itertools.product(MODELS, MESHES.items()):
        for precision, degrees in itertools.product(precisions, DEGREES):
            found = [_result(c) for c in cells(mesh) if (c.model, c.precision, c.degrees) == (model, precision, degrees)]
            lines, same = sum(cell["lines"] for cell in found), sum(cell["equal"] for cell in found)
            rules = sorted({rule for cell in found for rule in cell["rules"]})
            unexplained = sum(len(cell["unexplained"]) for cell in found)
            total, equal = total + lines, equal + same
            small.append(
                f"| {model} | {mesh} | {precision} | {degrees} | {len(found)} | {same:,} of {lines:,} | {unexplained} "
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
            f"**Small models: {equal:,} of {total:,} lines are equal.** A line is one kind of memory, the matmuls of one "
            "phase, or one kind of collective over some mesh axes in one phase, in payload and wire bytes. Each row is "
            f"over ZeRO stages 0 to 3, remat none and full, 1 and 4 microbatches: all combinations for {MODELS[0]}, for the "
            "other families as many as it takes to meet each pair of values on each mesh.",
            "",
            "| model | mesh | precision | degrees | cells | equal lines | unexplained | rules |",
            "|---|---|---|---|---|---|---|---|",
            *small,
            "",
            f"**Pipelines**: every schedule over {', '.join(PIPELINE_DEGREES)}, ZeRO stages 0 to 2, as many microbatches as "
            "stages P, 2P, and P + 1, in turns with remat none and full and with the small models; stage 3 as often as it "
            "takes to meet each pair of values. On emulated devices three steps are taken and compared with the unsharded "
            "reference; for the other meshes a pairwise cover is compiled.",
            "",
            "| schedule | mesh | cells | equal lines | unexplained | largest error of the run |",
            "|---|---|---|---|---|---|",
            *staged(),
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
