import io
from dataclasses import FrozenInstanceError, replace

import pytest

from jaxllm.report.difference import difference, print_difference
from jaxllm.report.inspection import Finding
from jaxllm.report.table import console
from tests.report.inspections import CLASSES, HOSTILE, LIVE, MEMORY, NOTHING, STEP, buffer


def words(before, after, width=80):
    return " ".join(shown(before, after, width).split())


def shown(before, after, width=80):
    file = io.StringIO()
    out = console(file)
    out.width = width
    print_difference(difference(before, after), out)
    return file.getvalue()


def test_a_program_is_like_itself():
    made = difference(STEP, STEP)
    assert not made.changed
    assert words(STEP, STEP) == "before jit_step after jit_step Nothing changed."
    data = made.to_json()
    assert data["changed"] is False and data["figures"] == data["collectives"] == data["memory"] == []
    with pytest.raises(FrozenInstanceError):
        made.before = "other"


def test_another_name_or_another_time_of_the_work_is_no_change():
    same = replace(STEP, name="jit_other", seconds={"read": 9.0})
    assert not difference(STEP, same).changed
    assert "after jit_other Nothing changed." in words(STEP, same)


def test_numbers_of_instructions_and_lines_of_the_source_are_no_change():
    moved = tuple(replace(b, name=f"{b.name}9", source=b.source.replace(":12", ":13"), start=b.start + 1) for b in LIVE)
    warned = tuple(replace(w, source="model.py:46 < step.py:13") for w in STEP.warnings)
    assert not difference(STEP, replace(STEP, memory=replace(MEMORY, live=moved), warnings=warned)).changed


def test_only_what_changed_with_before_after_change_and_percent():
    after = replace(STEP, products=STEP.products[1:], matmul_flops_range=(12_885_901_888,) * 2)
    made = difference(STEP, after)
    assert made.changed
    assert [(c.name, c.before, c.after, c.change, c.fraction) for c in made.figures] == [
        ("FLOPs", 17_180_869_184, 12_885_901_888, -4_294_967_296, pytest.approx(-0.25, abs=1e-4)),
    ]  # fmt: skip
    assert [(c.name, c.change) for c in made.flops] == [("forward", -134_217_728 * 32)]
    assert made.collectives == made.memory == made.came == made.went == made.warned == made.solved == ()
    text = words(STEP, after)
    assert "FLOPs 17,180,869,184 12,885,901,888 -4,294,967,296 -25 %" in text
    assert "forward 8,590,934,592 4,295,967,296 -4,294,967,296 -50 %" in text
    assert "Collectives" not in text and "Memory" not in text and "peak" not in text and "arnings" not in text


def test_collectives_by_kind_axes_phase_and_dtype():
    gather, reduce = STEP.collectives
    scattered = replace(reduce, kind="reduce-scatter", wire=3_500_000, disguise="")
    larger = replace(gather, payload=2 * gather.payload, wire=2 * gather.wire)
    made = difference(STEP, replace(STEP, collectives=(larger, scattered)))
    assert [line.label for line in made.collectives] == [
        "all-gather/data/forward/bf16", "all-reduce/data+tensor/backward/f32",
        "reduce-scatter/data+tensor/backward/f32",
    ]  # fmt: skip
    grown, gone, new = made.collectives
    assert (grown.payload.before, grown.payload.after, grown.payload.fraction) == (134_217_728, 268_435_456, 1.0)
    assert (grown.count.before, grown.count.after) == (32, 32)
    assert (gone.wire.after, gone.wire.fraction, new.wire.before, new.wire.fraction) == (0, -1.0, 0, None)
    text = words(STEP, replace(STEP, collectives=(larger, scattered)))
    assert "payload 134,217,728 268,435,456 +134,217,728 +100 %" in text
    assert "times" not in text.partition("all-reduce")[0]  # what stayed the same is not listed
    assert "wire 224,000,000 0 -224,000,000 gone" in text and "wire 0 112,000,000 +112,000,000 new" in text
    assert "sent by collectives" in text


def test_memory_by_class_and_the_buffers_that_came_and_went():
    classes = {name: size for name, size in CLASSES.items() if name != "logits"} | {"activation": 5_000_000}
    live = (*(b for b in LIVE if b.kind != "logits"), buffer("act.1", "activation", 5_000_000, 40, 45))
    after = replace(STEP, memory=replace(MEMORY, classes=classes, peak=sum(classes.values()), live=live))
    made = difference(STEP, after)
    assert [(c.name, c.change) for c in made.memory] == [
        ("peak", -795_000_000), ("peak, activation", 5_000_000), ("peak, logits", -800_000_000),
    ]  # fmt: skip
    assert [b.name for b in made.came] == ["act.1"] and [b.name for b in made.went] == ["logits.1"]
    text = words(STEP, after)
    assert "peak 11,001,012,346 10,206,012,346 -795,000,000 -7.2 %" in text
    assert "Alive at the peak now, 1 buffer bytes class what 5,000,000 activation bf16[64,2048] model.py:31" in text
    assert "Alive at the peak no more, 1 buffer" in text


