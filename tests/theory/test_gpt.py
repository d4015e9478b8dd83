"""The closed form of a GPT against the tables of the papers that are about it.

Their letters: B batch, s sequence, l layers, h width, a heads, V vocabulary, t tensor parallelism.
"""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict
from jaxllm.theory.products import products
from jaxllm.theory.symbols import Symbols

# Narayanan et al. 2021, Table 1: model and batch
TABLE_1 = {
    "megatron-1.7b": 512, "megatron-3.6b": 512, "megatron-7.5b": 512, "megatron-18.4b": 1024, "megatron-39.1b": 1536,
    "megatron-76.1b": 1792, "megatron-145.6b": 2304, "megatron-310.1b": 2160, "megatron-529.6b": 2520,
    "megatron-1008b": 3072,
}  # fmt: skip
# Korthikanti et al. 2022, Table 3: model and microbatch
TABLE_3 = {"megatron-22b": 4, "megatron-175b": 1, "megatron-530b": 1, "megatron-1t": 1}
MATRICES = ("q", "k", "v", "o", "up", "down")

TINY = ModelConfig.load("gpt-tiny")


def ledger(name: str | ModelConfig, layout: str, batch: int, precision: str = "bf16-f32", **options: str) -> Ledger:
    model = ModelConfig.load(name) if isinstance(name, str) else name
    return predict(model, Layout.parse(layout), Workload(batch, min(2048, model.max_sequence), precision, **options))


def terms(found: Ledger, name: str, **match: str) -> dict[str, int]:
    return {term.label: term.value for term in found.line(name, **match).terms}


@pytest.mark.parametrize(("name", "batch"), TABLE_1.items())
def test_flops_of_narayanan(name: str, batch: int) -> None:
    model = ModelConfig.load(name)
    B, s, l, h, V = batch, 2048, model.layers, model.d_model, model.vocab
    # Equation 3, 96 B s l h^2 (1 + s/(6 h) + V/(16 l h)): forward, backward twice that, and all of each block again,
    # but not the head.
    equation_3 = 96 * B * s * l * h**2 + 16 * B * s**2 * l * h + 6 * B * s * h * V
    found = ledger(name, "data=1,remat=full", batch)
    # The last product of a block is not computed again here, for nobody needs its output.
    last = 2 * B * s * l * h * 4 * h
    assert found.total("flops") == equation_3 - last
    forward, recompute = (terms(found, "matmul", phase=phase) for phase in ("forward", "recompute"))
    assert {label: value for label, value in forward.items() if label not in recompute} == {
        "down": last, "head": 2 * B * s * h * V,
    }  # fmt: skip
    assert all(recompute[label] == forward[label] for label in recompute)
    # Of the paper's figure the difference is 1/12 at most, less the longer the sequence.
    assert last / equation_3 < 1 / 12


@pytest.mark.parametrize("t", [1, 8])
@pytest.mark.parametrize(("name", "b"), TABLE_3.items())
def test_activations_of_korthikanti(name: str, b: int, t: int) -> None:
    model = ModelConfig.load(name)
    s, h, a, l = 2048, model.d_model, model.heads, model.layers
    # Table 2, tensor parallelism: s b h (10 + 24/t + 5 a s/(h t)) for each layer.
    theirs = 10 * s * b * h + 24 * s * b * h // t + 5 * a * s * s * b // t
    found = terms(ledger(name, f"tensor={t}", b), "residuals")
    masks = 2 * s * b * h  # of the dropout after attention and after the feed-forward, a byte each: no dropout is built
    norms = 2 * 2 * s * b * h  # outputs of the two LayerNorms, the inputs of q, k, v and of up: computed again
    gelu = 8 * s * b * h // t  # its output, which is the input of down: computed again
    # Softmax's output and a dropout's (2 each) and its mask (1): here the scores that go into softmax (2).
    square = 3 * a * s * s * b // t
    assert sum(found.values()) == l * (theirs - masks - norms - gelu - square)
    assert found["scores"] == l * 2 * a * s * s * b // t
    # What is left: inputs of the two LayerNorms; q, k, v, what attention gives and what up gives.
    assert found["block input"] == found["residual"] == l * 2 * s * b * h
    assert found["q"] == found["k"] == found["v"] == found["attention"] == l * 2 * s * b * h // t
    assert found["up"] == l * 8 * s * b * h // t
    # Section 5: with full recomputation 2 s b h, here too.
    assert ledger(name, f"tensor={t},remat=full", b).line("residuals").value == l * 2 * s * b * h


