"""The ladder, the recognition of devices, refusals; and all of it on emulated devices, in processes as it would run."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments import common, on_device
from jaxllm.spec.errors import SpecError
from jaxllm.spec.machine import Machine
from jaxllm.targets import tpu

H100 = {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 1, "extent": []}


def run(*arguments):
    command = [sys.executable, "-m", "experiments.on_device", *arguments]
    return subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)


def test_the_smallest_size_on_emulated_devices(tmp_path):
    done = run("--mesh", "cpu:2", "--sizes", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 x cpu, emulated: no peak is measured")
    assert "llama-tiny, f32: agrees, largest relative error" in done.stdout

    found = on_device.load(tmp_path / "on_device_cpu-x2.json")
    assert found["emulated"] and found["mem_fraction"] is None
    assert found["versions"]["jax"] and found["device"]["count"] == 2
    (run_,), (size,) = found["agreement"], found["sizes"]
    assert run_["equal"] == run_["lines"] > 0 and run_["max_relative_error"] <= run_["tolerance"] == 1e-5
    assert size["outcome"] == "measured" and size["equal"] == size["lines"] > 0
    assert size["measured_peak"] is None and size["check"]["peak"]["within_tolerance"]
    assert len(size["losses"]) == len(size["step_seconds"]) >= on_device.WARM + 3
    assert size["losses"][-1] < size["losses"][0]

    (line,) = common.read_csv(tmp_path / "on_device_cpu-x2.csv")
    assert line["step_s"] > 0 and line["mfu"] is line["hfu"] is line["measured_peak"] is None
    assert line["flops_per_second"] * line["step_s"] == pytest.approx(size["flops"]["model"], rel=1e-3)
    assert (tmp_path / "on_device_cpu-x2.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "jax finds no accelerator here, only the cpu; --mesh cpu:8 measures emulated devices instead."),
        (("--mesh", "h100:1"), "--mesh h100:1 is a gpu machine and jax finds"),
        (("--mesh", "h1000:1"), "unknown name 'h1000'"),
    ],
)
def test_refusals(arguments, sentence, monkeypatch, capsys, tmp_path):
    probed = {"kind": "cpu", "platform": "cpu", "count": 8, "extent": []}
    monkeypatch.setattr(on_device, "ask", lambda *_, **__: probed)
    monkeypatch.setattr(sys, "argv", ["on_device", *arguments, "--out", str(tmp_path)])
    assert on_device.main() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("on_device: ") and sentence in error
    assert not list(tmp_path.iterdir())


def test_jax_that_does_not_start_is_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(on_device, "ask", lambda *_, **__: {"outcome": "failed", "why": "RuntimeError: no driver"})
    monkeypatch.setattr(sys, "argv", ["on_device", "--out", str(tmp_path)])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert on_device.main() == 3
    sentence = "on_device: jax does not start here with JAX_PLATFORMS=cuda: RuntimeError: no driver"
    assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------- which devices


@pytest.mark.parametrize(
    ("kind", "machine"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),  # the file says more: NVIDIA H200 141GB HBM3e
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 D", None),  # another card, though its name begins so
        ("NVIDIA H", None),
        ("NVIDIA", None),
        ("TPU v9", None),
    ],
)
def test_a_device_is_found_by_its_name(kind, machine):
    assert on_device.machine_of(kind) == machine


@pytest.mark.parametrize(
    ("mesh", "extent"),
    [
        ("v5e:1x1", (1, 1, 1)),
        ("v5e:2x4", (2, 4, 1)),
        ("v6e:2x2", (2, 2, 1)),
        ("v5p:2x2x1", (2, 2, 1)),
        ("tpu7x:2x2x1", (2, 2, 1)),
    ],
)
def test_a_tpu_is_found_as_libtpu_names_it(mesh, extent):
    devices = tpu.devices(Machine.load(mesh))
    probed = {"kind": devices[0].device_kind, "platform": "tpu", "count": len(devices), "extent": extent}
    found = on_device.found_mesh(probed)
    assert found.text == mesh
    on_device.check_here(found, probed)


def test_an_unknown_device_is_told_the_known_ones_and_a_way_out():
    with pytest.raises(SpecError, match=r"for a 'NVIDIA X1', only for .*NVIDIA H100 80GB HBM3.*--mesh my.toml:4"):
        on_device.found_mesh(H100 | {"kind": "NVIDIA X1", "count": 4})


def test_cards_that_are_no_slice_and_a_mesh_that_is_too_large_are_refused():
    with pytest.raises(SpecError, match="3 devices are no slice of v5e"):
        on_device.found_mesh({"kind": "TPU v5 lite", "platform": "tpu", "count": 3, "extent": (3, 1, 1)})
    with pytest.raises(SpecError, match="--mesh h100:2 has 2 devices and 1 are here"):
        on_device.check_here(Machine.load("h100:2"), H100)


def test_a_process_is_told_how_much_of_a_card_it_may_take(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # jax refuses the old name beside the new one
    own = on_device.environment(Machine.load("h100:1"))
    assert own["XLA_CLIENT_MEM_FRACTION"] == "0.9" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in own


# ---------------------------------------------------------------- which sizes


@pytest.mark.parametrize("text", ["h100:1", "h100:8", "v5e:1x1", "b200:1"])
def test_the_ladder_rises_to_what_the_card_offers(text):
    mesh = Machine.load(text)
    sizes = on_device.ladder(mesh)
    peaks = [on_device.peak(mesh, size.model, size.nouns[1].remat, size.batch) for size in sizes]
    assert max(peaks) == peaks[-1] <= mesh.capacity
    assert peaks[-1] > 0.85 * mesh.capacity
    for size in sizes:
        model, layout, workload = size.nouns
        assert layout.devices == mesh.devices and workload.sequences_per_device(layout) >= 1
        assert workload.sequence <= model.max_sequence


class Asked:
    """Stands for the processes: what each size comes to, by its batch."""

    def __init__(self, outcome):
        self.outcome, self.tasks = outcome, []

    def __call__(self, mesh, seconds, *, work, **task):
        self.tasks.append((work, task))
        return {"outcome": "agrees"} if work == "agreement" else self.outcome(task["size"])


def test_the_size_that_fills_the_card_is_tried_smaller_when_memory_runs_out(monkeypatch):
    mesh = Machine.load("h100:1")
    size = on_device.ladder(mesh)[-1]

    def outcome(own):
        return {"outcome": "measured"} if own["batch"] < size.batch else {"outcome": "out of memory", "why": "too much"}

    monkeypatch.setattr(on_device, "ask", asked := Asked(outcome))
    *_, found = on_device.measure_all(mesh, [size], 1000)
    assert [task["precision"] for work, task in asked.tasks if work == "agreement"] == ["f32", "bf16-f32"]
    assert [own["outcome"] for own in found["sizes"]] == ["out of memory", "measured"]
    assert found["sizes"][1]["batch"] < size.batch
    assert on_device.row(found["sizes"][0])["why"] == "too much"
    assert json.dumps(on_device.record(H100, mesh, found))


def test_what_is_left_when_the_time_is_up_is_told(monkeypatch):
    monkeypatch.setattr(on_device, "ask", lambda *_, **__: {"outcome": "measured"})
    mesh = Machine.load("h100:1")
    *_, found = on_device.measure_all(mesh, on_device.ladder(mesh)[:1], on_device.LEAST_SECONDS / 2)
    assert {own["outcome"] for own in (*found["agreement"], *found["sizes"])} == {"not started"}


def test_a_process_that_fails_or_stays_away_is_an_outcome():
    size = dataclasses.asdict(on_device.Size("llama-tiny", "data=1", 1, 128, "f8"))
    mesh = Machine.load("cpu:1")
    failed = on_device.ask(mesh, 100, work="size", size=size)
    assert failed["outcome"] == "failed" and "unknown precision 'f8'" in failed["why"]
    assert on_device.ask(mesh, 0.1, work="size", size=size)["outcome"] == "stopped"


def test_rates_are_of_matmuls_over_the_dense_peak():
    size = {
        "model": "m", "outcome": "measured", "flops": {"model": 300, "recompute": 100}, "flops_peak": 1000,
        "warm": 1, "step_seconds": [9.0, 1.0, 2.0, 1.0], "lines": 2, "equal": 2,
        "peak": {"predicted": 9, "compiled": 10, "capacity": 20}, "measured_peak": 8,
    }  # fmt: skip
    found = on_device.row(size)
    assert (found["step_s"], found["flops_per_second"], found["mfu"], found["hfu"]) == (1.0, 300, 0.3, 0.4)
    (cells,) = on_device.shown([found])
    assert (cells["off"], cells["mfu"], cells["equal"]) == ("+25 %", "30.0%", "2 of 2")


def test_what_differs_is_named():
    gather = {"kind": "all-gather", "axes": ["data"], "phase": "forward", "dtype": "bf16", "status": "differs"}
    check = {
        "memory": [{"line": "gradients", "status": "differs"}, {"line": "batch", "status": "equal"}],
        "flops": [{"line": "matmul", "phase": "forward", "status": "differs"}],
        "collectives": [gather],
    }
    size = {"model": "m", "layout": "data=2", "outcome": "measured", "check": check}
    run = {"model": "m", "precision": "f32", "outcome": "differs", "max_relative_error": 2e-3, "tolerance": 1e-5}
    assert on_device.sentences({"agreement": [run], "sizes": [size]}) == [
        "run   m, f32: differs, largest relative error 2.0e-03 > 1e-05",
        "differs: m data=2: gradients",
        "differs: m data=2: matmul/forward",
        "differs: m data=2: all-gather/data/forward/bf16",
    ]
