"""The closed form against the papers' own figures, and against itself over arrays of layouts."""

from __future__ import annotations

import dataclasses
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.spec import activations
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.optimizers import OPTIMIZERS
from jaxllm.spec.workload import Workload
from jaxllm.theory import predict
from jaxllm.theory.predict import of_symbols
from jaxllm.theory.symbols import Symbols

TINY = ModelConfig.load("llama-tiny")

# A Llama of the size of the model in Figure 1 of the ZeRO paper (7.5 billion parameters).
FIGURE_1 = dataclasses.replace(
    ModelConfig.load("llama-2-7b"), name="7.5b", layers=36, d_ff=10880, vocab=32000
)


def ledger(layout: str, model: ModelConfig = TINY, precision: str = "f32", sequences: int = 1, tokens: int = 64) -> Ledger:
    parsed = Layout.parse(layout)
    batch = sequences * parsed.replica * parsed.data * parsed.microbatches
    return predict(model, parsed, Workload(batch, tokens, precision))


def state_gb(found: Ledger) -> float:
    return sum(found.line(name).value for name in ("parameters", "gradients", "optimizer")) / 1e9


def wire(found: Ledger, *axes: str) -> int:
    """Wire bytes over exactly these axes, scalars left out."""
    return sum(line.wire for line in found.section("collectives") if line.axes == axes and line.value > 16)


def test_figure_1_of_the_zero_paper() -> None:
    # Rajbhandari et al. 2020, Figure 1: 120, 31.4, 16.6 and 1.9 GB for 7.5 B parameters on 64 devices.
    assert FIGURE_1.parameters == pytest.approx(7.5e9, rel=2e-3)
    found = [state_gb(ledger(f"data=64,zero={stage}", FIGURE_1, "bf16-master")) for stage in range(4)]
    scale = 7.5e9 / FIGURE_1.parameters
    assert [round(gb * scale, 1) for gb in found] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_communication_volume_of_the_zero_paper(stage: int, volume: int) -> None:
    # Section 7: 2 Psi for plain data parallelism and stages 1 and 2, 3 Psi for stage 3; in rings, (n-1)/n of each.
    # What stage 3 gathers but once, embedding, final norm and head, is the difference to three.
    n = 8
    found = ledger(f"data={n},zero={stage}")
    table = TINY.parameter_table()
    once = table["embed"] + table["head"] + table["final_norm"]
    elements = volume * TINY.parameters - (once if stage == 3 else 0)
    assert wire(found, "data") * n == elements * 4 * (n - 1)


def test_one_device_holds_the_whole_model_and_sends_nothing() -> None:
    found = ledger("data=1")
    assert found.line("parameters").value == 4 * TINY.parameters
    assert found.line("optimizer").value == 8 * TINY.parameters + 4
    assert found.section("collectives") == ()


@pytest.mark.parametrize(("precision", "held", "optimizer", "gradients"), [
    ("f32", 4, 8, 4),
    ("bf16-f32", 4, 8, 4),
    ("bf16-master", 2, 12, 2),
])  # fmt: skip
def test_bytes_a_parameter_by_precision(precision: str, held: int, optimizer: int, gradients: int) -> None:
    found = ledger("data=1", precision=precision)
    assert found.line("parameters").value == held * TINY.parameters
    assert found.line("optimizer").value == optimizer * TINY.parameters + 4
    assert found.line("gradients").value == gradients * TINY.parameters


@pytest.mark.parametrize("layout", ["tensor=2", "tensor=8", "data=4,tensor=2,zero=3,microbatches=4"])
def test_megatron_sums_twice_a_block_each_way(layout: str) -> None:
    # Shoeybi et al. 2019, section 3; one more for the embedding forward, and for the head backward.
    parsed = Layout.parse(layout)
    found = ledger(layout, precision="bf16-f32")
    for phase in ("forward", "backward"):
        line = found.line("all-reduce", axes=("tensor",), phase=phase, dtype="bf16")
        assert line.count == (2 * TINY.layers + 1) * parsed.microbatches
        assert line.value == line.count * 64 * TINY.d_model * 2


