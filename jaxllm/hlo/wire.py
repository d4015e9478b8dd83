"""The wire form of protos: where in the bytes a message stops being one, and where an instruction stands.

protobuf's own parser says that something is wrong and not where. Only a file with an error is walked here, and of its
messages only those in which the error is. (The format: protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from jaxllm.hlo.protos import classes

_VARINT, _FIXED64, _LENGTH, _START, _END, _FIXED32 = range(6)
_DEEPEST = 100  # messages inside of each other, protobuf's own limit


class Broken(Exception):
    """Bytes that are not the wire form of a message, from `offset` on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset, self.reason = offset, reason


def varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """The number at `position`, and the position after it. Raises Broken."""
    value = 0
    for count in range(10):
        if position + count >= end:
            raise Broken(min(position, end), "a number is cut")
        byte = data[position + count]
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, position + count + 1
    raise Broken(position, "a number goes on for more than 10 bytes")


def fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, begin, end) of the fields of the message in data[position:end]. Raises Broken."""
    while position < end:
        start = position
        tag, position = varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if not number or number >= 2**29:
            raise Broken(start, f"there is no field {number}")
        begin = position
        if kind == _VARINT:
            _, position = varint(data, position, end)
        elif kind == _LENGTH:
            length, begin = varint(data, position, end)
            position = begin + length
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        elif kind == _START:
            position = _after_group(data, position, end, number)
        else:
            raise Broken(start, f"field {number} has no type that a proto has")
        if position > end:
            where = end if end == len(data) else start
            left = max(0, end - begin)
            raise Broken(where, f"field {number} wants {position - begin:,} bytes, and {left:,} are left")
        yield number, kind, begin, position


def _after_group(data: bytes, position: int, end: int, number: int) -> int:
    """The position after the group of a field, an old form that XLA does not write."""
    depth = [number]
    while depth:
        start = position
        tag, position = varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == _START:
            depth.append(number)
        elif kind == _END and number == depth[-1]:
            depth.pop()
        elif kind == _VARINT:
            _, position = varint(data, position, end)
        elif kind == _LENGTH:
            length, position = varint(data, position, end)
            position += length
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise Broken(start, "a group of fields does not end where it should")
        if position > end or len(depth) > _DEEPEST:
            raise Broken(start, "a group of fields is cut")
    return position


def broken(data: bytes, message: str) -> Broken:
    """Where and why `data` is not the wire form of a message of that name, given that the parser has refused it."""
    try:
        _descend(data, 0, len(data), classes()[message].DESCRIPTOR, message)
    except Broken as found:
        return found
    return Broken(0, "the parser of protobuf refuses it")


def _descend(data: bytes, begin: int, end: int, descriptor: Any, path: str) -> None:
    """Raises Broken at the first field that is not what it should be."""
    known = descriptor.fields_by_number
    try:
        for number, kind, start, stop in fields(data, begin, end):
            field = known.get(number)
            if field is None or kind != _LENGTH:
                continue
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                if not _parses(data[start:stop], field.message_type.name):
                    _descend(data, start, stop, field.message_type, f"{path}.{field.name}")
            elif field.type == FieldDescriptor.TYPE_STRING:
                _text(data, start, stop, field.name)
            elif field.type != FieldDescriptor.TYPE_BYTES:
                position = start
                while position < stop:
                    _, position = varint(data, position, stop)
    except Broken as found:
        if not found.reason.endswith(")"):  # else it has been told further in
            named = re.match(r"field (\d+)", found.reason)
            if named and int(named[1]) in known:
                found.reason = known[int(named[1])].name + found.reason[named.end() :]
            found.reason += f" (in {_shown(path)})"
        raise
    raise Broken(begin, f"messages lie more than {_DEEPEST} deep in each other (in {_shown(path)})")


def _shown(path: str) -> str:
    return path if len(path) <= 100 else path[:97] + "..."


def _parses(data: bytes, message: str) -> bool:
    try:
        classes()[message].FromString(data)
    except DecodeError:
        return False
    return True


def _text(data: bytes, begin: int, end: int, name: str) -> None:
    try:
        data[begin:end].decode()
    except UnicodeDecodeError as error:
        raise Broken(begin + error.start, f"the {name} is no text of UTF-8") from None


# ---- where things stand, in bytes that have been parsed ----


def module_of(data: bytes) -> tuple[str, int, int]:
    """The form of a file, HloProto, HloModuleProto or "" for neither, and where its module begins and ends.

    Both have their field 1 first: of an HloProto that is a message whose own field 1 is the module's name, of an
    HloModuleProto that name itself.
    """
    try:
        begin, end = _first(data, 0)
        if _is_name(data[begin:end]):
            return "HloModuleProto", 0, len(data)
        inner, stop = _first(data, begin)
        if _is_name(data[inner:stop]):
            return "HloProto", begin, end
    except Broken:
        pass
    return "", 0, 0


def _first(data: bytes, position: int) -> tuple[int, int]:
    """Begin and end of field 1, in a message that begins with it. Raises Broken."""
    if data[position : position + 1] != b"\x0a":
        raise Broken(position, "there is no field 1")
    length, begin = varint(data, position + 1, len(data))
    return begin, begin + length


def _is_name(text: bytes) -> bool:
    return 0 < len(text) < 10_000 and re.fullmatch(rb"[\x21-\x7e\x80-\xff][\x20-\x7e\x80-\xff]*", text) is not None


def place(data: bytes, computation_id: int | None, instruction_id: int | None) -> int:
    """Where the name of an instruction stands, else that of its computation, else the module's."""
    _, begin, end = module_of(data)
    found = begin
    for start, stop in _each(data, begin, end, 3):
        if classes()["HloComputationProto"].FromString(data[start:stop]).id == computation_id:
            found = _name(data, start, stop)
            for first, last in _each(data, start, stop, 2) if instruction_id is not None else ():
                if classes()["HloInstructionProto"].FromString(data[first:last]).id == instruction_id:
                    return _name(data, first, last)
    return found


def buffer_place(data: bytes, number: int, position: int) -> int:
    """Where an entry of a list of an HloProto's buffer assignment begins: the field's number, and which of them."""
    for start, stop in _each(data, 0, len(data), 3):
        for count, (first, _) in enumerate(_each(data, start, stop, number)):
            if count == position:
                return first
    return 0


def _each(data: bytes, begin: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    wanted = number, _LENGTH
    return ((start, stop) for found, kind, start, stop in fields(data, begin, end) if (found, kind) == wanted)


def _name(data: bytes, begin: int, end: int) -> int:
    return next((start for start, _ in _each(data, begin, end, 1)), begin)
