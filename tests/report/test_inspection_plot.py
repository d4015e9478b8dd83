import re
import warnings
from dataclasses import replace

import pytest

from jaxllm.report.drawing import drawn
from jaxllm.report.inspection import Memory
from jaxllm.report.inspection_plot import layers, phase_spans, save_timeline
from jaxllm.spec.errors import SpecError
from jaxllm.spec.machine import Machine
from tests.report.inspections import HOSTILE, LIVE, MEMORY, NOTHING, STEP, buffer, operation


def drawing(tmp_path, report):
    """The texts of the picture."""
    path = tmp_path / "picture.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a layout that does not fit, or a glyph that is missing
        save_timeline(report, path)
    return path.read_text()


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_formats(tmp_path, suffix, magic):
    path = tmp_path / f"memory{suffix}"
    STEP.plot(path)
    assert path.read_bytes().startswith(magic) and path.stat().st_size > 5_000


def test_the_picture_says_what_it_shows(tmp_path):
    text = drawing(tmp_path, STEP)
    for part in (
        "jit_step", "XLA:GPU, 8 devices (data=4, tensor=2)", "exact: the compiler", "2.15 GB in the host",
        "peak 11.0 GB", "backward, model.py:44", "capacity 76.4 GB", "residual, 2.00 GB", "gathered weight, 900 MB",
        "fragmentation, 12.3 kB", "f32[1000000000]", "and 1 more, 1.00 MB in all", "forward",
        "update", "step of the schedule, of 100",
    ):  # fmt: skip
        assert part in text, part


def test_a_capacity_that_is_near_is_drawn_and_one_that_is_far_is_told(tmp_path):
    near = replace(STEP, machine=Machine.read("rtx4090"))
    assert "Memory over the schedule<" in drawing(tmp_path, near)
    assert "Memory over the schedule; capacity 76.4 GB<" in drawing(tmp_path, STEP)
    assert "capacity" not in drawing(tmp_path, replace(STEP, machine=None))
    assert "a lower bound" in drawing(tmp_path, replace(STEP, memory=replace(MEMORY, exact=False)))


def test_the_same_report_gives_the_same_file(tmp_path):
    assert drawing(tmp_path, STEP) == drawing(tmp_path, STEP)


def test_layers_reach_the_timeline_at_every_step():
    made = layers(MEMORY)
    tops = dict(zip(made.steps, made.tops, strict=True))
    for step, level in MEMORY.timeline:
        assert tops[step] == level
    assert max(made.tops) == tops[41] == sum(b.bytes for b in LIVE) == MEMORY.peak - MEMORY.classes["fragmentation"]
    assert list(made.classes) == [
        "parameter", "optimizer", "argument", "residual", "gathered weight", "logits", "temporary",
    ]  # fmt: skip


def test_layers_show_each_class_while_it_is_alive():
    made = layers(MEMORY)

    def at(kind, step):
        return next(v for s, v in reversed(list(zip(made.steps, made.classes[kind], strict=True))) if s <= step)

    assert [at("residual", step) for step in (11, 12, 70, 71)] == [0, 2_000_000_000, 2_000_000_000, 0]
    assert {at("parameter", step) for step in range(100)} == {4_000_000_000}
    assert at("temporary", 3) == 399_000_000 and at("temporary", 42) == 300_000_001


def test_a_long_schedule_keeps_its_peak():
    steps = 200_000
    timeline = tuple((step, 1_000 + step % 7 + 5_000 * (step == 123_456)) for step in range(steps))
    memory = Memory(False, 6_000, {"temporary": 6_000}, 123_456, None, (), timeline, {"temporary": tuple(level for _, level in timeline)}, steps)
    made = layers(memory)
    assert len(made.steps) <= 1500 and 123_456 in made.steps
    assert max(made.tops) == max(level for _, level in timeline)


def test_phases_follow_the_schedule_and_slivers_are_left_out():
    assert phase_spans(STEP) == [("forward", 5, 42), ("backward", 42, 90), ("update", 90, 100)]
    assert phase_spans(replace(STEP, operations=tuple(replace(o, step=None) for o in STEP.operations))) == []
    long = replace(STEP, memory=replace(MEMORY, steps=1000))
    strange = operation("dot.9", "dot", 400, 0, 1, 1, None, "", phase="update")
    again = operation("dot.10", "dot", 402, 0, 1, 1, None, "", phase="backward")
    spans = phase_spans(replace(long, operations=(*STEP.operations[3:5], strange, again)))
    assert spans == [("backward", 42, 1000)]


def test_nothing_to_draw(tmp_path):
    text = drawing(tmp_path, NOTHING)
    assert "nothing is held" in text and "none is known" in text and "unknown compiler, 1 device" in text


def test_one_step(tmp_path):
    held = (buffer("x", "argument", 500, 0, 0),)
    one = Memory(True, 500, {"argument": 500}, 0, None, held, ((0, 500),), {"argument": (500,)}, 1)
    text = drawing(tmp_path, replace(NOTHING, memory=one))
    assert "peak 500 B" in text and "step of the schedule, of 1" in text


def test_hostile_names_are_drawn_as_they_are_written(tmp_path):
    text = drawing(tmp_path, HOSTILE)
    assert "[red]Straße\\u001b[31m \\u202e\\u5c64[/red]" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "$a$ and $b$" in drawing(tmp_path, replace(STEP, name="$a$ and $b$"))  # no formula


def test_what_the_font_lacks_is_written_out():
    assert drawn("Straße\n層") == "Straße \\u5c64"


def test_a_path_that_fails_late_is_one_sentence(tmp_path):
    with pytest.raises(SpecError, match="cannot be written"):
        save_timeline(STEP, tmp_path / "gone" / "x.png")
    with pytest.raises(SpecError, match="not a picture"):
        STEP.plot(tmp_path / "x.gif")
