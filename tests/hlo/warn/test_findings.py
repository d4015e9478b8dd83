"""All finders together: what they are, how they are told, and that they are quiet where nothing is at stake."""

import pytest

from jaxllm.hlo import warn
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.loops import executions
from jaxllm.hlo.read import read_bytes
from jaxllm.hlo.view import View
from jaxllm.hlo.warn.walk import Walk
from jaxllm.report.inspection import Finding
from tests.hlo.dumps import PROGRAMS, dumped
from tests.hlo.warn import programs as p
from tests.hlo.warn.programs import compiled

KINDS = {
    "involuntary-rematerialization", "xla-rematerialization", "replicated", "all-reduce-then-slice",
    "reduction-in-loop", "gather-before-matmul", "f32-traffic", "donate", "heavy-residuals", "conditional-copies",
    "tpu-padding", "unmatched-name",
}  # fmt: skip


def test_every_kind_has_a_finder():
    assert {name.removeprefix("find_").replace("_", "-") for name in warn.finders()} == KINDS


def test_one_line_is_told_once(monkeypatch):
    def found(*bytes_):
        return [Finding("donate", f"{size} bytes.", "", source="a.py:1", bytes=size) for size in bytes_]

    finders = {
        "one": lambda walk: iter(found(3, 9, 1)),
        "two": lambda walk: iter([Finding("replicated", "x", "", bytes=10)]),
    }
    monkeypatch.setattr(warn, "finders", lambda: finders)
    monkeypatch.setattr(warn, "Walk", lambda view: None)
    replicated = Finding("replicated", "x", "", bytes=10)
    merged = Finding("donate", "9 bytes. The same line does so 2 times more.", "", source="a.py:1", bytes=13)
    assert warn.findings(None) == (merged, replicated)


def test_most_bytes_come_first():
    found, _ = compiled(p.whole_batch, "cpu", False)
    assert [finding.bytes for finding in found] == sorted((finding.bytes for finding in found), reverse=True)


@pytest.mark.parametrize(("name", "target"), PROGRAMS)
def test_small_programs_raise_no_warning(name, target):
    found = dumped(name, target)
    assert inspect_program(read_bytes(found.proto, found.name)).warnings == ()


def walk_of(text: str) -> Walk:
    """A walk through a program of which nothing has been measured."""
    module = read_bytes(text.encode("latin-1"), "program.txt").module
    return Walk(View(module, executions(module), {}, "", (), (), (), None, ()))


def all_of(walk: Walk) -> list[Finding]:
    return [finding for finder in warn.finders().values() for finding in finder(walk)]


HEAD = """HloModule hostile, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""
SUM = "all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add"
SHAPE = "f32[1024,1024]"


def entry(result: str, *lines: str) -> str:
    """A module whose entry takes %x and gives what the last line makes."""
    return "\n".join((f"{HEAD}ENTRY %main (x: {SHAPE}) -> {result} {{", f"%x = {SHAPE} parameter(0)", *lines, "}"))


def found_in_time(text: str) -> list[Finding]:
    walk = walk_of(text)
    found = all_of(walk)
    return found


def test_a_long_chain_ends():
    copies = (f"%c{n} = {SHAPE} copy(%c{n - 1})" for n in range(1, 20_000))
    assert not found_in_time(entry(SHAPE, f"%c0 = {SHAPE} {SUM}", *copies, f"ROOT %end = {SHAPE} negate(%c19999)"))


def test_a_wide_tuple_ends():
    sums = [f"%s{n} = {SHAPE} {SUM}" for n in range(3_000)]
    whole = f"({', '.join([SHAPE] * len(sums))})"
    end = f"ROOT %end = {whole} tuple({', '.join(f'%s{n}' for n in range(len(sums)))})"
    assert not found_in_time(entry(whole, *sums, end))


def test_following_stops_when_it_was_long_enough():
    walk = walk_of(compiled(p.sliced_sum, "cpu", False)[1])
    walk.left = 0
    assert all_of(walk) == []
