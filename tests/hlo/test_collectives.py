"""Collectives over every subset of the axes of a 2 x 2 x 2 mesh: kind, axes, payload, wire bytes, counts, phase."""

from itertools import combinations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.hlo.compilers import AXES, array, compile, mesh_of

SUBSETS = [axes for count in (1, 2, 3) for axes in combinations(AXES, count)]


def program(body):
    """One collective for each subset of axes, on an array of its own size, in the forward phase."""

    def step(x):
        def manual(x):
            with jax.named_scope("forward"):
                return [body(x[: 8 * (i + 1)] * (i + 1.0), axes) for i, axes in enumerate(SUBSETS)]

        return jax.shard_map(manual, in_specs=P(), out_specs=P(tuple(AXES)), check_vma=False)(x)

    return step


def rows(compiled):
    return {
        (line.name, line.axes): (line.value, line.wire, line.count, line.phase, line.dtype)
        for line in compiled.ledger.section("collectives")
    }


def ranks(axes):
    return 2 ** len(axes)


# kind, body, payload from (bytes of the argument, ranks), wire from (payload, ranks)
KINDS = {
    "all-reduce": (lambda x, axes: lax.psum(x, axes), lambda b, n: b, lambda p, n: 2 * p * (n - 1) // n),
    "all-gather": (
        lambda x, axes: lax.all_gather(x, axes, tiled=True),
        lambda b, n: b * n,
        lambda p, n: p * (n - 1) // n,
    ),
    "reduce-scatter": (
        lambda x, axes: lax.psum_scatter(x, axes, tiled=True),
        lambda b, n: b,
        lambda p, n: p * (n - 1) // n,
    ),
    "all-to-all": (
        lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True),
        lambda b, n: b,
        lambda p, n: p * (n - 1) // n,
    ),
}


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_of_axes(kind, target):
    body, payload, wire = KINDS[kind]
    mesh = mesh_of(target)
    compiled = compile(program(body), array(mesh, (64, 16)), mesh=mesh, target=target)
    wanted = {}
    for i, axes in enumerate(SUBSETS):
        value = payload(8 * (i + 1) * 16 * 4, ranks(axes))
        wanted[kind, axes] = (value, wire(value, ranks(axes)), 1, "forward", "f32")
    assert rows(compiled) == wanted


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_permutes(target):
    mesh = mesh_of(target)

    def step(x):
        def manual(x):
            with jax.named_scope("forward"):
                return [lax.ppermute(x * i, axis, [(0, 1), (1, 0)]) for i, axis in enumerate(AXES, start=1)]

        return jax.shard_map(manual, in_specs=P(), out_specs=P(tuple(AXES)), check_vma=False)(x)

    compiled = compile(step, array(mesh, (8, 16)), mesh=mesh, target=target)
    size = 8 * 16 * 4
    assert rows(compiled) == {("permute", (axis,)): (size, size, 1, "forward", "f32") for axis in AXES}


def test_loops_multiply_payload_and_count():
    mesh = mesh_of("cpu")

    def step(x):
        def manual(x):
            def body(x, _):
                return jnp.tanh(lax.psum(x, ("data", "tensor"))), None

            with jax.named_scope("backward"):
                return lax.scan(body, x, None, length=6)[0]

        return jax.shard_map(manual, in_specs=P(), out_specs=P(), check_vma=False)(x)

    compiled = compile(step, array(mesh, (4, 8)), mesh=mesh)
    size = 4 * 8 * 4
    (line,) = compiled.ledger.section("collectives")
    assert (line.value, line.wire, line.count) == (6 * size, 6 * 2 * size * 3 // 4, 6)
    assert line.phase == "backward" and line.emitted == 6 * size
    (term,) = line.terms
    assert term.value == line.value and "over data+tensor x 6 (6)" in term.detail
    assert term.source.startswith("test_collectives.py:")


def test_an_axis_of_one_device_costs_nothing():
    mesh = mesh_of("cpu", {"replica": 1, "data": 8})

    def step(x):
        def manual(x):
            with jax.named_scope("forward"):
                return lax.psum(x * 2, "replica"), lax.psum(x, ("replica", "data"))

        return jax.shard_map(manual, in_specs=P(), out_specs=P(), check_vma=False)(x)

    compiled = compile(step, array(mesh, (4, 8)), mesh=mesh)
    assert list(rows(compiled)) == [("all-reduce", ("data",))]


def test_groups_that_are_no_axes_are_unexplained():
    mesh = mesh_of("cpu", {"data": 8})

    def step(x):
        def manual(x):
            with jax.named_scope("forward"):
                return lax.psum(x, "data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])

        return jax.shard_map(manual, in_specs=P("data"), out_specs=P("data"), check_vma=False)(x)

    compiled = compile(step, array(mesh, (64, 8), P("data")), mesh=mesh)
    (line,) = compiled.ledger.section("collectives")
    assert line.axes == ("unknown",) and line.wire == 2 * line.value * 3 // 4
    assert any(text.startswith("mesh axes of all-reduce") for text in compiled.ledger.unexplained)


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_a_reshard_in_explicit_mode(target):
    mesh = mesh_of(target, {"data": 4, "tensor": 2})

    def step(x):
        with jax.named_scope("update"):
            return jax.reshard(x * 2, P(None, "tensor"))

    compiled = compile(step, array(mesh, (64, 32), P("data", "tensor")), mesh=mesh, target=target)
    size = 64 * 16 * 4
    assert rows(compiled) == {("all-gather", ("data",)): (size, size * 3 // 4, 1, "update", "f32")}


def test_no_phase_is_unexplained():
    mesh = mesh_of("cpu")

    def step(x):
        return jax.reshard(x * 2, P())

    compiled = compile(step, array(mesh, (64, 32), P("data")), mesh=mesh)
    (line,) = compiled.ledger.section("collectives")
    assert line.phase == "" and any(text.startswith("phase of all-gather") for text in compiled.ledger.unexplained)


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_merged_collectives_are_emitted_in_the_phase_of_each_array(target):
    mesh = mesh_of(target, {"data": 8})

    def step(x, y):
        def manual(x, y):
            with jax.named_scope("forward"):
                x = lax.psum(jnp.sin(x), "data")
            with jax.named_scope("backward"):
                y = lax.psum(jnp.sin(y), "data")
            return x, y

        return jax.shard_map(manual, in_specs=P(), out_specs=P(), check_vma=False)(x, y)

    compiled = compile(step, array(mesh, (16, 128)), array(mesh, (32, 128)), mesh=mesh, target=target)
    lines = {line.phase: line for line in compiled.ledger.section("collectives")}
    assert lines["forward"].value == lines["forward"].emitted == 16 * 128 * 4
    assert lines["backward"].value == lines["backward"].emitted == 32 * 128 * 4
    merged = [i for _, i in compiled.optimized.instructions() if i.opcode in ("all-reduce", "all-reduce-start")]
    assert len(merged) == 1  # the compiler did merge the two
