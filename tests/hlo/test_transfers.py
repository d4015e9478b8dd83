"""Copies between device and host memory, counted by hand in small programs."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from jax import lax

from jaxllm.hlo import Dump, measure
from jaxllm.program.offload import in_host_memory
from tests.hlo.compilers import array, compile, dumped, mesh_of

LAYERS, ROWS, COLUMNS = 6, 64, 256
STACK = LAYERS * ROWS * COLUMNS * 4
Space = jax.memory.Space


def in_place(parameters, optimizer):
    """One loop that updates both stacks where they are."""

    def turn(i, carry):
        p, m = carry
        one = 0.9 * jax.device_put(lax.dynamic_index_in_dim(m, i), Space.Device) + lax.dynamic_index_in_dim(p, i)
        m = lax.dynamic_update_slice_in_dim(m, jax.device_put(one, Space.Host), i, 0)
        return lax.dynamic_update_slice_in_dim(p, one, i, 0), m

    return lax.fori_loop(0, LAYERS, turn, (parameters, optimizer))


def stacked(parameters, optimizer):
    """A scan that takes rows of one stack in host memory and makes another."""

    def turn(p, x):
        i, m = x
        one = 0.9 * jax.device_put(m, Space.Device) + p[i]
        return lax.dynamic_update_slice_in_dim(p, one[None], i, 0), jax.device_put(one, Space.Host)

    return lax.scan(turn, parameters, (jax.numpy.arange(LAYERS), optimizer))


def measured(step, target):
    mesh = mesh_of(target, {"data": 8})
    parameters = array(mesh, (LAYERS, ROWS, COLUMNS))
    host = in_host_memory(parameters.sharding)
    optimizer = jax.ShapeDtypeStruct(parameters.shape, parameters.dtype, sharding=host)
    options = {"donate_argnums": (0, 1), "out_shardings": (parameters.sharding, host)}
    return compile(step, parameters, optimizer, mesh=mesh, target=target, **options).ledger


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_rows_that_come_and_go_in_a_loop(target):
    ledger = measured(in_place, target)
    assert {line.name: line.value for line in ledger.section("transfers")} == {"copy-to-device": STACK, "copy-to-host": STACK}
    assert ledger.line("host").value == STACK and ledger.line("optimizer").value == 0
    assert not ledger.unexplained


def test_a_second_stack_in_host_memory_shows():
    ledger = measured(stacked, "gpu")
    assert {term.label: term.value for term in ledger.line("host").terms} == {"optimizer": STACK, "temporaries": STACK}
    assert any("within host memory" in text for text in ledger.unexplained)


# ---------------------------------------------------------------- what a forward pass saves in host memory


def through_host(parameters, batch):
    """Saves the input of each of LAYERS layers in host memory, and multiplies with it in the backward pass."""

    def forward(x, w):
        return jax.numpy.tanh(x @ w.astype(x.dtype)), jax.device_put(x, Space.Host)

    def backward(dy, kept):
        x, w = kept
        x = jax.device_put(x, Space.Device)
        return (dy * (1 - x * x)) @ w.T.astype(x.dtype), x.T @ dy

    with jax.named_scope("forward"):
        y, saved = lax.scan(forward, batch, parameters)
    with jax.named_scope("backward"):
        return lax.scan(backward, jax.numpy.sin(y), (saved, parameters), reverse=True)[1]


@pytest.mark.parametrize(
    ("target", "rows"), [("gpu", 64), ("tpu", 64), ("gpu", 60), ("tpu", 60)], ids=["gpu", "tpu", "gpu-odd", "tpu-odd"]
)
def test_what_is_saved_in_host_memory(target, rows):
    mesh = mesh_of(target, {"data": 8})
    arguments = array(mesh, (LAYERS, 256, 256)), array(mesh, (rows, 256))
    ledger = compile(through_host, *arguments, mesh=mesh, target=target).ledger
    stack = LAYERS * rows * 256 * 4
    assert {line.name: line.value for line in ledger.section("transfers")} == {"copy-to-device": stack, "copy-to-host": stack}
    assert ledger.line("host").value == stack and ledger.line("residuals").value == 0
    padding = ledger.line("padding")
    # 60 rows lie in tiles of 8: as an argument, and in each layer of the stack.
    assert padding.value == ((LAYERS + 1) * 4 * 256 * 4 if target == "tpu" and rows == 60 else 0)
    assert sum(rule.bytes for rule in padding.rules) == padding.value
    assert not ledger.unexplained


def test_of_a_refused_program_nobody_knows_what_would_be_copied():
    mesh = mesh_of("gpu", {"data": 8})
    arguments = array(mesh, (LAYERS, 256, 256)), array(mesh, (64, 256), dtype="bfloat16")
    with dumped(through_host, mesh, "gpu", *arguments) as (folder, _):
        ledger = measure(replace(Dump.find(folder, "gpu"), optimized=None), dict(mesh.shape))
    assert ledger.line("host").value == LAYERS * 64 * 256 * 2
    assert [(line.name, line.dtype, line.value) for line in ledger.section("transfers")] == [
        ("copy-to-device", "bf16", None), ("copy-to-host", "bf16", None)
    ]  # fmt: skip
