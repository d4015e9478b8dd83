"""A ledger by parts of the model: what the parts have is what the ledger has, and each has what is its own."""

from __future__ import annotations

import pytest

from jaxllm import Layout, ModelConfig, Workload, predict
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import TO_DEVICE, TO_HOST
from jaxllm.theory.partition import stages_of
from jaxllm.theory.parts import DEPTHS, FIGURES, Part, parts
from jaxllm.theory.predict import of_symbols
from jaxllm.theory.symbols import Symbols

LAYOUTS = [
    "data=8", "data=4,tensor=2,zero=3,remat=full,microbatches=2", "replica=2,data=2,tensor=2,zero=1,sequence=true",
    "tensor=8,remat=selective", "pipe=4,data=2,zero=2,microbatches=4,schedule=zb-h1",
    "pipe=2,tensor=4,microbatches=3,schedule=dualpipev,sequence=true",
    "data=8,zero=3,offload=optimizer+parameters", "data=8,remat=full,offload=optimizer+input+qkv",
    "pipe=2,data=4,zero=1,offload=optimizer,microbatches=2",
]  # fmt: skip


def found(model: str, text: str, by: str = "layer", tokens: int = 64) -> tuple[tuple[Part, ...], object]:
    config, layout = ModelConfig.load(model), Layout.parse(text)
    workload = Workload(2 * layout.replica * layout.data * layout.microbatches, tokens)
    return parts(config, layout, workload, by), predict(config, layout, workload)


def total(of: tuple[Part, ...], figure: str, stage: int | None = None) -> int:
    return sum(getattr(part, figure) for part in of if stage in (None, part.stage))


@pytest.mark.parametrize("by", DEPTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["llama-tiny", "gpt-tiny"])
def test_the_parts_have_what_the_ledger_has(model, layout, by):
    of, ledger = found(model, layout, by)
    for stage in sorted({part.stage for part in of if part.stage is not None}) or [None]:
        value = lambda line, stage=stage: line.value if stage is None else line.on_stage(stage)  # noqa: E731
        for phase in ("forward", "recompute", "backward"):
            lines = [line for line in ledger.section("flops") if line.phase == phase]
            assert total(of, phase, stage) == sum(map(value, lines))
        for name in ("parameters", "gradients", "optimizer"):
            assert total(of, name, stage) == value(ledger.line(name))
        saved = [line for line in ledger.section("memory") if line.name in ("residuals", "stash", "weight_stash")]
        assert total(of, "activations", stage) == sum(map(value, saved))
        of_device = [line for line in ledger.section("memory") if line.name != "host"]
        assert sum(part.held for part in of if part.stage == stage) == sum(map(value, of_device))
        assert total(of, "host", stage) == sum(value(line) for line in ledger.section("memory") if line.name == "host")
        for figure, name in (("to_device", TO_DEVICE), ("to_host", TO_HOST)):
            copied = [line for line in ledger.section("transfers") if line.name == name]
            assert total(of, figure, stage) == sum(map(value, copied))
        if stage is None:
            assert total(of, "sent") == sum(line.wire for line in ledger.section("collectives"))
    config, parsed = ModelConfig.load(model), Layout.parse(layout)
    stages = stages_of(config, parsed, Workload(2 * parsed.replica * parsed.data * parsed.microbatches, 64))
    if stages is not None:  # each stage's own wire bytes: of the largest stage they are what the ledger has
        s = Symbols.of(config, parsed, Workload(2 * parsed.replica * parsed.data * parsed.microbatches, 64))
        for stage in range(parsed.pipe):
            sent = [line.wire for line in of_symbols(s.on_stage(stages, stage)).section("collectives")]
            assert total(of, "sent", stage) == sum(map(int, sent))


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_blocks_are_alike_and_their_halves_are_the_block(layout):
    layers, modules = found("llama-tiny", layout)[0], found("llama-tiny", layout, "module")[0]
    (block,) = (part for part in layers if part.name == "block")
    halves = [part for part in modules if part.name.startswith("block.")]
    assert block.times == ModelConfig.load("llama-tiny").layers and len(halves) == 2
    for figure in FIGURES:
        assert getattr(block, figure) == sum(getattr(half, figure) for half in halves)
        assert getattr(block, figure) % block.times == 0
    assert [part.name for part in layers] == ["embedding", "block", "head", "step"]


def test_the_embedding_multiplies_nothing_and_the_head_what_it_should():
    config = ModelConfig.load("llama-2-7b")
    of = {part.name: part for part in parts(config, Layout.parse("data=8"), Workload(8, 4096, "bf16-f32"))}
    table = config.vocab * config.d_model
    assert (of["embedding"].parameters, of["embedding"].forward, of["embedding"].backward) == (4 * table, 0, 0)
    assert of["head"].parameters == 4 * (table + config.d_model)
    assert of["head"].forward == 2 * 4096 * table
    # The gradient of each block's input is needed, the first one's by the embedding: all go twice as far back as forward.
    assert of["block"].backward == 2 * of["block"].forward
    # Attention's products and its two squares (Narayanan et al. 2021, appendix).
    by_module = {part.name: part for part in parts(config, Layout.parse("data=8"), Workload(8, 4096, "bf16-f32"), "module")}
    d = config.d_model
    assert by_module["block.attention"].forward == 32 * 4096 * (2 * 4 * d * d + 2 * 2 * 4096 * d)


def test_stages_have_their_own_ends_and_room_for_those_of_others():
    of, _ = found("llama-tiny", "pipe=4,microbatches=4")
    names = [[part.name for part in of if part.stage == stage and part.parameters] for stage in range(4)]
    assert names == [["embedding", "block"], ["block"], ["block"], ["block", "head"]]
    room = [total(tuple(part for part in of if part.name == "other stages"), "other", stage) for stage in range(4)]
    assert room[1] == room[2] > room[0] > 0


def test_bad_input_is_refused_as_predict_does():
    bad = (
        ("data=8", 3, "layer", "leaves no whole number"), ("tensor=3", 1, "layer", "tensor=3 does not divide"),
        ("remat=jax", 1, "layer", "no closed form"), ("data=1", 1, "x", "known: layer, module"),
    )  # fmt: skip
    for layout, batch, by, says in bad:
        with pytest.raises(SpecError, match=says):
            parts(ModelConfig.load("llama-tiny"), Layout.parse(layout), Workload(batch, 64), by)
