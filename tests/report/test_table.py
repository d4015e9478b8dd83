import io
import re
from dataclasses import replace

import pytest

from jaxllm.report.compare import compare
from jaxllm.report.table import console, print_comparison, print_figures, print_listing
from tests.report.ledgers import COMPILED, PREDICTED, SETUP, WINDOWED, flops, ledger, memory, ran

PLAIN = compare(PREDICTED, COMPILED, capacity=76_700_000_000)


def text(comparison=PLAIN, setup=SETUP):
    out = io.StringIO()
    print_comparison(comparison, setup, console(out))
    return out.getvalue()


def words(comparison=PLAIN):
    return " ".join(text(comparison).split())


def test_header_says_what_was_asked_and_that_nothing_ran():
    shown = words()
    for part in (
        "llama-2-7b, 6,738,415,616 parameters",
        "h100:8, 8 devices",
        "data=4,tensor=2,zero=3,remat=full",
        "batch 8, sequence 4,096",
        "bf16-f32, gradients in f32",
        "gpu: compiled, not run",
    ):
        assert part in shown


def test_every_figure_is_exact_on_both_sides_and_fits_80_columns():
    shown = text()
    for row in PLAIN.rows:
        if not row.empty:
            assert shown.count(f" {row.predicted:,}") >= 2
        for wire in (row.wire_predicted, row.wire_compiled):
            assert wire is None or f" {wire:,} " in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert not re.search(r" $", shown, re.MULTILINE)
    assert "\x1b" not in shown and shown.isascii()


def test_large_figures_are_not_cut():
    huge = 2_488_320_000_000_000_000_123
    shown = text(compare(ledger("closed form", flops("forward", huge)), ledger("XLA:GPU", flops("forward", huge))))
    assert shown.count(f"{huge:,}") == 2


def test_short_forms():
    assert re.search(r"parameters +3,369,209,856 3,369,209,856 +3\.37 GB equal", re.sub(" +", " ", text()))


def test_verdict_of_agreement():
    shown = words()
    assert "equal line by line: 14 of 14" in shown  # padding is zero on both sides: no line that says anything
    assert "closed form 20,100,000,000 (20.1 GB); XLA:GPU 20,900,000,000 (20.9 GB); an estimate, off by -3.8 %" in shown
    assert "20.9 GB is 27.2 % of 76.7 GB usable (0.92 x 85.5 GB - 2.00 GB): fits" in shown


def test_verdict_of_disagreement():
    lines = list(COMPILED.lines)
    lines[3] = memory("gradients", 3_369_213_952)
    lines[6] = replace(lines[6], value=None, reason="hidden in a call")
    lines[9] = replace(lines[9], rules=(WINDOWED, WINDOWED), emitted=123)
    strange = replace(COMPILED, lines=tuple(lines), unexplained=("copy of 5 bytes",), notes=("cached",))
    shown = words(compare(PREDICTED, strange, capacity=20_000_000_000))
    assert "equal line by line: 12 of 14, 1 differs, 1 not comparable" in shown
    assert "differs: gradients: the compiler has +4,096 bytes (+<0.1 %)" in shown
    assert "n/c, not comparable: matmul/forward: hidden in a call" in shown
    assert "rule windowed-einsum" in shown and "on all-gather/data/forward/bf16 (2.80 kB)" in shown
    assert "emitted - 123" in shown
    assert "unexplained: copy of 5 bytes" in shown and "1 unexplained" in shown
    assert "note: cached" in shown
    assert "104.5 % of 20.0 GB usable" in shown and "does not fit, 900 MB too much" in shown


def test_an_estimate_is_never_called_equal():
    same = words(compare(PREDICTED, replace(COMPILED, peak=PREDICTED.peak)))
    assert "an estimate, off by +0.0 %, within the tolerance of 10 %" in same
    assert "outside the tolerance" in words(compare(PREDICTED, replace(COMPILED, peak=2 * PREDICTED.peak)))
    assert "XLA:GPU unknown; not comparable" in words(compare(PREDICTED, replace(COMPILED, peak=None)))


@pytest.mark.parametrize(
    ("error", "verb"), [(1.2e-7, "agree with"), (3e-2, "differ from"), (float("nan"), "differ from")]
)
def test_a_run_says_how_it_ended(error, verb):
    shown = words(replace(PLAIN, run=ran(error)))
    assert "gpu: compiled and run" in shown and "not run" not in shown
    assert f"3 steps {verb} the unsharded reference" in shown
    assert "in change/layers.q" in shown and "losses 6.25, 6, 5.75" in shown


def test_refused_by_the_compiler_does_not_fit():
    refused = compare(PREDICTED, replace(COMPILED, peak=None), capacity=10**12, refused="274 GB exceeds 15.75 GB")
    assert not refused.fits
    assert "does not fit: the compiler says 274 GB exceeds 15.75 GB" in words(refused)


def test_no_limit_known():
    assert "no limit is known for this machine: fits" in words(compare(PREDICTED, COMPILED))


def test_listing_aligns_numbers_and_wraps_the_last_column():
    out = io.StringIO()
    print_listing(console(out), ("name", "size", "about"), [("a", 1_000_000, "word " * 20), ("bcd", 5, "short")])
    lines = out.getvalue().splitlines()
    assert lines[0] == "name       size  about"
    assert lines[1].startswith("a     1,000,000  word word") and lines[2].startswith(" " * 17 + "word")
    assert lines[-1] == "bcd           5  short"
    assert max(map(len, lines)) <= 80


def test_figures_name_each_source_once():
    out = io.StringIO()
    print_figures(
        console(out), "chip", [("memory", "80 GB", "a paper"), ("peak", "9 TFLOP/s", "a paper"), ("kind", "x", "")]
    )
    shown = out.getvalue()
    assert shown.count("a paper") == 1 and shown.count("[1]") == 3 and "80 GB" in shown


def staged(predicted, compiled):
    lines = [[replace(memory("parameters", max(each)), stages=each)] for each in (predicted, compiled)]
    return text(compare(ledger("closed form", *lines[0]), ledger("XLA:CPU", *lines[1])))


def test_stages_that_are_not_alike_do_not_print_alike():
    assert "    by stage 0: 4.20 MB; 1 to 2: 3.94 MB; 3: 4.20 MB\n" in staged(*2 * [(4_200_001, 3_940_000, 3_940_000, 4_200_001)])
    shown = staged(*2 * [(4_071_936, 4_068_352, 1_000_000)])
    assert "    by stage 0: 4,071,936 B; 1: 4,068,352 B; 2: 1,000,000 B\n" in shown


def test_a_difference_names_the_stages_that_have_it():
    shown = staged((4_096, 2_048, 1_024), (4_096, 2_048, 1_000))
    assert "differs: parameters: the compiler has -24 bytes on stage 2\n" in shown