def test_forward_flops_are_two_for_each_weight_and_token() -> None:
    tokens = 64
    weights = TINY.parameters - TINY.parameter_table()["embed"] - (2 * TINY.layers + 1) * TINY.d_model
    attention = 2 * TINY.layers * 2 * tokens * TINY.heads * TINY.head_dim  # scores and their product with the values
    found = ledger("data=1")
    assert found.line("matmul", phase="forward").value == tokens * (2 * weights + attention)
    assert found.line("matmul", phase="backward").value == 2 * found.line("matmul", phase="forward").value


def test_full_recomputation_leaves_out_the_last_matmul_of_a_block() -> None:
    found = ledger("data=1,remat=full")
    down = 2 * 64 * TINY.layers * TINY.d_model * TINY.d_ff
    head = 2 * 64 * TINY.d_model * TINY.vocab
    recomputed = found.line("matmul", phase="recompute").value
    assert recomputed == found.line("matmul", phase="forward").value - down - head
    with pytest.raises(KeyError):
        ledger("data=1").line("matmul", phase="recompute")


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_what_is_not_saved_is_computed_again(family: str) -> None:
    model = TINY if family == "llama" else ModelConfig.load("gpt-tiny")
    square = model.layers * 2 * 64 * 64 * model.heads * model.head_dim
    names = activations.BY_FAMILY[family]
    widths = {term.label: term.value for term in ledger("data=1", model).line("residuals").terms}
    assert set(widths) == {"block input", *names}
    forward = {term.label: term.value for term in ledger("data=1", model).line("matmul", phase="forward").terms}
    for kept in (*itertools.combinations(names, 1), names[:3], names[3:]):
        found = ledger(f"data=1,remat=full,save={'+'.join(kept)}", model)
        assert found.line("residuals").value == widths["block input"] + sum(widths[name] for name in kept)
        again = [name for name in names if name not in kept]
        # What is added to the residual stream is the product of `o`.
        assert found.line("matmul", phase="recompute").value == sum(
            forward["o" if name == "residual" else name] for name in again
        )
    selective = ledger("data=1,remat=selective", model)
    assert selective.line("matmul", phase="recompute").value == square
    assert selective.line("residuals").value == sum(widths.values()) - widths["scores"]
    with pytest.raises(KeyError):  # all of it saved is nothing computed again
        ledger(f"data=1,remat=full,save={'+'.join(names)}", model).line("matmul", phase="recompute")


def test_selective_recomputation_saves_what_korthikanti_says() -> None:
    # Korthikanti et al. 2022, section 5: without the attention square nothing grows with the square of the sequence.
    one, two = (ledger("data=1,remat=selective", tokens=tokens).line("residuals").value for tokens in (32, 64))
    assert two == 2 * one


def test_attention_square_of_korthikanti() -> None:
    # Korthikanti et al. 2022, section 4.1: 2 a s^2 b bytes for the attention square saved in 16 bits.
    short, long = (ledger("data=1", precision="bf16-f32", tokens=tokens).line("residuals").value for tokens in (32, 64))
    assert long - 2 * short == TINY.layers * 2 * TINY.heads * (64 * 64 - 2 * 32 * 32)


def test_attention_block_by_block_saves_its_statistics_in_the_place_of_the_square() -> None:
    # Dao 2023, section 3.1: beside q, k, v and the output one number for each query and head.
    whole, blocks = (ledger(f"data=1,attention={kind}", precision="bf16-f32").line("residuals") for kind in ("xla", "blockwise"))
    terms, others = ({term.label: term.value for term in line.terms} for line in (blocks, whole))
    assert terms.pop("lse") == TINY.layers * 64 * TINY.heads * 4
    assert others.pop("scores") == TINY.layers * 64 * 64 * TINY.heads * 2
    assert terms == others
    # With remat=full they are saved with the output, and only with it.
    for save, labels in (("qkv", {"q", "k", "v"}), ("attention", {"attention", "lse"})):
        found = ledger(f"remat=full,save={save},attention=blockwise").line("residuals")
        assert {term.label for term in found.terms} == {"block input", *labels}


