"""Loops that run as often as a table says, on each device another number: counted as they really run."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxllm.hlo.flops import matmul_lines
from jaxllm.hlo.graph import Shape
from jaxllm.hlo.loops import executions
from jaxllm.hlo.protos import classes
from jaxllm.hlo.text import read_text
from jaxllm.hlo.values import _dynamic_slice, _literal
from tests.hlo.compilers import array, compile, mesh_of

AXES = {"pipe": 4, "data": 2}
# stages x ticks x (turns of the outer loop, turns of the inner one at each of them)
TABLE = np.array([[[1, 2], [0, 5], [2, 1]], [[0, 1], [0, 1], [0, 1]], [[3, 3], [1, 0], [1, 1]], [[1, 1]] * 3], np.int32)
TURNS = {stage: int(sum(a * b for a, b in rows)) for stage, rows in enumerate(TABLE)}


def in_pipe(body, table=TABLE):
    """A function of an array that runs `body(array, row of the table)` at each tick, on each stage with its own rows."""

    def forward(x):
        def local(x):
            rows = lax.dynamic_index_in_dim(jnp.asarray(table), lax.axis_index("pipe"), 0, keepdims=False)
            x = lax.pcast(x, ("data",), to="varying")
            return lax.scan(lambda x, row: (body(x, row), None), x, rows)[0][None]

        with jax.named_scope("forward"):
            return jax.shard_map(local, in_specs=P("pipe"), out_specs=P("data", "pipe"))(x)

    return forward


def once(x):
    return jnp.sin(x @ x) + 1


def nested(x, row):
    inner = lambda _, x: lax.fori_loop(0, row[1], lambda _, x: once(x), x)  # noqa: E731
    return lax.fori_loop(0, row[0], inner, x)


def compiled_for(target, forward):
    mesh = mesh_of(target, AXES)
    return compile(forward, array(mesh, (32, 8), P("pipe")), mesh=mesh, target=target)


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_each_device_has_the_turns_of_its_own_rows(target):
    compiled = compiled_for(target, in_pipe(nested))
    for device in range(8):
        runs = executions(compiled.partitioned, device)
        assert runs.unexplained == ()
        lines, unexplained = matmul_lines(compiled.partitioned, runs)
        assert unexplained == ()
        assert sum(line.value for line in lines) == TURNS[device // 2] * 2 * 8**3
    # And in what the backend made of it, where a table may travel through fusions and memories.
    assert executions(compiled.optimized, 7).unexplained == ()
    # Of a pipeline the ledger has the stage with the most, and all of them beside.
    line = compiled.ledger.line("matmul")
    assert line.stages == tuple(turns * 1024 for turns in TURNS.values())
    assert line.value == max(line.stages)
    assert "x 10 (10)" in line.terms[0].detail  # 3 x 3 + 1 x 0 + 1 x 1: the turns at each tick are not alike


def test_the_turns_are_those_that_really_run():
    """A loop that counts itself, over limits computed from the device and the tick in many ways, on devices."""
    ways = [
        lambda i, t: jnp.clip(i - 1, 0, 2) + t % 2,
        lambda i, t: jnp.where(t > i, 3, 1) * jnp.minimum(i, 2),
        lambda i, t: lax.div(i + 7, jnp.int32(2)) - jnp.maximum(t, 1),
        lambda i, t: jnp.asarray(TABLE)[i, t, 1],
        lambda i, t: ((i & 1) | (t ^ 1)) << 1,
        lambda i, t: jnp.int32(i == t) + jnp.int32(i != 2),
    ]

    def counts(x):
        def local(x):
            i = lax.axis_index("pipe").astype(jnp.int32)
            count = lax.pcast(jnp.zeros((1, len(ways)), jnp.int32), ("pipe", "data"), to="varying")

            def tick(carry, t):
                for number, way in enumerate(ways):

                    def turn(_, carry, number=number):
                        x, count = carry
                        return once(x), count.at[0, number].add(1)

                    carry = lax.fori_loop(0, way(i, t).astype(jnp.int32), turn, carry)
                return carry, None

            x = lax.pcast(x, ("data",), to="varying")
            return lax.scan(tick, (x, count), jnp.arange(3, dtype=jnp.int32))[0][1]

        with jax.named_scope("forward"):
            return jax.shard_map(local, in_specs=P("pipe"), out_specs=P(("pipe", "data")))(x)

    mesh = mesh_of("cpu", AXES)
    compiled = compile(counts, array(mesh, (32, 8), P("pipe")), mesh=mesh)
    ran = np.asarray(compiled.executable(jax.device_put(jnp.ones((32, 8)), jax.NamedSharding(mesh, P("pipe")))))
    assert len(np.unique(ran, axis=0)) == 4  # every stage another one
    for device in range(8):
        runs = executions(compiled.partitioned, device)
        assert runs.unexplained == ()
        found = matmul_lines(compiled.partitioned, runs)[0][0].value // (2 * 8**3)
        assert found == ran[device].sum(), device


def test_a_table_that_is_an_argument_is_not_known():
    mesh = mesh_of("cpu", AXES)

    def forward(x, table):
        def local(x, table):
            return lax.scan(lambda x, n: (lax.fori_loop(0, n, lambda _, x: once(x), x), None), x, table[0])[0]

        return jax.shard_map(local, in_specs=(P("pipe"), P("pipe")), out_specs=P("pipe"))(x, table)

    arguments = array(mesh, (32, 8), P("pipe")), array(mesh, (4, 3), P("pipe"), "int32")
    (told,) = executions(compile(forward, *arguments, mesh=mesh).partitioned).unexplained
    assert told.startswith("trip count of ") and told.endswith("counted once")


def test_what_a_loop_changes_is_not_known():
    def grows(x, row):
        return lax.while_loop(lambda c: c[0] < c[1] % 3, lambda c: (c[0] + 1, c[1] + 2, once(c[2])), (0, row[0], x))[2]

    runs = executions(compiled_for("cpu", in_pipe(grows)).partitioned)
    assert len(runs.unexplained) == 1


# A module as the compilers leave one, with a table of two rows of three behind two layouts.
TURNED_AROUND = """
HloModule jit_f, is_scheduled=true

