"""Step time: each part by hand, arrays as each layout alone, pipelines as the event simulation, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload
from jaxllm.schedules import make
from jaxllm.schedules.simulation import simulate
from jaxllm.schedules.times import Times
from jaxllm.spec.errors import SpecError
from jaxllm.theory import collectives
from jaxllm.theory.rates import Rates, _of_torus
from jaxllm.theory.symbols import Symbols, stacked
from jaxllm.theory.matmul import product
from jaxllm.theory.time import STREAM, block, bubble, cells_of, of_symbols, step_time
from jaxllm.theory.training import flops_per_token

MODEL = ModelConfig.load("llama-2-7b")
NODES = Machine.load("a100-80:4x8")
WORK = Workload(32, 4096, "bf16-master")
RATES = Rates.of(NODES, WORK)


def symbols(layout: str, batch: int = 32) -> Symbols:
    return Symbols.of(MODEL, Layout.parse(layout), replace(WORK, batch=batch))


def timed(layout: str, mesh: str = "a100-80:4x8", batch: int = 32, **more: object):
    return step_time(MODEL, Layout.parse(layout), Machine.load(mesh), replace(WORK, batch=batch, **more))


# ---------------------------------------------------------------- products and memory


def test_a_product_takes_the_waves_of_its_tiles():
    """108 cores take a tile of 256 x 128 each: 12 x 9 of them are one wave, one more tile is another."""
    wave = 2 * 108 * 256 * 128 * (4096 + RATES.fill) / (RATES.peak * RATES.matmul)
    full = product(RATES, 12 * 256, 4096, 9 * 128, 2)
    assert full == pytest.approx(wave + RATES.kernel, rel=1e-12)
    assert product(RATES, 12 * 256 + 1, 4096, 9 * 128, 2) > 1.2 * full
    # Half a wave of the largest tiles is a whole one of smaller, which are slower.
    assert full / 2 < product(RATES, 6 * 256, 4096, 9 * 128, 2) < 0.7 * full


def test_a_large_product_reaches_its_share_of_the_peak_and_a_thin_one_that_of_memory():
    large = product(RATES, 65536, 16384, 16384, 2)
    assert 0.95 < 2 * 65536 * 16384 * 16384 / large / (RATES.peak * RATES.matmul) <= 1
    thin = product(RATES, 1, 16384, 65536, 2) - RATES.kernel
    assert thin == pytest.approx(2 * (16384 + 16384 * 65536 + 65536) / RATES.memory, rel=1e-12)


def test_what_is_no_product_is_bytes():
    s = symbols("data=32,attention=cudnn")
    of_block = block(s, RATES)
    rows, given = 4096, 3 * 4096 + 4096 + 2 * 11008
    moved = rows * (STREAM * 4096 + 2 * given) * 2 / RATES.memory + 13 * RATES.kernel
    assert of_block.forward.memory == pytest.approx(moved, rel=1e-12)
    assert of_block.again.seconds >= 0 and block(symbols("data=32,remat=none"), RATES).again.seconds == 0
    full = block(symbols("data=32,remat=full"), RATES)
    assert 0.6 < full.again.products / full.forward.products < 1  # the last matmul is not computed again
    assert full.again.memory == pytest.approx(full.forward.memory)


def test_products_in_8_bits_are_as_much_faster_as_the_card_is():
    cards = Machine.load("h100:8")
    wide, narrow = (step_time(MODEL, Layout(data=8), cards, Workload(8, 4096, precision)) for precision in ("bf16-f32", "fp8"))
    assert 1.4 < wide.products / narrow.products < 2 and wide.memory == narrow.memory


# ---------------------------------------------------------------- what travels


def test_tensor_parallelism_over_nvlink_is_waited_for():
    time = timed("data=16,tensor=2,microbatches=2")
    (tensor,) = [each for each in time.traffic if each.axes == ("tensor",)]
    lines = [line for line in collectives.lines(symbols("data=16,tensor=2,microbatches=2")) if line.axes == ("tensor",)]
    wire, count = sum(line.wire for line in lines), sum(line.count for line in lines)
    assert tensor.hidden == 0
    assert tensor.exposed == pytest.approx(wire / RATES.inside + count * (RATES.collective + 2 * RATES.hop), rel=1e-9)


def sent(layout: str, kind: str, axes: str, rates: Rates = RATES) -> float:
    """Seconds of 1 GB on the wire of each device, launches apart."""
    return float(rates.seconds(symbols(layout), kind, (axes,), 1e9, 0))


def test_a_ring_shares_the_network_of_its_nodes():
    near, far = 1e9 / RATES.inside, 1e9 / RATES.between
    assert sent("data=4,tensor=8", "all-reduce", "tensor") == near
    assert sent("data=4,tensor=8", "all-reduce", "data") == far  # each card is in a group of its own
    assert sent("data=32", "all-gather", "data") == max(far / 8, near)  # all eight of a node are in one
    assert sent("data=2,tensor=16", "reduce-scatter", "tensor") == max(far / 8, near)
    assert sent("data=8,tensor=4", "all-gather", "data") == far / 2


def test_what_goes_to_one_other_device_takes_its_own_link():
    far = 1e9 / RATES.between
    assert sent("context=32,attention=blockwise", "permute", "context") == far
    assert sent("data=32", "all-to-all", "data") == pytest.approx(far * 24 / 31)  # what is for other nodes
    assert sent("data=4,tensor=8", "all-to-all", "tensor") == pytest.approx(1e9 / RATES.inside)


def test_a_hop_between_nodes_is_longer_and_rare():
    launched = lambda layout, axes: float(RATES.seconds(symbols(layout), "all-gather", (axes,), 0, 1))  # noqa: E731
    assert launched("data=4,tensor=8", "tensor") == pytest.approx(RATES.collective + 7 * RATES.hop)
    assert launched("data=4,tensor=8", "data") == pytest.approx(RATES.collective + 3 * RATES.far_hop)
    assert launched("data=32", "data") == pytest.approx(RATES.collective + 31 * (7 * RATES.hop + RATES.far_hop) / 8)


@pytest.mark.parametrize(
    ("stride", "extent", "links"),
    [(1, 4, 2), (1, 2, 1), (4, 16, 2), (1, 16, 4), (2, 4, 1), (1, 64, 6), (4, 64, 4), (16, 64, 2), (1, 8, 3)],
)
def test_links_of_a_torus(stride, extent, links):
    assert _of_torus(((4, True), (4, True), (4, True)), 1.0, stride, extent) == links
    assert _of_torus(((4, False), (4, False), (4, False)), 1.0, 1, 64) == 3
    # 16 in a closed ring: a link carries 16/8 of what a device sends.
    assert _of_torus(((16, True),), 1.0, 1, 16, "all-to-all") == 0.5 and _of_torus(((16, True),), 1.0, 1, 16, "permute") == 1
    # Two devices of a chip, and four chips beside them.
    assert _of_torus(((2, False), (2, False), (2, True)), 1.0, 1, 8) == 4


def test_what_zero_gathers_is_hidden_as_far_as_blocks_compute():
    few, many = timed("data=32,zero=3,remat=full"), timed("data=32,zero=0,remat=full")
    (gathered,) = [each for each in few.traffic if each.axes == ("data",)]
    assert gathered.hidden > 20 * gathered.exposed > 0
    (reduced,) = [each for each in many.traffic if each.axes == ("data",)]
    assert reduced.hidden == 0 < reduced.exposed
    # A token each: there is nothing to hide behind.
    short = timed("data=32,zero=3,remat=full", sequence=1)
    assert [each.exposed > each.hidden for each in short.traffic if each.axes == ("data",)] == [True]


def test_a_cut_stream_is_gathered_again_behind_products():
    cut = timed("data=4,tensor=8,sequence=true")
    (tensor,) = [each for each in cut.traffic if each.axes == ("tensor",)]
    assert 0.1 < tensor.hidden / tensor.exposed < 0.5


def test_host_memory_is_billed_by_its_link():
    time = timed("offload=optimizer,remat=full", "a100-80:1", 1)
    copied = 2 * 12 * MODEL.parameters  # m, v and the master copy, there and back
    assert time.host == pytest.approx(copied / 31e9 / Machine.read("a100-80").value("efficiency.inside_node"), rel=1e-3)
    here = timed("remat=full", "a100-80:1", 1)
    assert here.host == 0 and here.optimizer == pytest.approx(time.optimizer)  # the device updates all the same


def test_an_optimizer_that_multiplies_takes_its_time():
    plain, muon = (timed("data=32,zero=1", optimizer=name) for name in ("adamw", "muon"))
    assert muon.optimizer > 3 * plain.optimizer and muon.seconds > plain.seconds and muon.mfu < plain.mfu


def test_microbatches_add_to_an_accumulator():
    """Behind a product's FLOPs, if these take longer."""
    one, many = (block(symbols(f"data=32,microbatches={m}", 32 * m), RATES).weights.products for m in (1, 2))
    assert one == many
    few = replace(WORK, sequence=64)
    one, many = (
        block(Symbols.of(MODEL, Layout(data=32, microbatches=m), replace(few, batch=32 * m)), RATES).weights.products for m in (1, 2)
    )
    assert many - one == pytest.approx(4 * 4096**2 * 2 / RATES.memory + 3 * 4096 * 11008 * 2 / RATES.memory, rel=1e-6)


