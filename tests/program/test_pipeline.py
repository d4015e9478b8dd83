"""A pipeline's step: what it copies, what it runs and sends; and that one with a bug in it does not pass.

That every schedule equals the unsharded reference, and its ledger line by line, is in tests/test_grid.py.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxllm.check import build, check, measure
from jaxllm.hlo.graph import read_module
from jaxllm.hlo.loops import executions
from jaxllm.hlo.protos import read
from jaxllm.program import collectives, pipeline
from jaxllm.program.build import arranged, natural
from jaxllm.program.reference import loss as reference_loss
from jaxllm.program.run import LEARNING_RATES, random_batch, random_parameters, run
from jaxllm.program.sharding import is_placement
from jaxllm.schedules import names
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.targets import compiler
from jaxllm.theory import predict
from tests.program.test_run import MODEL, compiled_for

MODEL = dataclasses.replace(MODEL, layers=4)  # 17 tokens divide by nothing: the vocabulary is padded
TIED = dataclasses.replace(MODEL, tied=True)
GPT = dataclasses.replace(ModelConfig.load("gpt-tiny"), layers=4, d_model=16, d_ff=32, heads=4, kv_heads=4, head_dim=4, vocab=17)
MESHES = {"cpu": "cpu:8", "gpu": "h100:8", "tpu": "v5p:2x2x2"}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Attention takes the 8 tokens here in three blocks, of which the last is filled up by one."""
    monkeypatch.setattr("jaxllm.spec.attention.LONGEST_BLOCK", 3)


def workload(layout: Layout, sequence: int = 8, precision: str = "f32") -> Workload:
    return Workload(2 * layout.replica * layout.data * layout.microbatches, sequence, precision)


def built_for(text: str, model: ModelConfig = MODEL):
    layout = Layout.parse(text)
    return build(model, layout, Machine.load(f"cpu:{layout.devices}"), workload(layout), learning_rate=LEARNING_RATES["adamw"])


@functools.cache
def clean(text: str, model: ModelConfig = MODEL):
    built = built_for(text, model)
    return built, compiled_for(built)


# ---------------------------------------------------------------- layers that do not divide, families, both ends


UNEVEN = dataclasses.replace(MODEL, layers=7)
LAYOUTS = [
    ("pipe=4,tensor=2,zero=1,microbatches=4,schedule=zb-h1", UNEVEN),
    ("pipe=2,data=2,zero=3,microbatches=2,schedule=zb-v,remat=full", UNEVEN),
    ("pipe=3,microbatches=3,schedule=dualpipev", UNEVEN),
    ("pipe=2,replica=2,data=2,zero=2,microbatches=3,schedule=zb-h2,partition=memory", dataclasses.replace(TIED, layers=7)),
    ("pipe=2,tensor=2,zero=0,microbatches=2,schedule=zb-v,remat=full,save=qkv+residual,sequence=true", TIED),
    ("pipe=2,tensor=2,data=2,zero=3,microbatches=2,schedule=circular,remat=selective,sequence=true", dataclasses.replace(GPT, tied=False)),
    ("pipe=2,tensor=2,zero=1,microbatches=2,schedule=zb-h1,remat=full,save=attention,attention=blockwise", GPT),
    ("pipe=2,context=2,data=2,zero=2,microbatches=2,schedule=zb-h1,remat=selective,exchange=ulysses", UNEVEN),
]


@pytest.mark.parametrize(("text", "model"), LAYOUTS, ids=[text for text, _ in LAYOUTS])
def test_a_pipeline_agrees_with_the_reference_and_its_ledger(text, model):
    layout = Layout.parse(text)
    comparison = check(model, layout, Machine.load(f"cpu:{layout.devices}"), workload(layout), run=True)
    bad = [f"{row.label}: {row.predicted} {row.compiled} {row.predicted_stages} {row.compiled_stages}"
           for row in comparison.rows if row.status != "equal"]  # fmt: skip
    assert not bad and not comparison.unexplained
    assert 1e-8 < comparison.run.max_relative_error <= 1e-5