@pytest.mark.parametrize("tokens", [32, 64, 65, 200])
def test_attention_block_by_block_multiplies_pairs_of_blocks(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.spec.attention.LONGEST_BLOCK", 32)
    long = dataclasses.replace(TINY, max_sequence=tokens)
    number = -(-tokens // 32)
    size = -(-tokens // number)
    # Pairs in which a query meets a key of its past, in whole blocks; two products, and of all heads.
    pairs = sum(1 for i in range(number) for j in range(number) if i >= j)
    one = long.layers * pairs * size * size * 2 * long.heads * long.head_dim
    square = long.layers * tokens * tokens * 2 * long.heads * long.head_dim
    for remat, again in (("none", 0), ("selective", 0), ("full", 2), ("full,save=qkv", 2), ("full,save=attention", 0)):
        blocks, whole = (
            {line.phase: line.value for line in ledger(f"remat={remat},attention={kind}", long, tokens=tokens).section("flops")}
            for kind in ("blockwise", "xla")
        )
        assert whole["forward"] - blocks["forward"] == 2 * (square - one)
        # Dao 2023, section 2.3.2: five products backward, the scores again and four gradients.
        assert whole["backward"] - blocks["backward"] == 4 * square - 5 * one
        terms = [line.terms for line in ledger(f"remat={remat},attention=blockwise", long, tokens=tokens).section("flops")
                 if line.phase == "recompute"]  # fmt: skip
        attention = [term.value for found in terms for term in found if term.label in ("scores", "attention")]
        assert sum(attention) == again * one


def test_no_square_is_at_the_peak_of_attention_block_by_block() -> None:
    long = dataclasses.replace(ModelConfig.load("llama-3-8b"), max_sequence=1 << 20)
    short, double = (ledger("remat=full,attention=blockwise", long, tokens=tokens) for tokens in (1 << 18, 1 << 19))
    growth = double.peak - short.peak
    later = ledger("remat=full,attention=blockwise", long, tokens=1 << 20).peak - double.peak
    assert later == 2 * growth  # linear, once the logits are more than the gradients
    assert ledger("remat=full", long, tokens=1 << 17).peak > 5 * double.peak


def test_devices_together_hold_what_one_would() -> None:
    whole = ledger("data=1")
    for layout in ("tensor=8", "data=8,zero=3", "data=4,tensor=2,zero=3"):
        found = ledger(layout)
        held = 8 * found.line("parameters").value
        norms = 4 * (2 * TINY.layers + 1) * TINY.d_model  # tensor parallelism keeps norms whole
        copies = Layout.parse(layout).tensor - 1
        assert held == whole.line("parameters").value + copies * norms


def test_few_key_value_heads_are_held_by_every_rank() -> None:
    few = dataclasses.replace(TINY, kv_heads=2)
    found = ledger("tensor=8", few)
    terms = {term.label: term.value for term in found.line("parameters").terms}
    assert terms["k"] == terms["v"] == 4 * few.layers * few.d_model * 2 * few.head_dim
    shared = next(t for t in found.line("all-reduce", phase="backward", axes=("tensor",)).terms if t.label == "gradient of k")
    assert shared.value == terms["k"]


def test_the_vocabulary_is_padded_to_the_tensor_degree() -> None:
    odd = dataclasses.replace(TINY, vocab=509)
    found = ledger("tensor=4", odd)
    # 3 rows more than 509 over 4 ranks, in embedding and head, held in 4 bytes and in the 8 of Adam's moments
    assert found.line("padding").value == sum(
        512 // 4 * odd.d_model * size - 509 * odd.d_model * size // 4 for size in (4, 8) for _ in range(2)
    )
    assert ledger("tensor=1", odd).line("padding").value == 0


def test_what_no_dim_divides_stays_whole_and_is_all_reduced() -> None:
    found = ledger("data=3,zero=3")  # neither 128 nor any other dim is a multiple of 3
    assert found.line("parameters").value == 4 * TINY.parameters
    assert {line.name for line in found.section("collectives")} == {"all-reduce"}


def test_hybrid_sharding_reduces_slices_over_replica() -> None:
    found = ledger("replica=2,data=4,zero=2")
    assert found.line("all-reduce", axes=("replica",), phase="backward").value == 4 * TINY.parameters // 4


def test_microbatches_repeat_what_zero_2_and_3_reduce() -> None:
    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        kind = "reduce-scatter" if stage else "all-reduce"
        one, four = (
            ledger(f"data=8,zero={stage},microbatches={m}").line(kind, phase="backward", axes=("data",)).value
            for m in (1, 4)
        )
        assert four == times * one


def test_plain_autodiff_is_measured_and_not_predicted() -> None:
    found = ledger("data=8,zero=3,remat=jax")
    assert found.peak is None
    assert found.line("residuals").value is None
    assert found.line("residuals").reason
    assert not found.section("flops") and not found.section("collectives")


def test_terms_add_up_to_their_line() -> None:
    for layout in ("data=2,tensor=2,zero=1", "replica=2,data=2,zero=3,remat=full,microbatches=2", "tensor=4"):
        for line in ledger(layout, precision="bf16-master").lines:
            assert line.value == sum(term.value for term in line.terms), line.label
            assert all(term.detail for term in line.terms)


@pytest.mark.parametrize(("layout", "tokens", "sentence"), [
    ("tensor=3", 64, "does not divide the 16 query heads"),
    ("data=8", 1 << 25, "longer than"),
])  # fmt: skip
def test_what_does_not_divide_is_refused_and_not_rounded(layout: str, tokens: int, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        ledger(layout, tokens=tokens)


def test_fallbacks_are_told_with_their_bytes() -> None:
    (whole,) = ledger("data=3,zero=3").notes
    assert whole.startswith("zero=3 slices no dim of embed, attention_norm, q") and "which 3 divides" in whole
    assert f"{4 * TINY.parameters:,} bytes" in whole
    shared, padded = ledger("tensor=8", dataclasses.replace(TINY, kv_heads=2, vocab=509)).notes
    assert "every rank holds k, v whole" in shared
    assert "509 is padded by 3 rows" in padded
    assert ledger("data=4,tensor=2,zero=3").notes == ()


def test_a_batch_that_leaves_no_whole_sequence_is_refused() -> None:
    with pytest.raises(SpecError, match="batch 6 leaves no whole number"):
        predict(TINY, Layout.parse("data=4"), Workload(6, 64))


degrees = st.sampled_from([1, 2, 3, 4, 8, 16])


@pytest.mark.parametrize("model", [TINY, ModelConfig.load("gpt-tiny")], ids=lambda model: model.name)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_arrays_of_layouts_give_what_each_layout_gives_alone(model: ModelConfig, data: st.DataObject) -> None:
    layouts = [
        Layout(
            replica=data.draw(degrees),
            data=data.draw(degrees),
            tensor=tensor,
            zero=data.draw(st.integers(0, 3)),
            remat=remat,
            save=data.draw(st.sampled_from(["", "qkv", saved])) if remat == "full" else "",
            offload=data.draw(st.sampled_from(["none", "input", "k+input", "optimizer+v"])) if remat != "full" else "none",
            sequence=tensor > 1 and data.draw(st.booleans()),
            attention=attention,
            microbatches=data.draw(st.sampled_from([1, 2, 5])),
        )
        for _ in range(4)
        for tensor in [data.draw(st.sampled_from([1, 2, 4, 8, 16]))]
        for remat in [data.draw(st.sampled_from(["none", "selective", "full"]))]
        for attention, saved in [data.draw(st.sampled_from([("xla", "scores+residual"), ("blockwise", "attention+residual")]))]
    ]
    optimizer = data.draw(st.sampled_from(list(OPTIMIZERS)))
    batches = [2 * layout.replica * layout.data * layout.microbatches for layout in layouts]
    works = [Workload(batch, 64, "bf16-master", optimizer) for batch in batches]
    alone = [Symbols.of(model, layout, work) for layout, work in zip(layouts, works, strict=True)]
    columns = {name: np.array([getattr(s, name) for s in alone]) for name in ("r", "n", "t", "z", "m", "q", "b", "T", "w", "h")}
    columns |= {name: tuple(np.array([getattr(s, name) for s in alone]).T) for name in ("saved", "away")}
    together = of_symbols(dataclasses.replace(alone[0], **columns))
    for index, symbols in enumerate(alone):
        one = of_symbols(symbols)
        for section, name in itertools.product(("memory", "flops", "collectives", "transfers"), (None,)):
            many = np.broadcast_to(together.total(section, name), len(layouts))[index]
            assert many == one.total(section, name)
        assert np.broadcast_to(together.peak, len(layouts))[index] == one.peak
        assert sum(np.broadcast_to(line.wire, len(layouts))[index] for line in together.section("collectives")) == sum(
            line.wire for line in one.section("collectives")
        )


# ---------------------------------------------------------------- formulas as they are printed


def evaluated(formula: str, letters: dict[str, int]) -> Fraction:
    """The value of a formula such as `2 L m b T max(K/t, 1) H, as z = 3`: factors side by side, `/` binds to the left."""
    text = formula.split(", as ")[0].replace("V'", "W")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text)
    text = re.sub(r"\d+", lambda match: f"Fraction({match[0]})", text)
    names = {name.replace("V'", "W"): Fraction(value) for name, value in letters.items()}
    return eval(text, {"Fraction": Fraction, "max": max, **names})


@pytest.mark.parametrize("layout", [
    "data=4,tensor=2,zero=3", "data=4,tensor=2,zero=2,remat=full,microbatches=3", "replica=2,data=2,tensor=16,zero=1",
    "replica=3,tensor=16,zero=3", "data=3,zero=3", "data=8", "data=5,tensor=2,zero=1,remat=full",
    "data=2,tensor=4,zero=2,remat=selective,sequence=true", "tensor=2,remat=full,save=qkv+residual,sequence=true",
    "data=2,tensor=2,zero=1,attention=blockwise", "tensor=4,remat=full,save=attention,sequence=true,attention=blockwise",
])  # fmt: skip
@pytest.mark.parametrize("precision", ["f32", "bf16-f32", "bf16-master"])
@pytest.mark.parametrize("model", [
    dataclasses.replace(TINY, vocab=509, kv_heads=4), dataclasses.replace(ModelConfig.load("gpt-tiny"), vocab=509),
], ids=lambda model: model.name)  # fmt: skip
def test_every_formula_gives_the_value_beside_it(model, layout, precision, monkeypatch):
    monkeypatch.setattr("jaxllm.spec.attention.LONGEST_BLOCK", 24)  # 64 tokens are three blocks of 22
    parsed = Layout.parse(layout)
    workload = Workload(parsed.replica * parsed.data * parsed.microbatches, 64, precision)
    s = Symbols.of(model, parsed, workload)
    letters = {name: getattr(s, name) for name in "L D F N K H V P r n t z m q A C b T p c g o".split()}
    letters["V'"] = -(-s.V // s.t) * s.t
    checked = 0
    for line in predict(model, parsed, workload).lines:
        for term in line.terms:
            value = evaluated(term.detail, letters)
            # Bytes are whole: a slice of a padded vocabulary has a fractional share of real rows.
            assert abs(value - term.value) < 1, (line.label, term.label, term.detail)
            checked += 1
    assert checked > 40
