"""Warnings about what is whole on every device, and about ways from one sharding to another."""

import os
import re
import subprocess
import sys

import jax
import pytest
from google.protobuf import text_format

from jaxllm.hlo.protos import classes
from jaxllm.hlo.warn.shardings import pieces_of
from tests.hlo.warn import programs as p
from tests.hlo.warn.programs import MIB, TARGETS, findings, from_text, is_marked

OLD = jax.__version_info__ < (0, 11)  # shardings are written as devices, since then as axes of a mesh
KIND = "involuntary-rematerialization"

# what XLA 0.10.2 of jaxlib says of `reshard`, and of a place that leaves nothing in the program
SAID = (
    "W1124 11:52:12.253772   12824 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {devices=[1,2,4]<=[8] last_tile_dim_replicate} to {devices=[4,1,2]<=[2,4]T(1,0) "
    "last_tile_dim_replicate} efficiently for HLO operation %sharding_constraint.0 = f32[8192,2048]{1,0} copy(%sin.0), "
    'sharding={devices=[1,2,4]<=[8] last_tile_dim_replicate}, metadata={op_name="jit(step)/sharding_constraint" '
    "stack_frame_id=4}. As the last resort, SPMD will replicate the tensor and then partition it.\n"
)
OTHER = (
    "E0531 10:54:04 spmd_partitioner.cc:569] [spmd] Involuntary full rematerialization. The compiler was not able to "
    "go from sharding {devices=[2,1,4]<=[4,2]T(1,0)} to {devices=[1,8,1]<=[8]} without doing a full rematerialization "
    "of the tensor for HLO operation: %add.5 = f32[16,16,16]{2,1,0} add(%a, %b), "
    'metadata={op_name="jit(f)/add" source_file="/home/me/train.py" source_line=12}. You probably want to enrich.\n'
)


@pytest.mark.parametrize("target", TARGETS)
def test_involuntary_rematerialization(target):
    (found,) = findings(p.reshard, target, False, KIND)
    assert found.bytes == 8192 * 4096 * 4 // 2  # each device has one half of the columns
    assert is_marked(found) and "with_sharding_constraint" in found.advice
    assert from_text(p.reshard, target, KIND) == [found]
    assert not findings(p.reshard, target, True, KIND)


def test_what_the_partitioner_says_is_told_once():
    (found,) = findings(p.reshard, "cpu", False, KIND, messages=SAID + SAID)
    assert found.bytes == 8192 * 4096 * 4 // 2 and is_marked(found)
    assert "{devices=[1,2,4]<=[8] last_tile_dim_replicate} to {devices=[4,1,2]<=[2,4]T(1,0)" in found.message


def test_what_left_no_trace_is_told_as_it_was_said():
    first, second = findings(p.reshard, "cpu", False, KIND, messages=OTHER + SAID)
    assert first.bytes and "[4,1,2]" in first.message
    assert (second.source, second.op_name, second.bytes) == ("train.py:12", "jit(f)/add", 0)
    assert "%add.5" not in second.message and "add.5" in second.message and "{devices=[1,8,1]<=[8]}" in second.message


def test_messages_of_this_xla_are_understood():
    code = (
        "import jax\n"
        "from tests.hlo.warn import programs as p\n"
        "case = p.reshard('cpu', False)\n"
        "with jax.set_mesh(case.mesh): jax.jit(case.function).lower(*case.arguments).compile()\n"
    )
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "Involuntary full rematerialization" in done.stderr
    (found,) = findings(p.reshard, "cpu", False, KIND, messages=done.stderr)
    old, new = (
        ("{devices=[1,2,4]<=[8]", "{devices=[4,1,2]<=") if OLD else ("[{}, {'a'}]}", "{mesh['a'=2,'b'=4], [{'b'}, {}]}")
    )
    assert found.bytes and re.search(f"from .*{re.escape(old)}.* to {re.escape(new)}", found.message)


@pytest.mark.parametrize("target", TARGETS)
def test_replicated(target):
    (found,) = findings(p.whole_argument, target, False, "replicated")
    assert found.bytes == 64 * MIB * 7 // 8
    assert is_marked(found) and "w f32[4096,4096]" in found.message and "NamedSharding" in found.advice
    assert not findings(p.whole_argument, target, True, "replicated")


@pytest.mark.parametrize("target", TARGETS)
def test_replicated_over_some_of_the_axes(target):
    (found,) = findings(p.half_sharded, target, False, "replicated")
    assert found.bytes == 64 * MIB * 3 // 4 and "each of 4 devices" in found.message and is_marked(found)
    assert not findings(p.half_sharded, target, True, "replicated")


@pytest.mark.parametrize("target", TARGETS)
def test_work_that_every_device_does(target):
    found = findings(p.whole_batch, target, False, "replicated")
    size = 65536 * 256 * 4  # of the batch, and of what is made of it
    assert [finding.bytes for finding in found] == [2 * size * 7 // 8]  # of one line
    assert is_marked(found[0])
    assert not findings(p.whole_batch, target, True, "replicated")


def sharding_of(text: str):
    """The OpSharding in the fields of a proto's text form."""
    return text_format.Parse(text, classes()["OpSharding"]())


MESH = 'named_sharding { mesh { axes { name: "a" size: 2 } axes { name: "b" size: 4 } } %s }'


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("type: 0", (0,) * 8),
        (
            "type: 3 tile_assignment_dimensions: [2, 4] tile_assignment_devices: [0, 1, 2, 3, 4, 5, 6, 7]",
            tuple(range(8)),
        ),
        (
            "type: 3 tile_assignment_dimensions: [1, 2, 4] replicate_on_last_tile_dim: true iota_reshape_dims: 8",
            (0, 0, 0, 0, 1, 1, 1, 1),
        ),
        (
            "type: 3 tile_assignment_dimensions: [4, 1, 2] last_tile_dims: 0 iota_reshape_dims: [2, 4] "
            "iota_transpose_perm: [1, 0]",
            (0, 1, 2, 3, 0, 1, 2, 3),
        ),
        ("type: 3 tile_assignment_dimensions: [2, 4] last_tile_dims: 4 iota_reshape_dims: 8", None),  # manual
        ("type: 3 tile_assignment_dimensions: [2, 2] iota_reshape_dims: 8", None),
        ("type: 3 tile_assignment_dimensions: 8 iota_reshape_dims: [2, 4] iota_transpose_perm: [1, 7]", None),
        ("type: 5", None),  # unknown
        (MESH % "", (0,) * 8),
        (MESH % "dim_shardings { } dim_shardings { axes { mesh_axis_index: 1 } }", (0, 1, 2, 3, 0, 1, 2, 3)),
        (
            MESH % "dim_shardings { axes { mesh_axis_index: 1 sub_axis_info { pre_size: 1 size: 2 } } }",
            (0, 0, 1, 1) * 2,
        ),
        (
            MESH % "dim_shardings { axes { mesh_axis_index: 1 sub_axis_info { pre_size: 2 size: 2 } } }",
            (0, 1, 0, 1) * 2,
        ),
        (MESH % "dim_shardings { axes { mesh_axis_index: 2 } }", None),
        (MESH % "dim_shardings { axes { mesh_axis_index: 0 sub_axis_info { pre_size: 3 size: 0 } } }", None),
    ],
)
def test_pieces_of_a_sharding(text, pieces):
    assert pieces_of(sharding_of(text), 8) == pieces
