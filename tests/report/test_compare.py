from dataclasses import replace

import pytest

from jaxllm.report import RunResult, exit_code
from jaxllm.report.compare import PEAK_TOLERANCE, compare, worst
from tests.report.ledgers import COMPILED, PADDED, PREDICTED, WINDOWED, collective, flops, ledger, memory, ran


def both(left, right, **more):
    """The rows of two ledgers by label."""
    comparison = compare(ledger("closed form", *left), ledger("XLA:CPU", *right), **more)
    return {row.label: row for row in comparison.rows}


def test_equal_ledgers_agree_line_by_line():
    comparison = compare(PREDICTED, COMPILED)
    assert [row.status for row in comparison.rows] == ["equal"] * 15
    assert comparison.agrees and comparison.fits
    assert comparison.authors == ("closed form", "XLA:GPU")


def test_one_byte_differs():
    row = both([memory("parameters", 1000)], [memory("parameters", 1001)])["parameters"]
    assert (row.status, row.predicted, row.compiled) == ("differs", 1000, 1001)


def test_a_line_on_one_side_only_differs_from_zero():
    rows = both([memory("residuals", 5)], [collective("all-gather", "data", "forward", 400)])
    assert (rows["residuals"].status, rows["residuals"].compiled) == ("differs", 0)
    extra = rows["all-gather/data/forward/bf16"]
    assert (extra.status, extra.predicted, extra.wire_predicted, extra.wire_compiled) == ("differs", 0, 0, 300)


def test_a_zero_that_the_other_side_leaves_out_is_equal_and_only_memory_keeps_it():
    rows = both([memory("padding", 0), flops("recompute", 0)], [])
    assert list(rows) == ["padding"]
    assert rows["padding"].status == "equal" and rows["padding"].empty


@pytest.mark.parametrize(
    "change", [{"axes": ("tensor",)}, {"phase": "backward"}, {"dtype": "f32"}, {"name": "all-reduce"}], ids=str
)
def test_what_makes_another_line(change):
    line = collective("all-gather", "data", "forward", 400)
    statuses = [row.status for row in both([line], [replace(line, **change)]).values()]
    assert statuses == ["differs", "differs"]


def test_the_same_payload_on_a_smaller_ring_differs():
    left = collective("all-gather", "data", "forward", 400, n=4)
    right = collective("all-gather", "data", "forward", 400, n=2)
    assert both([left], [right])["all-gather/data/forward/bf16"].status == "differs"


def test_lines_of_one_key_are_added_up():
    parts = [
        collective("all-gather", "data", "forward", 100, count=1),
        collective("all-gather", "data", "forward", 300, count=2),
    ]
    row = both([collective("all-gather", "data", "forward", 400, count=9)], parts)["all-gather/data/forward/bf16"]
    assert (row.status, row.compiled, row.count) == ("equal", 400, 3)


def test_unknown_is_not_comparable_and_gives_the_reason():
    rows = both(
        [memory("residuals", None, reason="plain autodiff chooses"), memory("host", 0)],
        [memory("residuals", 7), memory("host", None)],
    )
    assert (rows["residuals"].status, rows["residuals"].reason) == ("not comparable", "plain autodiff chooses")
    assert (rows["host"].status, rows["host"].reason) == ("not comparable", "the compiler cannot know it")


def test_lines_that_a_target_cannot_know_by_name_or_label():
    left = [memory("padding", 0), flops("forward", 5), flops("backward", 5)]
    right = [memory("padding", 96), flops("forward", 6), flops("backward", 6)]
    rows = both(left, right, not_comparable={"padding": "tiles", "matmul/forward": "hidden in a call"})
    assert rows["padding"].status == rows["matmul/forward"].status == "not comparable"
    assert rows["matmul/backward"].status == "differs"


def test_a_line_that_agrees_needs_no_excuse():
    row = both([memory("padding", 96)], [memory("padding", 96)], not_comparable={"padding": "tiles"})["padding"]
    assert (row.status, row.reason) == ("equal", "")


def kinds(*rules, payload=1_400):
    left = [collective("all-gather", "tensor", "forward", 2_800, n=2)]
    right = [collective("permute", "tensor", "forward", payload, rules=rules)]
    return both(left, right)


def test_a_rule_that_changes_the_kind_is_settled_by_wire_bytes():
    rows = kinds(WINDOWED)
    assert {row.status for row in rows.values()} == {"equal"}
    # the rule is named on both lines, the one that vanished and the one that came
    assert all(row.rules == (WINDOWED,) for row in rows.values())


