"""Each rule on a program of its own."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxllm.hlo.graph import Shape
from jaxllm.hlo.rules import argument_padding, tile_padded_bytes
from tests.hlo.compilers import array, compile, mesh_of

# shapes whose tiles are full, and shapes whose are not, of one to four dims
SHAPES = [
    (), (1,), (7,), (1000,), (3, 5), (8, 128), (100, 200), (64, 32), (2, 2, 64), (3, 5, 7), (1, 1, 129), (2, 3, 9, 130),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32", "bool", "int16"])
def test_tpu_tile_padding_equals_what_is_allocated(dtype):
    mesh = mesh_of("tpu")

    def step(batch):
        return [x == x for x in batch]

    compiled = compile(step, [array(mesh, shape, dtype=dtype) for shape in SHAPES], mesh=mesh, target="tpu")
    padding = compiled.ledger.line("padding")
    assert padding.value == argument_padding(compiled.optimized) > 0
    assert [(rule.name, rule.bytes) for rule in padding.rules] == [("tpu-tile-padding", padding.value)]
    assert not any(text.startswith("padding") for text in compiled.ledger.unexplained)


def test_tile_padding_by_hand():
    # JAX's f32[3,5] in tiles of 8 x 128: two dims of 8 and 128; a bf16 tile (8,128)(2,1) holds pairs of rows
    assert tile_padded_bytes(Shape("f32", (3, 5), minor_to_major=(1, 0), tiles=((4, 128),))) == 2048
    assert tile_padded_bytes(Shape("f32", (100, 200), minor_to_major=(1, 0), tiles=((8, 128),))) == 104 * 256 * 4
    assert tile_padded_bytes(Shape("bf16", (9, 128), minor_to_major=(1, 0), tiles=((8, 128), (2, 1)))) == 16 * 128 * 2
    assert tile_padded_bytes(Shape("f32", (5, 3), minor_to_major=(0, 1), tiles=((4, 128),))) == 2048
    assert tile_padded_bytes(Shape("f32", (7,), minor_to_major=(0,), tiles=((128,),))) == 512
    assert tile_padded_bytes(Shape("f32", (3, 5), minor_to_major=(1, 0))) == 60


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_cpu_and_gpu_do_not_pad(target):
    mesh = mesh_of(target)

    def step(batch):
        return [x == x for x in batch]

    padding = compile(step, [array(mesh, shape) for shape in SHAPES], mesh=mesh, target=target).ledger.line("padding")
    assert padding.value == 0 and not padding.rules


def contraction(target):
    """A matmul whose contracted dim is sharded, and whose result is wanted sharded over the same axis."""
    mesh = mesh_of(target, {"data": 8}, AxisType.Auto)

    def step(x, w):
        with jax.named_scope("forward"):
            return lax.with_sharding_constraint(x @ w, P("data", None))

    arguments = array(mesh, (1024, 512), P(None, "data")), array(mesh, (512, 256), P("data", None))
    return compile(step, *arguments, mesh=mesh, target=target)


def test_all_reduce_and_slice_for_reduce_scatter():
    compiled = contraction("cpu")
    (line,) = compiled.ledger.section("collectives")
    size = 1024 * 256 * 4
    assert (line.name, line.axes, line.value, line.wire) == ("all-reduce", ("data",), size, 2 * size * 7 // 8)
    assert [(rule.name, rule.bytes) for rule in line.rules] == [("all-reduce+slice", size)]


def test_an_all_reduce_that_is_used_whole_is_no_rule():
    mesh = mesh_of("cpu", {"data": 8}, AxisType.Auto)

    def step(x, w):
        with jax.named_scope("forward"):
            y = lax.with_sharding_constraint(x @ w, P())
            return lax.dynamic_slice(y, (8, 0), (16, 256))  # the same slice on every device

    arguments = array(mesh, (1024, 512), P(None, "data")), array(mesh, (512, 256), P("data", None))
    (line,) = compile(step, *arguments, mesh=mesh).ledger.section("collectives")
    assert line.name == "all-reduce" and not line.rules


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_gpu_and_tpu_emit_a_reduce_scatter(target):
    compiled = contraction(target)
    emitted = {line.name: line.emitted for line in compiled.ledger.section("collectives")}
    notes = " ".join(compiled.ledger.notes)
    assert emitted.get("reduce-scatter") == 1024 * 256 * 4 or f"reduce-scatter of {1024 * 256 * 4:,} bytes" in notes


def test_cpu_runs_bf16_collectives_in_f32():
    mesh = mesh_of("cpu", {"data": 8})

    def step(x):
        def manual(x):
            with jax.named_scope("forward"):
                return lax.psum(jnp.sin(x), "data")

        return jax.shard_map(manual, in_specs=P(), out_specs=P(), check_vma=False)(x)

    (line,) = compile(step, array(mesh, (16, 64), dtype="bfloat16"), mesh=mesh).ledger.section("collectives")
    assert (line.dtype, line.value, line.emitted) == ("bf16", 16 * 64 * 2, 16 * 64 * 4)
    assert [(rule.name, rule.bytes) for rule in line.rules] == [("cpu-f32-promotion", 16 * 64 * 2)]
