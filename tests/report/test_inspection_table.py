import io
import re
from dataclasses import replace

import pytest

from jaxllm.report.inspection import Finding
from jaxllm.report.inspection_table import TOP, print_report, text
from jaxllm.report.table import console
from jaxllm.spec.machine import Machine
from tests.report.inspections import CLASSES, HOSTILE, HUGE, NOTHING, STEP, buffer, operation, place, product


def shown(report=STEP, width=80):
    file = io.StringIO()
    out = console(file)
    out.width = width
    print_report(report, out)
    return file.getvalue()


def words(report=STEP, width=80):
    return " ".join(shown(report, width).split())


@pytest.mark.parametrize("width", [80, 100, 137, 200])
def test_it_fits_the_terminal_in_plain_text(width):
    lines = shown(width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    assert "\x1b" not in shown(width=width) and shown(width=width).isascii()


def test_a_wide_terminal_needs_fewer_lines():
    assert len(shown(width=160).splitlines()) < len(shown(width=80).splitlines()) - 15


def test_print_of_a_report_is_its_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert str(STEP) == text(STEP) == shown(width=100).rstrip("\n")
    monkeypatch.setenv("COLUMNS", "40")
    assert str(STEP) == shown(width=80).rstrip("\n")


def test_the_header_says_what_was_compiled_for_what():
    begin = words()
    assert "module jit_step compiler XLA:GPU devices 8 mesh data=4, tensor=2 machine h100: NVIDIA H100" in begin
    assert "compiler unknown devices 1 mesh unknown Multiplied" in words(NOTHING)


def test_flops_by_phase_and_line_with_counts():
    report = words(width=200)
    assert "forward 8,590,934,592 8.59 G 50 % backward 8,589,934,592 8.59 G 50 % total 17,180,869,184" in report
    line = "8,589,934,592 50 % 2 x 32 (2 x 16) forward dot bf16 model.py:31 < step.py:12 bf16[64,512] . bf16[512,2048]"
    assert line in report
    assert "1,000,000 <0.1 % x 1 forward convolution f32 model.py:18" in report


def test_declarations_of_kernels_are_no_part_of_the_total():
    report = words(width=200)
    assert "Declared by kernels of themselves, 2,464,000,000 in all, and no part of the total" in report
    assert "2,464,000,000 100 % x 32 (2 x 16) forward __triton$flash bf16 model.py:52" in report
    assert "Declared" not in words(replace(STEP, products=STEP.products[:-1]))


def test_conditionals_leave_a_range_and_the_rows_add_up_to_its_upper_end():
    one, other = (
        product(name, flops, "forward", (), conditional=True)
        for name, flops in (("dot.1", 1_000_000), ("dot.2", 700_000))
    )
    report = words(replace(NOTHING, products=(one, other), matmul_flops_range=(700_000, 1_000_000)))
    assert "forward 1,700,000 1.70 M 100 %" in report
    assert "branches instead of which others run -700,000" in report
    assert "total, at least 700,000 700 k 41 % total, at most 1,000,000" in report
    assert "in a branch that may not be taken" in report


def test_bytes_and_intensity():
    read, written = STEP.bytes
    report = words()
    assert f"read {read:,} 7.43 GB written {written:,} 7.31 GB total {read + written:,}" in report
    assert "Arithmetic intensity: 1.17 FLOPs a byte; h100 has 295 in bf16" in report
    assert "are all counted" not in report
    taken = replace(STEP.operations[0], place=place("dot.1", conditional=True))
    assert "All branches of conditionals are counted" in words(replace(STEP, operations=(taken,)))


def test_f32_is_held_against_the_peak_at_which_gpus_multiply_it():
    products = tuple(replace(p, dtype="f32") for p in STEP.products)
    assert "h100 has 148 in tf32" in words(replace(STEP, products=products))


def test_the_roofline_names_what_bounds_the_step_and_the_slowest_lines():
    report = words(width=200)
    assert "Time of a step on h100, at least" in report
    assert "bound by memory 4.29 ms 87 % bound by network 640 us 13 % total 4.93 ms 100 %" in report
    assert "4.71 ms when asynchronous collectives run beside all else" in report
    assert "4.20 ms 85 % x 1 memory update fusion model.py:31 < step.py:12 14.0 GB" in report
    assert "48.0 us 1.0 % x 32 (2 x 16) memory backward fusion model.py:44" in report
    assert "8.59 GFLOP, 160 MB, 53.7 FLOPs a byte" in report


def test_without_a_machine_the_lines_that_move_most_bytes():
    report = words(replace(STEP, machine=None), width=200)
    assert "Time of a step" not in report
    assert "14,000,000,000 95 % x 1 update fusion model.py:31" in report


def test_a_machine_that_states_nothing_is_no_bound():
    bare = replace(STEP, operations=tuple(replace(o, seconds=None, bound="") for o in STEP.operations))
    report = words(bare)
    assert "no bound is known: the machine's file states nothing of what the step uses" in report
    some = replace(STEP, operations=(*STEP.operations[:-1], replace(STEP.operations[-1], seconds=None, bound="")))
    assert "Without 1 operation for which the machine's file states no peak" in words(some)


def test_collectives_with_their_lines_loops_and_overlap():
    report = words(width=200)
    assert (
        "134,217,728 100,663,296 32 all-gather/data/forward/bf16 in groups of 4, in 2 nested loops of 2 x 16" in report
    )
    assert "overlaps with compute model.py:31 < step.py:12" in report
    assert "128,000,000 224,000,000 32 all-reduce/data+tensor/backward/f32 in groups of 8" in report
    assert "synchronous reduce-scatter in disguise model.py:44" in report
    assert "262,217,728 324,663,296 64 total" in report


def test_collectives_of_several_lines_and_depths():
    first = STEP.collectives[1]
    more = tuple(
        replace(
            first,
            place=place(f"all-reduce.{i}", "backward", line=i, trips=(2,) * (i % 2), conditional=i == 3),
            disguise="", asynchronous=True, overlapped=("dot.2",) if i == 1 else (),
        )
        for i in range(5)
    )  # fmt: skip
    report = words(replace(STEP, collectives=more))
    assert "some in a loop" in report and "overlaps with compute (2 of 7)" in report
    assert "and 2 more lines" in report and "in branches that may not be taken" in report
    assert "asynchronous, overlaps with nothing" in words(replace(STEP, collectives=more[:1]))


def test_memory_adds_up_and_says_where_the_peak_is():
    report = words()
    rows = re.findall(r"^  (\D+?) +([\d,]+)  ", shown(), re.MULTILINE)
    held = {name: int(number.replace(",", "")) for name, number in rows if name in CLASSES or name == "peak"}
    assert held.pop("peak") == STEP.peak_bytes == sum(held.values()) and held == CLASSES
    assert "Exact: the compiler's own assignment of buffers." in report
    assert "14 % of the 76.4 GB that h100 has for use: fits." in report
    assert "7,000,000,000 bytes (7.00 GB) of outputs that take an argument's place (donated)." in report
    assert "2,147,483,648 bytes (2.15 GB) in the host's memory, no part of the peak." in report
    assert "on the chip" not in report
    assert "The peak is at step 42 of 100: fusion.8, backward, x 32 (2 x 16), model.py:44 < step.py:12" in report


def test_a_lower_bound_is_called_so_and_a_peak_that_does_not_fit_too():
    bound = replace(STEP, memory=replace(STEP.memory, exact=False, on_chip=77))
    assert "A lower bound, from lifetimes alone" in words(bound) and "Exact" not in words(bound)
    assert "77 bytes (77 B) on the chip, no part of the peak." in words(bound)
    assert "bytes (11.0 GB), a lower bound" in words(bound)
    small = replace(STEP, machine=Machine.read("rtx4090"), memory=replace(STEP.memory, peak=90_000_000_000))
    assert "does not fit" in words(small) and "GB too much" in words(small)


def test_the_largest_buffers_with_class_shape_operation_and_line():
    report = words(width=200)
    assert "Largest of the 7 buffers that are alive there" in report
    assert (
        "2,000,000,000 18 % residual 12 to 70 bf16[16,64,976563] model.py:31 < step.py:12 jit(step)/residual" in report
    )
    assert "4,000,000,000 36 % parameter all f32[1000000000]" in report
    assert "and 1 more buffer of 1,000,000 bytes in all" in report


def test_warnings_with_line_and_advice():
    report = words()
    assert "Warnings, 1 all-reduce-then-slice: an all-reduce of 128 MB, of which each device keeps a slice" in report
    assert "at model.py:44 < step.py:12 try: give the result of the product a sharding" in report
    assert "Warnings none" in words(NOTHING)


def test_a_warning_without_a_line_names_the_operation():
    finding = Finding("padded", "tiles add 5 MB", "", "", "jit(step)/dot")
    assert "padded: tiles add 5 MB at jit(step)/dot" in words(replace(STEP, warnings=(finding,)))


def test_what_is_not_known_is_counted_and_listed():
    twice = replace(STEP, not_understood=("opcode zap: not known",) * 2 + STEP.not_understood)
    report = words(twice)
    assert "Not understood, and not counted, 3 opcode zap: not known (2 times) FLOPs of custom-call.3" in report
    assert "unknown 3 not understood" in report
    assert "Taken for granted, 1 a loop whose trip count is unknown counts once: while.7" in report
    assert "Not understood" not in words(NOTHING)


def test_lists_say_how_much_they_leave_out():
    many = range(TOP + 5)
    report = replace(
        STEP,
        machine=None,
        products=tuple(product(f"dot.{i}", 1_000, line=i) for i in many),
        operations=tuple(operation(f"dot.{i}", "dot", i, 0, 10, 0, None, "", line=i) for i in many),
        memory=replace(STEP.memory, live=tuple(buffer(f"b.{i}", "temporary", 10**9, 0, 9) for i in many)),
        warnings=tuple(Finding("kind", f"message {i}", "advice", bytes=i) for i in many),
        not_understood=tuple(f"opcode {i}" for i in many),
        assumed=tuple(f"loop {i}" for i in many),
    )
    told = words(report)
    assert f"and 5 more lines of {5 * 32_000:,} FLOPs in all" in told
    assert "and 5 more lines of 1,600 bytes in all" in told
    assert "and 5 more buffers of 5,000,000,000 bytes in all" in told
    assert "and 5 more warnings" in told and told.count("and 5 more sentences") == 2
    assert f"message {TOP + 4}" in told and "message 0" not in told  # the dearest come first


def test_an_empty_program():
    report = words(NOTHING)
    assert "a module without a name" in report and "no collectives" in report
    assert "in FLOPs nothing" in report and "bytes of its memory nothing" in report
    assert max(map(len, shown(NOTHING).splitlines())) <= 80


def test_hostile_names_are_shown_and_not_obeyed_and_huge_figures_not_cut():
    report = shown(HOSTILE)
    assert "[red]Straße\\u001b[31m \\u202e層[/red]" in report
    assert not any(ord(c) < 32 and c != "\n" for c in report) and "\u202e" not in report
    for figure in (HUGE, HUGE * 32, HUGE - 5):
        assert f"{figure:,}" in report
    assert "31m" in shown(HOSTILE, 200)


def test_the_summary_at_the_end():
    end = words()[-300:]
    assert "FLOPs 17,180,869,184 (17.2 GFLOP) sent 324,663,296 bytes (325 MB) on the wire" in end
    assert f"peak {STEP.peak_bytes:,} bytes (11.0 GB), exact warnings 1 unknown 1 not understood" in end
    assert end.endswith("time read 210 ms, measure 50.0 ms")
