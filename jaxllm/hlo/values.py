"""What a program computes from constants alone: how many turns a loop takes on one device, when a table says so.

Small arrays of integers are followed from constants, the counters of loops and the number of the device to the limit of
a loop. A table that is looked up by tick and by device, as a pipeline's schedule is, tells so in each tick how often the
loops of its body run, on each device another number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jaxllm.hlo.graph import PASSES, Computation, Instruction, Module, Shape

_MOST = 1 << 24  # elements: no table is larger, and what is larger is not looked up


_RUNS = ("call", "fusion", "async-start")
_ENDS = ("async-done", "async-update")  # they name what their start runs


class Unknown(Exception):
    """A value that depends on more than constants, counters and the device."""


_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shift-left": np.left_shift,
    # Of what is not negative, as numbers of devices and ticks are, both shifts to the right are the same.
    "shift-right-logical": np.right_shift, "shift-right-arithmetic": np.right_shift,
}  # fmt: skip
_COMPARE = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
_LITERALS = {"s32": "s32s", "s64": "s64s", "u32": "u32s", "u64": "u64s", "pred": "preds"}


@dataclass
class Values:
    """Evaluates integers of a module as one device sees them.

    An array of values has a leading dim over the turns of one loop, whose counter was met; of length 1 when none was.
    """

    module: Module
    device: int
    counters: Callable[[Computation, Instruction], tuple[int, range] | None]  # (slot, its value at each turn)
    loop: int | None = None  # id of the loop whose counter was met, in the last thing that was asked for
    _known: dict[tuple[int, int, tuple[int, ...]], tuple[np.ndarray, int | None]] = field(default_factory=dict)

    def asked(self, computation: Computation, instruction: Instruction, index: tuple[int, ...]) -> np.ndarray:
        """The value of the part of an instruction at an index; `loop` is set for it. Raises Unknown."""
        self.loop = None
        return self.of(computation, instruction, index)

    @cached_property
    def _callers(self) -> dict[int, list[tuple[Computation, Instruction]]]:
        callers: dict[int, list[tuple[Computation, Instruction]]] = {}
        for computation, instruction in self.module.instructions():
            for called in instruction.called_ids if not instruction.opcode.startswith(_ENDS) else ():
                callers.setdefault(called, []).append((computation, instruction))
        return callers

    def of(self, computation: Computation, instruction: Instruction, index: tuple[int, ...] = ()) -> np.ndarray:
        """The value of an instruction, or of the part of it at an index. Raises Unknown."""
        key = (computation.id, instruction.id, index)
        if key not in self._known:
            before, self.loop = self.loop, None
            value = self._compute(computation, instruction, index)
            self._known[key] = value, self.loop
            self.loop = before
        value, loop = self._known[key]
        self._met(loop)
        return value

    def _met(self, loop: int | None) -> None:
        if loop is None:
            return
        if self.loop not in (None, loop):
            raise Unknown("the counters of two loops")
        self.loop = loop

    def _compute(self, computation: Computation, made: Instruction, index: tuple[int, ...]) -> np.ndarray:
        opcode = made.opcode
        operand = lambda position=0: self.of(computation, computation.operand(made, position))  # noqa: E731
        if opcode == "get-tuple-element":
            return self.of(computation, computation.operand(made), (made.proto.tuple_index, *index))
        if opcode == "tuple" and index:
            return self.of(computation, computation.operand(made, index[0]), index[1:])
        if opcode == "parameter":
            return self._parameter(computation, made, index)
        if opcode in ("async-done", "async-update"):  # of what runs beside the rest, the value is that of its start
            return self.of(computation, computation.operand(made), index)
        if opcode in _RUNS and made.called_ids:
            (called,) = self.module.called(made)
            return self.of(called, called.root, index)
        if opcode == "copy-start":  # its tuple is what it writes, what it reads, and a context
            return operand()
        if index or made.shape.size > _MOST or made.shape.dtype not in _LITERALS:
            raise Unknown(opcode)
        if opcode in PASSES and made.operand_ids:
            value, read = operand(), computation.operand(made).shape
            if made.shape.size == 1:  # the first in memory, however it is laid out: XLA:TPU looks so into a row of a table
                value = value.reshape(len(value), -1)[:, :1]
            if value[0].size != made.shape.size:
                raise Unknown("other elements of the same memory")
            if opcode != "bitcast":
                return value.reshape(len(value), *made.shape.dims)
            return np.stack([_laid_out(_in_memory(turn, read), made.shape) for turn in value])
        if opcode == "constant":
            return _literal(made)[None]
        if opcode == "iota":
            (along,) = made.proto.dimensions
            shape = [size if dim == along else 1 for dim, size in enumerate(made.shape.dims)]
            return np.broadcast_to(np.arange(made.shape.dims[along]).reshape(1, *shape), (1, *made.shape.dims))
        if opcode == "partition-id":
            return np.asarray([self.device])
        if opcode in _TWO:
            left, right = operand(0), operand(1)
            if opcode == "shift-right-logical" and np.any(left < 0):
                raise Unknown("the bits of a negative number")
            return _TWO[opcode](left, right).astype(np.int64)
        if opcode == "compare":
            return _COMPARE[made.proto.comparison_direction](operand(0), operand(1)).astype(np.int64)
        if opcode == "select":
            return np.where(operand(0) != 0, operand(1), operand(2))
        if opcode == "clamp":
            return np.clip(operand(1), operand(0), operand(2))
        if opcode == "divide":
            return _divided(operand(0), operand(1))
        if opcode == "remainder":
            return np.fmod(operand(0), _divisor(operand(1)))
        if opcode == "slice":
            ranges = tuple(slice(d.start, d.limit, d.stride) for d in made.proto.slice_dimensions)
            if len(ranges) != len(made.shape.dims):
                raise Unknown("a slice that does not say of what")
            return operand()[(slice(None), *ranges)]
        if opcode == "broadcast":
            return self._broadcast(made, operand())
        if opcode == "dynamic-slice":
            starts = [operand(position) for position in range(1, len(made.operand_ids))]
            return _dynamic_slice(operand(), starts, made.shape.dims)
        raise Unknown(opcode)

    def _parameter(self, computation: Computation, made: Instruction, index: tuple[int, ...]) -> np.ndarray:
        """What a computation was given, where there is one place that runs it."""
        callers = self._callers.get(computation.id, [])
        if len({(outer.id, call.id) for outer, call in callers}) != 1:
            raise Unknown("a function that is called from several places, or the program's own argument")
        outer, call = callers[0]
        if call.opcode in _RUNS:
            return self.of(outer, outer.operand(call, made.proto.parameter_number), index)
        if call.opcode != "while" or not index:
            raise Unknown(call.opcode)
        counter = self.counters(outer, call)
        if counter is not None and counter[0] == index[0]:
            self._met(call.id)
            return np.asarray(counter[1], np.int64)
        if not carried_unchanged(self.module, call, index[0]):
            raise Unknown("what a loop changes")
        return self.of(outer, outer.operand(call), index)

    def _broadcast(self, made: Instruction, value: np.ndarray) -> np.ndarray:
        dims = tuple(made.proto.dimensions)
        shape = [1] * len(made.shape.dims)
        for position, dim in enumerate(dims):
            shape[dim] = value.shape[1 + position]
        return np.broadcast_to(value.reshape(len(value), *shape), (len(value), *made.shape.dims))


def _literal(constant: Instruction) -> np.ndarray:
    """A constant's elements by its dims. They are written in the order in which they lie in memory: XLA:TPU may turn a
    table around to where it reads along its rows."""
    literal, dims = constant.proto.literal, constant.shape.dims
    values = getattr(literal, _LITERALS[constant.shape.dtype])
    if len(values) != constant.shape.size:
        raise Unknown("a constant that is not written out")
    return _laid_out(np.asarray(values, np.int64), Shape("", dims, minor_to_major=tuple(literal.shape.layout.minor_to_major)))


def _outermost_first(shape: Shape) -> tuple[int, ...]:
    return tuple(reversed(shape.minor_to_major or range(len(shape.dims))[::-1]))


def _laid_out(in_memory: np.ndarray, shape: Shape) -> np.ndarray:
    """Elements by the dims of a shape, from the order in which they lie in memory."""
    order = _outermost_first(shape)
    return in_memory.reshape([shape.dims[dim] for dim in order]).transpose(np.argsort(order))


def _in_memory(value: np.ndarray, shape: Shape) -> np.ndarray:
    """Elements in the order in which they lie in memory."""
    return value.transpose(_outermost_first(shape)) if value.shape == shape.dims else value


def not_below_zero(turns: np.ndarray) -> np.ndarray:
    """Turns of a loop whose limit lies so far above its start: none where it lies below."""
    return np.maximum(0, turns)


def carried_unchanged(module: Module, loop: Instruction, slot: int) -> bool:
    """Whether a loop's body hands an element of what it carries on as it got it."""
    body, _ = module.while_parts(loop)
    if body.root.opcode != "tuple":
        return False
    made = body.operand(body.root, slot)
    while made.opcode in PASSES and made.operand_ids:
        made = body.operand(made)
    return (
        made.opcode == "get-tuple-element"
        and made.proto.tuple_index == slot
        and body.operand(made).opcode == "parameter"
    )


def _dynamic_slice(value: np.ndarray, starts: list[np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
    """`sizes` elements of each dim from `starts` on, which are moved inside as XLA moves them."""
    turns = max(len(value), *(len(start) for start in starts))
    places: list[np.ndarray] = [np.arange(len(value)).reshape(-1, *[1] * len(sizes))]
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        inside = np.clip(start.reshape(-1), 0, value.shape[1 + dim] - size)
        along = inside[:, None] + np.arange(size)
        places.append(along.reshape(len(inside), *[size if other == dim else 1 for other in range(len(sizes))]))
    return np.broadcast_to(value[tuple(places)], (turns, *sizes))


def _divided(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Towards zero, as XLA divides integers."""
    return np.trunc(left / _divisor(right)).astype(np.int64)


def _divisor(value: np.ndarray) -> np.ndarray:
    if not np.all(value):
        raise Unknown("a division by zero")
    return value
