"""A pairwise cover of the grid: every line of every cell is equal, and nothing is unexplained."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from importlib.metadata import version

import pytest

from jaxllm import schedules, targets
from jaxllm.program.run import TOLERANCE
from jaxllm.spec.errors import TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.optimizers import OPTIMIZERS
from jaxllm.spec.validate import default_batch
from jaxllm.spec.workload import PRECISIONS
from tests import grid

REQUIRED = os.environ.get("JAXLLM_REQUIRE_TARGETS") or os.environ.get("CI")


# Of the compilers for absent devices what the covers leave out: pipelines cut along the sequence, and what is saved in one.
OTHERS = [
    grid.Cell("h100:8", "bf16-f32", "pipe=2,data=2,tensor=2,sequence=true", 2, "selective", 3, "gpt-tiny", 32, "zb-h1"),
    grid.Cell("v5p:2x2x2", "bf16-f32", "pipe=2,tensor=4,sequence=true", 1, "full,save=residual", 4, "llama-tiny", 32, "zb-v"),
]


# Those of one model and batch follow each other: they share the reference.
CELLS = sorted(
    grid.tested() + grid.tested_pipelines() + grid.tested_options() + OTHERS,
    key=lambda c: (c.mesh, bool(c.schedule), c.model, c.precision, c.optimizer, default_batch(Layout.parse(c.layout))),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_every_line_of_the_cell_is_equal(cell: grid.Cell) -> None:
    mesh = Machine.load(cell.mesh)
    try:  # of a compiler that is there and refuses the step nothing is skipped
        targets.module(mesh.target).devices(mesh)
    except TargetError as error:
        if REQUIRED:
            raise
        pytest.skip(f"this machine has no such compiler: {error}")
    # Steps with an option are tested with each option. Most of gpt-tiny's table of 4,096 positions is never looked up, and to
    # add up and update its gradient would take most of a pipeline's time.
    result = grid.run(cell, steps=bool(cell.schedule), short=True)
    assert result["bad"] == []
    assert result["unexplained"] == []
    # What the compiler emitted multiplies as much as the lines say, but for one that has a note: in a pipeline XLA:CPU of jax
    # 0.10 takes the scores of a single block for those of the forward pass, behind the pass that removes fences.
    merged = cell.mesh == "cpu:8" and bool(cell.schedule) and "attention=blockwise" in cell.option and cell.remat == "full"
    assert bool(result["matmuls"]) is (merged and version("jaxlib").startswith("0.10."))
    assert result["lines"] >= 9
    if cell.schedule and cell.mesh == "cpu:8":  # and the run equals the unsharded reference
        assert result["agrees"]
        assert result["error"] > 1e-8
        assert result["error"] <= 1e-5 or cell.precision != "f32"


def test_the_cover_of_pipelines_meets_every_pair_where_they_run_and_every_value_elsewhere() -> None:
    values = {
        "schedule": schedules.names(), "degrees": grid.PIPELINE_DEGREES, "zero": grid.ZERO, "remat": grid.REMAT,
        "fill": tuple(grid.FILLS),
    }  # fmt: skip
    chosen = [cell for cell in grid.tested_pipelines() if cell.mesh != "cpu:8"]
    assert {cell.mesh for cell in chosen} | {"cpu:8"} == set(grid.PIPELINE_MESHES)
    assert {cell.model for cell in chosen} == set(grid.MODELS)
    for column in values:
        assert {getattr(cell, column) for cell in chosen} == set(values[column])
    chosen = [cell for cell in grid.tested_pipelines() if cell.mesh == "cpu:8"]
    for one, other in itertools.combinations(values, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in chosen}
        assert met == set(itertools.product(values[one], values[other])), (one, other)


def test_every_option_is_met_with_every_mesh_degrees_and_zero_stage_that_it_can_go_with() -> None:
    can, chosen = [cell for mesh in grid.MESHES for cell in grid.possible(mesh)], grid.options()
    for one, other in itertools.combinations(grid.OPTION_COLUMNS, 2):
        pairs = {(getattr(cell, one), getattr(cell, other)) for cell in can}
        assert {(getattr(cell, one), getattr(cell, other)) for cell in chosen} == pairs
    alone = {cell.option for cell in grid.tested_options()}
    assert alone == {cell.option for mesh in grid.MESHES for cell in grid.possible(mesh)} == set(grid.OPTIONS)
    assert {f"optimizer={name}" for name in OPTIMIZERS} - alone == {"optimizer=adamw"}
    for mesh, precisions in grid.MESHES.items():
        met = {cell.option for cell in grid.possible(mesh)} | {f"precision={name}" for name in precisions}
        assert {f"precision={name}" for name in PRECISIONS} - met == set()
    assert not {name for name, field in Layout.__dataclass_fields__.items() if field.type in ("str", "bool")} - {
        key.split("=")[0] for option in alone for key in option.split(",")
    } - {"schedule", "partition"}  # which are a pipeline's


def test_what_is_refused_says_why() -> None:
    refused = Counter(grid.refusal(cell) for mesh in grid.MESHES for cell in grid.candidates(mesh))
    del refused[""]
    assert all(reason.endswith(".") and ";" in reason for reason in refused)
    assert sum(refused.values()) < 0.2 * sum(len(grid.candidates(mesh)) for mesh in grid.MESHES)


def test_the_cover_meets_every_pair_of_values() -> None:
    values = {
        "mesh": grid.MESHES, "precision": {name for names in grid.MESHES.values() for name in names},
        "degrees": grid.DEGREES, "zero": grid.ZERO, "remat": grid.REMAT, "microbatches": grid.MICROBATCHES,
        "model": grid.MODELS,
    }  # fmt: skip
    assert set(values) == set(grid.TESTED_COLUMNS)
    for one, other in itertools.combinations(values, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in grid.tested()}
        pairs = {(mesh, name) for mesh, names in grid.MESHES.items() for name in names}
        assert met == (pairs if {one, other} == {"mesh", "precision"} else set(itertools.product(values[one], values[other])))


def test_the_grid_is_the_whole_product_and_a_cover_of_what_is_much_alike() -> None:
    first, *others = grid.MODELS
    each = Counter(cell.model for cell in grid.cells())
    assert each[first] == 4 * 5 * 4 * 2 * 2
    assert all(0 < each[model] < each[first] / 2 for model in others)
    for mesh, precisions in grid.MESHES.items():
        for model in others:
            mine = [cell for cell in grid.cells(mesh) if cell.model == model]
            columns = (
                ("degrees", grid.DEGREES), ("zero", grid.ZERO), ("remat", grid.REMAT),
                ("microbatches", grid.MICROBATCHES), ("precision", precisions),
            )  # fmt: skip
            for (one, here), (other, there) in itertools.combinations(columns, 2):
                met = {(getattr(cell, one), getattr(cell, other)) for cell in mine}
                assert met == set(itertools.product(here, there)), (mesh, one, other)
    run = Counter((cell.zero == 3, cell.schedule) for cell in grid.pipelines("cpu:8"))
    assert all(run[False, schedule] == 4 * 3 * 3 for schedule in schedules.names())
    assert all(run[True, schedule] >= len(grid.PIPELINE_DEGREES) for schedule in schedules.names())
    parts = [grid.cells(), grid.pipelines(), grid.real(), grid.options()]
    assert len({cell.name for cell in grid.everything()}) == sum(map(len, parts))


def test_the_committed_table_has_all_of_it_and_every_line_equal() -> None:
    lines = grid.TABLE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    real = {cell.model for cell in grid.real()}
    small = {tuple(row[:4]): row for row in rows if row[0] in grid.MODELS}
    staged = {tuple(row[:2]): row for row in rows if row[0] in schedules.names()}
    single = {tuple(row[:2]): row for row in rows if row[0] in grid.OPTIONS}
    large = {tuple(row[:3]): row for row in rows if row[0] in real}
    assert len(rows) == len(small) + len(staged) + len(single) + len(large) + 4  # of each of the four tables its head
    assert set(small) == {(cell.model, cell.mesh, cell.precision, cell.degrees) for cell in grid.cells()}
    assert set(staged) == {(cell.schedule, cell.mesh) for cell in grid.pipelines()}
    assert set(single) == {(cell.option, cell.mesh) for mesh in grid.MESHES for cell in grid.candidates(mesh)}
    assert set(large) == {(cell.model, cell.mesh, f"{cell.degrees},zero={cell.zero}") for cell in grid.real()}
    each = Counter((cell.schedule, cell.mesh) for cell in grid.pipelines())
    assert {key: int(row[2]) for key, row in staged.items()} == each
    each = Counter((cell.option, cell.mesh) for cell in grid.options())
    assert {key: int(row[2]) for key, row in single.items() if row[2] != "0"} == each
    # The small table says first of which model, mesh, precision and degrees, and how many cells there are.
    parts = ((small, slice(5, 7)), (staged, slice(3, 5)), (single, slice(4, 6)), (large, slice(4, 6)))
    for lines_equal, unexplained in [row[columns] for part, columns in parts for row in part.values()]:
        equal, of, total = lines_equal.split()
        assert (equal, of, unexplained) == (total, "of", "0"), (lines_equal, unexplained)
    # Where they run, as close to the unsharded reference as the contract says.
    errors = {key: row[5] for key, row in staged.items()} | {key: row[7] for key, row in single.items() if row[2] != "0"}
    for (name, mesh), error in errors.items():
        dtypes = PRECISIONS[name.removeprefix("precision=") if name.startswith("precision=") else "f32"]
        used = (dtypes.parameters, dtypes.compute, dtypes.gradients, dtypes.state, *["fp8"] * dtypes.fp8)
        limit = max(TOLERANCE[dtype] for dtype in used)
        assert 1e-8 < float(error) <= limit if mesh == "cpu:8" else error == "not run", (name, mesh)
