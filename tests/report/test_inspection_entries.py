import io
from dataclasses import replace

import pytest

from jaxllm.report.entries import Entry, clipped, fold, print_entries, print_left_out, shown
from jaxllm.report.inspection_lines import (
    brief,
    collective_lines,
    flops_lines,
    largest,
    operation_lines,
    phase_flops,
    roofline,
    times,
)
from jaxllm.report.table import console
from jaxllm.report.units import duration, one_line
from tests.report.inspections import HUGE, MEMORY, NOTHING, STEP, place, product


def printed(heads, entries, width=80):
    file = io.StringIO()
    out = console(file)
    out.width = width
    print_entries(out, heads, entries)
    return file.getvalue().splitlines()


def test_texts_stand_beside_the_figures_where_there_is_room_and_below_where_not():
    heads = (">bytes", "class", "what")
    entries = [Entry((1_000_000, "residual"), ("f32[250000]", "model.py:31 < step.py:12"), "jit(step)/while/body/dot")]
    wide = printed(heads, entries, 120)
    assert wide[0] == "      bytes  class     what"
    assert wide[1] == "  1,000,000  residual  f32[250000]  model.py:31 < step.py:12  jit(step)/while/body/dot"
    entries[0] = replace(entries[0], cells=(1_000_000, "residual" * 4))
    narrow = printed(heads, entries)
    assert narrow[0] == "      bytes  class"
    assert narrow[2:] == [" " * 13 + "f32[250000]  model.py:31 < step.py:12  jit(step)/while/body/dot"]


def test_a_column_that_says_nothing_is_left_out_and_a_single_cell_is_a_line_of_its_own():
    lines = printed(("", ">before", "phase"), [Entry(("all",)), Entry(("payload", 5, ""), inset="  ")])
    assert lines == ["             before", "  all", "    payload       5"]
    assert printed(("", ">x"), []) == ["  nothing"]


def test_figures_are_never_cut():
    lines = printed((">bytes", ">wire", "what"), [Entry((HUGE, HUGE * 10**40), ("word " * 30,))])
    assert f"{HUGE:,}" in lines[1] and f"{HUGE * 10**40:,}" in lines[1]
    assert fold(f"there are {10**90:,} bytes", 30)[1] == f"{10**90:,} bytes"


def test_fold_breaks_at_spaces_and_long_words_inside_of_paths():
    text = "a peak of some 20.9 GB and 12.5 % of it, in jit(step)/transpose(jvp(Model))/while/body/dot_general"
    lines = fold(text, 30)
    assert max(map(len, lines)) <= 30
    assert "".join(text.split()) == "".join("".join(lines).split())
    assert any("20.9 GB" in line for line in lines) and any("12.5 %" in line for line in lines)
    assert lines[-2:] == ["transpose(jvp(Model))/while/", "body/dot_general"]
    assert fold("x" * 70, 30) == ["x" * 30, "x" * 30, "x" * 10]
    assert fold("", 30) == [""]
    assert fold("層" * 20, 20) == ["層" * 10, "層" * 10]  # each takes two cells


def test_an_operation_loses_its_outermost_scopes():
    name = "jit(step)/transpose(jvp(Model))/while/body/dot_general"
    assert clipped(name, 100) == name
    assert clipped(name, 30) == ".../while/body/dot_general"
    assert clipped("x" * 50, 20) == "..." + "x" * 17


