"""A pairwise cover of the grid: every line of every cell is equal, and nothing is unexplained."""

from __future__ import annotations

import itertools
import os

import pytest

from jaxllm import targets
from jaxllm.spec.errors import TargetError
from jaxllm.spec.machine import Machine
from tests import grid

REQUIRED = os.environ.get("JAXLLM_REQUIRE_TARGETS") or os.environ.get("CI")


@pytest.mark.parametrize("cell", [cell for mesh in grid.MESHES for cell in grid.pairwise(mesh)], ids=lambda c: c.name)
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
    assert result["lines"] >= 9


def test_the_cover_meets_every_pair_of_values() -> None:
    for mesh, precisions in grid.MESHES.items():
        chosen = grid.pairwise(mesh)
        columns = {
            "precision": precisions, "degrees": grid.DEGREES, "zero": grid.ZERO, "remat": grid.REMAT,
            "microbatches": grid.MICROBATCHES,
        }  # fmt: skip
        for (one, values), (other, others) in itertools.combinations(columns.items(), 2):
            met = {(getattr(cell, one), getattr(cell, other)) for cell in chosen}
            assert met == set(itertools.product(values, others)), (mesh, one, other)


def test_the_grid_is_the_whole_product() -> None:
    assert len(grid.cells()) == len(set(grid.cells())) == 4 * 5 * 4 * 2 * 2
    assert len(set(grid.everything())) == len(grid.cells()) + len(grid.real())


def test_the_committed_table_has_all_of_it_and_every_line_equal() -> None:
    lines = grid.TABLE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    small = {tuple(row[:3]): row for row in rows if row[0] in grid.MESHES}
    large = {tuple(row[:3]): row for row in rows if row[0] in {cell.model for cell in grid.real()}}
    assert set(small) == {(cell.mesh, cell.precision, cell.degrees) for cell in grid.cells()}
    assert set(large) == {(cell.model, cell.mesh, f"{cell.degrees},zero={cell.zero}") for cell in grid.real()}
    for row in (*small.values(), *large.values()):
        equal, of, total = row[4].split()
        assert (equal, of, row[5]) == (total, "of", "0"), row
