"""`jaxllm train` end to end: what is killed, interrupted or moved to another layout goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jaxllm.cli import main
from jaxllm.targets import compiler
from jaxllm.train import loop, metrics
from jaxllm.train.request import last_checkpoint

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "docs" / "examples" / "harbour.txt"
# 257 divides by no degree: the vocabulary is padded, and a checkpoint is not.
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 64,
}  # fmt: skip
LAYOUT, OTHER = "data=4,tensor=2,zero=3", "replica=2,data=2,tensor=2,zero=1,remat=full"
STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def arguments(config: str, out: Path, *more: str, mesh: str = "cpu:8", layout: str = LAYOUT, steps: int = STEPS) -> list[str]:
    return [
        "train", config, "--mesh", mesh, "--layout", layout, "--out", str(out), "--steps", str(steps),
        "--save-every", "2", "--eval-every", "4", *more,
    ]  # fmt: skip


ONE = {"mesh": "cpu:1", "layout": "data=1"}  # where nothing but the end of a run is looked at


def new(config: str, out: Path, *more: str, **options) -> list[str]:
    return arguments(config, out, "--text", str(TEXT), "--seq", "16", "--lr", "0.01", "--warmup", "2", *more, **options)


build, compile = loop.build, compiler.compile


@cache
def program(*nouns: Any, **options: Any) -> tuple[Any, Any]:
    """A step and what the compiler makes of it."""
    built = build(*nouns, **options)
    return built, compile(built)


@pytest.fixture(autouse=True, scope="module")
def a_program_is_compiled_once() -> Iterator[None]:
    """For all runs of it in this process; those in processes of their own compile for themselves."""
    known: dict[int, Any] = {}

    def built(*nouns: Any, **options: Any) -> Any:
        found, step = program(*nouns, **options)
        known[id(found)] = step
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", built)
        patch.setattr(compiler, "compile", lambda built, say: known[id(built)])
        yield


@pytest.fixture(scope="module")
def whole(config, a_program_is_compiled_once, tmp_path_factory) -> list[metrics.Step]:
    """The steps of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(new(config, out)) == 0
    return metrics.read(out / "metrics.csv")


def losses(out: Path) -> list[tuple[float, float | None]]:
    return [(step.loss, step.held_out) for step in metrics.read(out / "metrics.csv")]


def same(steps: list[metrics.Step]) -> list[tuple[float, float | None]]:
    return [(step.loss, step.held_out) for step in steps]