def test_of_two_alike_buffers_one_may_go():
    twice = replace(STEP, memory=replace(MEMORY, live=(LIVE[2], *LIVE)))
    assert [b.name for b in difference(twice, STEP).went] == ["residual.3"]
    assert difference(twice, twice).went == ()


def test_warnings_that_came_and_went():
    new = Finding("f32-traffic", "5 MB are sent as f32", "cast before", "model.py:9", "jit(step)/psum", 5_000_000)
    made = difference(STEP, replace(STEP, warnings=(new,)))
    assert made.warned == (new,) and made.solved == STEP.warnings
    text = words(STEP, replace(STEP, warnings=(new,)))
    assert "New warnings, 1 f32-traffic: 5 MB are sent as f32 at model.py:9 try: cast before" in text
    assert "Warnings that went, 1 all-reduce-then-slice" in text
    grown = (replace(STEP.warnings[0], bytes=224_000_000),)
    assert difference(STEP, replace(STEP, warnings=grown)).warned == grown  # the same at another price is news


def test_another_setting_is_told_and_times_on_two_machines_are_not_compared():
    after = replace(STEP, target="tpu", devices=16, mesh={"data": 16}, machine=None)
    made = difference(STEP, after)
    assert made.setting == (
        ("compiler", "XLA:GPU", "XLA:TPU"), ("devices", "8", "16"), ("mesh", "data=4, tensor=2", "data=16"),
        ("machine", "h100", "none"),
    )  # fmt: skip
    assert not made.figures
    assert "mesh data=4, tensor=2 data=16" in words(STEP, after)


def test_a_measure_and_a_lower_bound_are_told_apart():
    bound = replace(STEP, memory=replace(MEMORY, exact=False))
    assert difference(STEP, bound).setting == (("memory", "exact", "a lower bound"),)


def test_tiny_buffers_are_counted_and_not_listed():
    tiny = tuple(buffer(f"c.{i}", "constant", 4, 0, 99) for i in range(3))
    after = replace(STEP, memory=replace(MEMORY, live=(*LIVE, buffer("act.1", "activation", 5_000, 1, 2), *tiny)))
    assert "and 3 more buffers of 12 bytes in all" in words(STEP, after)


def test_a_slower_step_on_one_machine():
    slow = replace(STEP, operations=(*STEP.operations[:-1], replace(STEP.operations[-1], seconds=8.4e-3)))
    (change,) = difference(STEP, slow).figures
    assert change.name == "seconds on h100" and change.change == pytest.approx(4.2e-3)
    assert "seconds on h100 4.93 ms 9.13 ms +4.20 ms +85 %" in words(STEP, slow)


def test_conditionals_that_leave_more_open():
    (change,) = difference(STEP, replace(STEP, matmul_flops_range=(1, STEP.matmul_flops))).figures
    assert (change.name, change.before, change.after) == ("FLOPs that branches leave open", 0, 17_180_869_183)


def test_long_lists_say_what_they_leave_out():
    many = tuple(buffer(f"b.{i}", "activation", 1_000 + i, 0, 9) for i in range(14))
    after = replace(STEP, memory=replace(MEMORY, live=(*LIVE, *many)))
    assert "and 4 more buffers of 4,046 bytes in all" in words(STEP, after)
    warned = tuple(Finding("k", "m", "a", bytes=i) for i in range(12))
    assert "and 2 more warnings" in words(NOTHING, replace(NOTHING, warnings=warned))


@pytest.mark.parametrize("pair", [(STEP, NOTHING), (NOTHING, STEP)])
def test_from_something_to_nothing_and_back(pair):
    text = shown(*pair)
    assert ("gone" in text) == (pair[0] is STEP) and ("new" in text) == (pair[1] is STEP)
    assert max(map(len, text.splitlines())) <= 80 and "%" not in text
    assert "a module without a name" in text


def test_hostile_names_are_shown_and_not_obeyed():
    text = shown(STEP, HOSTILE)
    assert "[red]Straße\\u001b[31m \\u202e層[/red]" in text
    assert not any(ord(c) < 32 and c != "\n" for c in text) and "\u202e" not in text


def test_the_json_of_a_change():
    data = difference(STEP, replace(STEP, warnings=(), collectives=STEP.collectives[:1])).to_json()
    assert (data["document"], data["before"], data["after"], data["changed"]) == (
        "difference",
        "jit_step",
        "jit_step",
        True,
    )
    (line,) = data["collectives"]
    assert line["compiled"] == {"before": 128_000_000, "after": 0, "change": -128_000_000, "fraction": -1.0}
    assert [one["kind"] for one in data["warnings"]["went"]] == ["all-reduce-then-slice"] and not data["warnings"][
        "came"
    ]
