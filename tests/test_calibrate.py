"""calibrate: rates of what was measured, files that can be read, and the devices that are here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload, calibrate
from jaxllm.cli import main
from jaxllm.plan.conditions import parse
from jaxllm.plan.plan import plan
from jaxllm.spec.errors import SpecError
from jaxllm.theory.rates import Rates
from jaxllm.theory.matmul import product
from jaxllm.theory.time import of_symbols, step_time

SIZES = (256, 2048, 8192)
SHAPES, BETWEEN = calibrate.cube(SIZES), calibrate.cube(calibrate.halfway(SIZES))


def measured(machine: str = "h100", share: float = 0.6, memory: float = 0.5, **more: object) -> calibrate.Found:
    """What a card would show whose products are as the formula has them at that share, and steps with that share of memory's
    bandwidth."""
    known = Machine.read(machine)
    rates = replace(calibrate._plain(known, known.rate("bf16"), 3e12), matmul=share, kernel=4e-6, step=1e-4)
    products, between = ({shape: float(product(rates, *shape, 2)) for shape in shapes} for shapes in (SHAPES, BETWEEN))
    found = calibrate.Found(
        kind="NVIDIA H100", platform="gpu", devices=8, dtype="bf16", memory=3e12, kernel=4e-6, step=1e-4, sent=3.6e11,
        collective=3e-5, bytes=8 * 10**10, products=products, between=between, steps={},
    )  # fmt: skip
    in_steps = replace(rates, memory=known.bandwidth * memory, curve=calibrate._curve(found, rates.peak))
    steps = {shape: of_symbols(calibrate._symbols(shape, "bf16"), in_steps).seconds for shape in calibrate.FEW_STEPS}
    return replace(found, steps=steps, **more)


def test_the_share_that_was_reached_is_found():
    for share in (0.4, 0.6, 0.85):
        figures = calibrate.fit(measured(share=share), Machine.read("h100"))
        # Shares are tried in steps of 0.0025. Waves are uneven, so that what lies between three sizes a side is up to 7 % off.
        assert figures.matmul == pytest.approx(share, abs=0.005) and figures.off < 0.1
    assert figures.inside == pytest.approx(3.6e11 / 450e9)


@pytest.mark.parametrize("memory", [0.05, 0.3, 0.8])
def test_the_share_of_memory_that_steps_reach_is_found(memory):
    # Between 25 shares over three decades it is interpolated, and the steps here are of a curve with shares of four digits.
    assert calibrate.fit(measured(memory=memory), Machine.read("h100")).memory == pytest.approx(memory, rel=0.05)


def test_products_that_were_measured_take_what_they_took(tmp_path):
    """Whatever that was: here at random. Between them, and many at once, in proportion; beyond them as at the edge."""
    rng = np.random.default_rng(0)
    found = measured()
    found = replace(found, products={shape: seconds * rng.uniform(1, 3) for shape, seconds in found.products.items()})
    path = tmp_path / "mine.toml"
    path.write_text(calibrate.machine_file(found, "h100"))
    rates = Rates.of(Machine.load(f"{path}:1"), Workload(1, 1, "bf16-f32"))
    slow = replace(rates, memory=1e9)  # within the measured shapes that is in what they took, beyond them not
    for shape, seconds in found.products.items():
        assert float(product(slow, *shape, 2)) == pytest.approx(seconds, rel=2e-3)
    assert float(product(slow, 1, 8192, 8192, 2)) >= 2 * (8192 + 8192 * 8192 + 8192) / slow.memory
    rates = replace(rates, memory=math.inf)
    plain = replace(rates, curve=None)
    for shape, seconds in found.products.items():
        assert float(product(rates, *shape, 2)) == pytest.approx(seconds, rel=2e-3)  # of four digits
    beside = lambda *shape: float((product(rates, *shape, 2) - rates.kernel) / (product(plain, *shape, 2) - rates.kernel))  # noqa: E731
    a, b = beside(256, 256, 2048), beside(256, 256, 8192)
    assert beside(256, 256, 4096) == pytest.approx((a * b) ** 0.5)
    assert beside(256, 256, 10**6) == pytest.approx(b) and beside(1, 256, 2048) == pytest.approx(a)
    together = product(rates, 256, 2048, 2048, 2, 8) - rates.kernel
    assert together / (product(plain, 256, 2048, 2048, 2, 8) - rates.kernel) == pytest.approx(beside(2048, 2048, 2048))
    rows = np.array([256, 2048, 8192])
    assert product(rates, rows, 2048, 256, 2) == pytest.approx([found.products[size, 2048, 256] for size in SIZES], rel=2e-3)


def test_the_interval_knows_how_far_products_and_steps_are_off():
    """Products of shapes between the measured ones, and each step by what the others tell."""
    found = measured()
    longer = {shape: 2 * found.steps[shape] for shape in list(found.steps)[-1:]}
    for off in (
        replace(found, between={shape: 2 * seconds for shape, seconds in found.between.items()}),
        replace(found, steps=found.steps | longer),
    ):
        assert calibrate.fit(off, Machine.read("h100")).off == pytest.approx(math.log(2), rel=0.05)
        machine = calibrate.read_back(calibrate.machine_file(off, "h100"))
        assert machine.value("interval.least") == pytest.approx(math.log(2), rel=0.05)


def test_a_known_machine_keeps_its_own_figures(tmp_path):
    for name in ("h100", "a100-80"):  # without and with measurements of its own
        text = calibrate.machine_file(measured(), name)
        machine, known = calibrate.read_back(text), Machine.read(name)
        for figure in ("memory.total", "peak.bf16", "links.between_nodes", "node.devices"):
            assert machine.value(figure) == known.value(figure)
        assert machine.compiler == known.compiler and text.count("[efficiency]") == text.count("[latency]") == 1
        assert machine.value("curve.matmul").sizes == SIZES
        data = json.loads(json.dumps(machine.to_json()))["figures"]["curve.matmul"]["value"]
        assert (data["dtype"], tuple(data["sizes"]), np.shape(data["shares"])) == ("bf16", SIZES, (3, 3, 3))
        assert machine.value("latency.kernel") == pytest.approx(4e-6) and "measured by jaxllm calibrate" in text
        # 2 x 7 hops of a ring of eight, and its launch
        assert 15 * machine.value("latency.hop") == pytest.approx(3e-5, rel=1e-3)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    nouns = ModelConfig.load("llama-2-7b"), Layout(data=8, zero=3), Machine.load(f"{path}:8"), Workload(8, 4096, "bf16-f32")
    time = step_time(*nouns)
    assert time.rates.measured and time.seconds > 0
    # A machine that was calibrated can be calibrated again.
    again = calibrate.machine_file(measured(), str(path))
    assert again == text.replace("h100", "mine")


def test_a_plan_scores_layouts_as_their_time_alone_says(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(calibrate.machine_file(measured(), "h100"))
    model, mesh, work = ModelConfig.load("llama-2-7b"), Machine.load(f"{path}:8"), Workload(16, 4096, "bf16-f32")
    found = plan(model, mesh, work, conditions=parse("attention=xla"), top=40)
    assert len(found.best) == 40
    for scored in found.best:
        assert scored.seconds == pytest.approx(float(step_time(model, scored.layout, mesh, work).seconds), rel=1e-12)


def test_a_card_that_nobody_knows_is_described_by_what_was_measured():
    machine = calibrate.read_back(calibrate.machine_file(measured(kind="NVIDIA X"), None))
    assert machine.target == "gpu" and machine.predict_only and machine.memory_bytes == 8 * 10**10
    best = max(2 * math.prod(shape) / seconds for shape, seconds in measured().products.items())
    assert machine.value("peak.bf16") == pytest.approx(best, rel=1e-6) and machine.value("links.inside_node") == 3.6e11
    alone = calibrate.read_back(calibrate.machine_file(measured(devices=1, sent=None, collective=None), None))
    assert "one device was measured" in alone.absent["links.inside_node"]


CURVE = "curve.matmul: "


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('dtype = "bf16"\n', "", CURVE + "dtype=None is unknown; choose bf16 or f32."),
        ('dtype = "bf16"', 'dtype = "int4"', CURVE + "dtype='int4' is unknown"),
        ("sizes = [256, 2048, 8192]", "sizes = [256, 256, 8192]", CURVE + "sizes=[256, 256, 8192] are not two or more whole numbers"),
        ("sizes = [256, 2048, 8192]", "sizes = [2048]", CURVE + "sizes=[2048] are not two or more"),
        ("sizes = [256, 2048, 8192]", "sizes = [256, 2048]", CURVE + "value is not 2 x 2 x 2 shares"),
        ("value = [\n", "value = [0.5,\n", CURVE + "value is not 3 x 3 x 3 shares above 0 and up to 1"),
        ("[curve.matmul]", "[curve.matmlu]", "did you mean 'curve.matmul'?"),
        ("[curve.matmul]", "[curve.matmul]\nunit = 1", "unknown key 'unit'"),
    ],
)
def test_a_wrong_curve_is_refused_in_one_sentence(old, new, says):
    text = calibrate.machine_file(measured(), "h100")
    assert old in text
    with pytest.raises(SpecError) as error:
        calibrate.read_back(text.replace(old, new))
    assert says in str(error.value) and str(error.value).count("\n") == 0


def test_a_curve_comes_with_what_else_was_measured():
    text = calibrate.machine_file(measured(), "h100")
    alone = text[: text.index("[efficiency]")] + text[text.index("[curve.matmul]") :]
    with pytest.raises(SpecError, match="curve.matmul comes with efficiency, latency, interval"):
        calibrate.read_back(alone)


def test_what_cannot_be_is_refused():
    with pytest.raises(SpecError, match="is no TPU that is known"):
        calibrate.machine_file(measured(platform="tpu", kind="TPU v9"), None)
    with pytest.raises(SpecError, match="v5e is a tpu, and the devices here are gpu; leave --machine out"):
        calibrate.check("v5e", "gpu")
    calibrate.check("v5e", "tpu")


def test_what_was_measured_before_goes_and_all_else_of_a_file_stays(tmp_path):
    known = calibrate.read_back(calibrate.machine_file(measured(), "h100"))
    path = tmp_path / "odd.toml"
    text = calibrate.machine_file(measured(), "h100")
    path.write_text(text.replace("[efficiency]\n", "[ efficiency ]\n# of a day\n").replace("[interval]\n", "# how sure\n\n[interval] # all\n") + "# the end\n")
    calibrate.check(str(path), "cuda")
    again = calibrate.read_back(calibrate.machine_file(measured(), str(path)))
    assert again.figures == known.figures and again.compiler == known.compiler and again.absent == known.absent


def test_a_curve_of_another_dtype_is_not_taken(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(calibrate.machine_file(measured(), "h100"))
    assert Rates.of(Machine.load(f"{path}:1"), Workload(1, 1, "bf16-f32")).curve is not None
    assert Rates.of(Machine.load(f"{path}:1"), Workload(1, 1, "f32")).curve is None


def test_the_devices_here_are_measured_and_time_takes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "FEW", (32, 128))
    monkeypatch.setattr(calibrate, "SECONDS", 0.002)
    monkeypatch.setattr(calibrate, "MEMORY", 2**24)
    monkeypatch.setattr(calibrate, "SENT", 2**18)
    monkeypatch.setattr(calibrate, "FEW_STEPS", ((64, 2, 32), (64, 1, 64), (128, 1, 32)))
    path = tmp_path / "mine.toml"
    assert main(["calibrate", "--out", str(path)]) == 0
    said = capsys.readouterr().err
    assert f"wrote {path}" in said and "measured CPUs: no accelerator is here" in said
    machine = Machine.read(path)
    assert machine.target == "cpu" and machine.value("peak.f32") > 1e8 and machine.value("links.inside_node") > 0
    arguments = ["time", "llama-tiny", "--mesh", f"{path}:8", "--layout", "data=8", "--precision", "f32"]
    assert main(arguments) == 0
    assert "efficiencies and latencies of mine: measured by jaxllm calibrate" in " ".join(capsys.readouterr().out.split())
    assert main([text.replace("f32", "bf16-f32") for text in arguments]) == 2
    assert "mine has no figure peak.bf16" in capsys.readouterr().err


def test_a_step_without_room_is_left_out_and_too_few_are_refused(monkeypatch):
    import jax

    for name, value in {"FEW": (32, 64), "SECONDS": 0.001, "MEMORY": 2**20, "SENT": 2**12, "FEW_STEPS": ((64, 1, 32), (64, 2, 32), (64, 4, 32), (64, 8, 32))}.items():
        monkeypatch.setattr(calibrate, name, value)

    def seconds(model, layout, workload, device):
        if workload.batch > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return 1.0

    monkeypatch.setattr(calibrate, "step_seconds", seconds)
    said: list[str] = []
    most = 4
    assert list(calibrate.measure(said.append).steps) == [(64, 1, 32), (64, 2, 32), (64, 4, 32)]
    assert said.count("which has no room here, and is left out") == 1
    most = 2
    with pytest.raises(SpecError, match="has room for 2 of the steps"):
        calibrate.measure(said.append)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "mine.txt"], ".txt is not a machine file"),
        (["--out", "nowhere/mine.toml"], "there is no folder nowhere"),
        (["--machine", "h900"], "unknown name 'h900'"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(arguments, reason):
    done = subprocess.run([sys.executable, "-m", "jaxllm", "calibrate", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr and len(done.stderr.strip().splitlines()) == 1
