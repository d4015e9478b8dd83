"""A GPT under every ZeRO stage and set of degrees: the run equals the reference, and every line of the ledger is equal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxllm.check import check, resolve
from jaxllm.model import gpt
from jaxllm.program.run import ROUNDING, _largest
from jaxllm.report.compare import Comparison
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig

# Fewer layers than the preset's, so that it compiles soon, and more than of anything else. 45 entries of the vocabulary
# divide by no degree: they are padded. A quarter of the positions is used.
SMALL = dataclasses.replace(
    ModelConfig.load("gpt-tiny"), name="small-gpt", layers=5, d_model=32, d_ff=64, heads=8, kv_heads=8, head_dim=4,
    vocab=45, max_sequence=64,
)  # fmt: skip
SEQUENCE = 16

DEGREES = ("data=8", "data=4,tensor=2", "data=2,tensor=4", "tensor=8", "replica=2,data=2,tensor=2")

# All degrees, all stages, both kinds of remat; every pair of them is in the grid, and pipelines of a GPT run there too.
LAYOUTS = [
    f"{degrees},zero={stage},remat={('none', 'full')[i % 2]},microbatches={1 + i // 2 % 2}"
    for i, (degrees, stage) in enumerate(zip((*DEGREES, DEGREES[-1]), (3, 1, 2, 0, 3, 1), strict=True))
] + [
    "data=2,context=4,zero=3,remat=full,attention=blockwise,microbatches=2",
    "context=2,tensor=4,zero=1,exchange=ulysses,sequence=true,remat=selective",
]


def checked(
    layout: str, model: ModelConfig = SMALL, mesh: str = "cpu:8", precision: str = "f32", **options: bool
) -> Comparison:
    parsed, machine = Layout.parse(layout), Machine.load(mesh)
    batch = 8 if parsed.devices == 8 else None  # one for all, so one reference
    return check(model, parsed, machine, resolve(model, parsed, machine, batch, SEQUENCE, precision), **options)


def differences(comparison: Comparison) -> list[str]:
    bad = [f"{row.label}: {row.predicted} / {row.compiled}" for row in comparison.rows if row.status != "equal"]
    return bad + list(comparison.unexplained)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_agrees_in_the_run_and_in_the_ledger(layout: str) -> None:
    comparison = checked(layout, run=True)
    assert differences(comparison) == []
    assert comparison.run.agrees, comparison.run.errors
    tensors = set(SMALL.parameter_table())
    found = (name.partition("/") for name in comparison.run.errors)
    assert {tensor.removeprefix("layers.") for kind, _, tensor in found if kind == "change"} == tensors


def test_the_layouts_meet_every_value() -> None:
    parsed = [Layout.parse(text) for text in LAYOUTS]
    assert {layout.zero for layout in parsed} == {0, 1, 2, 3}
    assert {layout.remat for layout in parsed} == {"none", "selective", "full"}
    assert {layout.exchange for layout in parsed if layout.context > 1} == {"ring", "ulysses"}
    assert {layout.microbatches for layout in parsed} == {1, 2}


@pytest.mark.parametrize(
    ("layout", "mesh", "change"),
    [
        ("data=3,zero=3,microbatches=2", "cpu:3", {"tied": False}),
        ("data=3,zero=2,remat=full", "cpu:3", {"d_model": 48, "head_dim": 6, "max_sequence": 50}),
        ("data=4,tensor=2,zero=3", "cpu:8", {"d_model": 36, "d_ff": 44, "heads": 6, "kv_heads": 6, "head_dim": 6}),
        ("data=1,zero=3", "cpu:1", {"max_sequence": SEQUENCE}),
    ],
    ids=str,
)
def test_odd_sizes(layout: str, mesh: str, change: dict) -> None:
    comparison = checked(layout, dataclasses.replace(SMALL, **change), mesh, run=True)
    assert differences(comparison) == []
    assert comparison.run.agrees, comparison.run.errors


def test_in_bf16() -> None:
    comparison = checked("data=2,tensor=4,zero=3", precision="bf16-master", run=True)
    assert differences(comparison) == []
    assert comparison.run.agrees, comparison.run.errors


def test_plain_autodiff_trains_the_same() -> None:
    comparison = checked("data=4,tensor=2,zero=3,remat=jax", run=True)
    assert comparison.agrees
    assert comparison.run.agrees, comparison.run.errors


def inside_of_the_sum(name):
    """The bias of a product that is sliced by rows, added by every rank: so many times what it is."""
    right = gpt.Block.product

    def product(self, which, x, shards, multiply):
        value = right(self, which, x, shards, multiply)
        bias = getattr(self, f"{name}_bias")[...].astype(x.dtype)
        return value + bias if which == name else value

    return product


@pytest.mark.parametrize("layout", ["data=4,tensor=2,zero=3"])
def test_a_bias_that_every_rank_adds_disagrees(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.Block, "product", inside_of_the_sum("o"))
    errors = checked(layout, run=True).run.errors
    assert errors["loss/1"] > 1e-3 and errors["gradient/layers.o_bias"] > 0.01


def test_the_gradient_of_a_keys_bias_is_measured_by_that_of_the_others() -> None:
    """It is zero but for rounding, which is another one in every program: see ROUNDING."""
    tree = {"k_bias": np.array([1e-10, -3e-10]), "q": np.array([0.5, -2.0]), "v": np.array([1e-3])}
    assert _largest(tree) == {"k_bias": 2.0, "q": 2.0, "v": 1e-3}
    assert 3e-10 < ROUNDING * 2.0 < 1e-3
