"""The first layouts of a plan, compiled: what a check says of them, and how that orders them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxllm import Machine, ModelConfig, Workload, verify
from jaxllm.plan.conditions import parse
from jaxllm.plan.plan import plan


def checked(status: str = "equal", compiled: int = 100, unexplained=(), fits: bool = True) -> dict:
    """The JSON of a check with one line of each kind."""
    return {
        "memory": [
            {"line": "parameters", "predicted": 100, "compiled": compiled, "status": status},
            {"line": "host", "predicted": 0, "compiled": None, "status": "not comparable"},
        ],
        "flops": [{"line": "matmul", "phase": "forward", "predicted": 5, "compiled": 5, "status": "equal"}],
        "collectives": [
            {"kind": "all-gather", "axes": ["data"], "phase": "forward", "status": "equal", "wire_predicted": 7, "wire_compiled": 8}
        ],
        "unexplained": list(unexplained),
        "peak": {"predicted": 1000, "compiled": 900, "capacity": 950, "fits": fits},
    }


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (checked(), ""),
        (checked("differs", 101), "it compiles to something else: parameters"),
        (checked(unexplained=["a copy of 3 GB"]), "the program has what nobody planned: a copy of 3 GB"),
        (checked(fits=False), "the compiled program does not fit"),
    ],
)
def test_what_a_check_says_of_a_layout(document, reason):
    found = verify.read(document, 1, "data=8")
    assert (found.reason, found.lines, found.peak, found.compiled_peak, found.wire, found.compiled_wire) == (reason, 3, 1000, 900, 7, 8)
    assert found.equal == 3 - (document["memory"][0]["status"] != "equal")


def test_what_compiles_to_something_else_moves_down(monkeypatch):
    work = Workload(16, 128, "bf16-f32")
    found = plan(ModelConfig.load("llama-tiny"), Machine.load("h100:4"), work, conditions=parse("attention=xla"), top=3)
    answers = {
        f"{found.best[0].layout}": (1, json.dumps(checked("differs", 101)), ""),
        f"{found.best[1].layout}": (3, "", "jaxllm: starting JAX\njaxllm: no cuDNN is here; pip install it."),
        f"{found.best[2].layout}": (0, json.dumps(checked()), ""),
    }

    real = subprocess.Popen

    def answer(command, **options):
        code, out, err = answers[command[command.index("--layout") + 1]]
        assert command[1:4] == ["-m", "jaxllm", "check"] and command[-1] == "--json"
        said = f"import sys; sys.stdout.write({out!r}); sys.stderr.write({err!r}); sys.exit({code})"
        return real([sys.executable, "-c", said], **options)

    monkeypatch.setattr(verify.subprocess, "Popen", answer)
    said: list[str] = []
    order = verify.verify(found, 3, said.append)
    assert [one.rank for one in order] == [3, 1, 2]
    assert order[2].reason == "it does not compile: no cuDNN is here; pip install it."
    assert said[0].startswith("compiling 3, ") and len(said) == 4
    other = verify.reordered(found, order)
    assert [scored.layout for scored in other.best] == [found.best[index].layout for index in (2, 0, 1)]


def test_the_first_layouts_compile_to_what_was_planned(capsys):
    from jaxllm.cli import main

    code = main([
        "plan", "llama-tiny", "--mesh", "h100:2", "--batch", "8", "--fix", "attention=xla,microbatches=1,pipe=1", "--verify", "1", "--json"
    ])  # fmt: skip
    (one,) = json.loads(capsys.readouterr().out)["verified"]
    assert code == 0 and one["reason"] == "" and one["lines"] == one["equal"] > 10 and one["wire"] == one["compiled_wire"] > 0


def test_checks_end_with_a_plan_that_is_terminated():
    arguments = ["plan", "llama-tiny", "--mesh", "h100:2", "--batch", "8", "--verify", "2"]
    one = subprocess.Popen([sys.executable, "-m", "jaxllm", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = _wait(lambda: _children(one.pid))
    os.kill(one.pid, signal.SIGTERM)
    one.communicate()
    assert one.returncode == 128 + signal.SIGTERM
    _wait(lambda: not any(_runs(child) for child in children))


def _wait(found, seconds=60):
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
    return value


def _children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", f"{process}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