def test_state_of_korthikanti() -> None:
    # Figure 1, the 22B model on 8 devices: 18 bytes for each of the 12 l h^2 parameters of its matrices, 45.5625 GiB.
    # 18 are bf16 parameters, f32 gradients, and master copy, m and v in f32.
    found = ledger("megatron-22b", "tensor=8", 4, "bf16-master", gradient_dtype="f32")
    state = ("master copy", "first moment m", "second moment v")
    held = sum(terms(found, line)[name] for line in ("parameters", "gradients") for name in MATRICES)
    held += sum(terms(found, "optimizer")[f"{name}, {what}"] for what in state for name in MATRICES)
    assert held == 45.5625 * 2**30


def test_what_tensor_parallelism_keeps_whole() -> None:
    one, eight = (ledger(TINY, f"tensor={t}", 8, "f32") for t in (1, 8))
    whole, sliced = (terms(found, "parameters") for found in (one, eight))
    kept = {name for name in whole if sliced[name] == whole[name]}
    norms = {f"{name}{part}" for name in ("attention_norm", "mlp_norm", "final_norm") for part in ("", "_bias")}
    # Biases of what is sliced by rows are added once, behind the sum.
    assert kept == {"positions", "o_bias", "down_bias", *norms}
    assert all(8 * sliced[name] == whole[name] for name in whole if name not in kept)


def test_biases_are_gathered_again_where_what_they_are_added_to_is_computed_again() -> None:
    biases = {f"{name}_bias" for name in MATRICES}

    def again(layout: str) -> set[str]:
        found = terms(ledger(TINY, layout, 8, "f32"), "all-gather", phase="backward")
        return {label.removesuffix(", again") for label in found}

    inside = set(TINY.parameter_table()) - {"embed", "positions", "final_norm", "final_norm_bias"}
    assert again("data=8,zero=3") == inside - biases
    assert again("data=8,zero=3,remat=full") == inside - {"down_bias"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_gradient_is_reduced_once(stage: int) -> None:
    found = ledger(TINY, f"data=8,zero={stage}", 8, "f32")
    assert found.line("reduce-scatter").value == 4 * TINY.parameters
    assert [line.value for line in found.lines if line.name == "all-reduce"] == [8, 4]  # tokens and loss; the norm


def test_what_a_bias_divides_by_is_its_own_dim() -> None:
    # 96 is a multiple of 3, and so is 24 of the four ranks; 128 and 32 are not.
    model = dataclasses.replace(TINY, d_ff=96)
    found = ledger(model, "data=3,tensor=4,zero=3", 3, "f32")
    assert found.notes == (
        "zero=3 slices no dim of embed, positions, attention_norm, attention_norm_bias, q, q_bias, k, k_bias, v, "
        "v_bias, o, o_bias, mlp_norm, mlp_norm_bias, down_bias, final_norm, final_norm_bias, none of which 3 divides: "
        f"{_held_whole(model):,} bytes a device",
    )


def _held_whole(model: ModelConfig) -> int:
    D, L = model.d_model, model.layers
    ends = model.vocab // 4 * D + model.max_sequence * D + 2 * D
    return 4 * (ends + L * (4 * D + 4 * D * D // 4 + 3 * D // 4 + 2 * D))


def test_dropout_that_is_not_built_is_a_note() -> None:
    assert ledger("gpt2", "data=1", 1).notes == (ModelConfig.load("gpt2").note,)
    assert "dropout of 0.1 is not built" in ledger("gpt2", "data=1,remat=jax", 1).notes[1]
    assert ledger(TINY, "data=1", 1).notes == ()


@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny"])
@pytest.mark.parametrize("layout", ["data=1", "tensor=4", "tensor=16"])
def test_parameters_and_flops_follow_from_the_products(name: str, layout: str) -> None:
    """Widths of inputs and outputs, once as what multiplies a token, and once as the shape of a weight."""
    model, parsed, work = ModelConfig.load(name), Layout.parse(layout), Workload(1, 64)
    s = Symbols.of(model, parsed, work)
    found = predict(model, parsed, work)
    held, computed = terms(found, "parameters"), terms(found, "matmul", phase="forward")
    for product in products(s):
        size = product.enters.size * product.leaves.size
        assert computed[product.name] == 2 * s.L * s.T * size
        # With fewer key/value heads than ranks a rank holds all of them and computes one.
        copies = s.K if product.shared else 1
        assert held[product.name] == 4 * s.L * size * copies
        assert s.D in (product.enters.size, product.leaves.size)
