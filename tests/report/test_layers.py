"""The closed form by layer and by module: as a table, as a document, and what is said to be uneven."""

import io

import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload
from jaxllm.report.compare import Setup
from jaxllm.report.layers import check_by, document, print_parts, remedy
from jaxllm.report.table import console
from jaxllm.spec.errors import SpecError


def setup(model: str, mesh: str, layout: str, batch: int) -> Setup:
    return Setup(
        ModelConfig.load(model), Layout.parse(layout), Machine.load(mesh), Workload(batch, 4096, "bf16-f32"), "gpu", {}
    )


def printed(of: Setup, by: str) -> str:
    out = io.StringIO()
    print_parts(of, by, console(out))
    return out.getvalue()


def test_a_row_for_each_part_and_the_sum_of_all():
    of = setup("llama-2-7b", "h100:8", "data=8", 8)
    text = printed(of, "layer")
    assert max(map(len, text.splitlines())) <= 80
    starts = [line.split("  ")[0] for line in text.splitlines()]
    assert [starts.count(name) for name in ("embedding", "block, each of 32", "head", "step", "all")] == [2] * 5
    # 32 blocks of 4 D^2 + 3 D F + 2 D weights in f32
    assert "810 MB" in text and "27.0 GB" in text
    assert "% of what is held: optimizer state" in text


def test_modules_are_the_halves_of_a_block():
    text = printed(setup("llama-2-7b", "h100:8", "data=8", 8), "module")
    assert "attention, each of 32" in text and "mlp, each of 32" in text
    assert max(map(len, text.splitlines())) <= 80


def test_stages_are_told_apart_and_the_heaviest_is_named():
    of = setup("llama-3-8b", "h100:16", "pipe=4,data=2,tensor=2,microbatches=8,zero=1,remat=full", 16)
    text = printed(of, "layer")
    assert "stage 3: head" in text and "stage 0: embedding" in text and "stage 1: head" in text  # its update is gathered
    assert max(map(len, text.splitlines())) <= 80
    found = document(of, "layer")
    # Both ends hold a table of half the vocabulary, at 4 + 4 + 8/2 bytes, beside the eight blocks that each stage has.
    needed = [sum(p["held"] for p in found if p["stage"] == i and p["name"] != "other stages") for i in range(4)]
    table = 12 * 128256 * 4096 // 2
    assert (needed[0] - needed[1], needed[1]) == (table, needed[2]) and needed[3] - needed[0] == 12 * 4096
    share = 100 * (needed[3] / (sum(needed) / 4) - 1)
    assert f"stage 3 needs {share:.1f} % more than the mean" in text and 10 < share < 14
    assert "is room for weights" in text.replace("\n          ", " ")
    assert {part["stage"] for part in found} == {0, 1, 2, 3}
    assert all(part["held"] == sum(part[name] for name in ("parameters", "gradients", "optimizer", "activations", "other"))
               for part in found)  # fmt: skip


@pytest.mark.parametrize(
    ("by", "remat", "says"),
    [("layers", "none", "did you mean 'layer'"), ("x", "none", "known: layer, module"), ("layer", "jax", "remat=jax has none")],
)
def test_bad_input(by, remat, says):
    with pytest.raises(SpecError, match=says):
        check_by(by, remat)


@pytest.mark.parametrize(
    ("kind", "layout", "says"),
    [
        ("optimizer", "tensor=8", "zero=1 or more with data slices them"),
        ("optimizer", "data=8", "zero=1 or more over 8 ranks slices them"),
        ("gradients", "data=2,context=4,zero=1,exchange=ulysses", "zero=2 or more over 8 ranks slices them"),
        ("parameters", "data=8,zero=3", "more of data, context or tensor slices them further"),
        ("activations", "data=8", "remat=selective or full, attention=blockwise, context or more microbatches leave less of them"),
        ("activations", "tensor=8,remat=selective", "remat=full, sequence=true, context or more microbatches leave less of them"),
        ("activations", "data=8,remat=full", "context or more microbatches leave less of them"),
        ("activations", "tensor=8,remat=full,sequence=true", "context or more microbatches leave less of them"),
    ],
)
def test_the_remedy_is_one_that_the_layout_does_not_have(kind, layout, says):
    assert remedy(kind, Layout.parse(layout)) == says
