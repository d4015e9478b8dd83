"""A module of HLO as a graph: computations, instructions, shapes, and where in the program each came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from jaxllm.spec.ledger import DTYPE_BYTES

# xla.PrimitiveType; what has no entry here holds no array (tuple, token, opaque).
ELEMENT_TYPES = {
    1: "pred", 2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64", 10: "f16", 11: "f32",
    12: "f64", 15: "c64", 16: "bf16", 18: "c128", 19: "f8e5m2", 20: "f8e4m3fn", 21: "s4", 22: "u4",
    23: "f8e4m3b11fnuz", 24: "f8e5m2fnuz", 25: "f8e4m3fnuz", 26: "s2", 27: "u2", 28: "f8e4m3", 29: "f8e3m4", 30: "s1",
    31: "u1", 32: "f4e2m1fn", 33: "f8e8m0fnu",
}  # fmt: skip
_TUPLE = 13
_MORE_BITS = {"c64": 64, "c128": 128, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "s1": 1, "u1": 1, "f4e2m1fn": 4}

_LIBRARIES = re.compile(r"/site-packages/(jax|flax|optax)/")  # whose lines are not the program's

# Instructions that hand an array on without computing on its values.
PASSES = frozenset({"bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "opt-barrier"})


def element_bits(dtype: str) -> int:
    """Bits of one element: 32 for f32, 4 for s4; the rare one-byte floats are 8."""
    return _MORE_BITS.get(dtype) or DTYPE_BYTES.get(dtype, 1) * 8


@dataclass(frozen=True, slots=True)
class Shape:
    """An array of `dtype` and `dims`, or a tuple of shapes."""

    dtype: str
    dims: tuple[int, ...] = ()
    elements: tuple[Shape, ...] = ()  # of a tuple
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()  # of the layout, the first applied first
    memory_space: int = 0
    tail_alignment: int = 1  # the tiled array is padded at its end to a multiple of so many elements

    @property
    def size(self) -> int:
        """Number of elements of an array."""
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, with no padding; of a tuple, of all its arrays (the table of pointers left out)."""
        if self.dtype == "tuple":
            return sum(element.bytes for element in self.elements)
        if not self.dtype:
            return 0
        return (self.size * element_bits(self.dtype) + 7) // 8

    @property
    def leaves(self) -> tuple[Shape, ...]:
        """The arrays of a tuple, nested ones too, in order; an array is its own leaf."""
        if self.dtype != "tuple":
            return (self,)
        return tuple(leaf for element in self.elements for leaf in element.leaves)

    def at(self, index: tuple[int, ...]) -> Shape:
        """The shape at an index into nested tuples."""
        shape = self
        for position in index:
            shape = shape.elements[position]
        return shape

    def __str__(self) -> str:
        if self.dtype == "tuple":
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.dtype or 'token'}[{','.join(map(str, self.dims))}]"


def read_shape(proto: Any) -> Shape:
    """A Shape from a ShapeProto."""
    if proto.element_type == _TUPLE:
        return Shape("tuple", elements=tuple(read_shape(element) for element in proto.tuple_shapes))
    dtype = ELEMENT_TYPES.get(proto.element_type, "")
    dims = tuple(proto.dimensions)
    if not proto.HasField("layout"):
        return Shape(dtype, dims)
    layout = proto.layout
    return Shape(
        dtype,
        dims,
        minor_to_major=tuple(layout.minor_to_major),
        tiles=tuple(tuple(tile.dimensions) for tile in layout.tiles),
        memory_space=layout.memory_space,
        tail_alignment=layout.tail_padding_alignment_in_elements or 1,
    )


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction. `proto` holds the fields that only a few opcodes have."""

    id: int
    name: str
    opcode: str
    op_name: str
    operand_ids: tuple[int, ...]
    called_ids: tuple[int, ...]
    proto: Any = field(repr=False)

    @cached_property
    def shape(self) -> Shape:
        return read_shape(self.proto.shape)


@dataclass(frozen=True, eq=False)
class Computation:
    """A list of instructions in an order in which operands come before their users."""

    id: int
    name: str
    instructions: tuple[Instruction, ...]
    root_id: int

    @cached_property
    def by_id(self) -> dict[int, Instruction]:
        return {instruction.id: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return self.by_id[self.root_id]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number -> instruction."""
        return {i.proto.parameter_number: i for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[int, list[Instruction]]:
        """Instruction id -> the instructions that read it."""
        users: dict[int, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operand_ids):
                users.setdefault(operand, []).append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_id[operand] for operand in instruction.operand_ids]

    def operand(self, instruction: Instruction, position: int = 0) -> Instruction:
        return self.by_id[instruction.operand_ids[position]]


@dataclass(frozen=True, eq=False)
class Module:
    """A module: its computations by id, callees before callers, and the entry."""

    name: str
    computations: dict[int, Computation]
    entry: Computation
    frames: Any = field(repr=False)  # StackFrameIndexProto

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[called] for called in instruction.called_ids]

    def source(self, instruction: Instruction) -> str:
        """`file.py:line` of the innermost frame that is no library's, and who called it; "" when nothing was kept."""
        metadata = instruction.proto.metadata
        if metadata.source_line:
            return f"{Path(metadata.source_file).name}:{metadata.source_line}"
        places = list(self._stack(metadata.stack_frame_id))
        own = [place for place in places if not _LIBRARIES.search(place[0])]
        return " < ".join(f"{Path(file).name}:{line}" for file, line in (own or places)[:2])

    def _stack(self, frame_id: int) -> Iterator[tuple[str, int]]:
        """File and line of the frames of a stack, innermost first. Ids count from 1, and 0 is none."""
        frames = self.frames
        while 0 < frame_id <= len(frames.stack_frames):
            frame = frames.stack_frames[frame_id - 1]
            location = frames.file_locations[frame.file_location_id - 1]
            yield frames.file_names[location.file_name_id - 1], location.line
            frame_id = frame.parent_frame_id

    def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
        for computation in self.computations.values():
            for instruction in computation.instructions:
                yield computation, instruction

    def while_parts(self, loop: Instruction) -> tuple[Computation, Computation]:
        """Body and condition of a `while` (the proto lists them in this order)."""
        body, condition = self.called(loop)
        return body, condition


def read_module(proto: Any) -> Module:
    """A Module from an HloModuleProto."""
    computations = {}
    for computation in proto.computations:
        instructions = tuple(
            Instruction(
                i.id, i.name, i.opcode, i.metadata.op_name, tuple(i.operand_ids), tuple(i.called_computation_ids), i
            )
            for i in computation.instructions
        )
        computations[computation.id] = Computation(computation.id, computation.name, instructions, computation.root_id)
    return Module(proto.name, computations, computations[proto.entry_computation_id], proto.stack_frame_index)
