"""The committed table of experiments/three_compilers.py is what the closed form and a compile say now.

Of a compile only the partitioned program is compared, and the rules: what a backend merges, and the peak, differ
between versions of XLA.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments import common
from experiments import three_compilers as experiment
from jaxllm.hlo.rules import cpu_f32_promotion, tile_padded_bytes
from jaxllm.spec.ledger import DTYPE_BYTES

TABLE = common.read_csv(common.COMMITTED / "three_compilers.csv")
PARTITIONED = ("bytes", "FLOPs", "payload", "times")


def rows(figure: str) -> dict[str, common.Row]:
    return {row["line"]: row for row in TABLE if row["figure"] == figure}


def test_the_closed_form_of_every_row_is_what_predict_says():
    attribute = {"bytes": "value", "FLOPs": "value", "payload": "value", "times": "count"}
    own = {line.label: line for line in experiment.closed_form().lines}
    for figure, name in attribute.items():
        for label, row in rows(figure).items():
            assert row["closed_form"] == getattr(own[label], name), (figure, label)
    told = {label for figure in PARTITIONED for label in rows(figure)}
    assert told == {label for label, line in own.items() if line.value} | {"padding"}


def test_the_partitioned_program_is_the_same_but_for_what_a_rule_accounts_for():
    for figure in PARTITIONED:
        for label, row in rows(figure).items():
            values = [row[target] for target in experiment.MESHES]
            if row["same"] == "no":
                assert row["rule"] and sum(values) - row["closed_form"] == row["rule_bytes"], label
            else:
                assert values == [row["closed_form"]] * 3, label


def test_a_difference_has_a_rule_or_says_that_it_has_none():
    for row in TABLE:
        differs = len({row[target] for target in experiment.MESHES} | ({row["partitioned"]} - {None})) > 1
        assert row["same"] == ("no" if differs else "yes")
        assert bool(row["reason"]) == differs
        assert not differs or row["rule"] or row["reason"].startswith(experiment.NO_RULE)
        assert "not found again" not in (row["reason"] or "")


def test_the_rules_are_those_of_the_project():
    named = {row["rule"] for row in TABLE} - {None}
    assert named == {cpu_f32_promotion.__name__.replace("_", "-"), "tpu-tile-padding"}
    assert tile_padded_bytes.__doc__ is not None and "tpu-tile-padding" in tile_padded_bytes.__doc__


def test_what_is_emitted_otherwise_is_as_many_elements():
    """What XLA:TPU has fewer of gathers and scatters, it has of all-reduces."""
    missing, beyond = [], []
    for label, row in rows("emitted").items():
        size = DTYPE_BYTES[label.rpartition("/")[2].partition(">")[0]]
        (beyond if row["partitioned"] == 0 else missing).append((row["tpu"] - row["partitioned"]) // size)
    assert sorted(-count for count in missing if count) == sorted(beyond) != []


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], common.Row]:
    return {(row["figure"], row["line"]): row for row in experiment.rows(experiment.authors(("cpu",)))}


def test_a_compiler_says_now_what_is_committed(compiled):
    for figure in PARTITIONED:
        for label, row in rows(figure).items():
            if label != "padding":  # it is 0 on cpu, and then no row
                assert compiled[figure, label]["cpu"] == row["cpu"], (figure, label)
    for label, row in rows("emitted").items():
        if row["rule"]:
            now = compiled["emitted", label]
            assert (now["cpu"], now["rule"], now["rule_bytes"]) == (row["cpu"], row["rule"], row["rule_bytes"])


def test_help_asks_the_question():
    script = common.ROOT / "experiments" / "three_compilers.py"
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "where do XLA:CPU, XLA:GPU and XLA:TPU differ" in shown
