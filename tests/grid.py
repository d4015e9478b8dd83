"""The grid: every layout of a small Llama on every target, pairs of values for a small model of each other family,
pipelines, options, and real models at real size.

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
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxllm import predict, schedules
from jaxllm.report import document
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.optimizers import OPTIMIZERS
from jaxllm.spec.validate import default_batch, default_sequence, validate, validate_target
from jaxllm.spec.workload import PRECISIONS, Workload

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
PIPELINE_SEQUENCE = {"cpu": 16, "gpu": 32, "tpu": 32}  # where they are run, no longer than it takes

# What else decides memory, compute and traffic, each on these degrees of eight devices with every ZeRO stage; context takes
# two of the devices from what has most of them. cudnn asks for a library that is not everywhere (tests/program/test_attention.py).
OPTIONS = (
    "remat=selective", "remat=full,save=qkv+mlp", "sequence=true", "sequence=true,remat=selective",
    "attention=blockwise", "context=2,attention=blockwise", "context=2,exchange=ulysses",
    "context=2,exchange=ulysses,attention=blockwise", "offload=optimizer", "offload=optimizer+parameters",
    "remat=full,offload=input+mlp", "remat=full,offload=optimizer+qkv",
    *(f"optimizer={name}" for name in OPTIMIZERS if name != "adamw"),
    *(f"precision={name}" for name in PRECISIONS),
)  # fmt: skip
OPTION_SEQUENCE = 32
OPTION_DEGREES = ("data=8", "tensor=8", "data=4,tensor=2", "pipe=2,data=4", "pipe=2,data=2,tensor=2")

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

# For the tests as well. Lines are settled before machine code is written, which need not be fast for small programs. To call
# cuBLAS takes XLA:GPU a quarter less than to write kernels for matmuls; where XLA:CPU still has older emitters, they take
# 2.6 times less for a whole compilation than those of today; and a fifth of what is left goes into machine code in 32 parts.
EMITTERS = {"xla_gpu_enable_triton_gemm": False}
if metadata.version("jaxlib").startswith("0.10."):
    EMITTERS |= {"xla_cpu_use_fusion_emitters": False}
FLAGS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1} | EMITTERS
QUICK = " ".join(f"--{name}={value}".lower() for name, value in FLAGS.items())
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
    option: str = ""  # one of OPTIONS, which has keys of a layout, a precision or an optimizer

    @property
    def layout(self) -> str:
        own = dict(item.split("=") for item in self.option.split(",") if item)
        keys = dict(item.split("=") for item in self.degrees.split(","))
        keys |= {"zero": f"{self.zero}", "remat": self.remat, "microbatches": f"{self.microbatches}", "schedule": self.schedule}
        if "context" in own:
            most = max(("data", "tensor"), key=lambda axis: int(keys.get(axis, 1)))
            keys[most] = f"{int(keys[most]) // int(own['context'])}"
        keys |= {key: value for key, value in own.items() if key not in ("optimizer", "precision")}
        return ",".join(f"{key}={value}" for key, value in keys.items() if value)

    @property
    def optimizer(self) -> str:
        return self.option.removeprefix("optimizer=") if self.option.startswith("optimizer=") else "adamw"

    @property
    def where(self) -> str:
        return f"{self.mesh} {self.precision}"

    @property
    def name(self) -> str:
        other = f" {self.optimizer}" if self.optimizer != "adamw" else ""
        return f"{self.model} {self.mesh} {self.precision}{other} {self.layout}"


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
                    MODELS[(d + f) % len(MODELS)], PIPELINE_SEQUENCE[Machine.load(name).target], schedule, fill,
                )
                # Cells of one model and batch behind each other, which a process has the reference of.
                for (d, degrees), (f, fill), schedule, zero in itertools.product(
                    enumerate(PIPELINE_DEGREES), enumerate(FILLS), schedules.names(), ZERO
                )
            ]  # fmt: skip
            whole = [cell for cell in here if name == "cpu:8" and cell.zero < 3]
            rest = [cell for cell in here if cell.zero == 3] if whole else here
            found += whole + cover(rest, 2, PIPELINE_COLUMNS)
    return found


@cache
def candidates(mesh: str) -> list[Cell]:
    """Each option with every degrees and ZeRO stage on a mesh, remat, microbatches and models in turns: also what is refused."""
    plain = MESHES[mesh][0]
    return [
        Cell(
            mesh, option.removeprefix("precision=") if option.startswith("precision=") else plain,
            degrees, zero, REMAT[(o + d + zero) % 2], 3 if "pipe" in degrees else 1 + (o + zero) % 2, MODELS[(o + d) % len(MODELS)],
            OPTION_SEQUENCE, "1f1b" if "pipe" in degrees else "", "", option,
        )
        for (o, option), (d, degrees), zero in itertools.product(enumerate(OPTIONS), enumerate(OPTION_DEGREES), ZERO)
        if option.removeprefix("precision=") not in MESHES[mesh]  # which the other cells have
    ]  # fmt: skip


def nouns(cell: Cell) -> tuple[ModelConfig, Layout, Machine, Workload]:
    """What a cell is of. Raises SpecError."""
    model, layout = ModelConfig.load(cell.model), Layout.parse(cell.layout)
    sequence = cell.sequence or default_sequence(model, layout)
    return model, layout, Machine.load(cell.mesh), Workload(default_batch(layout), sequence, cell.precision, cell.optimizer)


def refusal(cell: Cell) -> str:
    """Why a combination makes no sense; nothing where it does."""
    try:
        model, layout, mesh, workload = nouns(cell)
        validate(model, layout, mesh.devices, workload)
        validate_target(mesh.target, layout, workload)
    except (SpecError, TargetError) as error:
        return str(error)
    return ""


@cache
def possible(mesh: str) -> list[Cell]:
    """Those of the candidates that are not refused."""
    return [cell for cell in candidates(mesh) if not refusal(cell)]


@cache
def options() -> list[Cell]:
    """Each option on all meshes, with all degrees, and with all ZeRO stages, that it can go with."""
    return cover([cell for mesh in MESHES for cell in possible(mesh)], 2, OPTION_COLUMNS)


@cache
def everything() -> list[Cell]:
    return cells() + pipelines() + options() + real()


COLUMNS = ("where", "degrees", "zero", "remat", "microbatches", "model")
TESTED_COLUMNS = ("mesh", "precision", *COLUMNS[1:])
PIPELINE_COLUMNS = ("schedule", "degrees", "zero", "remat", "fill")
OPTION_COLUMNS = ("option", "mesh", "degrees", "zero")


def cover(candidates: list[Cell], together: int, columns: tuple[str, ...] = COLUMNS) -> list[Cell]:
    """Few of some cells, in their order, in which all values of so many columns together occur: greedy, and the same each time."""

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
    return sorted(chosen, key=candidates.index)


def tested() -> list[Cell]:
    """The cells that the tests take: each pair of values."""
    return cover(cells(), 2, TESTED_COLUMNS)


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


def tested_pipelines() -> list[Cell]:
    """The cells with a pipeline that the tests take: where they run every pair of values, for absent devices every value."""
    compiled = [cell for cell in pipelines() if cell.mesh != "cpu:8"]
    return cover(pipelines("cpu:8"), 2, PIPELINE_COLUMNS) + cover(compiled, 1, ("mesh", *PIPELINE_COLUMNS))


def tested_options() -> list[Cell]:
    """The cells with an option that the tests take: each of them, and each mesh, degrees and ZeRO stage, where it can go."""
    return cover([cell for mesh in MESHES for cell in possible(mesh)], 1, OPTION_COLUMNS)


def optional() -> list[str]:
    """Rows of the table: of each option and mesh its cells, and how many of all combinations are refused."""
    rows = []
    for option, mesh in itertools.product(OPTIONS, MESHES):
        tried = [cell for cell in candidates(mesh) if cell.option == option]
        if not tried:
            continue
        refused = sum(cell not in possible(mesh) for cell in tried)
        found = [_result(cell) for cell in options() if (cell.option, cell.mesh) == (option, mesh)]
        lines, same = sum(cell["lines"] for cell in found), sum(cell["equal"] for cell in found)
        rules = sorted({rule for cell in found for rule in cell["rules"]})
        errors = [cell["error"] for cell in found if cell["error"] is not None]
        rows.append(
            f"| {option} | {mesh} | {len(found)} | {refused} of {len(tried)} | {same:,} of {lines:,} "
            f"| {sum(len(c['unexplained']) for c in found)} | {', '.join(rules) or '-'} "
            f"| {f'{max(errors):.1e}' if errors else 'not run'} |"
        )
    return rows


def run(cell: Cell, *, steps: bool = True, short: bool = False) -> dict[str, Any]:
    """Checks one cell in this process, whose environment must be prepared for the cell's target; with `steps`, takes those of
    a pipeline or an option where there are devices; `short`, with a table of positions not much longer than the sequence."""
    from jaxllm.check import check

    model, layout, mesh, workload = nouns(cell)
    if short:
        model = replace(model, max_sequence=min(model.max_sequence, 4 * workload.sequence))
    comparison = check(model, layout, mesh, workload, run=steps and bool(cell.schedule or cell.option) and mesh.target == "cpu")
    return {
        "lines": len(comparison.rows),
        "equal": sum(row.status == "equal" for row in comparison.rows),
        "bad": [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"],
        "unexplained": list(comparison.unexplained),
        "matmuls": [note for note in comparison.notes if note.startswith("emitted: matmuls")],
        "rules": sorted({rule.name for row in comparison.rows for rule in row.rules}),
        "peak": comparison.peak.compiled,
        "error": comparison.run.max_relative_error if comparison.run else None,
        "agrees": comparison.run.agrees if comparison.run else True,
        "seconds": dict(comparison.seconds),
    }


def differs(result: dict[str, Any]) -> list[str]:
    """What is not as it has to be in a cell's result."""
    apart = [] if result["agrees"] else [f"the run is {result['error']:.1e} off the reference"]
    return result["bad"] + result["unexplained"] + apart


