"""The committed table of experiments/zero_stages.py is what the closed form, a compile and the paper say now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments.zero_stages import MODEL, PAPER_GB, PAPER_SENT, PRECISIONS, STAGES, cell, closed_form, layout, rounded
from jaxllm import Workload, predict
from jaxllm.spec.ledger import DTYPE_BYTES

TABLE = common.read_csv(common.COMMITTED / "zero_stages.csv")


def test_the_table_has_every_cell():
    assert [(row["precision"], row["zero"]) for row in TABLE] == [(p, z) for p in PRECISIONS for z in STAGES]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['precision']} {row['zero']}")
def test_a_row_is_what_the_closed_form_says_and_what_was_compiled(row):
    own = closed_form(row["precision"], row["zero"])
    assert {name: row[name] for name in own} == own
    assert {name: row[f"{name}_compiled"] for name in ("state", "sent", "wire")} == {
        name: row[name] for name in ("state", "sent", "wire")
    }
    assert row["equal"] == row["lines"] > 0
    assert "unexplained" not in row["sent_reason"]


@pytest.mark.parametrize("row", TABLE[: len(STAGES)], ids=lambda row: f"stage {row['zero']}")
def test_the_papers_numbers_are_ours_as_printed(row):
    assert rounded(row["state_compiled"], PAPER_GB[row["zero"]]) == PAPER_GB[row["zero"]]
    assert round(row["sent_compiled"] / MODEL.parameters) == PAPER_SENT[row["zero"]]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_elements_are_whole(precision):
    for line in predict(MODEL, layout(3), Workload(64, 4096, precision)).section("collectives"):
        assert line.wire % DTYPE_BYTES[line.dtype] == 0 or line.value == 4 * line.count


def test_a_cell_compiled_now_is_the_committed_row():
    (row,) = (row for row in TABLE if (row["precision"], row["zero"]) == ("bf16-master", 3))
    now = cell("bf16-master", 3)
    assert {name: str(value) for name, value in now.items()} == {name: str(value) for name, value in row.items()}


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "zero_stages.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "Does a compiled step hold and send what the ZeRO paper says" in shown
