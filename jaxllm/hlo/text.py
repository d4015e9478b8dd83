"""HLO text, as `as_text()` and XLA's flags write it, read into the same graph as a proto.

What every instruction needs (name, shape, operands, called computations) is read at once, line by line. The rest of a
line becomes the fields of an HloInstructionProto when somebody asks for them (attributes.py), so that whatever reads a
proto reads a text as well. (The grammar: openxla/xla, xla/hlo/parser/hlo_parser.cc)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxllm.hlo.attributes import FRONTEND, fields_of, integer, integers, op_name_of, split, unescaped
from jaxllm.hlo.errors import ParseError
from jaxllm.hlo.graph import ELEMENT_TYPES, Alias, Computation, Instruction, Module, Shape
from jaxllm.hlo.opcodes import KNOWN
from jaxllm.hlo.protos import classes

_DTYPES = frozenset(ELEMENT_TYPES.values())
_NO_ARRAY = frozenset(("token", "opaque"))

# A line whose result is one array and whose operands are in no brackets: nearly all
_LINE = re.compile(
    r"[ \t]*(ROOT )?%?([^\s=%]+) = ([a-z]\w*\[[^\]\n]*\](?:\{[^{}\n]*\})?) ([a-z][\w\-]*)\(([^()\"\n]*)\)(.*)\n"
)
_HEAD = re.compile(r"\s*(ROOT )?%?([^\s=%]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.* )?\{(?: *// .*)?$")
_NAME = re.compile(r"%([^\s,()%]+)")
_TILES = re.compile(r"T((?:\([\d,*]*\))+)")
_TILE = re.compile(r"\(([\d,*]*)\)")
_BRACKETS = re.compile(r'[(){}"]|/\*')
_QUOTED = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.S)
_PERHAPS_QUOTED = re.compile(_QUOTED.pattern + "?", re.S)  # to the end, when it is never closed
_DEEPEST = 50  # tuples in each other

_CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation"
    r"|select|scatter)=(\{[^}]*\}|%?[^\s,{}]+)"
)
_CALLERS = frozenset(
    "fusion while call conditional reduce reduce-window map scatter select-and-scatter sort custom-call all-reduce "
    "all-reduce-start reduce-scatter async-start async-update async-done topk scan".split()
)
_NO_CALLERS = KNOWN - _CALLERS
_LEAVES = frozenset(("constant", "parameter", "iota"))  # whose operands are no names
_ORDER = {"condition": 1, "false_computation": 1, "scatter": 1}  # a proto has the body of a loop before its condition
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

# `X-start` with an opcode of its own; any other is short for an async-start that calls a computation of X. Newer
# compilers write these short forms too of some that have opcodes of their own.
_OWN = frozenset("all-gather all-reduce async collective-permute copy recv send".split())
_PARTS = ("-start", "-update", "-done")
_STARTED = frozenset(("async-start", "async-update"))


def looks_like_text(data: bytes) -> bool:
    """Whether bytes begin as a text of HLO does, comments and empty lines apart."""
    head = re.sub(rb"\A(\s*\n|//[^\n]*\n|/\*.*?\*/)*", b"", data[:4096], flags=re.S)
    return head.startswith(b"HloModule ")


def read_text(data: bytes, file: str) -> Module:
    """The module of a text. `file` is its name in errors. Raises ParseError."""
    return _Reader(data, file).module()


class _Written(Instruction):
    """An instruction of a module that came as text.

    operands_text, attributes  the ends of its line
    offset                     of its line, in bytes
    """

    def __init__(self, id_: int, name: str, opcode: str, shape: Shape, operands: str, attributes: str, offset: int):
        self.id = id_
        self.name = name
        self.opcode = opcode
        self.shape = shape
        self.operands_text = operands
        self.attributes = attributes
        self.offset = offset
        self.operand_ids = ()
        self.called_ids = ()

    @cached_property
    def op_name(self) -> str:  # type: ignore[override]
        return op_name_of(self.attributes)

    @cached_property
    def proto(self) -> Any:  # type: ignore[override]
        return fields_of(self.opcode, self.shape, self.operands_text, self.attributes, self.op_name)


@dataclass
class _Body:
    """A computation as far as it has been read."""

    name: str
    offset: int
    instructions: list[_Written] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # name of an instruction -> its id
    root: _Written | None = None


class _Reader:
    """Goes through the lines of one text."""

    def __init__(self, data: bytes, file: str) -> None:
        self.file = file
        self.text = data.decode("latin-1")  # a character a byte, so that positions are offsets
        self.ascii = data.isascii()
        self.plain = b"\r" not in data
        self.shapes: dict[str, Shape] = {}
        self.opcodes: dict[str, str] = {}
        self.computations: dict[int, Computation] = {}
        self.calls: list[_Written] = []
        # short forms of async-start: of what, and the shapes of its operands
        self.short: list[tuple[_Written, str, list[Shape]]] = []
        self.next_id = 1
        self.offset = 0  # of the line at hand
        self.begin = 0  # of the line after it

    def fail(self, column: int, reason: str, begin: int | None = None) -> ParseError:
        offset = min((self.offset if begin is None else begin) + column, len(self.text))
        return ParseError(self.file, offset, reason, self.text.count("\n", 0, offset) + 1)

    def module(self) -> Module:
        lines = self._lines()
        header = self._header(lines)
        frames = classes()["StackFrameIndexProto"]()
        table = ""
        entry = None
        for line in lines:
            if not line or line.isspace() or line.startswith("//"):
                continue
            if line[0] == "}":
                raise self.fail(0, "a computation ends here that never began; the text is cut or damaged.")
            if line in _TABLES:
                table = line
                continue
            if table and "0" <= line[0] <= "9":
                self._row(table, line, frames)
                continue
            found = _COMPUTATION.match(line)
            if not found:
                raise self.fail(0, f"{_shown(line)} is neither a computation nor an instruction of HLO.")
            if found[1] and entry is not None:
                raise self.fail(0, "this is the second ENTRY; the text is damaged.")
            computation = self._computation(self._named(found[2]), lines)
            self.computations[computation.id] = computation
            if found[1]:
                entry = computation
        if entry is None:
            raise self.fail(0, "the text ends without an ENTRY computation; it is cut, dump it again.", len(self.text))
        self._resolve()
        return Module(
            header["name"],
            self.computations,
            entry,
            frames,
            scheduled=header["scheduled"],
            aliases=header["aliases"],
            devices=header["devices"],
        )

    def _lines(self) -> Iterator[str]:
        text = self.text
        while self.begin < len(text):
            begin = self.offset = self.begin
            end = text.find("\n", begin)
            end = len(text) if end < 0 else end
            self.begin = end + 1
            yield text[begin:end].rstrip("\r") if text[end - 1 : end] == "\r" else text[begin:end]

    def _named(self, name: str) -> str:
        return name if self.ascii else name.encode("latin-1").decode("utf-8", "replace")

    def _header(self, lines: Iterator[str]) -> dict[str, Any]:
        for line in lines:
            if line.startswith("HloModule "):
                break
        else:
            raise self.fail(0, "this is no HLO: a text of it begins with HloModule.", 0)
        name = re.match(r"HloModule ([^\s,]+)", line)
        if not name:
            raise self.fail(9, "the module has no name; the text is cut or damaged.")
        devices = 1
        for key in ("replica_count", "num_partitions"):
            if found := re.search(rf"\b{key}=(\d+)", line):
                devices *= integer(found[1])
        aliases: list[Alias] = []
        start = line.find("input_output_alias={")
        if start >= 0:
            inside = line[start : self._closing(line, start + len("input_output_alias="))]
            for out, number, index in re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", inside):
                aliases.append((integers(out), integer(number), integers(index)))
        return {
            "name": self._named(name[1]),
            "scheduled": "is_scheduled=true" in line,
            "aliases": tuple(aliases),
            "devices": devices,
        }

    def _row(self, table: str, line: str, frames: Any) -> None:
        """One row of the tables of stack frames."""
        number, _, rest = line.partition(" ")
        rows = {
            "FileNames": frames.file_names,
            "FunctionNames": frames.function_names,
            "FileLocations": frames.file_locations,
            "StackFrames": frames.stack_frames,
        }[table]
        if number != str(len(rows) + 1):
            raise self.fail(0, f"row {len(rows) + 1} of the table {table} is missing here; the text is cut or damaged.")
        if table in ("FileNames", "FunctionNames"):
            rows.append(unescaped(rest.strip().strip('"')))
            return
        row = rows.add()
        known = row.DESCRIPTOR.fields_by_name
        for key, value in re.findall(r"(\w+)=(\d+)", rest):
            if key in known:
                if integer(value) >= 2**31:
                    raise self.fail(0, f"{_shown(value)} is too large for an index.")
                # XLA writes the parent of a frame one too high: the outermost has 1 here and 0 in a proto
                setattr(row, key, int(value) - (key == "parent_frame_id" and int(value) > 0))

    def _computation(self, name: str, lines: Iterator[str]) -> Computation:
        own_id = self.next_id
        self.next_id += 1
        body = _Body(name, self.offset)
        while True:
            if self.plain:
                self._plain_lines(body)
            line = next(lines, None)
            if line is None:
                reason = f"the text ends inside of computation {name}; it is cut, dump it again."
                raise self.fail(0, reason, len(self.text))
            if line[:1] == "}":
                break
            if line and not line.isspace() and not line.lstrip().startswith("//"):
                self._instruction(line, lines, body)
        if not body.instructions:
            raise self.fail(0, f"computation {name} has no instructions; the text is damaged.", body.offset)
        root = body.root or body.instructions[-1]
        return Computation(own_id, name, tuple(body.instructions), root.id)

    def _plain_lines(self, body: _Body) -> None:
        """Reads on as long as lines are plain."""
        match, text, shapes = _LINE.match, self.text, self.shapes
        while found := match(text, self.begin):
            root, name, shape, opcode, operands, attributes = found.groups()
            if attributes and attributes.count("{") != attributes.count("}"):
                return
            self.offset = self.begin
            self.begin = found.end()
            known = shapes.get(shape)
            if known is None:
                known = self._shape(shape, found.start(3) - self.offset)
            self._add(body, root is not None, name, known, opcode, operands, attributes, self.offset)

    def _instruction(self, line: str, lines: Iterator[str], body: _Body) -> None:
        """Any other line of a computation."""
        offset = self.offset
        if line.count("{") != line.count("}"):
            line = self._whole(line, lines)
        head = _HEAD.match(line)
        if not head:
            raise self.fail(0, f"{_shown(line)} is no instruction of HLO.", offset)
        end = self._end_of_shape(line, head.end())
        found = _OPCODE.match(line, end)
        if not found:
            raise self.fail(end, "an opcode and its operands are missing here; the line is cut or damaged.", offset)
        shape = self._shape(line[head.end() : end], head.end())
        end = self._closing(line, found.end() - 1)
        operands = line[found.end() : end - 1]
        self._add(body, head[1] is not None, head[2], shape, found[1], operands, line[end:], offset)

    def _add(
        self, body: _Body, root: bool, name: str, shape: Shape, opcode: str, operands: str, attributes: str, offset: int
    ) -> None:
        ids = body.ids
        if not self.ascii:
            name = self._named(name)
        if name in ids:
            raise self.fail(0, f"{name} is defined twice; the text is damaged.", offset)
        operand_ids: tuple[int, ...] = ()
        if operands and opcode not in _LEAVES:
            names = _NAME.findall(operands) if "%" in operands else _bare_names(operands)
            if not self.ascii:
                names = list(map(self._named, names))
            if "#" in operands:
                self._take_elements(names, body, offset)
            try:
                operand_ids = tuple(map(ids.__getitem__, names))
            except KeyError as error:
                reason = f"operand {error.args[0]} of {name} is not defined above it; the text is cut or damaged."
                raise self.fail(0, reason, offset) from None
        instruction = self._made(name, self.opcodes.setdefault(opcode, opcode), shape, operands, attributes, offset)
        instruction.operand_ids = operand_ids
        ids[name] = instruction.id
        body.instructions.append(instruction)
        if root:
            if body.root is not None:
                raise self.fail(0, f"{name} is the second ROOT of {body.name}; the text is damaged.", offset)
            body.root = instruction
        if opcode.endswith(_PARTS):
            self._lengthen(instruction, body.instructions)
        if opcode not in _NO_CALLERS:
            self.calls.append(instruction)

    def _take_elements(self, names: list[str], body: _Body, offset: int) -> None:
        """Newer compilers write `%tuple#2` for an operand that a get-tuple-element gives, and leave that one out."""
        ids, before = body.ids, body.instructions
        for name in names:
            whole, mark, index = name.rpartition("#")
            if not mark or name in ids or whole not in ids or not (index.isascii() and index.isdigit()):
                continue
            made = before[ids[whole] - before[0].id]
            if integer(index) >= len(made.shape.elements):
                raise self.fail(0, f"{whole} has no element {index}; the text is damaged.", offset)
            shape = made.shape.elements[int(index)]
            element = self._made(name, "get-tuple-element", shape, f"%{whole}", f", index={index}", offset)
            element.operand_ids = (made.id,)
            ids[name] = element.id
            before.append(element)

    def _whole(self, line: str, lines: Iterator[str]) -> str:
        """A line of which braces are left open, with those that follow until they are closed: some kernels write their
        configuration over several lines."""
        begin, depth = self.offset, _depth(line)
        parts = [line]
        while depth > 0:
            more = next(lines, None)
            if more is None or _HEAD.match(more) or (more[:1] != '"' and _COMPUTATION.match(more)):
                raise self.fail(0, "a brace of this line is never closed; the line is cut or damaged.", begin)
            parts.append(more)
            depth += _depth(more)
        if depth < 0:
            raise self.fail(0, "a brace of this line closes what was never opened; the line is damaged.", begin)
        return "\n".join(parts)

    def _closing(self, line: str, begin: int) -> int:
        """The position after the bracket that closes the one at `begin`; brackets in quotes do not count."""
        depth, position = 0, begin
        while found := _BRACKETS.search(line, position):
            mark, position = found[0], found.end()
            if mark == '"':
                quoted = _QUOTED.match(line, position - 1)
                if not quoted:
                    raise self.fail(position - 1, "a quotation mark is never closed; the line is cut or damaged.")
                position = quoted.end()
            elif mark == "/*":
                position = line.find("*/", position) + 2
                if position < 2:
                    break
            elif mark in "({":
                depth += 1
            else:
                depth -= 1
                if not depth:
                    return position
        raise self.fail(begin, f"the bracket {line[begin]!r} is never closed; the line is cut or damaged.")

    def _end_of_shape(self, line: str, begin: int) -> int:
        if line[begin : begin + 1] == "(":
            return self._closing(line, begin)
        if line.startswith("b(", begin):
            return self._closing(line, begin + 1)
        found = _ARRAY.match(line, begin)
        if not found:
            raise self.fail(begin, f"{_shown(line[begin:])} is no shape of HLO.")
        return found.end()

    def _shape(self, text: str, column: int, depth: int = 0) -> Shape:
        known = self.shapes.get(text)
        if known is None:
            known = self.shapes[text] = self._new_shape(text, column, depth)
        return known

    def _new_shape(self, text: str, column: int, depth: int) -> Shape:
        if depth > _DEEPEST:
            raise self.fail(column, f"tuples lie more than {_DEEPEST} deep in each other.")
        if text[0] == "(":
            return Shape("tuple", elements=tuple(self._elements(text, column, depth)))
        if text.startswith("b("):
            return self._shape(text[2:-1], column + 2, depth + 1)  # a buffer, which holds such an array
        found = _ARRAY.fullmatch(text)
        if not found or found[1] not in _DTYPES | _NO_ARRAY:
            raise self.fail(column, f"{_shown(text)} is no shape of HLO.")
        dtype = "" if found[1] in _NO_ARRAY else found[1]
        dims = tuple(dim.lstrip("<=") for dim in found[2].split(",") if dim)
        if not all(dim.isascii() and dim.isdigit() and len(dim) < 20 for dim in dims):
            raise self.fail(column, f"the dims {_shown(found[2])} are no numbers.")
        return Shape(dtype, tuple(map(int, dims)), **self._layout(found[3] or "", len(dims), column))

    def _elements(self, text: str, column: int, depth: int) -> Iterator[Shape]:
        """The elements of a tuple's shape, between parentheses."""
        position, end = 1, len(text) - 1
        while True:
            while text[position] in " ,":
                position += 1
            if position == end:
                return
            if text.startswith("/*", position):
                position = text.index("*/", position) + 2
                continue
            begin = position
            if text[position] == "(" or text.startswith("b(", position):
                position = self._closing(text, text.index("(", position))
            elif found := _ARRAY.match(text, position):
                position = found.end()
            else:
                raise self.fail(column + position, f"{_shown(text[position:])} is no shape of HLO.")
            yield self._shape(text[begin:position], column + begin, depth + 1)

    def _layout(self, text: str, rank: int, column: int) -> dict[str, Any]:
        order, _, rest = text.partition(":")
        layout: dict[str, Any] = {"minor_to_major": integers(order)}
        if sorted(layout["minor_to_major"]) not in ([], list(range(rank))):
            raise self.fail(column, f"the layout {{{order}}} is none of an array of {rank} dims.")
        if not rest:
            return layout
        if found := _TILES.search(rest):
            # `*` joins a dim with the next; no compiler here writes it, and 1 leaves the dim as it is
            tiles = (tile.replace("*", "1").split(",") for tile in _TILE.findall(found[1]))
            layout["tiles"] = tuple(tuple(integer(size) for size in tile if size) for tile in tiles)
        if found := re.search(r"S\((\d+)\)", rest):
            layout["memory_space"] = integer(found[1])
        if found := re.search(r"L\((\d+)\)", rest):
            layout["tail_alignment"] = integer(found[1]) or 1
        return layout

    def _lengthen(self, instruction: _Written, before: list[_Written]) -> None:
        """Makes of `fusion-start(%x), calls=%f` an async-start, for `_unfold` to make what it calls."""
        base, _, part = instruction.opcode.rpartition("-")
        operands = [before[id_ - before[0].id] for id_ in instruction.operand_ids]
        elements = instruction.shape.elements
        if part == "start":
            # An opcode of its own has a single operand as it is in its shape, and all-reduce-start only results.
            listed = len(elements) > 1 and elements[0].dtype == "tuple" and len(elements[0].elements) == len(operands)
            short = listed and base not in ("async", "copy") and (len(operands) == 1 or base == "all-reduce")
            if short or base not in _OWN:
                self.short.append((instruction, base, [operand.shape for operand in operands]))
                instruction.opcode = "async-start"
        elif base not in _OWN or (operands and operands[0].opcode in _STARTED):
            instruction.opcode = f"async-{part}"

    def _resolve(self) -> None:
        """Names of called computations become ids, and short forms of async-start what they are short for."""
        ids: dict[str, int] = {}
        for id_, computation in self.computations.items():
            if ids.setdefault(computation.name, id_) != id_:
                begin = computation.instructions[0].offset  # type: ignore[attr-defined]
                raise self.fail(0, f"computation {computation.name} is defined twice; the text is damaged.", begin)
        for instruction in self.calls:
            text = instruction.attributes
            cut = text.find(", metadata={")
            called: dict[str, list[str]] = {}
            for key, value in _CALLS.findall(text if cut < 0 else text[:cut]):
                called[key] = [self._named(name.strip().lstrip("%")) for name in value.strip("{}").split(",")]
            order = sorted(called, key=lambda key: _ORDER.get(key, 0))
            try:
                instruction.called_ids = tuple(ids[name] for key in order for name in called[key] if name)
            except KeyError as error:
                reason = f"{instruction.name} calls {error.args[0]}, which this text does not have; it is cut."
                raise self.fail(0, reason, instruction.offset) from None
        for instruction, opcode, shapes in self.short:
            self._unfold(instruction, opcode, shapes)

    def _unfold(self, instruction: _Written, opcode: str, shapes: list[Shape]) -> None:
        """Makes the computation that a short form is short for, of parameters and one instruction."""
        if len(instruction.shape.elements) < 2:
            reason = f"{instruction.name} does not have its operands and its result in its shape; the text is damaged."
            raise self.fail(0, reason, instruction.offset)
        # The attributes are those of what is started, but for the configuration; both have the frontend's and metadata.
        own, metadata, config = split(instruction.attributes)
        frontend = FRONTEND.search(own)
        inside = []
        for number, shape in enumerate(shapes):
            inside.append(self._made(f"param.{number}", "parameter", shape, str(number), "", instruction.offset))
        name = instruction.name.replace("-start", "")
        root = self._made(name, opcode, instruction.shape.elements[1], "", own + metadata, instruction.offset)
        root.operand_ids = tuple(parameter.id for parameter in inside)
        root.called_ids = instruction.called_ids
        instruction.attributes = (f", {frontend[0]}" if frontend else "") + metadata + config
        computation = Computation(self.next_id, f"async_{name}", (*inside, root), root.id)
        self.next_id += 1
        self.computations[computation.id] = computation
        instruction.called_ids = (computation.id,)

    def _made(self, *line: Any) -> _Written:
        """An instruction with the next id."""
        self.next_id += 1
        return _Written(self.next_id - 1, *line)


def _depth(line: str) -> int:
    """Braces opened less braces closed, outside of quotes."""
    plain = _PERHAPS_QUOTED.sub("", line)
    return plain.count("{") - plain.count("}")


def _bare_names(operands: str) -> list[str]:
    """Names of operands that were written without `%`, with or without their shapes."""
    text = re.sub(r"/\*.*?\*/", "", operands)
    parts, depth, begin = [], 0, 0
    for position, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[begin:position])
            begin = position + 1
    return [part.split()[-1] for part in (*parts, text[begin:]) if part.strip()]


def _shown(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