def test_the_loss_of_forward_cells_alone_is_that_of_the_reference():
    for text, model in LAYOUTS[:2] + LAYOUTS[-1:]:
        built = built_for(text, model)
        rng = np.random.default_rng(0)
        parameters = random_parameters(model, rng)
        batch = random_batch(model, built.workload.batch, built.workload.sequence, rng)
        like, _, rows = built.arguments
        put = lambda x, place, leaf: jax.device_put(arranged(x, place, leaf), leaf.sharding)  # noqa: E731
        on_mesh = jax.tree.map(put, parameters, built.places, like)
        split = jax.tree.map(lambda x, leaf: jax.device_put(x.reshape(leaf.shape), leaf.sharding), batch, rows)
        with jax.set_mesh(built.mesh):
            found = float(built.loss(on_mesh, split))
        assert found == pytest.approx(float(reference_loss(model, parameters, batch)), rel=1e-5)


def test_what_the_stages_hold_is_what_the_model_has():
    for text, model in LAYOUTS:
        built = built_for(text, model)
        parameters = random_parameters(model, np.random.default_rng(1))
        whole = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731, ARG005
        like = jax.tree.map(whole, built.arguments[0], built.places)
        held = jax.tree.map(arranged, parameters, built.places, like)
        assert all(held["embed"].shape[0] == built.layout.pipe for _ in [0])
        back = jax.tree.map(lambda x, place: natural(jnp.asarray(x), place), held, built.places)
        jax.tree.map(np.testing.assert_array_equal, back, parameters)
        rows = next(iter(jax.tree.leaves(built.places["layers"], is_leaf=is_placement))).rows
        assert sorted(row for row in rows if row >= 0) == list(range(model.layers))


# ---------------------------------------------------------------- one bug each


def run_with(monkeypatch, text, model, *patch):
    built, _ = clean(text, model)
    monkeypatch.setattr(*patch)
    mutant = compiled_for(built_for(text, model))
    monkeypatch.undo()
    return run(built, mutant)


def no_exchange():
    return pipeline, "_exchanged", lambda gradient, stages: gradient


def counted_twice():
    return pipeline, "_counted_once", lambda reduced, config, stages: reduced


def sent_the_wrong_way():
    right = pipeline.neighbours
    return pipeline, "neighbours", lambda schedule: right(schedule)[::-1]


def changed(name, change):
    """The table with one of its columns changed."""
    right = pipeline.table

    def table(stages, steps):
        rows = right(stages, steps).copy()
        column = pipeline.COLUMNS.index(name)
        rows[..., column] = change(rows[..., column])
        return rows

    return pipeline, "table", table


def one_slot():
    return changed("stash_slot", lambda slots: 0 * slots)


def other_rows():
    return changed("weight_slot", lambda slots: 0 * slots)


def nothing_handed_on():
    return changed("from_self", lambda slots: 0 * slots - 1)


def no_weight_steps():
    return changed("weights", lambda turns: 0 * turns)


def no_embedding_gradient():
    return changed("lookup", lambda turns: 0 * turns)


def other_microbatch():
    return changed("microbatch", lambda numbers: numbers ^ 1)


def no_reduction_over_data():
    def scattered(x, axes, dim):
        names = collectives.present(axes)
        first = lax.axis_index(names) == 0
        return lax.psum_scatter(jnp.where(first, x, 0), names, scatter_dimension=dim, tiled=True)

    return collectives, "scattered_total", scattered


ONE_F_ONE_B = "pipe=2,data=2,zero=1,microbatches=4,schedule=1f1b"
SPLIT = "pipe=2,microbatches=4,schedule=zb-h2"
MUTATIONS = [
    (no_exchange, ONE_F_ONE_B, TIED, "change/embed"),
    (counted_twice, ONE_F_ONE_B, TIED, "gradient_norm/1"),
    (sent_the_wrong_way, ONE_F_ONE_B, MODEL, "loss/1"),
    (one_slot, ONE_F_ONE_B, MODEL, "change/layers.q"),
    (no_reduction_over_data, ONE_F_ONE_B, MODEL, "change/layers.q"),
    (no_embedding_gradient, ONE_F_ONE_B, MODEL, "change/embed"),
    (other_microbatch, ONE_F_ONE_B, MODEL, "loss/1"),
    (other_rows, SPLIT, MODEL, "change/layers.down"),
    (nothing_handed_on, SPLIT, MODEL, "gradient_norm/1"),
    (no_weight_steps, SPLIT, MODEL, "change/layers.gate"),
]


