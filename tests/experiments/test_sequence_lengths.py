"""The committed table of experiments/sequence_lengths.py is what the closed form says now, and the compiler said the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import sequence_lengths as experiment
from jaxllm import Layout, ModelConfig, predict

TABLE = common.read_csv(common.COMMITTED / "sequence_lengths.csv")


def test_what_is_committed_is_what_is_said_now():
    known = ("layout", "tokens", "predicted", "fits", "kilobytes", "attention")
    now = [experiment.predicted(name, tokens) for name in experiment.LAYOUTS for tokens in experiment.LENGTHS]
    assert [[row[name] for name in known] for row in TABLE] == [[row[name] for name in known] for row in now]


def test_both_sides_of_each_limit_are_compiled_with_every_line_equal_and_the_same_verdict():
    assert [problem for row in TABLE for problem in experiment.wrong(row)] == []
    for name in experiment.LAYOUTS:
        mine = [row for row in TABLE if row["layout"] == name]
        fitting = sum(row["fits"] == "yes" for row in mine)
        compiled = [row for row in mine if row["compiled"] is not None]
        assert compiled == mine[fitting - 1 : fitting + 1] and all(row["lines"] >= 10 for row in compiled)


def test_context_and_tensor_share_out_a_sequence_and_data_does_not():
    longest = {name: max(row["tokens"] for row in TABLE if row["layout"] == name and row["fits"] == "yes") for name in experiment.LAYOUTS}
    assert longest["data"] < longest["ring of 8"] <= longest["ring of 64"] == 2**20
    assert longest["heads over 8"] == longest["ring of 8"]


def test_what_attention_sends_is_as_the_page_has_it():
    """Per layer in units of b S H c / t: 2 (x - 1) K by hops, (x - 1)/x (2 N + 2 K) by heads; backward in bf16."""
    model = ModelConfig.load(experiment.MODEL)
    for text, forward, backward in (
        ("context=8,attention=blockwise", 2 * 7 * 8, 6 * 7 * 8),
        ("context=8,exchange=ulysses,attention=blockwise", 7 / 8 * (64 + 16), 7 / 8 * (96 + 16)),
    ):
        layout = Layout.parse(text)
        lines = [line for line in predict(model, layout, experiment.workload(layout, 8192)).section("collectives") if line.axes == ("context",)]
        unit = model.layers * 1024 * model.head_dim * 2
        ahead = [line.wire for line in lines if line.name in ("permute", "all-to-all") and line.phase == "forward"]
        back = [line.wire for line in lines if line.name in ("permute", "all-to-all") and line.phase != "forward"]
        assert sum(ahead) == forward * unit and sum(back) == backward * unit


@pytest.mark.parametrize("change", [{"equal": 1}, {"verdict": "no"}, {"verdict": "yes"}])
def test_what_differs_fails(change):
    row = next(row for row in TABLE if row["compiled"] is not None)
    assert bool(experiment.wrong(dict(row) | change)) == (change != {"verdict": row["fits"]})


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "sequence_lengths.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "How long may a sequence be" in shown
