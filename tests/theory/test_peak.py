"""The estimate of the peak: which moment it comes in, and what is there then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.spec.ledger import Ledger
from jaxllm.spec.validate import default_batch
from jaxllm.theory.predict import of_symbols
from jaxllm.theory.symbols import Symbols

MODEL = ModelConfig.load("llama-3-8b")
TOKENS = 8192


def ledger(layout: str, precision: str = "bf16-f32", target: str = "", tokens: int = TOKENS) -> Ledger:
    parsed = Layout.parse(layout)
    return predict(MODEL, parsed, Workload(default_batch(parsed), tokens, precision), target=target)


def at_peak(found: Ledger) -> dict[str, int]:
    return {term.label: term.value for term in found.peak_terms}


def moment(found: Ledger) -> str:
    """The one that the peak comes in."""
    (name,) = {label.split(":")[0] for label in at_peak(found) if ":" in label}
    return name


@pytest.mark.parametrize(
    ("layout", "precision", "tokens", "where"),
    [
        ("data=8,zero=3,remat=full", "bf16-f32", 8192, "attention"),
        ("data=8,zero=3,remat=none", "bf16-f32", 8192, "turn"),
        # Where state and layers are sliced finely the vocabulary counts: whole for long sequences, its weights for short.
        ("data=64,zero=3,remat=full,attention=blockwise", "bf16-f32", 32768, "loss"),
        ("data=64,zero=3,remat=full,attention=blockwise", "bf16-f32", 8192, "ends"),
        ("data=8,zero=3,remat=full,attention=blockwise", "bf16-master", 2048, "feed-forward"),
        ("tensor=8,remat=selective,sequence=true,attention=blockwise", "bf16-master", 8192, "sum"),
        # With hardly any tokens all is weights and their gradients.
        ("data=8,zero=1,remat=full,attention=cudnn", "bf16-master", 512, "update"),
    ],
)
def test_the_peak_comes_in_one_moment(layout: str, precision: str, tokens: int, where: str) -> None:
    found = ledger(layout, precision, tokens=tokens)
    assert moment(found) == where
    assert sum(at_peak(found).values()) == found.peak


def test_gradients_of_a_layer_wait_to_be_reduced_together() -> None:
    layout, work = Layout(data=64, zero=3, remat="full", attention="blockwise"), Workload(64, 2048, "bf16-f32")
    model = ModelConfig.load("llama-3.1-405b")
    found = predict(model, layout, work)
    assert moment(found) == "reduction"
    outer = ("embed", "final_norm", "head")
    sliced = sum(term.value for term in found.line("gradients").terms if term.label not in outer)
    assert at_peak(found)["reduction: gradients of the layer's weights"] == sliced * layout.data // model.layers


def test_xla_gpu_alone_transposes_saved_scores() -> None:
    label = "turn: scores of all layers, transposed"
    found = {target: at_peak(ledger("data=8,zero=3", target=target)).get(label) for target in ("", "gpu", "cpu", "tpu")}
    stacked = MODEL.layers * MODEL.heads * TOKENS**2 * 2
    assert found == {"": stacked, "gpu": stacked, "cpu": None, "tpu": None}


@pytest.mark.parametrize(
    ("layout", "there"),
    [("data=8", 0), ("data=8,zero=2", 0), ("data=8,zero=3", 1), ("data=4,tensor=2", 1), ("data=8,microbatches=2", 2)],
)
def test_the_accumulator_at_the_turn_is_begun_before_where_the_head_has_a_collective(layout: str, there: int) -> None:
    found = ledger(f"{layout},remat=none")
    assert moment(found) == "turn"
    whole = found.line("gradients")
    layers = sum(term.value for term in whole.terms if term.label not in ("embed", "final_norm", "head"))
    assert at_peak(found).get("gradients", 0) == (0, layers, whole.value)[there]


@pytest.mark.parametrize(("tokens", "sequences", "times"), [(32768, 1, 2), (16384, 2, 1)])
def test_xla_tpu_has_the_logits_of_one_sequence_and_their_gradient(tokens: int, sequences: int, times: int) -> None:
    layout, work = Layout.parse("data=64,zero=3,remat=full,attention=blockwise"), Workload(64 * sequences, tokens, "bf16-f32")
    each = {target: predict(MODEL, layout, work, target=target) for target in ("gpu", "tpu")}
    assert {moment(found) for found in each.values()} == {"loss"}
    logits = {target: value for target, found in each.items() for name, value in at_peak(found).items() if "logits" in name}
    assert logits == {"gpu": 32768 * MODEL.vocab * 2, "tpu": times * 32768 * MODEL.vocab * 2}


def test_with_one_microbatch_no_accumulator_is_there_at_the_loss() -> None:
    layout = "data=64,zero=3,remat=full,attention=blockwise"
    once, twice = (ledger(f"{layout},microbatches={count}", tokens=32768) for count in (1, 2))
    assert moment(once) == moment(twice) == "loss"
    assert "gradients" not in at_peak(once)
    assert at_peak(twice)["gradients"] == twice.line("gradients").value


def test_zero_1_has_slices_beside_the_accumulator() -> None:
    found = [at_peak(ledger(f"data=8,zero={zero},remat=full", "bf16-master")) for zero in range(4)]
    slices = [terms.get("attention: slices of the gradients") for terms in found]
    # An eighth of what the accumulator has of the layers; all their dims divide.
    assert slices == [None, found[1]["gradients"] // 8, None, None]
    # XLA:TPU makes room for them when the block has gone.
    assert "attention: slices of the gradients" not in at_peak(ledger("data=8,zero=1,remat=full", "bf16-master", "tpu"))


@pytest.mark.parametrize(
    ("layout", "gpu", "tpu"),
    [
        # In bf16: scores and the gradient of the probabilities, and on XLA:GPU the softmax's derivative in f32.
        ("data=8,zero=3,remat=full", 8, 4),
        ("data=8,zero=1,remat=selective", 8, 4),
        # Probabilities that were computed again wait for the gradient of the values, but under ZeRO 3.
        ("data=8,zero=1,remat=full", 10, 6),
        ("data=8,zero=1,remat=full,save=attention", 8, 4),
        ("data=4,tensor=2,zero=3,remat=full", 10, 4),
        # One head of keys: all in bf16.
        ("tensor=8,remat=full", 8, 6),
    ],
)
def test_bytes_of_a_pair_of_positions(layout: str, gpu: int, tpu: int) -> None:
    parsed = Layout.parse(layout)
    pairs = MODEL.heads // parsed.tensor * TOKENS**2
    for target, each in (("gpu", gpu), ("tpu", tpu)):
        assert at_peak(ledger(layout, target=target))["attention: scores and their gradients"] == each * pairs


@pytest.mark.parametrize(
    ("model", "devices", "each"),
    [
        # Of llama-2-7b's layer on 8 devices v goes with up, on 16 with q and up, on 64 with all.
        ("llama-2-7b", 8, 8), ("llama-2-7b", 16, 10), ("llama-2-7b", 64, 10),
        # With fewer heads of keys nothing waits, though all of a layer is one reduce-scatter.
        ("llama-3-8b", 64, 8),
    ],
)  # fmt: skip
def test_probabilities_wait_where_a_reduce_scatter_does(model: str, devices: int, each: int) -> None:
    config = ModelConfig.load(model)
    layout, work = Layout(data=devices, zero=3, remat="full"), Workload(devices, TOKENS, "bf16-f32")
    for target, bytes_ in (("gpu", each), ("tpu", 4)):
        found = at_peak(predict(config, layout, work, target=target))["attention: scores and their gradients"]
        assert found == bytes_ * config.heads * TOKENS**2


def test_xla_tpu_prepares_the_weights_of_all_layers_before_their_loop() -> None:
    layout, label = "data=8,zero=3,remat=full", "attention: weights, cast or laid out anew"
    terms = {term.label: term.value for term in ledger(layout).line("parameters").terms}
    stacked = {name: value for name, value in terms.items() if name not in ("embed", "head", "final_norm")}
    assert label not in at_peak(ledger(layout, target="gpu"))
    assert at_peak(ledger(layout, target="tpu"))[label] == sum(stacked.values()) // 2  # in bf16 what is held in f32
    assert at_peak(ledger(layout, "bf16-master", target="tpu"))[label] == stacked["q"] // 2
    assert label not in at_peak(ledger("data=8,zero=3,remat=selective", "bf16-master", target="tpu"))
    work = Workload(8, TOKENS, "bf16-master")
    wide = predict(ModelConfig.load("llama-2-7b"), Layout(data=8, remat="full"), work, target="tpu")
    terms = {term.label: term.value for term in wide.line("parameters").terms}
    assert at_peak(wide)[label] == terms["q"] + terms["k"] + terms["v"]


def test_no_line_depends_on_the_target() -> None:
    for layout in ("data=8,zero=1", "data=8,zero=3,remat=full"):
        assert ledger(layout, target="gpu").lines == ledger(layout, target="tpu").lines == ledger(layout).lines


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_arrays_of_layouts_have_the_peaks_of_each(target: str) -> None:
    layouts = [
        Layout(data=4, tensor=2, zero=zero, remat="full", sequence=sequence, microbatches=microbatches)
        for zero in range(4)
        for sequence in (False, True)
        for microbatches in (1, 4)
    ]
    workload = Workload(16, TOKENS, "bf16-f32")
    each = [Symbols.of(MODEL, layout, workload) for layout in layouts]
    arrays = {name: np.array([getattr(s, name) for s in each]) for name in ("z", "q", "m", "b")}
    found = of_symbols(replace(each[0], **arrays), target)
    assert found.peak.tolist() == [predict(MODEL, layout, workload, target=target).peak for layout in layouts]
    assert sum(np.broadcast_to(term.value, len(layouts)) for term in found.peak_terms).tolist() == found.peak.tolist()
