"""Habits of the compilers that touch a line of the ledger. Each is coded here once, and tested on a small program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from jaxllm.hlo.graph import Computation, Instruction, Module, Shape, element_bits
from jaxllm.spec.ledger import Line, Rule


def tile_padded_bytes(shape: Shape) -> int:
    """Bytes of an array in its tiled layout (`tpu-tile-padding`).

    A tile covers the minor-most dims: each of them is rounded up to the tile's size, and a tile of more dims than the
    array has pads missing ones from 1. The next tile applies to what is inside the tile before. The end is padded to
    the layout's alignment. (openxla.org/xla/tiled_layout)
    """
    dims = [shape.dims[dim] for dim in reversed(shape.minor_to_major)] if shape.minor_to_major else list(shape.dims)
    for tile in shape.tiles:
        missing = max(0, len(tile) - len(dims))
        dims = [1] * missing + dims
        outer, tiled = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
        dims = [*outer, *(-(-dim // size) for dim, size in zip(tiled, tile, strict=True)), *tile]
    elements = -(-prod(dims) // shape.tail_alignment) * shape.tail_alignment
    return (elements * element_bits(shape.dtype) + 7) // 8


def argument_padding(module: Module) -> int:
    """Bytes that tiling adds to the arguments of a module, by the rule alone."""
    leaves = [leaf for parameter in module.entry.parameters.values() for leaf in parameter.shape.leaves]
    return sum(tile_padded_bytes(leaf) - leaf.bytes for leaf in leaves)


Fusion = tuple[Computation, Instruction] | None  # a fusion, and the computation in which it stands

_HANDED_ON = frozenset(("get-tuple-element", "bitcast", "copy", "reshape", "convert", "transpose"))


def all_reduce_then_slice(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Whether every use of an all-reduce takes a device's slice of it, for a reduce-scatter (`all-reduce+slice`)."""
    readers = list(_readers(module, computation, instruction))
    return bool(readers) and all(
        user.opcode == "dynamic-slice" and _by_device(home, user, fusion) for home, user, fusion in readers
    )


def _readers(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction, Fusion]]:
    """Who reads an array, past what only hands it on, and inside of fusions. What hands it out of a fusion reads it."""
    waiting: list[tuple[Computation, Instruction, Fusion]] = [(computation, instruction, None)]
    while waiting:
        home, made, fusion = waiting.pop()
        for user in home.users.get(made.id, ()):
            handed_on = user.opcode in _HANDED_ON and user.id != home.root_id
            if handed_on or user.opcode.startswith("all-reduce-done"):
                waiting.append((home, user, fusion))
            elif user.opcode == "fusion" and fusion is None and user.called_ids:
                fused = module.called(user)[0]
                for number, operand in enumerate(user.operand_ids):
                    if operand == made.id and number in fused.parameters:
                        waiting.append((fused, fused.parameters[number], (home, user)))
            else:
                yield home, user, fusion


def _by_device(computation: Computation, slice_: Instruction, fusion: Fusion) -> bool:
    """Whether an index of a dynamic-slice is computed from the id of the device."""
    waiting = [(computation, operand) for operand in computation.operands(slice_)[1:]]
    seen = set()
    while waiting:
        home, instruction = waiting.pop()
        if instruction.opcode in ("partition-id", "replica-id"):
            return True
        if instruction.id in seen:
            continue
        seen.add(instruction.id)
        if instruction.opcode == "parameter" and fusion is not None and home is computation:
            outer, call = fusion
            waiting.append((outer, outer.operand(call, instruction.proto.parameter_number)))
        else:
            waiting += [(home, operand) for operand in home.operands(instruction)]
    return False


def cpu_f32_promotion(lines: list[Line], left: dict[tuple, int]) -> list[Line]:
    """XLA:CPU reduces in f32, so that a bf16 line is emitted at twice its bytes (`cpu-f32-promotion`).

    Args: lines with their emitted payload; the emitted payload that has no line, from which what is placed is taken.
    """
    placed = list(lines)
    for position, line in enumerate(placed):
        if line.dtype not in ("bf16", "f16") or line.emitted:
            continue
        key = (line.name, line.axes, line.phase, "f32")
        twin = next((i for i, o in enumerate(placed) if (o.name, o.axes, o.phase, o.dtype) == key), None)
        surplus = left.pop(key, 0) if twin is None else placed[twin].emitted - placed[twin].value
        if surplus <= 0:
            continue
        if twin is not None:
            placed[twin] = replace(placed[twin], emitted=placed[twin].value)
        why = f"XLA:CPU runs this collective in f32, at {surplus:,} bytes for {line.value:,}"
        rule = Rule("cpu-f32-promotion", surplus - line.value, why)
        placed[position] = replace(line, emitted=surplus, rules=(*line.rules, rule))
    return placed
