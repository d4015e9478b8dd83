"""A pairwise cover of the grid: every line of every cell is equal, and nothing is unexplained."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest

from jaxllm import schedules, targets
from jaxllm.spec.errors import TargetError
from jaxllm.spec.machine import Machine
from tests import grid

REQUIRED = os.environ.get("JAXLLM_REQUIRE_TARGETS") or os.environ.get("CI")


PIPELINES = [cell for mesh in grid.PIPELINE_MESHES for cell in grid.tested_pipelines(mesh)]


@pytest.mark.parametrize("cell", grid.tested() + PIPELINES, ids=lambda c: c.name)
def test_every_line_of_the_cell_is_equal(cell: grid.Cell) -> None:
    mesh = Machine.load(cell.mesh)
    try:  # of a compiler that is there and refuses the step nothing is skipped
        targets.module(mesh.target).devices(mesh)
    except TargetError as error:
        if REQUIRED:
            raise
        pytest.skip(f"this machine has no such compiler: {error}")
    result = grid.run(cell)
    assert result["bad"] == []
    assert result["unexplained"] == []
    assert result["matmuls"] == []  # what the compiler emitted multiplies as much as the lines say
    assert result["lines"] >= 9
    if cell.schedule and cell.mesh == "cpu:8":  # and the run equals the unsharded reference
        assert 1e-8 < result["error"] <= 1e-5


def test_the_cover_of_pipelines_meets_every_pair_where_they_run_and_every_value_elsewhere() -> None:
    values = {
        "schedule": schedules.names(), "degrees": grid.PIPELINE_DEGREES, "zero": grid.ZERO, "remat": grid.REMAT,
        "fill": tuple(grid.FILLS),
    }  # fmt: skip
    for mesh in grid.PIPELINE_MESHES:
        chosen = grid.tested_pipelines(mesh)
        assert {cell.model for cell in chosen} == set(grid.MODELS)
        for column in values:
            assert {getattr(cell, column) for cell in chosen} == set(values[column])
    chosen = grid.tested_pipelines("cpu:8")
    for one, other in itertools.combinations(values, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in chosen}
        assert met == set(itertools.product(values[one], values[other])), (one, other)


def test_the_cover_meets_every_pair_of_values() -> None:
    values = {
        "where": [f"{mesh} {precision}" for mesh, precisions in grid.MESHES.items() for precision in precisions],
        "degrees": grid.DEGREES, "zero": grid.ZERO, "remat": grid.REMAT, "microbatches": grid.MICROBATCHES,
        "model": grid.MODELS,
    }  # fmt: skip
    assert set(values) == set(grid.COLUMNS)
    for one, other in itertools.combinations(values, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in grid.tested()}
        assert met == set(itertools.product(values[one], values[other])), (one, other)


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
    assert len(set(grid.everything())) == len(grid.cells()) + len(grid.pipelines()) + len(grid.real())


def test_the_committed_table_has_all_of_it_and_every_line_equal() -> None:
    lines = grid.TABLE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    small = {tuple(row[:4]): row for row in rows if row[0] in grid.MODELS}
    large = {tuple(row[:3]): row for row in rows if row[0] in {cell.model for cell in grid.real()}}
    # A table is written whole, by one run: of each model that it has it has every cell.
    models, named = {key[0] for key in small}, {key[0] for key in large}
    assert models and named
    assert set(small) == {(c.model, c.mesh, c.precision, c.degrees) for c in grid.cells() if c.model in models}
    assert set(large) == {(c.model, c.mesh, f"{c.degrees},zero={c.zero}") for c in grid.real() if c.model in named}
    # The small table says first of which model, mesh, precision and degrees, and how many cells there are.
    results = [row[5:7] for row in small.values()] + [row[4:6] for row in large.values()]
    for lines_equal, unexplained in results:
        equal, of, total = lines_equal.split()
        assert (equal, of, unexplained) == (total, "of", "0"), (lines_equal, unexplained)
