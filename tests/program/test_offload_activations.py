"""Activations in host memory: bytes and copies by closed form and on both compilers, and a run equal to the reference."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from jaxllm import predict
from jaxllm.check import check
from jaxllm.program import build, gradient
from jaxllm.program.run import learning_rate, run
from jaxllm.report.compare import Comparison
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import TRANSFERS, Ledger
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from tests.program.test_run import MODEL, compiled_for

TINY = ModelConfig.load("llama-tiny")
B, T = 2, 64  # sequences of a device and microbatch, and tokens of each


def ledger(text: str, precision: str = "bf16-f32", model: ModelConfig = TINY) -> Ledger:
    layout = Layout.parse(text)
    return predict(model, layout, Workload(B * layout.replica * layout.data * layout.microbatches, T, precision))


# ---------------------------------------------------------------- closed form


D, F, N, KV = TINY.d_model, TINY.d_ff, TINY.heads, TINY.kv_heads * TINY.head_dim
BLOCKS = "context=2,attention=blockwise"

# A layout, what is offloaded in it, features of a token in that, and the layout that saves as much, all on the device.
CASES = [
    ("data=8,remat=none", "input", D, ""),
    ("data=8,remat=full", "input+mlp", D + 2 * F, ",save=mlp"),
    ("data=8,remat=selective", "qkv", D + 2 * KV, ""),
    ("data=8,zero=3,remat=full,save=mlp", "scores", N * T, "+scores"),
    ("data=2,tensor=4,sequence=true,remat=full", "input+residual+up", 2 * D // 4 + F // 4, ",save=residual+up"),
    ("data=1,tensor=8,remat=full", "v", TINY.head_dim, ",save=v"),  # each head of values is on two ranks
    (f"data=4,{BLOCKS},exchange=ulysses,remat=full", "input+up", (D + F) // 2, ",save=up"),
    # The statistics of a softmax are f32, twice as wide.
    (f"data=4,{BLOCKS},remat=full", "attention", (D + 2 * N) // 2, ",save=attention"),
]


@pytest.mark.parametrize(("layout", "names", "features", "saved"), CASES)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_what_is_offloaded_is_not_on_the_device_and_is_copied_once_each_way(
    layout: str, names: str, features: int, saved: str, microbatches: int
) -> None:
    more = f",microbatches={microbatches}"
    found, kept = ledger(f"{layout},offload={names}{more}"), ledger(f"{layout}{saved}{more}")
    stack = TINY.layers * B * T * features * 2  # one microbatch's: the next takes its place
    assert found.line("host").value == stack == kept.line("residuals").value - found.line("residuals").value
    for name in TRANSFERS:
        assert found.total("transfers", name) == microbatches * stack
    for name in ("parameters", "optimizer", "gradients", "batch"):
        assert found.line(name).value == kept.line(name).value
    for section in ("flops", "collectives"):
        assert [(line.key, line.value) for line in found.section(section)] == [
            (line.key, line.value) for line in kept.section(section)
        ]


def test_beside_state_in_host_memory_each_is_counted_by_itself() -> None:
    layout = "data=8,zero=3,remat=full"
    both = ledger(f"{layout},offload=optimizer+mlp", "bf16-master")
    state, saved = (ledger(f"{layout},offload={name}", "bf16-master") for name in ("optimizer", "mlp"))
    assert both.line("host").value == state.line("host").value + saved.line("host").value
    for name in TRANSFERS:
        assert both.line(name, dtype="f32").value == state.line(name).value
        assert both.line(name, dtype="bf16").value == saved.line(name).value


@pytest.mark.parametrize(("target", "there"), [("gpu", 1), ("tpu", 1 + 2 * 4)])
def test_the_peak_has_of_one_layer_what_it_had_of_all(target: str, there: int) -> None:
    # XLA:TPU has gate and up, each four times as wide as the input, throughout a turn of the loop.
    model, work = ModelConfig.load("llama-3.2-1b"), Workload(8, 8192, "bf16-f32")
    kept, found = (
        predict(model, Layout.parse(f"data=8,zero=3,remat=full,{more}"), work, target=target)
        for more in ("save=mlp", "offload=input+mlp")
    )
    stream = 8192 * model.d_model * 2
    assert {term.label: term.value for term in found.peak_terms}["attention: back from host memory"] == there * stream
    assert kept.peak - found.peak == (model.layers * (1 + 2 * 4) - there) * stream


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("offload=mlp+weights", "nothing named 'weights'; known: optimizer, parameters, input, qkv, mlp, q, k, v, scores"),
        ("offload=none+mlp", "nothing named 'none'"),
        ("offload=mlp+", "a name is missing beside a .; known"),
        ("offload=parameters+mlp", r"write offload=optimizer\+parameters\+mlp"),
        ("remat=full,save=qkv+up,offload=mlp", "save=qkv\\+up keeps up on the device, and offload=mlp in host memory"),
        ("attention=blockwise,offload=scores", "the scores are never there"),
        ("remat=jax,offload=input", "remat=jax is plain autodiff"),
        ("pipe=2,microbatches=2,offload=input", "pipe=2 what a stage saves lies in slots"),
    ],
)
def test_what_makes_no_sense_is_refused(layout: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as error:
        ledger(layout)
    assert str(error.value).count(". ") == 0


def test_a_block_of_gpts_has_no_gate() -> None:
    gpt = ModelConfig.load("gpt-tiny")
    with pytest.raises(SpecError, match="the blocks of gpt-tiny have no activation 'gate'; theirs are qkv, mlp, input, q, k"):
        ledger("offload=gate", model=gpt)
    assert ledger("offload=mlp", model=gpt).line("host").value == gpt.layers * B * T * gpt.d_ff * 2


@pytest.mark.parametrize(("mesh", "target"), [("cpu:8", ""), ("h100:8", "cpu")])
def test_a_cpu_is_refused(mesh: str, target: str) -> None:
    with pytest.raises(SpecError, match="keeps activations in the memory .* the memory of a cpu is its host's"):
        check(TINY, Layout.parse("data=8,offload=input"), Machine.load(mesh), Workload(8, 16), target=target)


# ---------------------------------------------------------------- what the program computes


@pytest.mark.parametrize(
    "layout",
    [
        "data=4,tensor=2,zero=3,remat=full,microbatches=2,offload=input+mlp",
        "data=2,context=2,zero=1,attention=blockwise,offload=optimizer+attention+input",
    ],
)
def test_a_step_equals_the_reference(layout: str) -> None:
    # Emulated devices tell their memory from their host's by name alone, and so run the same program.
    parsed = Layout.parse(layout)
    devices = jax.devices()[: parsed.devices]
    built = build(MODEL, parsed, Workload(8, 8), devices, learning_rate=learning_rate("adamw", MODEL))
    assert 0 < run(built, compiled_for(built)).max_relative_error <= 1e-5


# ---------------------------------------------------------------- what the compilers make of it


# With more layers than two, that XLA:TPU has a loop over.
FOUR = replace(TINY, layers=4, vocab=64)

def compared(mesh: str, layout: str, precision: str = "bf16-master") -> Comparison:
    parsed = Layout.parse(layout)
    return check(FOUR, parsed, Machine.load(mesh), Workload(parsed.data * parsed.microbatches, 16, precision))


@pytest.mark.parametrize("mesh", ["h100:8", "v5e:2x4"])
@pytest.mark.parametrize(
    "layout",
    [
        "data=4,tensor=2,zero=3,sequence=true,remat=full,save=q,microbatches=2,offload=optimizer+input+mlp",
        "data=8,zero=1,remat=selective,attention=blockwise,offload=attention+residual",
    ],
)
def test_every_byte_is_where_it_is_said_to_be(mesh: str, layout: str) -> None:
    found = compared(mesh, layout)
    assert [row.label for row in found.rows if row.status != "equal"] == [] and not found.unexplained


def test_an_activation_that_stays_on_the_device_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "to_host", lambda value: value)
    found = compared("h100:8", "data=8,remat=full,offload=mlp")
    differ = {row.label for row in found.rows if row.status == "differs"}
    assert differ == {"residuals", "host", "copy-to-device/bf16", "copy-to-host/bf16"}


def test_a_stack_in_the_room_of_an_embedding_counts() -> None:
    # The embedding comes to the device once a step, and what XLA:GPU saves of values lies where it was.
    found = compared("h100:8", "data=8,zero=3,remat=full,offload=optimizer+parameters+up")
    assert {row.label: row.status for row in found.rows}["host"] == "equal"
