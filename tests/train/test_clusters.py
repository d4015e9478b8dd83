"""The files for clusters say what the command line takes: Slurm's run with stand-ins, Kubernetes' read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxllm.cli import app
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Machine
from jaxllm.train import processes

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# srun starts its command once a node, each with its own number.
STANDS_IN = {
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done',
    "jaxllm": 'printf "%s\\n" "$*"',
}


def run(script: str, folder: Path, **environment: str) -> list[list[str]]:
    """The arguments of each `jaxllm` that a script starts."""
    (folder / "bin").mkdir()
    for name, body in STANDS_IN.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": path, "HOME": str(folder)} | environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def checked(arguments: list[str], index: int) -> dict[str, str]:
    """The options, each of which the command has, with values that go together."""
    import typer.main

    assert arguments[:2] == ["train", "llama-3-8b"]
    command = typer.main.get_command(app).commands["train"]
    known = {name for parameter in command.params for name in parameter.opts}
    flags = [word for word in arguments if word.startswith("--")]
    assert set(flags) <= known
    options = {word: arguments[i + 1] for i, word in enumerate(arguments) if word.startswith("--") and word != "--resume"}
    mesh, layout = Machine.load(options["--mesh"]), Layout.parse(options["--layout"])
    assert layout.devices == mesh.devices
    assert options["--process"] == str(index)
    processes.validate(2, index, options["--coordinator"], mesh.devices, str(mesh), "local")
    return options


def test_slurm(tmp_path) -> None:
    started = run((EXAMPLES / "slurm.sh").read_text(), tmp_path, SLURM_JOB_NODELIST="node-[a-b]", SLURM_NTASKS="2")
    assert len(started) == 2
    for index, arguments in enumerate(started):
        assert checked(arguments, index)["--coordinator"] == "node-a:12345"
        assert "--resume" not in arguments


def test_slurm_goes_on_after_a_requeue(tmp_path) -> None:
    (tmp_path / "runs" / "llama-3-8b").mkdir(parents=True)
    (tmp_path / "runs" / "llama-3-8b" / "run.json").write_text("{}")
    started = run((EXAMPLES / "slurm.sh").read_text(), tmp_path, SLURM_JOB_NODELIST="node-[a-b]", SLURM_NTASKS="2")
    assert all("--resume" in arguments for arguments in started)


@pytest.mark.parametrize("index", [0, 1])
def test_kubernetes(tmp_path, index) -> None:
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["bash", "-c"] and job["spec"]["completions"] == 2
    (arguments,) = run(container["args"][0], tmp_path, JOB_COMPLETION_INDEX=str(index))
    checked(arguments, index)


def test_the_page_shows_the_file() -> None:
    assert (EXAMPLES / "slurm.sh").read_text() in (EXAMPLES.parent / "clusters.md").read_text()
