"""`jaxllm time`: what it prints and how it ends."""

import json

import pytest

from jaxllm.cli import main

STEP = {"--mesh": "a100-80:8", "--layout": "data=2,tensor=4,zero=1,remat=full", "--seq": "2048"}


def run(capsys, options, *flags):
    code = main(["time", "llama-2-7b", *(text for option in options.items() for text in option), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(capsys):
    code, out, err = run(capsys, STEP)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for text in ("four of five between", "MFU", "HFU", "matmuls", "collectives over tensor", "latencies of a100-80"):
        assert text in out


def test_json_and_python_say_the_same(capsys):
    import jaxllm

    code, out, _ = run(capsys, STEP | {"--precision": "bf16-master"}, "--json")
    data = json.loads(out)
    time = jaxllm.step_time(
        jaxllm.ModelConfig.load("llama-2-7b"), jaxllm.Layout.parse(STEP["--layout"]), jaxllm.Machine.load(STEP["--mesh"]),
        jaxllm.Workload(2, 2048, "bf16-master"),
    )  # fmt: skip
    assert code == 0 and data["batch"] == 2 and data["seconds"] == float(time.seconds)
    assert (data["interval"]["low"], data["interval"]["high"]) == time.interval


BAD = {
    "no speed": ({"--mesh": "cpu:8"}, "cpu has no figure peak.bf16"),
    "no network": ({"--mesh": "rtx4090:16", "--layout": "data=16"}, "no figure links.between_nodes"),
    "no size": ({"--mesh": "h100"}, "has no size"),
    "degrees": ({"--layout": "data=3"}, "needs 3 devices"),
    "no closed form": ({"--layout": "data=8,remat=jax"}, "plain autodiff"),
    "no batch": ({"--batch": "0"}, "--batch '0'"),
    "odd batch": ({"--batch": "3"}, "leaves no whole number of sequences"),
    "no length": ({"--seq": "x"}, "--seq 'x'"),
    "unknown precision": ({"--precision": "f13"}, "unknown precision 'f13'"),
    "blank precision": ({"--precision": ""}, "unknown precision ''"),
    "unknown optimizer": ({"--optimizer": "adamx"}, "unknown optimizer 'adamx'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, capsys):
    more, reason = BAD[case]
    code, out, err = run(capsys, STEP | more)
    assert (code, out) == (2, "") and reason in err
    assert err.startswith("jaxllm: ") and len(err.strip().splitlines()) == 1
