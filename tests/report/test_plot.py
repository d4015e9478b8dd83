from dataclasses import replace

import pytest

from jaxllm.report.compare import compare
from jaxllm.report.files import plot_path
from jaxllm.report.layers import bars
from jaxllm.report.plot import memory_stack, save_plot
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.theory.parts import parts
from tests.report.ledgers import COMPILED, PREDICTED, SETUP, ledger, memory

COMPARISON = compare(PREDICTED, COMPILED, capacity=76_700_000_000)


def test_the_stack_reaches_the_peak_of_both_authors():
    parts = memory_stack(COMPARISON)
    assert [name for name, _, _ in parts] == [
        "parameters", "optimizer", "batch", "gradients", "residuals", "temporaries up to the peak",
    ]  # fmt: skip
    assert (sum(part[1] for part in parts), sum(part[2] for part in parts)) == (PREDICTED.peak, COMPILED.peak)


def test_host_memory_is_not_in_the_stack_and_a_peak_below_its_parts_adds_nothing():
    lines = (memory("parameters", 100), memory("host", 50))
    parts = memory_stack(compare(ledger("a", *lines, peak=90), ledger("b", *lines, peak=120)))
    assert parts == [("parameters", 100, 100), ("temporaries up to the peak", 0, 20)]


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_formats(tmp_path, suffix, magic):
    path = tmp_path / f"picture{suffix}"
    save_plot(COMPARISON, SETUP, plot_path(str(path)))
    assert path.read_bytes().startswith(magic) and path.stat().st_size > 5_000


def test_the_picture_says_what_it_shows(tmp_path):
    path = tmp_path / "picture.svg"
    save_plot(COMPARISON, SETUP, path)
    text = path.read_text()
    for part in (
        "llama-2-7b on h100:8", "compiled, not run", "capacity 76.7 GB", "peak 20.1 GB", "peak 20.9 GB", "closed form",
        "XLA:GPU", "over data+tensor", "15.0 GB",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("layout", "by", "shown", "not_shown"),
    [
        ("data=4,tensor=2,remat=full,offload=optimizer+input", "layer", ("By layer, closed form", "each of 32", "in host memory"), "mlp"),
        ("data=4,tensor=2", "module", ("By module", "attention, each of 32", "mlp, each of 32", "activations"), "in host memory"),
        ("pipe=4,data=2,microbatches=4", "layer", ("By stage", "stage 0", "stage 3"), "each of"),
        ("pipe=32,microbatches=32", "layer", ("By stage", ">31<"), "stage 31"),
    ],
)
def test_the_parts_are_drawn_below(tmp_path, layout, by, shown, not_shown):
    path = tmp_path / "picture.svg"
    parsed = Layout.parse(layout)
    setup = replace(SETUP, layout=parsed, workload=replace(SETUP.workload, batch=32))
    save_plot(COMPARISON, setup, path, by)
    text = path.read_text()
    assert all(part in text for part in shown) and not_shown not in text
    for name, sizes in bars(setup, by):  # a bar's bytes are those of the table
        assert sizes["parameters"] or name in ("step", "other"), name


def test_the_bars_of_all_stages_are_what_all_parts_hold():
    setup = replace(SETUP, layout=Layout.parse("pipe=4,data=2,microbatches=4"), workload=replace(SETUP.workload, batch=32))
    held = sum(part.held for part in parts(setup.model, setup.layout, setup.workload))
    assert sum(sum(sizes.values()) for _, sizes in bars(setup, "layer")) == held


def test_the_same_comparison_gives_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        save_plot(COMPARISON, SETUP, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_nothing_to_send_and_nothing_known(tmp_path):
    unknown = compare(ledger("a", memory("residuals", None)), ledger("b", memory("parameters", 100)))
    save_plot(unknown, SETUP, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "nothing is sent" in text and "peak unknown" in text
    save_plot(compare(ledger("a"), ledger("b")), SETUP, tmp_path / "empty.svg")


@pytest.mark.parametrize(
    ("name", "why"), [("x.gif", "not a picture"), ("x", "no suffix"), ("no/x.png", "no folder"), ("d.png", "a folder")]
)
def test_paths_that_cannot_be_written_are_refused_early(tmp_path, name, why):
    (tmp_path / "d.png").mkdir()
    with pytest.raises(SpecError, match=why):
        plot_path(str(tmp_path / name))


def test_a_path_that_fails_late_is_one_sentence(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(SpecError, match="cannot be written"):
        save_plot(replace(COMPARISON), SETUP, folder / "x.png")
