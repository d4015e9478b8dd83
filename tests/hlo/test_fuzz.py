"""Damaged dumps: what is read is either a program that everything can measure, or an error with a place in the file.

Nothing else may come of it: no other exception, and no hang.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.hlo.emitted import emitted_payload
from jaxllm.hlo.errors import ParseError
from jaxllm.hlo.flops import matmul_lines
from jaxllm.hlo.inspect import inspect_program
from jaxllm.hlo.loops import executions
from jaxllm.hlo.protos import classes
from jaxllm.hlo.read import read_bytes
from tests.hlo.dumps import TARGETS, dumped

LIMIT = 10  # seconds for a case; the slowest takes a twentieth of it

# Of each compiler: loops with autodiff, asynchronous and library calls, convolutions, permutes, kernels.
NAMES = ("cnn", "experts", "scan_in_scan", "ring", "decode", "pallas")


class Hangs(BaseException):
    """Not an Exception, so that nothing on the way can take it for one of its own."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(data: bytes) -> bool:
    """Reads and measures; whether it was a program. Raises what must not be."""
    with limited():
        try:
            program = read_bytes(data, "x")
        except ParseError as error:
            assert 0 <= error.offset <= len(data)
            return False
        runs = executions(program.module)
        matmul_lines(program.module, runs)
        emitted_payload(program.module, runs, {"all": program.module.devices or 1})
        inspect_program(program).to_json()
        return True


@cache
def files(target: str, form: str) -> tuple[bytes, ...]:
    return tuple(getattr(dumped(name, target), form) for name in NAMES)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["proto", "module", "text"])
def test_what_is_whole_is_measured(target: str, form: str) -> None:
    assert all(measured(data) for data in files(target, form))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["proto", "text"])
def test_cuts(target: str, form: str) -> None:
    for data in files(target, form):
        for length in range(1, len(data.rstrip()), len(data) // 40):
            # A proto may end where its module does; the buffers are then missing.
            assert not measured(data[:length]) or form == "proto"


# ---- plain loops ----

Change = Callable[[random.Random, bytearray], None]


def flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)


def grow(rng: random.Random, data: bytearray) -> None:
    """A byte becomes a long number of the wire form."""
    place = rng.randrange(len(data))
    data[place : place + 1] = bytes([255] * rng.randrange(1, 10) + [rng.randrange(1, 128)])


def shrink(rng: random.Random, data: bytearray) -> None:
    place = rng.randrange(len(data))
    del data[place : place + rng.randrange(1, 5)]


def digit(rng: random.Random, data: bytearray) -> None:
    places = [found.start() for found in re.finditer(rb"\d", data)]
    for _ in range(rng.randrange(1, 4)):
        data[rng.choice(places)] = rng.choice(b"0123456789")


def number(rng: random.Random, data: bytearray) -> None:
    begin, end = rng.choice([found.span() for found in re.finditer(rb"\d+", data)])
    data[begin:end] = rng.choice(
        (b"0", b"-1", b"7", b"2147483648", b"9223372036854775808", b"9" * 30, b"9" * 5000, b"1e9")
    )


def word(rng: random.Random, data: bytearray) -> None:
    """One word in the place of another: names, opcodes, types."""
    words = [found.span() for found in re.finditer(rb"[\w.\-]+", data)]
    (begin, end), (first, last) = rng.choice(words), rng.choice(words)
    data[begin:end] = data[first:last]


def lines(change: Callable[[random.Random, list[bytes]], None]) -> Change:
    def changed(rng: random.Random, data: bytearray) -> None:
        rows = bytes(data).split(b"\n")
        change(rng, rows)
        data[:] = b"\n".join(rows)

    return changed


def delete(rng: random.Random, rows: list[bytes]) -> None:
    del rows[rng.randrange(len(rows))]


def double(rng: random.Random, rows: list[bytes]) -> None:
    rows.insert(rng.randrange(len(rows)), rng.choice(rows))


def move(rng: random.Random, rows: list[bytes]) -> None:
    rows.insert(rng.randrange(len(rows)), rows.pop(rng.randrange(len(rows))))