def test_the_models_own_flops_do_not_depend_on_how_attention_is_computed():
    found = [timed(f"data=32,attention={kind},remat=full") for kind in ("xla", "blockwise", "cudnn")]
    assert len({time.model_flops for time in found}) == 1
    assert found[1].hardware_flops < found[0].hardware_flops < found[2].hardware_flops
    assert found[2].memory < found[0].memory  # a kernel keeps its scores to itself
    assert found[2].model_flops == 32 * 4096 // 32 * flops_per_token(MODEL, 4096)


# ---------------------------------------------------------------- a step


def test_parts_add_up_and_the_interval_is_around_them():
    time = timed("pipe=2,data=2,tensor=8,microbatches=8,remat=full,zero=1")
    assert time.seconds == pytest.approx(sum(time.parts.values()), rel=1e-12)
    low, high = time.interval
    assert low < time.seconds < high and time.seconds / low == pytest.approx(high / time.seconds)
    assert 0 < time.mfu < time.hfu < time.rates.matmul


def test_a_machine_that_nobody_measured_is_less_sure():
    cards = timed("data=32", "h100:4x8"), timed("data=32")
    assert [time.rates.measured for time in cards] == [False, True]
    unsure, sure = (time.interval[1] / time.seconds - 1 for time in cards)
    assert unsure == pytest.approx(2 * sure, rel=0.3) and cards[0].seconds < cards[1].seconds


