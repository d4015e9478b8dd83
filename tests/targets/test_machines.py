"""The machines that come along: every compiler takes its own, and the predicted ones are refused before jax starts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import targets
from jaxllm.check import build, check
from jaxllm.cli import main
from jaxllm.spec.errors import TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.targets import start

TINY = ModelConfig.load("llama-tiny")
# The fewest and smallest kernels with which the layers are still a loop.
LEAST = dataclasses.replace(TINY, layers=2, d_model=16, d_ff=16, heads=2, kv_heads=2, vocab=16)

MACHINES = {name: Machine.read(name) for name in Machine.names()}
PREDICTED = [name for name, machine in MACHINES.items() if machine.predict_only]
COMPILED = [name for name, machine in MACHINES.items() if machine.target != "cpu" and name not in PREDICTED]
# Cards of one compute capability get the same kind of code, so a whole step is compiled for one of them.
STEPS = list({repr(MACHINES[name].compiler.get("compute_capability", name)): name for name in COMPILED}.values())


def smallest(machine: Machine) -> str:
    """The smallest mesh of a machine: a card, or its first slice."""
    shape = machine.value("torus.slices")[0] if machine.target == "tpu" else (1,)
    return f"{machine.name}:{'x'.join(map(str, shape))}"


@pytest.mark.parametrize("name", COMPILED)
def test_its_compiler_takes_every_machine(name: str) -> None:
    mesh = Machine.load(smallest(MACHINES[name]))
    with start.quiet():
        devices = targets.module(mesh.target).devices(mesh)
        assert len(devices) == mesh.devices
        rows = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
        batch = jax.ShapeDtypeStruct((64 * mesh.devices, 64), "bfloat16", sharding=rows)
        assert jax.jit(lambda x: x.T @ x).lower(batch).compile() is not None


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_compiled_for_it_and_every_line_is_equal(name: str) -> None:
    mesh = Machine.load(smallest(MACHINES[name]))
    layout = Layout.parse(f"data={mesh.devices}")
    comparison = check(LEAST, layout, mesh, Workload(mesh.devices, 8, precision="bf16-f32"))
    assert {row.status for row in comparison.rows} == {"equal"}
    assert comparison.agrees


# ---------------------------------------------------------------- machines that are only predicted


@pytest.mark.parametrize("name", PREDICTED)
def test_a_predicted_machine_is_refused_with_the_reason_and_a_way_out(name: str, capsys) -> None:
    for target in ([], ["--target", "gpu"]):
        assert main(["check", "llama-tiny", "--mesh", f"{name}:8", "--layout", "data=8", *target]) == 3
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"jaxllm: {name}:8 can only be predicted: ") and shown.err.count("\n") == 1
        assert MACHINES[name].predict_only in shown.err
        assert "--target cpu" in shown.err and "jaxllm.predict" in shown.err


@pytest.mark.parametrize("name", PREDICTED)
def test_a_predicted_machine_is_refused_before_jax_starts(name: str) -> None:
    code = f"""
import sys
from jaxllm.cli import main
assert main(["check", "llama-tiny", "--mesh", "{name}:8", "--layout", "data=8"]) == 3
assert not {{"numpy", "jax"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_reason_is_told_from_python_too() -> None:
    with pytest.raises(TargetError, match="v100:8 can only be predicted: compute capability 7.0"):
        build(TINY, Layout.parse("data=8"), Machine.load("v100:8"), Workload(8, 64))


def test_the_reason_is_among_the_figures(capsys) -> None:
    assert main(["meshes", "v100"]) == 0
    shown = capsys.readouterr().out
    assert any(line.split()[:2] == ["compiler", "absent"] for line in shown.splitlines())
    assert "compute capability 7.0" in shown


def test_a_predicted_machine_is_emulated(capsys) -> None:
    arguments = ["check", "llama-tiny", "--mesh", "v100:8", "--layout", "data=4,tensor=2,zero=3", "--seq", "16"]
    assert main([*arguments, "--target", "cpu"]) == 0
    assert "30.7 GB usable (0.9 x 34.1 GB): fits" in capsys.readouterr().out