BYTES = (flip, overwrite, grow, shrink)
WORDS = (flip, overwrite, shrink, digit, number, word, lines(delete), lines(double), lines(move))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("form", "changes"), [("proto", BYTES), ("module", BYTES), ("text", WORDS)])
def test_changed_bytes_words_and_lines(target: str, form: str, changes: tuple[Change, ...]) -> None:
    rng = random.Random(f"{target} {form}")
    outcomes = set()
    for _ in range(150):
        data = bytearray(rng.choice(files(target, form)))
        rng.choice(changes)(rng, data)
        outcomes.add(measured(bytes(data)))
    assert outcomes == {True, False}  # else the changes are too weak, or too strong to reach what measures


NUMBERS = (0, 1, 2, 3, 7, 8, -1, -2, 100, 2**31 - 1, 2**40, 2**62, -(2**63), 2**63 - 1)
TEXTS = ("", "x", "é", 'a"b\n', *"while tuple parameter dot fusion call bitcast all-reduce copy-start".split())
CONFIGS = (
    b"",
    b"{}",
    b"[]",
    b"[" * 3000,
    b"\xff",
    b'{"known_trip_count":3}',
    b'{"gemm_backend_config":[1]}',
    b'{"collective_backend_config":7,"is_sync":1}',
    b'{"custom_call_config":{"cost_estimate":{"flops":"x"}}}',
)


def change_field(rng: random.Random, message: object) -> None:
    """Sets, clears, doubles, removes or moves something of one field of a message."""
    field = rng.choice([field for field, _ in message.ListFields()] or list(message.DESCRIPTOR.fields))
    types, value = type(field), getattr(message, field.name)
    if hasattr(value, "append") and len(value):
        change = rng.randrange(4)
        place, other = rng.randrange(len(value)), rng.randrange(len(value))
        if change == 0:
            del value[place]
        elif change == 1:
            value.extend([value[place]])
        elif field.type == types.TYPE_MESSAGE:
            kept = list(value)
            kept[place], kept[other] = kept[other], kept[place]
            copies = [type(item).FromString(item.SerializeToString()) for item in kept]
            del value[:]
            value.extend(copies)
        else:
            value[place] = value[other] if change == 2 else any_value(rng, field)
    elif field.type == types.TYPE_MESSAGE or hasattr(value, "append"):
        message.ClearField(field.name)
    else:
        setattr(message, field.name, any_value(rng, field))


def any_value(rng: random.Random, field: object) -> object:
    types = type(field)
    if field.type == types.TYPE_STRING:
        return rng.choice(TEXTS)
    if field.type == types.TYPE_BYTES:
        return rng.choice(CONFIGS)
    if field.type == types.TYPE_BOOL:
        return rng.random() < 0.5
    low, high = {
        types.TYPE_INT32: (-(2**31), 2**31 - 1),
        types.TYPE_UINT32: (0, 2**32 - 1),
        types.TYPE_UINT64: (0, 2**64 - 1),
    }.get(field.type, (-(2**63), 2**63 - 1))
    return min(high, max(low, rng.choice((*NUMBERS, rng.randrange(300)))))


def messages(message: object) -> Iterator[object]:
    yield message
    for field, value in message.ListFields():
        if field.type == type(field).TYPE_MESSAGE:
            for inside in value if hasattr(value, "append") else (value,):
                yield from messages(inside)


@pytest.mark.parametrize("target", TARGETS)
def test_changed_fields(target: str) -> None:
    """A field of one message at a time: bytes that any parser takes, whose numbers and names do not fit together."""
    rng = random.Random(target)
    outcomes = set()
    whole = classes()["HloProto"]
    for _ in range(200):
        proto = whole.FromString(rng.choice(files(target, "proto")))
        kinds: dict[str, list[object]] = {}
        for message in messages(proto):
            kinds.setdefault(message.DESCRIPTOR.name, []).append(message)
        kind = rng.choice((*kinds, *["HloInstructionProto"] * len(kinds)))
        change_field(rng, rng.choice(kinds[kind]))
        outcomes.add(measured(proto.SerializeToString()))
    assert outcomes == {True, False}