def checkpoints(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").iterdir()}


def test_a_run_tells_what_it_did(config, whole, tmp_path, capsys) -> None:
    assert [step.step for step in whole] == list(range(1, STEPS + 1))
    assert [step.held_out is not None for step in whole] == [False, False, False, True] * 2
    assert whole[-1].loss < whole[0].loss and whole[-1].tokens == STEPS * 8 * 16
    out = tmp_path / "run"
    assert main(new(config, out, steps=4)) == 0
    shown = capsys.readouterr()
    assert losses(out) == same(whole[:4])  # the same again
    assert shown.out.splitlines()[0] == "model     small, 12,144 parameters"
    for piece in ("139,230 bytes to train on, 15,470 held out", "4 of 4", "byte pairs has 1.8748", str(out / "metrics.csv")):
        assert piece in " ".join(shown.out.split())
    assert "jaxllm: step 4 of 4: loss" in shown.err and "Traceback" not in shown.err
    assert checkpoints(out) == {"2", "4"} and (out / "run.json").exists()


def test_another_optimizer_goes_on_as_if_nothing_had_been(config, tmp_path, capsys) -> None:
    """Momentum, whose number of updates is not optax's: the rate follows it."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(new(config, one, "--optimizer", "momentum", steps=6, **ONE)) == 0
    assert main(new(config, two, "--optimizer", "momentum", steps=4, **ONE)) == 0
    assert main(arguments(config, two, "--resume", steps=6, **ONE)) == 0
    assert "optimizer momentum" in capsys.readouterr().out
    assert losses(two) == losses(one)
    assert json.loads((two / "run.json").read_text())["optimizer"] == "momentum"


def test_a_run_goes_on_with_the_same_losses_and_on_another_layout(config, whole, tmp_path, capsys) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    assert main(new(config, out, steps=5)) == 0
    shutil.copytree(out, moved)
    assert main(arguments(config, out, "--resume")) == 0
    assert losses(out)[4:] == [(whole[4].loss, losses(out)[4][1]), *same(whole[5:])]  # step 5 was the last, so evaluated
    assert main(arguments(config, moved, "--resume", layout=OTHER)) == 0
    for (loss, _), step in zip(losses(moved), whole, strict=True):
        assert loss == pytest.approx(step.loss, abs=1e-5)
    capsys.readouterr()
    (moved / "metrics.csv").write_bytes(b"\xff\x00 no rows")
    assert main(arguments(config, moved, "--resume", layout=OTHER, steps=STEPS + 1)) == 0
    assert "lacks rows of the 8 steps before" in capsys.readouterr().err
    assert [step.step for step in metrics.read(moved / "metrics.csv")] == [9]
    assert main(arguments(config, out, "--resume")) == 2
    assert "has 8 steps already" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_after_the_step_with_what_there_is(config, whole, tmp_path, monkeypatch, capsys, number) -> None:
    out, append = tmp_path / "run", metrics.append

    def interrupted(path: Path, step: metrics.Step) -> None:
        append(path, step)
        if step.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics, "append", interrupted)
    before = signal.getsignal(number)
    assert main(new(config, out)) == 128 + number
    assert signal.getsignal(number) == before
    assert checkpoints(out) == {"2", "3"} and len(losses(out)) == 3
    assert "3 of 8" in capsys.readouterr().out
    monkeypatch.undo()
    if number == signal.SIGTERM:  # once is enough
        assert main(arguments(config, out, "--resume")) == 0
        assert [loss for loss, _ in losses(out)] == [step.loss for step in whole]


def test_kill_9_costs_the_steps_since_the_last_checkpoint(config, whole, tmp_path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jaxllm", *new(config, out, steps=4000)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(metrics.read(out / "metrics.csv")) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    said = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, said[-500:]
    assert main(arguments(config, out, "--resume", steps=max(STEPS, last_checkpoint(out) + 1))) == 0
    assert losses(out)[:STEPS] == same(whole)


def test_two_processes_are_one_mesh(config, whole, tmp_path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jaxllm", *new(config, out, "--processes", "2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    assert "8 devices in 2 processes" in done.stdout and "Gloo" not in done.stdout + done.stderr
    for (loss, held_out), step in zip(losses(out), whole, strict=True):
        assert loss == pytest.approx(step.loss, abs=1e-5)
        assert held_out == (None if step.held_out is None else pytest.approx(step.held_out, abs=1e-5))
    # One process takes up what two have left.
    assert main(arguments(config, out, "--resume", steps=STEPS + 1)) == 0


def test_a_cluster_s_own_ways_do_not_choose_the_devices() -> None:
    """jax would take one card a process from Slurm's variables; a node's only process has all."""
    code = """
import socket
from jaxllm.targets import start
with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
start.prepare("cpu", 2, start.Group(1, 0, f"localhost:{port}"))
from jax._src import xla_bridge
assert xla_bridge.CUDA_VISIBLE_DEVICES.value == "all", xla_bridge.CUDA_VISIBLE_DEVICES.value
"""
    slurm = dict(SLURM_JOB_ID="5", SLURM_STEP_NODELIST="a", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | slurm, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_a_process_that_fails_takes_the_others_with_it(config, tmp_path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    command = [sys.executable, "-m", "jaxllm", *new(config, tmp_path / "run", "--processes", "2")]
    environment = os.environ | {"XLA_FLAGS": "--no_such_flag"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("jaxllm: XLA_FLAGS=") and "Traceback" not in done.stderr


def test_a_loss_that_is_no_number_ends_the_run(config, tmp_path, capsys) -> None:
    assert main([*arguments(config, tmp_path / "run", **ONE), "--text", str(TEXT), "--seq", "16", "--lr", "999", "--warmup", "0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "training with --lr 999 gives what is no number at step" in error and "take a smaller one" in error
    for step in checkpoints(tmp_path / "run"):  # no checkpoint holds what is no number
        assert int(step) < len(metrics.read(tmp_path / "run" / "metrics.csv"))


def test_a_full_disk_is_one_sentence_and_leaves_what_there_is(config, tmp_path, monkeypatch, capsys) -> None:
    import errno

    out, append = tmp_path / "run", metrics.append

    def full(path: Path, step: metrics.Step) -> None:
        if step.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, step)

    monkeypatch.setattr(metrics, "append", full)
    assert main(new(config, out, **ONE)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "metrics.csv' cannot be written: no space left on device" in error and "--resume" in error
    assert "2" in checkpoints(out) and len(losses(out)) == 3


def test_a_checkpoint_that_finds_the_disk_full_is_one_sentence(config, tmp_path) -> None:
    """A limit on the size of files stands for a disk that is full: the embedding alone takes more than 8 kB."""
    limited = f"ulimit -f 8; exec {sys.executable} -m jaxllm " + " ".join(new(config, tmp_path / "run", **ONE))
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-800:]
    assert done.stderr.splitlines()[-1].startswith("jaxllm: the checkpoint cannot be written")
    assert "Traceback" not in done.stderr
    assert not any(name.isdecimal() for name in checkpoints(tmp_path / "run"))


def test_memory_that_runs_out_is_a_verdict(config, tmp_path, monkeypatch, capsys) -> None:
    import jax

    def exhausted(*arguments: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(loop, "training_batch", exhausted)
    assert main(new(config, tmp_path / "run", **ONE)) == 4
    assert "small does not fit with data=1 on cpu:1" in capsys.readouterr().err


def test_a_scaled_loss_that_overflows_costs_a_step_and_not_the_run(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("jaxllm.program.optimizer.SCALE", 2.0**27)
    assert main(new(config, tmp_path / "run", "--precision", "f16-master", steps=16, **ONE)) == 0
    steps = metrics.read(tmp_path / "run" / "metrics.csv")
    finite = [math.isfinite(step.gradient_norm) for step in steps]
    assert not finite[0] and any(finite)  # the factor starts too high, and is halved until it is not
    assert steps[-1].loss < steps[0].loss
