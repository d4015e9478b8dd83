"""A module of HLO as a graph: computations, instructions, shapes, and where in the program each came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from posixpath import basename
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

Alias = tuple[tuple[int, ...], int, tuple[int, ...]]

LIBRARIES = re.compile(r"/site-packages/(jax|flax|optax)/|/jaxllm/inspection\.py$")  # whose lines are not the program's

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


class Instruction:
    """One instruction. `proto` holds the fields that only a few opcodes have, as an HloInstructionProto.

    Not a dataclass, because a large module has half a million of them: what reads a module settles what each needs at
    once, and the rest when it is asked for.
    """

    id: int
    name: str
    opcode: str
    op_name: str
    operand_ids: tuple[int, ...]
    called_ids: tuple[int, ...]
    shape: Shape
    proto: Any

    def __repr__(self) -> str:
        return f"{self.name} = {self.shape} {self.opcode}"


class _Read(Instruction):
    """An instruction of a module that came as a proto."""

    def __init__(self, proto: Any) -> None:
        self.id = proto.id
        self.name = proto.name
        self.opcode = proto.opcode
        self.op_name = proto.metadata.op_name
        self.operand_ids = tuple(proto.operand_ids)
        self.called_ids = tuple(proto.called_computation_ids)
        self.proto = proto

    @cached_property
    def shape(self) -> Shape:  # type: ignore[override]
        return read_shape(self.proto.shape)


@dataclass(frozen=True, eq=False)
class Computation:
    """A list of instructions in an order in which operands come before their users; in the order of the schedule where
    there is one."""

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

    @cached_property
    def needed(self) -> set[int]:
        """Ids of the instructions that the root is made of."""
        needed = {self.root_id}
        for instruction in reversed(self.instructions):
            if instruction.id in needed:
                needed.update(instruction.operand_ids)
        return needed

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_id[operand] for operand in instruction.operand_ids]

    def operand(self, instruction: Instruction, position: int = 0) -> Instruction:
        return self.by_id[instruction.operand_ids[position]]


@dataclass(frozen=True, eq=False)
class Module:
    """A module: its computations by id, callees before callers, and the entry.

    scheduled  whether the instructions of what runs stand in the order in which they run
    aliases    outputs that take an argument's place: index of the output, number of the argument, index in it
    devices    for how many it was compiled, as far as it says; 0 when it does not
    """

    name: str
    computations: dict[int, Computation]
    entry: Computation
    frames: Any = field(repr=False)  # StackFrameIndexProto
    scheduled: bool = False
    aliases: tuple[Alias, ...] = ()
    devices: int = 0
    shardings: tuple[Any, ...] = field(default=(), repr=False)  # of the arguments, as OpShardings, where they stand apart

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[called] for called in instruction.called_ids]

    def source(self, instruction: Instruction) -> str:
        """`file.py:line` of the innermost frame that is no library's, and who called it; "" when nothing was kept."""
        metadata = instruction.proto.metadata
        if metadata.source_line:
            return f"{basename(metadata.source_file)}:{metadata.source_line}"
        frame = metadata.stack_frame_id
        known = self._sources.get(frame)
        if known is None:
            places = list(self._stack(frame))
            own = [place for place in places if not LIBRARIES.search(place[0])]
            told = dict.fromkeys(f"{basename(file)}:{line}" for file, line in own or places)
            known = self._sources[frame] = " < ".join(list(told)[:2])
        return known

    @cached_property
    def _sources(self) -> dict[int, str]:
        """Id of a stack frame -> its source, as far as it has been asked for."""
        return {}

    def _stack(self, frame_id: int) -> Iterator[tuple[str, int]]:
        """File and line of the frames of a stack, innermost first. Ids count from 1, and 0 is none."""
        frames = self.frames
        while 0 < frame_id <= len(frames.stack_frames):
            frame = frames.stack_frames[frame_id - 1]
            location = frames.file_locations[frame.file_location_id - 1]
            yield frames.file_names[location.file_name_id - 1], location.line
            if frame.parent_frame_id >= frame_id:  # a caller is listed before whom it calls
                return
            frame_id = frame.parent_frame_id

    @cached_property
    def by_opcode(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """Opcode -> where it stands, in the order of the module."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions:
                found.setdefault(instruction.opcode, []).append((computation, instruction))
        return found

    @cached_property
    def asynchronous(self) -> dict[int, tuple[Computation, Instruction]]:
        """Id of a computation that runs asynchronously -> what starts it, and where."""
        return {
            called: (computation, instruction)
            for computation, instruction in self.by_opcode.get("async-start", ())
            for called in instruction.called_ids
        }

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
    order = {entry.key: entry.value.instruction_ids for entry in proto.schedule.sequences}
    computations = {}
    for computation in proto.computations:
        instructions: Iterable[Instruction] = map(_Read, computation.instructions)
        if computation.id in order:
            by_id = {instruction.id: instruction for instruction in instructions}
            instructions = [by_id[id_] for id_ in order[computation.id]]
        computations[computation.id] = Computation(
            computation.id, computation.name, tuple(instructions), computation.root_id
        )
    aliases = tuple(
        (tuple(alias.output_shape_index), alias.parameter_number, tuple(alias.parameter_shape_index))
        for alias in proto.input_output_alias.entries
    )
    assignment = proto.device_assignment
    return Module(
        proto.name,
        computations,
        computations[proto.entry_computation_id],
        proto.stack_frame_index,
        scheduled=proto.entry_computation_id in order,
        aliases=aliases,
        devices=assignment.replica_count * assignment.computation_count,
        shardings=tuple(proto.spmd_parameters_shardings),
    )