@pytest.mark.parametrize(("mutation", "text", "model", "shown"), MUTATIONS, ids=[row[0].__name__ for row in MUTATIONS])
def test_a_mutation_disagrees(mutation, text, model, shown, monkeypatch):
    if mutation is other_microbatch:  # consistently another one is the same sum in another order
        patch = changed("microbatch", lambda numbers: numbers // 2)
    else:
        patch = mutation()
    result = run_with(monkeypatch, text, model, *patch)
    assert not result.agrees
    assert result.errors[shown] > 0.01, result.errors[shown]


def measured_with(text, model, monkeypatch, *patch):
    layout = Layout.parse(text)
    monkeypatch.setattr(*patch)
    mutant = build(model, layout, Machine.load(f"cpu:{layout.devices}"), workload(layout))
    ledger = measure(compiler.compile(compiler.lower(mutant)))
    monkeypatch.undo()
    return predict(model, layout, workload(layout)), ledger


def test_idle_ticks_that_compute_change_no_loss_and_the_ledger_shows_them(monkeypatch):
    """What GPipe by autodiff of a scan does: every stage computes at every tick and throws away what is not needed."""

    def always(cell, loop, body, carried):
        return jax.tree.map(lambda new, old: jnp.where(cell[loop] > 0, new, old), body(cell, carried), carried)

    predicted, found = measured_with(SPLIT, MODEL, monkeypatch, pipeline, "gate", always)
    for phase in ("forward", "backward"):
        assert found.line("matmul", phase=phase).value > 1.2 * predicted.line("matmul", phase=phase).value


def test_a_permute_that_nobody_needs_changes_no_loss_and_the_ledger_shows_it(monkeypatch):
    right = pipeline._kept

    def kept(buffer, slot, value):
        more = lax.ppermute(value, "pipe", [(0, 1), (1, 0)])
        return right(buffer, slot, value + jnp.where(slot < -1, more, 0))

    predicted, found = measured_with(SPLIT, MODEL, monkeypatch, pipeline, "_kept", kept)
    sums = [sum(line.value for line in ledger.lines if line.name == "permute") for ledger in (predicted, found)]
    assert sums[1] > sums[0]


# ---------------------------------------------------------------- what the compilers make of it


LARGE = dataclasses.replace(ModelConfig.load("llama-tiny"), layers=16, d_model=128, d_ff=256, vocab=640)


@functools.cache
def dumped(target: str, text: str):
    layout, mesh = Layout.parse(text), Machine.load(MESHES[target])
    built = build(LARGE, layout, mesh, workload(layout, 64, "f32" if target == "cpu" else "bf16-f32"))
    compiled = compiler.compile(compiler.lower(built))
    from jaxllm.check import dump_of

    dump = dump_of(compiled)
    return compiled, *(read_module(read(path).hlo_module) for path in (dump.partitioned, dump.optimized))


COPIED = [(target, text) for target in MESHES for text in (
    "pipe=2,data=2,tensor=2,zero=1,microbatches=8,schedule=zb-v",
    "pipe=4,data=2,zero=2,microbatches=8,schedule=1f1b",
)]  # fmt: skip


@pytest.mark.parametrize(("target", "text"), COPIED)
def test_no_tick_copies_a_stash_or_an_accumulator(target, text):
    """Of the stacks behind the fences of stash, weight_stash and gradients none is copied inside of a loop."""
    _, partitioned, optimized = dumped(target, text)
    runs = executions(partitioned)
    buffers = {
        leaf.dims
        for computation, instruction in partitioned.by_opcode["opt-barrier"]
        for context in runs.of(computation)
        if {"stash", "weight_stash", "gradients"} & set(context.op_name(instruction).split("/"))
        for leaf in instruction.shape.leaves
        if leaf.size >= 16 * 128 and len(leaf.dims) > 2  # embedding and head are no stacks, and matmuls transpose them
    }
    assert len(buffers) >= 5
    runs = executions(optimized)
    copies = [
        f"{instruction.name} {leaf} in {computation.name}"
        for computation, instruction in optimized.instructions()
        for context in runs.of(computation)[:1]
        if context.trips and (instruction.opcode in ("copy", "copy-start") or instruction.name.startswith("copy"))
        for leaf in instruction.shape.leaves
        # A TPU moves what is as small as here into its on-chip memory and back, which is no copy beside the buffer.
        if leaf.dims in buffers and len({part.memory_space for part in _moved(computation, instruction)}) == 1
    ]
    assert copies == []


ONE_EACH = "pipe=8,microbatches=8,schedule=dualpipev"  # chunks of one layer, and a weight stash of one slot


@pytest.mark.parametrize("target", MESHES)
def test_a_tick_does_nothing_large_outside_of_its_cells(target):
    """Neither slices of the weights nor a matmul is taken out of the gates, to where every stage has it at every tick."""
    compiled, _, optimized = dumped(target, ONE_EACH)
    assert [note for note in measure(compiled).notes if "matmuls" in note] == []
    runs = executions(optimized)
    bodies = [  # of the loop over ticks, whose body may be there twice: it has loops inside of it and is in none itself
        computation
        for computation in optimized.computations.values()
        if any(instruction.opcode == "while" for instruction in computation.instructions)
        and [len(context.trips) for context in runs.of(computation)] == [1]
    ]
    assert bodies
    sent = (2, 64, 128)  # (b, t, D), and the inbox holds a few
    large = [
        f"{instruction.name} {leaf}"
        for body in bodies
        for instruction in body.instructions
        # XLA:CPU puts a loop that is small into a call
        if instruction.opcode not in ("while", "call", "parameter", "get-tuple-element", "tuple", "bitcast", "copy-start", "copy-done")
        for leaf in instruction.shape.leaves
        if leaf.size > np.prod(sent) and leaf.dims[1:] != sent
    ]
    assert large == []


def test_a_matmul_that_a_compiler_takes_out_of_its_gate_is_noted(monkeypatch):
    _, ledger = measured_with(ONE_EACH, dataclasses.replace(MODEL, layers=16), monkeypatch, pipeline, "_here", lambda x, _: x)
    (note, *others) = [note for note in ledger.notes if "matmuls" in note]
    assert note.startswith("emitted: matmuls of ") and " on stage 0, where the partitioned program has " in note
    assert len(others) == 7


def _moved(computation, instruction):
    """What a copy reads and writes, as shapes."""
    return [*instruction.shape.leaves, *(o.shape for o in computation.operands(instruction) if o.shape.dtype != "tuple")]


@pytest.mark.parametrize("target", MESHES)
def test_a_weight_step_neither_waits_for_a_permute_nor_holds_one_up(target):
    """So that what travels may do so while weights' gradients are computed."""
    _, module, _ = dumped(target, "pipe=2,data=2,tensor=2,zero=1,microbatches=8,schedule=zb-v")
    permutes = [place for place in module.by_opcode["collective-permute"] if executions(module).of(place[0])[0].trips]
    (body,) = {computation.id: computation for computation, _ in permutes}.values()
    sent = {instruction.id for _, instruction in permutes}

    def before(instruction):
        """All that an instruction waits for."""
        waiting, seen = [instruction], set()
        while waiting:
            for operand in body.operands(waiting.pop()):
                if operand.id not in seen:
                    seen.add(operand.id)
                    waiting.append(operand)
        return seen

    waits = {instruction.id: before(instruction) for _, instruction in permutes}
    free = [
        loop
        for loop in body.instructions
        if loop.opcode == "while" and not before(loop) & sent and all(loop.id not in seen for seen in waits.values())
    ]
    products = [sum(i.opcode == "dot" for part in module.called(loop) for i in _inside(module, part)) for loop in free]
    assert sorted(products) == [0, 7]  # the embedding's gradient is a scatter; a block of a Llama has seven matrices


def _inside(module, computation):
    for instruction in computation.instructions:
        yield instruction
        for called in module.called(instruction):
            yield from _inside(module, called)


# ---------------------------------------------------------------- by closed form


@pytest.mark.parametrize("schedule", names())
def test_the_stash_is_flat_in_microbatches_but_for_schedules_that_run_all_forward_first(schedule):
    stash = [
        predict(LARGE, layout, workload(layout)).line("stash").value
        for layout in (Layout(pipe=4, microbatches=count, schedule=schedule) for count in (8, 16, 32))
    ]
    if schedule in ("gpipe", "circular"):
        assert stash[1:] == [2 * stash[0], 4 * stash[0]]
    else:
        assert stash[0] == stash[1] == stash[2]


def test_a_stash_holds_no_weights():
    """Its slots are as large as the batch makes them: without sequences there is nothing."""
    for schedule in names():
        layout = Layout(pipe=4, microbatches=4, schedule=schedule)
        one, two = (
            predict(LARGE, layout, Workload(4 * count, 64)).section("memory") for count in (1, 2)
        )
        for small, large in zip(one, two, strict=True):
            if small.name in ("stash", "weight_stash", "inbox"):
                assert large.value == 2 * small.value