def test_a_host_that_is_too_slow_is_waited_for():
    small = ModelConfig.load("gpt2")
    time = step_time(small, Layout(), Machine.load("a100-80:1"), Workload(1, 128, "f16-master"))
    assert time.launch > time.products + time.memory
    tpu = step_time(small, Layout(), Machine.load("v5e:1x1"), Workload(1, 128, "bf16-f32"))
    assert tpu.launch == 0  # it runs one program


def test_arrays_of_layouts_take_what_each_takes():
    texts = [
        f"{degrees},zero={zero},remat={remat},microbatches={m}"
        for degrees in ("data=32", "data=4,tensor=8", "data=2,tensor=16", "replica=2,data=4,tensor=4,sequence=true")
        for zero in range(4)
        for remat in ("none", "selective", "full")
        for m in (1, 4)
    ]
    each = [symbols(text, batch=128) for text in texts]
    found = of_symbols(stacked(each), RATES)
    alone = [of_symbols(s, RATES) for s in each]
    np.testing.assert_allclose(found.seconds, [time.seconds for time in alone], rtol=1e-12)
    np.testing.assert_allclose(found.interval[1], [time.interval[1] for time in alone], rtol=1e-12)
    assert found.hardware_flops.tolist() == [time.hardware_flops for time in alone]


