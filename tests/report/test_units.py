import pytest

from jaxllm.report.units import exact, human, percent, wrap


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"), (99_960, "100 kB"),
        (999_499, "999 kB"), (999_500, "1.00 MB"), (7_890_000_000, "7.89 GB"), (10**26, "100000 ZB"), (None, "-"),
    ],
)  # fmt: skip
def test_human(value, text):
    assert human(value) == text


def test_exact_and_percent():
    assert (exact(20_215_246_848), exact(None)) == ("20,215,246,848", "-")
    assert [percent(x) for x in (0.0, 0.00001, -0.00001, 0.004, -0.12, 2.5)] == [
        "+0.0 %", "+<0.1 %", "-<0.1 %", "+0.4 %", "-12 %", "+250 %",
    ]  # fmt: skip


def test_wrap_keeps_numbers_with_their_units():
    lines = wrap("a peak of some 20.9 GB and 12.5 % of it, word after word", 20, "  ")
    assert lines[0] == "a peak of some" and lines[1] == "  20.9 GB and 12.5 %"
    assert " ".join(" ".join(lines).split()) == "a peak of some 20.9 GB and 12.5 % of it, word after word"
    assert wrap("", 40) == [""]