# ---------------------------------------------------------------- all of it, resumable


# What a cell's result does not depend on
APART = ("cli.py", "__main__.py", "cache.py", "peak.py")


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
    quick = "" if batch[0] in real() else QUICK  # which schedules, and the peaks with them, depend on
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    environment = os.environ | {"JAXLLM_CACHE": str(KEPT / "cache"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-m", "tests.grid", "--work", names], cwd=ROOT, env=environment).returncode


def _result(cell: Cell) -> dict[str, Any]:
    return json.loads(_kept(cell).read_text())


def _predicted_peak(cell: Cell) -> int:
    """Of the closed form as it is now: nothing else of a result depends on it."""
    model, layout, mesh, workload = nouns(cell)
    return predict(model, layout, workload, target=mesh.target).peak


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
        predicted, compiled = _predicted_peak(cell), found["peak"]
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
            f"**Options**: each over {', '.join(OPTION_DEGREES)} and ZeRO stages 0 to 3, as often as it takes to meet each pair "
            "of values that is not refused, meshes included; context takes its two devices from the largest degree. The others, remat, "
            "microbatches, models, in turns; pipelines are 1f1b. Refused is what makes no sense, with the reason: sequence "
            "without tensor, a ring in a pipeline, ZeRO stages 1 and 2 without room for what they gather. On emulated devices "
            "three steps are taken and compared with the unsharded reference (limit 1e-5, 0.0125 for f16, 0.1 for bf16, 0.5 for fp8).",
            "",
            "| option | mesh | cells | refused | equal lines | unexplained | rules | largest error of the run |",
            "|---|---|---|---|---|---|---|---|",
            *optional(),
            "",
            "**Real models**, bf16-f32, remat=full, one sequence for each device along data. The peak of the closed "
            "form is an estimate; every other line is exact. Compiled as `check` does it, not run.",
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
    bad = [cell for cell in everything() if differs(_result(cell))]
    for cell in bad[:20]:
        print(f"{cell.name}: {differs(_result(cell))}")
    print(f"wrote {TABLE.relative_to(ROOT)}; {len(bad)} cells differ; {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
