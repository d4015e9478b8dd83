"""Programs that are not ours through all three compilers: nothing is dropped, and totals are those of a count by hand."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxllm
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.read import read_bytes
from jaxllm.report.inspection import CLASSES, Report, total
from tests.hlo.compilers import array, mesh_of
from tests.hlo.foreign import Program, programs

TARGETS = ("cpu", "gpu", "tpu")
CASES = [(name, target) for name in programs() for target in TARGETS]


@cache
def program(name: str, target: str) -> Program:
    return programs()[name](target)


@cache
def report(name: str, target: str) -> Report:
    made = program(name, target)
    with jax.set_mesh(made.mesh):
        return jaxllm.inspect(jax.jit(made.function, **made.options), *made.arguments)


@cache
def from_text(name: str, target: str) -> Report:
    made = program(name, target)
    with jax.set_mesh(made.mesh):
        compiled = jax.jit(made.function, **made.options).lower(*made.arguments).compile()
    return inspect_program(read_bytes(compiled.as_text().encode(), "text", scheduled=True), mesh=dict(made.mesh.shape))


def test_there_are_at_least_ten_programs():
    assert len(programs()) >= 10


@pytest.mark.parametrize(("name", "target"), CASES)
def test_totals_are_those_of_a_count_by_hand(name, target):
    made, found = program(name, target), report(name, target)
    assert found.matmul_flops_range == (made.flops, made.flops)
    payload: Counter = Counter()
    for item in found.collectives:
        payload[item.kind, item.axes] += item.payload * item.place.count
    assert payload == made.collectives
    assert found.mesh == dict(made.mesh.shape) and found.devices == 8 and found.target == target


@pytest.mark.parametrize(("name", "target"), CASES)
def test_nothing_is_dropped(name, target):
    found = report(name, target)
    assert len(found.not_understood) == program(name, target).opaque, found.not_understood
    assert not found.assumed
    assert sum(product.declared for product in found.products) == (name == "pallas" and target == "tpu")


@pytest.mark.parametrize(("name", "target"), CASES)
def test_text_and_proto_tell_the_same(name, target):
    proto, text = report(name, target), from_text(name, target)

    def facts(made):
        products = Counter((p.place.name, p.place.phase, p.place.count, p.kind, p.shapes, p.flops) for p in made.products)
        # the line of the program; who called it is another line of this file for each of the two
        places = [replace(c.place, source=c.place.source.split(" < ")[0]) for c in made.collectives]
        sent = Counter((p, c.kind, c.axes, c.ranks, c.dtype, c.payload, c.wire, c.overlapped) for p, c in zip(places, made.collectives))
        return made.matmul_flops_range, products, sent, made.bytes, made.not_understood

    assert facts(proto) == facts(text)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_classes_add_up_to_what_the_compiler_allocates(name, target):
    memory = report(name, target).memory
    assert memory.exact and sum(memory.classes.values()) == memory.peak > 0
    assert set(memory.classes) <= set(CLASSES) and min(memory.classes.values()) > 0
    gaps = memory.classes.get("fragmentation", 0)
    assert sum(buffer.bytes for buffer in memory.live) == memory.peak - gaps
    assert max(level for _, level in memory.timeline) == memory.peak - gaps


@pytest.mark.parametrize(("name", "target"), CASES)
def test_lifetimes_alone_give_a_lower_bound(name, target):
    exact, bound = report(name, target).memory, from_text(name, target).memory
    assert not bound.exact and sum(bound.classes.values()) == bound.peak
    assert 0.5 * exact.peak < bound.peak <= exact.peak
    assert bound.on_chip <= exact.on_chip


@pytest.mark.parametrize("target", TARGETS)
def test_a_program_of_its_own_is_measured_without_compiling_it_anew(target):
    made = program("vmapped", target)
    with jax.set_mesh(made.mesh):
        compiled = jax.jit(made.function, **made.options).lower(*made.arguments).compile()
    measured, compiled_anew = jaxllm.measure(compiled), report("vmapped", target)
    assert measured.collectives == compiled_anew.collectives and measured.products == compiled_anew.products
    assert measured.memory.exact == (target == "cpu")  # elsewhere XLA does not keep the buffer assignment
    if target == "cpu":
        assert measured.memory == compiled_anew.memory


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_line_is_found_on_every_compiler(target):
    (line,) = {item.place.source.split(" ")[0] for item in report("experts", target).collectives[-1:]}
    assert line.startswith("foreign.py:")
    assert all(item.place.source for item in report("cnn", target).collectives)


def test_operations_hold_all_the_work():
    for target in TARGETS:
        for name in ("decode", "scan_in_scan", "cnn"):
            found = report(name, target)
            assert total(found.operations, "flops") == found.matmul_flops
            assert found.bytes[0] > 0 and found.bytes[1] > 0


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_what_is_offloaded_to_the_host_is_told_apart(target):
    mesh = mesh_of(target, {"data": 8}, AxisType.Auto)
    layers, rows, width = 4, 64, 128
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["x"], offload_src="device", offload_dst="pinned_host"
    )

    def step(offload, w, x):
        def layer(x, w):
            return jnp.sin(checkpoint_name(x, "x") @ w) @ w.T, None

        body = jax.checkpoint(layer, policy=policy if offload else None)
        return jax.grad(lambda w: lax.scan(body, x, w)[0].sum())(w)

    def inspected(offload):
        arguments = array(mesh, (layers, width, width)), array(mesh, (8 * rows, width), P("data"))
        with jax.set_mesh(mesh):
            jitted = jax.jit(partial(step, offload))
            return jaxllm.inspect(jitted, *arguments), jaxllm.measure(jitted.lower(*arguments).compile())

    saved = layers * rows * width * 4
    offloaded, bound = inspected(True)
    assert offloaded.memory.host == bound.memory.host == saved
    assert sum(offloaded.memory.classes.values()) == offloaded.memory.peak
    kept, _ = inspected(False)
    assert kept.memory.host == 0
