"""Arguments by class, gradient accumulators, residuals and the peak, on a toy step of two loops in a third."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.hlo import Dump, measure
from jaxllm.spec.ledger import MEMORY_LINES
from tests.hlo.compilers import array, compile, dumped, mesh_of

TARGETS = ("cpu", "gpu", "tpu")
L, D, B = 5, 128, 16  # layers, width, sequences of a microbatch on a device


def step(parameters, optimizer, batch):
    w = parameters["w"]

    def micro(gradient, x):
        with jax.named_scope("forward"):

            def forward(x, w):
                y = jnp.tanh(x @ w)
                return y, (x, y)

            y, saved = lax.scan(forward, x, w)
        with jax.named_scope("backward"):

            def backward(carry, layer):
                dy, gradient = carry
                w, (x, y), i = layer
                da = dy * (1 - y * y)
                gradient = [g.at[i].add(part) for g, part in zip(gradient, (x.T @ da, jnp.sum(da, 0)), strict=True)]
                return (da @ w.T, gradient), None

            (_, gradient), _ = lax.scan(backward, (2 * y, gradient), (w, saved, jnp.arange(L)), reverse=True)
        return gradient, None

    gradient, _ = lax.scan(micro, [jnp.zeros_like(w), jnp.zeros_like(parameters["b"])], batch["x"])
    with jax.named_scope("gradients"):
        gradient = [lax.optimization_barrier(g) for g in gradient]
    with jax.named_scope("update"):
        moment = jax.tree.map(lambda m, g: 0.9 * m + g, optimizer["m"], gradient)
        parameters = {"w": w - moment[0], "b": parameters["b"] - moment[1]}
    return parameters, {"m": moment}


def compiled_step(target, microbatches, **options):
    mesh = mesh_of(target)
    w, b = array(mesh, (L, D, D)), array(mesh, (L, D))
    batch = {"x": array(mesh, (microbatches, B, D))}
    return compile(step, {"w": w, "b": b}, {"m": [w, b]}, batch, mesh=mesh, target=target, **options)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_every_class_to_the_byte(target, microbatches):
    ledger = compiled_step(target, microbatches, donate_argnums=(0, 1)).ledger
    weights = (L * D * D + L * D) * 4
    wanted = {
        "parameters": weights,
        "optimizer": weights,
        "batch": microbatches * B * D * 4,
        "gradients": weights,
        "residuals": 2 * L * B * D * 4,  # input and output of each layer, of one microbatch
        "host": 0,
    }
    assert {line.name: line.value for line in ledger.section("memory") if line.name != "padding"} == wanted
    assert [line.name for line in ledger.section("memory")] == list(MEMORY_LINES)
    assert all(sum(term.value for term in line.terms) == line.value for line in ledger.lines)
    assert ledger.unexplained == ()


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_and_peak_equal_the_compilers_own_figures(target):
    compiled = compiled_step(target, 3, donate_argnums=(0, 1))
    own, ledger = compiled.executable.memory_analysis(), compiled.ledger
    arrays = sum(ledger.line(name).value for name in ("parameters", "optimizer", "batch", "padding"))
    assert arrays == own.argument_size_in_bytes
    terms = {term.label: term.value for term in ledger.peak_terms}
    assert sum(term.value for term in ledger.peak_terms) == ledger.peak
    assert terms["arguments"] == arrays
    resident = own.argument_size_in_bytes + own.output_size_in_bytes - own.alias_size_in_bytes
    if target == "tpu":  # its temporaries are in several memories, and temp_size_in_bytes adds up those of some
        assert ledger.peak >= resident
    else:
        assert ledger.peak - terms["constants"] == resident + own.temp_size_in_bytes


def test_largest_buffers_of_the_peak_are_named():
    ledger = compiled_step("cpu", 3).ledger
    stacks = [term for term in ledger.peak_terms if "f32[5,16,128]  forward/" in term.detail]
    assert [term.value for term in stacks] == [L * B * D * 4] * 2  # the two residuals
    assert all(term.source.startswith("test_memory.py:") for term in stacks)


@pytest.mark.parametrize("target", TARGETS)
def test_residuals_of_plain_autodiff(target):
    """A checkpointed layer saves its input and nothing else; weights that the loop only passes on are no residuals."""
    mesh = mesh_of(target)

    def autodiff_step(parameters, batch):
        @jax.checkpoint
        def layer(x, w):
            return jnp.sin(jnp.sin(x @ w) @ w), None

        def loss(parameters):
            return jnp.sum(lax.scan(layer, batch, parameters)[0] ** 2)

        with jax.named_scope("autodiff"):
            return jax.grad(loss)(parameters)

    ledger = compile(autodiff_step, array(mesh, (L, D, D)), array(mesh, (B, D)), mesh=mesh, target=target).ledger
    assert ledger.line("residuals").value == L * B * D * 4


def test_sharded_arguments_are_measured_per_device():
    mesh = mesh_of("cpu")

    def step(parameters, batch):
        return parameters["w"] * 2, batch + 1

    w, batch = array(mesh, (64, 32), P("data", "tensor")), array(mesh, (16, 8), P(("replica", "data")), "bfloat16")
    ledger = compile(step, {"w": w}, batch, mesh=mesh).ledger
    assert ledger.line("parameters").value == 32 * 16 * 4
    assert ledger.line("batch").value == 4 * 8 * 2
    (term,) = ledger.line("parameters").terms
    assert (term.label, term.detail) == ("parameters['w']", "f32[32,16]")


def test_an_argument_of_no_known_class_is_unexplained():
    mesh = mesh_of("cpu")

    def step(parameters, other):
        return parameters + other

    ledger = compile(step, array(mesh, (8,)), array(mesh, (8,)), mesh=mesh).ledger
    assert len(ledger.unexplained) == 1 and "argument other (f32[8], 32 bytes)" in ledger.unexplained[0]


def test_vocabulary_padding_is_told_from_the_parameters():
    mesh = mesh_of("cpu")

    def step(parameters):
        return parameters["embed"] * 2

    embed = array(mesh, (32, 16), P("tensor"))
    logical = {"parameters['embed']": 15 * 16 * 4}
    ledger = compile(step, {"embed": embed}, mesh=mesh, logical=logical).ledger
    assert ledger.line("parameters").value == 15 * 16 * 4
    assert ledger.line("padding").value == 1 * 16 * 4


def test_arguments_on_the_host():
    mesh = mesh_of("tpu")
    host = NamedSharding(mesh, P(), memory_kind="pinned_host")

    def step(parameters, optimizer):
        moved = jax.device_put(optimizer, NamedSharding(mesh, P()))
        return parameters + moved

    optimizer = jax.ShapeDtypeStruct((64, 128), "float32", sharding=host)
    ledger = compile(step, array(mesh, (64, 128)), optimizer, mesh=mesh, target="tpu").ledger
    assert ledger.line("host").value == 64 * 128 * 4
    assert ledger.line("optimizer").value == 0  # what is in host memory is in no other line
    assert ledger.line("copy-to-device").value == 64 * 128 * 4
    assert [term.label for term in ledger.line("host").terms] == ["optimizer"]
    assert dict((t.label, t.value) for t in ledger.peak_terms)["arguments"] == 64 * 128 * 4


@pytest.mark.parametrize("target", TARGETS)
def test_a_program_that_was_refused_has_arguments_but_no_peak(target):
    mesh = mesh_of(target)
    w = array(mesh, (64, 32), P("data", "tensor"))

    def step(parameters):
        return parameters["w"] * 2

    with dumped(step, mesh, target, {"w": w}) as (folder, _):
        refused = replace(Dump.find(folder, target), optimized=None)
        ledger = measure(refused, dict(mesh.shape))
    assert ledger.line("parameters").value == 32 * 16 * 4
    assert ledger.peak is None and ledger.peak_terms == ()
    assert ledger.line("padding").value is None and "refused" in ledger.line("padding").reason
    assert all(line.emitted is None for line in ledger.section("collectives"))