@pytest.mark.parametrize("layout", ["schedule=zb-v", "schedule=interleaved,virtual=4"])
def test_where_no_closed_form_holds_it_is_simulated(layout):
    parsed = Layout.parse(f"pipe=4,data=8,remat=full,microbatches=6,{layout}")
    s = replace(Symbols.of(MODEL, parsed, replace(WORK, batch=48)), L=8, pipe=4, ticks=1)
    assert np.isnan(bubble(s, cells_of(s, RATES), parsed.schedule, parsed.virtual or 2))
    time = timed(f"{parsed}", batch=48)
    work = time.seconds - time.bubble
    assert 0.1 * work < time.bubble < 0.6 * work


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("dualpipev", 2)])
def test_a_pipeline_idles_as_the_simulation_does(schedule, chunks):
    """The closed form of the bubble, with the cells' own times, against an event simulation without a message's time."""
    layout = Layout(pipe=4, data=8, microbatches=8, schedule=schedule, virtual=chunks * (schedule == "interleaved"), remat="full")
    time = step_time(MODEL, layout, NODES, replace(WORK, batch=64))
    s = replace(Symbols.of(MODEL, layout, replace(WORK, batch=64)), L=8, R=8, pipe=4, ticks=10**9, first=0, last=0)
    of_block = block(s, RATES)
    at_once = replace(RATES, inside=1e30, between=1e30, collective=0, hop=0, far_hop=0)
    times = Times(*(8 * each.seconds for each in (of_block.forward, of_block.again + of_block.inputs, of_block.weights)))
    idle = simulate(make(schedule, 4, 8, chunks if chunks > 1 else None), times).span - 8 * times.stage
    assert bubble(s, cells_of(s, at_once), schedule, chunks) == pytest.approx(idle, rel=1e-9)
    message = 4096 * 4096 * 2 / RATES.between + RATES.collective + RATES.far_hop
    assert time.bubble == pytest.approx(idle + 2 * 3 * message, rel=1e-3)


def test_the_stage_with_the_head_is_the_slowest():
    even = timed("pipe=4,data=8,microbatches=8,remat=full", batch=64)
    inner = of_symbols(replace(symbols("data=8,microbatches=8,remat=full", 64), L=8, R=8, first=0, last=0), RATES)
    assert even.products > 1.05 * inner.products


def test_a_ring_goes_on_behind_attention_alone():
    """Its hops are hidden as far as attention takes, whatever else a block computes."""
    mesh, work = Machine.load("v5p:4x4x4"), Workload(192, 8192, "bf16-f32")
    model = ModelConfig.load("llama-3-8b")
    time = step_time(model, Layout.parse("data=4,context=16,zero=3,attention=blockwise"), mesh, work)
    s = Symbols.of(model, Layout.parse("data=4,context=16,zero=3,attention=blockwise"), work)
    of_block = block(s, Rates.of(mesh, work))
    (ring,) = (each for each in time.traffic if each.axes == ("context",))
    assert ring.exposed > 0.5
    assert ring.hidden == pytest.approx(sum(of_block.attention) * 32, rel=1e-9)
    assert sum(of_block.attention) < 0.6 * of_block.all.seconds


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layout", "mesh", "reason"),
    [
        ("data=8", "cpu:8", "cpu has no figure peak.bf16"),
        ("data=16", "rtx4090:16", "rtx4090 has no figure links.between_nodes"),
        ("offload=optimizer", "v5e:1x1", "v5e has no figure links.host"),
        ("data=8,remat=jax", "a100-80:8", "plain autodiff"),
        ("data=4", "a100-80:8", "needs 4 devices"),
    ],
)
def test_refused_with_the_reason(layout, mesh, reason):
    with pytest.raises(SpecError, match=reason):
        step_time(MODEL, Layout.parse(layout), Machine.load(mesh), Workload(Layout.parse(layout).data, 4096, "bf16-f32"))


def test_measured_figures_come_together(tmp_path):
    whole = (Path(__file__).parents[2] / "meshes" / "a100-80.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(whole)
    assert Machine.read(path).value("latency.block") == pytest.approx(1.06e-3)
    path.write_text(whole.replace("step = {", "# step = {"))
    with pytest.raises(SpecError, match="latency.step is missing beside what was measured"):
        Machine.read(path)