def test_no_rule_no_equality():
    assert {row.status for row in kinds().values()} == {"differs"}


def test_a_rule_does_not_excuse_other_wire_bytes():
    assert {row.status for row in kinds(WINDOWED, payload=1_401).values()} == {"differs"}


def test_a_rule_does_not_reach_another_phase_or_axis():
    left = [collective("all-gather", "tensor", "forward", 2_800, n=2)]
    for axes, phase in (("data", "forward"), ("tensor", "backward")):
        right = [collective("permute", axes, phase, 1_400, rules=(WINDOWED,))]
        assert {row.status for row in both(left, right).values()} == {"differs"}


def test_every_changed_line_needs_its_own_rule():
    left = [collective("all-gather", "tensor", "forward", 2_800, n=2)]
    right = [
        collective("permute", "tensor", "forward", 700, rules=(WINDOWED,)),
        collective("permute", "tensor", "forward", 700, dtype="f32"),
    ]
    assert {row.status for row in both(left, right).values()} == {"differs"}


def test_a_rule_does_not_excuse_memory():
    row = both([memory("parameters", 4)], [memory("parameters", 100, rules=(PADDED,))])["parameters"]
    assert row.status == "differs" and row.rules == (PADDED,)


@pytest.mark.parametrize(("compiled", "status"), [(100, "equal"), (101, "differs"), (4, "equal")])
def test_a_rule_accounts_for_padding_to_the_byte(compiled, status):
    rules = (PADDED,) if compiled != 4 else ()
    row = both([memory("padding", 4)], [memory("padding", compiled, rules=rules)])["padding"]
    assert row.status == status and row.rules == rules


def test_floats_are_refused():
    with pytest.raises(TypeError):
        both([memory("parameters", 1.5)], [memory("parameters", 1.5)])


def peaks(predicted, compiled, capacity=None):
    return compare(ledger("a", peak=predicted), ledger("b", peak=compiled), capacity=capacity)


def test_the_peak_is_an_estimate_with_a_tolerance():
    edge = round(1000 * (1 + PEAK_TOLERANCE))
    assert peaks(edge, 1000).peak.within is True
    assert peaks(edge + 1, 1000).peak.within is False
    assert peaks(None, 1000).peak.within is None
    assert peaks(1000, None).peak.within is None


def test_the_compilers_peak_decides():
    assert peaks(1, 101, capacity=100).fits is False
    assert peaks(101, 100, capacity=100).fits is True
    assert peaks(101, None, capacity=100).fits is False  # only the closed form knows
    assert peaks(101, 10**15).fits is True  # no capacity, no limit


def test_exit_codes():
    fits = compare(PREDICTED, COMPILED, capacity=10**11)
    tight = compare(PREDICTED, COMPILED, capacity=10**9)
    wrong = compare(PREDICTED, replace(COMPILED, lines=COMPILED.lines[1:]), capacity=10**9)
    assert [exit_code(c) for c in (fits, tight, wrong)] == [0, 4, 1]
    strange = compare(PREDICTED, replace(COMPILED, unexplained=("a copy of 5 bytes",)))
    assert exit_code(strange) == 1


def test_strict_counts_what_is_not_comparable():
    unknown = compare(PREDICTED, replace(COMPILED, lines=(*COMPILED.lines, memory("host", None))))
    assert (exit_code(unknown), exit_code(unknown, strict=True)) == (0, 1)
    nothing = compare(PREDICTED, replace(COMPILED, peak=None))
    assert (exit_code(nothing), exit_code(nothing, strict=True)) == (0, 1)
    off = compare(PREDICTED, replace(COMPILED, peak=2 * COMPILED.peak))
    assert (exit_code(off), exit_code(off, strict=True)) == (0, 0)  # an estimate, and told to be off
    assert exit_code(compare(PREDICTED, COMPILED), strict=True) == 0


@pytest.mark.parametrize(("error", "code"), [(1e-6, 0), (1e-5, 0), (1.1e-5, 1), (float("nan"), 1), (float("inf"), 1)])
def test_a_run_that_disagrees(error, code):
    assert exit_code(replace(compare(PREDICTED, COMPILED), run=ran(error))) == code


def test_the_worst_tensor_and_nan_is_worse_than_any():
    nan = float("nan")
    for errors, name in (({"a": 1.0, "b": 2.0}, "b"), ({"a": nan, "b": 2.0}, "a"), ({"a": 2.0, "b": nan}, "b")):
        run = RunResult(3, (), (), errors, tolerance=10.0)
        assert worst(errors) == name and run.agrees is (nan not in errors.values())
