"""Attention block by block and by a kernel, compiled: every line is equal; and where a kernel is refused.

That layouts with it equal the reference is in test_run.py and test_pipeline.py, what the kernel computes in
tests/model/test_attention.py.
"""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.check import check
from jaxllm.cli import main
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict
from tests.program.test_pipeline import GPT
from tests.program.test_run import MODEL

WIDE = dataclasses.replace(MODEL, head_dim=8)
ONE = dataclasses.replace(MODEL, layers=1)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """20 tokens are three blocks, of which the last is filled up by one."""
    monkeypatch.setattr("jaxllm.spec.attention.LONGEST_BLOCK", 8)


def compared(model, mesh, layout, precision="bf16-f32", tokens=20):
    parsed = Layout.parse(layout)
    workload = Workload(parsed.replica * parsed.data * parsed.microbatches, tokens, precision)
    return check(model, parsed, Machine.load(mesh), workload)


def every_line_is_equal(comparison):
    bad = [f"{row.label}: {row.predicted} {row.compiled}" for row in comparison.rows if row.status != "equal"]
    assert not bad and not comparison.unexplained
    return True


def test_block_by_block_for_an_absent_tpu():
    """For an absent GPU docs/attention.md has it at real size."""
    assert every_line_is_equal(compared(GPT, "v5e:2x2", "data=2,tensor=2,zero=1,sequence=true,attention=blockwise"))


@pytest.mark.parametrize(("remat", "tokens"), [("none", 20), ("full", 8)])
def test_a_single_layer_or_block_leaves_no_loop_to_count(tokens, remat):
    assert every_line_is_equal(compared(ONE, "cpu:1", f"remat={remat},attention=blockwise", "f32", tokens))


def test_the_scores_of_a_single_block_are_computed_again_on_a_tpu():
    """Where the forward pass is computed again they are its own once more, and would be merged with them."""
    assert every_line_is_equal(compared(GPT, "v5e:2x2", "data=2,tensor=2,remat=full,attention=blockwise", tokens=8))


def test_a_kernel_of_cudnn_is_counted_over_the_square(monkeypatch):
    # The version is all that jax asks the library for before a card is there.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91200)
    layout = "data=2,tensor=2,zero=1,attention=cudnn"
    assert every_line_is_equal(compared(WIDE, "h100:4", layout))
    ledger = predict(WIDE, Layout.parse(layout), Workload(2, 20, "bf16-f32"))
    square = WIDE.layers * 20 * 20 * 2 * WIDE.heads // 2 * WIDE.head_dim
    for phase, products in (("forward", 2), ("recompute", 2), ("backward", 5)):
        terms = ledger.line("matmul", phase=phase).terms
        assert sum(term.value for term in terms if term.label in ("scores", "attention")) == products * square
    assert not {"scores", "lse"} & {term.label for term in ledger.line("residuals").terms}


@pytest.mark.parametrize(
    ("mesh", "layout", "says"),
    [
        ("cpu:1", "attention=cudnn", "for NVIDIA's cards, and the target is cpu"),
        ("v5e:1x1", "attention=cudnn", "for NVIDIA's cards, and the target is tpu"),
        ("h100:1", "attention=cudnn --precision f32", "is built for bf16, and precision f32 computes in f32"),
        ("h100:1", "attention=cudnn", "pip install nvidia-cudnn-cu12"),
        ("cpu:1", "attention=splash", "which mesh axes"),
        ("v5e:1x1", "attention=splash", "which mesh axes"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused_with_the_reason(mesh, layout, says, capsys, monkeypatch):
    def missing():
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", missing)
    layout, *more = layout.split(maxsplit=1)
    assert main(["check", "llama-tiny", "--mesh", mesh, "--layout", layout, "--seq", "16", *" ".join(more).split()]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert says in said and said.endswith("choose attention=blockwise.")