def test_what_a_terminal_would_obey_is_written_out():
    out = console(io.StringIO())
    assert shown("[red]a\x1b[31m\r\n\u202eb[/red]", out) == "[red]a\\u001b[31m \\u202eb[/red]"
    assert one_line("Straße\u2028層") == "Straße 層"
    ascii_only = console(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert shown("Straße", ascii_only) == "Stra\\xdfe"


def test_what_is_left_out_is_counted():
    file = io.StringIO()
    print_left_out(console(file), 1, "line", " of 5 bytes in all")
    print_left_out(console(file), 0, "line")
    print_left_out(console(file), 1200, "buffer")
    assert file.getvalue().splitlines() == ["  and 1 more line of 5 bytes in all", "  and 1,200 more buffers"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.2e-3, "4.20 ms"),
        (9.996e-4, "1.00 ms"),
        (4.5e-5, "45.0 us"),
        (2e-9, "2.00 ns"),
        (4321.0, "4,321 s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_times_multiply_out_loops():
    assert times([place("a", trips=(2, 16))]) == "x 32 (2 x 16)"
    assert times([place("a", trips=(2, 16)), place("b", trips=(2, 16))]) == "2 x 32 (2 x 16)"
    assert times([place("a", trips=(16,))]) == "x 16"
    assert times([place("a")]) == "x 1"
    assert times([place("a", trips=(8,)), place("b", trips=(3,))]) == "x 11"
    assert times([place("a", trips=(8,), count=3)]) == "x 24 (8)"  # a function that is called in three loops of 8


def test_lines_add_up_to_the_report():
    lines = flops_lines(STEP)
    assert sum(line.flops for line in lines if not line.declared) == STEP.matmul_flops == 17_180_869_184
    assert sum(line.flops for line in lines if line.declared) == STEP.declared_flops == 77_000_000 * 32
    assert [line.flops for line in lines] == sorted((line.flops for line in lines), reverse=True)
    assert lines[0].count == 64 and [p.place.name for p in lines[0].products] == ["dot.1", "dot.2"]
    assert list(phase_flops(STEP).items()) == [("forward", 8_590_934_592), ("backward", 8_589_934_592)]
    gather, reduce = collective_lines(STEP)
    assert (gather.label, gather.payload, gather.count) == ("all-gather/data/forward/bf16", 4_194_304 * 32, 32)
    assert (gather.overlapped, gather.depth, gather.disguise, gather.ranks) == (32, 2, "", (4,))
    assert (reduce.overlapped, reduce.disguise, reduce.wire) == (0, "reduce-scatter", 7_000_000 * 32)
    assert sum(line.moved for line in operation_lines(STEP)) == sum(STEP.bytes)


def test_phases_come_in_the_order_of_a_step_and_the_unknown_last():
    products = tuple(product(f"dot.{i}", 1, phase, ()) for i, phase in enumerate(("", "update", "backward", "forward")))
    assert list(phase_flops(replace(NOTHING, products=products))) == ["forward", "backward", "update", ""]


def test_the_roofline_of_a_step():
    bound = roofline(STEP)
    serial = sum(o.seconds * o.place.count for o in STEP.operations)
    assert bound.serial == pytest.approx(serial) and sum(bound.bounds.values()) == pytest.approx(serial)
    assert bound.hidden == pytest.approx(serial - 32 * 7.0e-6)  # of the all-gather alone, which is asynchronous
    assert bound.bounds["network"] == pytest.approx(32 * (7.0e-6 + 1.3e-5))
    unknown = replace(STEP, operations=tuple(replace(o, seconds=None, bound="") for o in STEP.operations))
    assert roofline(unknown).unknown == 6 and roofline(unknown).serial == 0
    assert roofline(replace(STEP, machine=None)) is None


def test_collectives_alone_bound_a_step_that_hides_all_else():
    slow = replace(
        STEP, operations=tuple(replace(o, seconds=9.0 if "gather" in o.opcode else 1e-9) for o in STEP.operations)
    )
    assert roofline(slow).hidden == pytest.approx(9.0 * 32)


def test_tiny_buffers_and_long_tuples_are_told_briefly():
    assert [b.name for b in largest(MEMORY, 10)] == [
        b.name for b in MEMORY.live[:6]
    ]  # the batch is 1/10,000 of the peak
    assert brief("f32[8]") == "f32[8]"
    assert brief(f"({', '.join(['f32[1,8,128]'] * 8)})") == "(f32[1,8,128], ...) of 8 arrays"
