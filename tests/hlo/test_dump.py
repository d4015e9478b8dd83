"""Which files of a dump are read, and what a broken one says."""

import subprocess
import sys

import pytest

from jaxllm.hlo import Dump, measure
from jaxllm.hlo.protos import classes
from jaxllm.spec.errors import TargetError
from tests.hlo.compilers import array, dumped, mesh_of


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_both_modules_are_found_and_hold_what_they_should(target):
    mesh = mesh_of(target)

    def step(parameters):
        return parameters * 2

    with dumped(step, mesh, target, array(mesh, (8, 128))) as (folder, _):
        dump = Dump.find(folder, target)
        partitioned, optimized = (
            classes()["HloProto"].FromString(path.read_bytes()) for path in (dump.partitioned, dump.optimized)
        )
    assert partitioned.hlo_module.name.startswith("jit_step")
    assert not partitioned.buffer_assignment.buffer_allocations
    assert optimized.buffer_assignment.buffer_allocations


def test_an_empty_folder_has_no_module(tmp_path):
    dump = Dump.find(tmp_path, "gpu")
    assert dump == Dump(None, None, "gpu")
    with pytest.raises(TargetError, match="no module after SPMD partitioning"):
        measure(dump, {"data": 8})


def test_the_largest_module_is_the_step(tmp_path):
    for number, size in ((0, 10), (1, 500), (2, 20)):
        stem = f"module_000{number}.jit_step"
        (tmp_path / f"{stem}.0002.spmd-partitioner.after_spmd-partitioning.before_dce.hlo.pb").write_bytes(b"x" * size)
        (tmp_path / f"{stem}.cpu_after_optimizations.hlo.pb").write_bytes(b"x" * size)
    dump = Dump.find(tmp_path, "cpu")
    assert dump.partitioned.name.startswith("module_0001") and dump.optimized.name.startswith("module_0001")


def test_unknown_target(tmp_path):
    with pytest.raises(TargetError, match="unknown target 'gpux'; did you mean 'gpu'"):
        Dump.find(tmp_path, "gpux")


def test_a_file_that_is_no_proto(tmp_path):
    broken = tmp_path / "broken.hlo.pb"
    broken.write_bytes(b"\xff\xff\xff")
    with pytest.raises(TargetError, match=r"broken\.hlo\.pb is not an HloProto"):
        measure(Dump(broken, None, "cpu"), {"data": 8})


def test_reading_protos_needs_no_jax():
    code = "import sys, jaxllm.hlo; print([m for m in ('jax', 'numpy', 'jaxllm.theory') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