LARGE = {
    "braces that nothing closes": "ENTRY %e {\n  %a = f32[] custom-call(), backend_config={\n" + "{\n" * 300_000,
    "lines of nothing": "ENTRY %e {\n  %a = f32[] custom-call(), backend_config={" + "\n" * 1_000_000,
    "arrows": "ENTRY %e (" + ") -> " * 200_000 + "\n",
    "parentheses": "ENTRY %e {\n  %a = " + "(" * 500_000,
    "open quotes": "ENTRY %e {\n  %a = f32[] custom-call(), frontend_attributes={x=\"" + '\\"{' * 200_000,
    "a long word": "ENTRY %e {\n  %a = f32[] convolution(), dim_labels=" + "a" * 300_000 + "\n}\n",
    "a long name": "ENTRY %e {\n  %" + "a" * 1_000_000 + "\n}\n",
    "attributes": "ENTRY %e {\n  ROOT %a = f32[] custom-call(), frontend_attributes={" + "word " * 100_000 + "}\n}\n",
    "one attribute": "ENTRY %e {\n  ROOT %a = f32[] custom-call(), frontend_attributes={" + "a." * 200_000 + "}\n}",
    "spaces": "ENTRY %e {\n" + " " * 1_000_000 + "\n}\n",
    "comments": "ENTRY %e {\n  %a = (" + "/*" * 300_000 + "\n}\n",
    "many of one computation": "".join(f"%f{k} {{\n  ROOT %a = f32[] parameter(0)\n}}\n" for k in range(30_000)),
    "a wide mesh": "ENTRY %e {\n  %x = f32[] parameter(0)\n  ROOT %a = f32[] all-gather(%x), replica_groups=mesh["
    + ",".join(f"'a{k}'=1" for k in range(20_000)) + "] {'a7'}\n}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_might_take_for_ever(name: str) -> None:
    measured(f"HloModule m\n\n{LARGE[name]}".encode())


# ---- hypothesis ----


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.data())
def test_pieces_of_dumps_put_together(data: st.DataObject) -> None:
    """A piece of one file in the place of a piece of another, of any form."""
    def one(name: str) -> bytes:
        target = data.draw(st.sampled_from(TARGETS), name)
        form = data.draw(st.sampled_from(("proto", "module", "text")))
        return data.draw(st.sampled_from(files(target, form)))

    def piece(whole: bytes) -> tuple[int, int]:
        begin = data.draw(st.integers(0, len(whole) - 1))
        return begin, data.draw(st.integers(begin, min(len(whole), begin + 200)))

    into, source = one("into"), one("from")
    (begin, end), (first, last) = piece(into), piece(source)
    measured(into[:begin] + source[first:last] + into[end:])


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(
    st.sampled_from((b"", b"HloModule m\n", b"HloModule m\n\nENTRY e {\n", b"\x0a\x05\x0a\x03abc", b"\x0a\x03abc\x1a")),
    st.binary(),
)
def test_any_bytes(head: bytes, rest: bytes) -> None:
    assert not measured(head + rest)


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                (
                    "  %a = f32[2] parameter(0)",
                    "  ROOT %b = f32[2] negate(%a)",
                    "  %c = (f32[2], s32[]) tuple(%a, %a)",
                    "  %d = f32[2] fusion(%a), kind=kLoop, calls=%f",
                    "  %g = f32[] get-tuple-element(%c), index=1",
                    "  %h = f32[2] all-reduce(%a), replica_groups={{0,1}}, to_apply=%f",
                    '  %i = f32[2] custom-call("',
                    "ENTRY %e {",
                    "%f {",
                    "{",
                    "}",
                    "",
                    "// remark",
                    "FileNames",
                    '1 "a.py"',
                    "StackFrames",
                    "1 {file_location_id=1}",
                )
            ),
            st.text(alphabet='%=()[]{},"\\#:/*-.f32 \n\r\t²é0T', max_size=30),
        ),
        max_size=14,
    )
)
def test_lines_in_any_order(rows: list[str]) -> None:
    measured("\n".join(("HloModule m, is_scheduled=true", *rows)).encode())