%body (p: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %p = (s32[], s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], s32[], f32[8,8]{1,0}) tuple(%next, %n, %y)
}

%condition (p: (s32[], s32[], f32[8,8])) -> pred[] {
  %p = (s32[], s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %flat = s32[6]{0} iota(), iota_dimension=0
  %table = s32[2,3]LAYOUT bitcast(%flat)
  %zero = s32[] constant(0)
  %second = s32[] constant(1)
  %row = s32[1,1]{1,0} dynamic-slice(%table, %second, %zero), dynamic_slice_sizes={1,1}
  %limit = s32[] bitcast(%row)
  %t = (s32[], s32[], f32[8,8]{1,0}) tuple(%zero, %limit, %x)
  %loop = (s32[], s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize(("layout", "turns"), [("{1,0}", 3), ("{0,1}", 1)])
def test_a_bitcast_keeps_what_lies_in_memory(layout, turns):
    """0 to 5 in memory: the second row begins with 3 where rows lie together, with 1 where columns do."""
    module = read_text(TURNED_AROUND.replace("LAYOUT", layout).encode(), "turned.txt")
    runs = executions(module)
    assert runs.unexplained == ()
    assert matmul_lines(module, runs)[0][0].value == turns * 2 * 8**3


@pytest.mark.parametrize("minor_to_major", [(), (1, 0), (0, 1)])
def test_a_constant_is_written_as_it_lies_in_memory(minor_to_major):
    """XLA:TPU of jax 0.12 turns the table of a schedule around."""
    table = TABLE[0]
    constant = classes()["HloInstructionProto"]()
    constant.literal.s32s.extend((table.T if minor_to_major == (0, 1) else table).ravel())
    constant.literal.shape.layout.minor_to_major.extend(minor_to_major)
    assert np.array_equal(_literal(SimpleNamespace(proto=constant, shape=Shape("s32", table.shape))), table)


def test_a_slice_is_moved_inside_as_xla_moves_it():
    value = np.arange(60).reshape(1, 3, 4, 5)
    for starts in ([0, 0, 0], [-3, 2, 1], [9, 9, 9], [1, 3, 4]):
        ours = _dynamic_slice(value, [np.array([start]) for start in starts], (2, 2, 3))
        assert np.array_equal(ours[0], lax.dynamic_slice(jnp.asarray(value[0]), starts, (2, 2, 3)))
    each = _dynamic_slice(value, [np.array([0, 1, 2]), np.array([0]), np.array([2, 0, 4])], (1, 4, 1))
    for turn, starts in enumerate(((0, 0, 2), (1, 0, 0), (2, 0, 4))):
        assert np.array_equal(each[turn], lax.dynamic_slice(jnp.asarray(value[0]), starts, (1, 4, 1)))
