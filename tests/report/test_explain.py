import io
from dataclasses import replace

import pytest

from jaxllm.report.compare import compare
from jaxllm.report.explain import check_name, explanation, find, print_explanation
from jaxllm.report.table import console
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import Term
from tests.report.ledgers import COMPILED, LINES, PREDICTED, SETUP, WINDOWED

GATHER = replace(
    LINES[9],
    terms=(Term("all-gather.7", 6_738_415_616, "bf16[4096,4096] x 32 loops", "gradient.py:40"),),
    rules=(WINDOWED,),
    emitted=99,
)
COMPARISON = compare(PREDICTED, replace(COMPILED, lines=(*LINES[:9], GATHER, *LINES[10:])))


def words(line):
    out = io.StringIO()
    print_explanation(COMPARISON, SETUP, line, console(out))
    assert max(len(text) for text in out.getvalue().splitlines()) <= 80
    return " ".join(out.getvalue().split())


def test_labels_and_their_beginnings():
    assert find(COMPARISON, "residuals") == "residuals"
    assert find(COMPARISON, "resid") == "residuals"
    assert find(COMPARISON, "matmul/rec") == "matmul/recompute"
    assert find(COMPARISON, "all-gather/data/f") == "all-gather/data/forward/bf16"
    assert find(COMPARISON, "peak") == "peak"


def test_ambiguous_and_unknown_lines_list_the_nearest():
    with pytest.raises(
        SpecError, match="2 lines begin so.*all-gather/data/forward/bf16, all-gather/data/backward/bf16"
    ):
        find(COMPARISON, "all-gather")
    with pytest.raises(SpecError, match="nearest are .*reduce-scatter/data/backward/f32"):
        find(COMPARISON, "reduce-scater/data")
    with pytest.raises(SpecError, match="no such line"):
        find(COMPARISON, "")


def test_formula_symbols_and_values():
    shown = words("parameters")
    assert "parameters equal" in shown
    assert "B=8, Psi=6738415616, L=32, D=4096, F=11008, N=32, K=32, H=128, V=32000" in shown
    assert "r=1, n=4, t=2, z=3, m=1, b=2, T=4096, p=4, c=2, g=4, o=4" in shown
    assert "65,536,000 embed V D / (data tensor) x 4 bytes ZeRO, section 5" in shown


def test_instructions_source_lines_and_rules():
    shown = words("all-gather/data/forward")
    assert "6,738,415,616 all-gather.7 bf16[4096,4096] x 32 loops gradient.py:40" in shown
    assert "payload 6,738,415,616 bytes (6.74 GB), wire 5,053,811,712 bytes" in shown
    assert "291 a step" in shown and "emitted 99 bytes" in shown
    assert "windowed-einsum, 1,400 bytes: a gather followed by a matmul" in shown


def test_terms_that_do_not_add_up_are_told():
    assert "add up" not in words("parameters")
    short = replace(LINES[0], terms=LINES[0].terms[:1])
    out = io.StringIO()
    comparison = compare(PREDICTED, replace(COMPILED, lines=(short, *LINES[1:])))
    print_explanation(comparison, SETUP, "parameters", console(out))
    assert "the terms add up to 65,536,000, which is -3,303,673,856 off the line" in " ".join(out.getvalue().split())


def test_the_peak_is_explained_as_an_estimate():
    shown = words("peak")
    assert "peak an estimate, off by -3.8 %" in shown and "20,100,000,000 state" in shown


def test_as_data():
    data = explanation(COMPARISON, SETUP, "all-gather/data/forward/bf16")
    assert data["symbols"]["F"] == 11008
    assert data["compiled"] == [
        {
            "label": "all-gather.7",
            "value": 6_738_415_616,
            "detail": "bf16[4096,4096] x 32 loops",
            "source": "gradient.py:40",
        }
    ]
    assert [rule["name"] for rule in data["rules"]] == ["windowed-einsum"]


@pytest.mark.parametrize("text", ["peak", "resid", "matmul/forward", "all-gather/data/forward/bf16", "all"])
def test_names_that_may_exist(text):
    check_name(text)


@pytest.mark.parametrize("text", ["", "/", "speed", "all/data", "residual/x", "matmull"])
def test_names_that_cannot_exist_are_refused_early(text):
    with pytest.raises(SpecError, match="no line has such a name"):
        check_name(text)
