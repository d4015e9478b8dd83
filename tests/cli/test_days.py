"""`jaxllm days`: what it prints and how it ends."""

import json

import pytest

from jaxllm.cli import main

ASKED = ("--tokens", "2e12", "--mesh", "a100-80:1024", "--mfu", "0.45")


def run(capsys, *arguments):
    code = main(["days", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_table(capsys):
    code, out, err = run(capsys, "llama-2-7b", *ASKED)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "X = 0.45 of it, 140 TFLOP/s" in out
    days = 6 * 6_738_415_616 * 2e12 / (1024 * 0.45 * 312e12) / 86400
    assert f"6 P                 40,430,493,696  {days:.4g}" in out and "33.8 %" not in out


def test_recomputation_is_in_the_rate(capsys):
    code, out, _ = run(capsys, "llama-2-7b", *ASKED, "--remat", "full", "--json")
    document = json.loads(out)
    assert code == 0 and document["devices"] == 1024 and document["rate"] == pytest.approx(0.45 * 312e12)
    rule, exact, causal = document["rows"]
    assert rule["mfu"] == pytest.approx(0.45 * 6 / 8) and rule["hfu"] == 0.45
    assert rule["days"] == pytest.approx(8 * 6_738_415_616 * 2e12 / (1024 * 0.45 * 312e12) / 86400)
    for row in (exact, causal):
        assert row["hardware_flops"] > row["model_flops"] and row["mfu"] < row["hfu"]


def test_the_length_counts(capsys):
    short, long = (
        json.loads(run(capsys, "llama-3.1-8b", *ASKED, "--seq", seq, "--json")[1])["rows"] for seq in ("128", "8192")
    )
    assert short[0]["days"] == long[0]["days"] and short[1]["days"] < long[1]["days"]


BAD = {
    "no tokens": (["--tokens", "0"], "--tokens '0' is no number above 0"),
    "tokens in words": (["--tokens", "many"], "--tokens 'many'"),
    "no number": (["--tokens", "nan"], "--tokens 'nan'"),
    "more than the peak": (["--mfu", "1.01"], "--mfu '1.01' is no number above 0, from 1e-09 up to 1;"),
    "in percent": (["--mfu", "45"], "--mfu '45'"),
    "nothing reached": (["--mfu", "0"], "--mfu '0'"),
    "no peak": (["--mesh", "cpu:8"], "states no peak rate"),
    "no size": (["--mesh", "h100"], "has no size"),
    "unknown remat": (["--remat", "some"], "--remat 'some' is none of none, selective, full"),
    "too long": (["--seq", "99999999"], "longer than the 16,777,216 tokens"),
    "no length": (["--seq", "0"], "--seq '0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(case, capsys):
    changed, words = BAD[case]
    given = dict(zip(ASKED[::2], ASKED[1::2], strict=True)) | dict([changed])
    code, out, err = run(capsys, "llama-2-7b", *(text for pair in given.items() for text in pair))
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
