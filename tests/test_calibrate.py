"""calibrate: rates of what was measured, files that can be read, and the devices that are here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from jaxllm import Layout, Machine, ModelConfig, Workload, calibrate
from jaxllm.cli import main
from jaxllm.spec.errors import SpecError
from jaxllm.theory.rates import Rates
from jaxllm.theory.time import product, step_time

SHAPES = [(a, b, c) for a in (256, 2048, 8192) for b in (256, 2048, 8192) for c in (256, 2048, 8192)]


def measured(machine: str = "h100", share: float = 0.6, **more: object) -> calibrate.Found:
    """What a card would show whose products are as the formula has them at that share."""
    rates = Rates.of(Machine.load(f"{machine}:1"), Workload(1, 1, "bf16-f32"))
    rates = replace(rates, matmul=share, memory=3e12, kernel=4e-6)
    found = calibrate.Found(
        kind="NVIDIA H100", platform="gpu", devices=8, dtype="bf16", memory=3e12, kernel=4e-6, step=1e-4, sent=3.6e11,
        collective=3e-5, bytes=8 * 10**10, products={shape: float(product(rates, *shape, 2)) for shape in SHAPES},
    )  # fmt: skip
    return replace(found, **more)


def test_the_share_that_was_reached_is_found():
    for share in (0.4, 0.6, 0.85):
        figures = calibrate.fit(measured(share=share), Machine.read("h100"))
        assert figures.matmul == pytest.approx(share, abs=0.005) and figures.off < 0.02
    assert figures.memory == pytest.approx(3e12 / 3352.32e9) and figures.inside == pytest.approx(3.6e11 / 450e9)


def test_a_known_machine_keeps_its_own_figures(tmp_path):
    for name in ("h100", "a100-80"):  # without and with measurements of its own
        text = calibrate.machine_file(measured(), name)
        machine, known = calibrate.read_back(text), Machine.read(name)
        for figure in ("memory.total", "peak.bf16", "links.between_nodes", "node.devices"):
            assert machine.value(figure) == known.value(figure)
        assert machine.compiler == known.compiler and text.count("[efficiency]") == text.count("[latency]") == 1
        assert machine.value("latency.kernel") == pytest.approx(4e-6) and "measured by jaxllm calibrate" in text
        # 2 x 7 hops of a ring of eight, and its launch
        assert 15 * machine.value("latency.hop") == pytest.approx(3e-5, rel=1e-3)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    nouns = ModelConfig.load("llama-2-7b"), Layout(data=8, zero=3), Machine.load(f"{path}:8"), Workload(8, 4096, "bf16-f32")
    time = step_time(*nouns)
    assert time.rates.measured and time.seconds > 0


def test_a_card_that_nobody_knows_is_described_by_what_was_measured():
    machine = calibrate.read_back(calibrate.machine_file(measured(kind="NVIDIA X"), None))
    assert machine.target == "gpu" and machine.predict_only and machine.memory_bytes == 8 * 10**10
    best = max(2 * math.prod(shape) / seconds for shape, seconds in measured().products.items())
    assert machine.value("peak.bf16") == pytest.approx(best, rel=1e-6) and machine.value("links.inside_node") == 3.6e11
    alone = calibrate.read_back(calibrate.machine_file(measured(devices=1, sent=None, collective=None), None))
    assert "one device was measured" in alone.absent["links.inside_node"]


def test_what_cannot_be_is_refused():
    with pytest.raises(SpecError, match="is no TPU that is known"):
        calibrate.machine_file(measured(platform="tpu", kind="TPU v9"), None)
    with pytest.raises(SpecError, match="v5e is a tpu, and NVIDIA H100 is here"):
        calibrate.machine_file(measured(), "v5e")


def test_the_devices_here_are_measured_and_time_takes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "FEW", (32, 128))
    monkeypatch.setattr(calibrate, "SECONDS", 0.002)
    monkeypatch.setattr(calibrate, "MEMORY", 2**24)
    monkeypatch.setattr(calibrate, "SENT", 2**18)
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
