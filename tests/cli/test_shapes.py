"""`jaxllm shapes`: what it prints and how it ends."""

import json

import pytest

from jaxllm.cli import main


def run(capsys, *arguments):
    code = main(["shapes", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("model", ["llama-2-7b", "gpt2", "llama-3.1-405b", "megatron-1t"])
def test_table(model, capsys):
    code, out, err = run(capsys, model, "--batch", "1", "--seq", "8")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    names = [line.split()[0] for line in out.splitlines() if line.strip()]
    for name in ("embed", "attention_norm", "scores", "mlp_norm", "down", "final_norm", "head"):
        assert name in names
    assert ("gate" in names) == model.startswith("llama")


def test_document(capsys):
    code, out, _ = run(capsys, "llama-2-7b", "--batch", "2", "--seq", "512", "--dtype", "f32", "--json")
    found = json.loads(out)
    assert code == 0
    assert sum(module["times"] * module["parameters"] for module in found["modules"]) == found["parameters"]
    by_name = {module["name"]: module for module in found["modules"]}
    assert by_name["gate"]["weights"] == [[4096, 11008]] and by_name["gate"]["times"] == 32
    assert by_name["scores"]["output"] == [2, 32, 1, 512, 512]
    assert by_name["head"]["output_bytes"] == 2 * 512 * 32000 * 4
    as_model, each, one = found["cache"]
    assert as_model["bytes"] == each["bytes"] == 2 * 2**29 and one["bytes"] == as_model["bytes"] // 32
    assert as_model["bytes_per_token"] == 2**20


BAD = {
    "no sequences": (["--batch", "0"], "--batch '0'"),
    "too long": (["--seq", "99999999"], "longer than the 16,777,216 tokens"),
    "unknown dtype": (["--dtype", "f31"], "--dtype 'f31' is unknown"),
    "no tokens": (["--seq", "-1"], "--seq '-1'"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(case, capsys):
    changed, words = BAD[case]
    code, out, err = run(capsys, "llama-2-7b", *changed)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
