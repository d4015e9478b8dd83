"""Collectives that send more than they need to, or more often."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from jaxllm.hlo.graph import Shape, element_bits
from jaxllm.hlo.groups import Groups, groups_of
from jaxllm.hlo.warn.alike import Alike
from jaxllm.hlo.warn.walk import HANDED_ON, TRAFFIC, Spot, Walk, times
from jaxllm.report.inspection import Finding
from jaxllm.report.units import human

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "permute")
_WIDE, _NARROW = ("f32", "f64"), ("bf16", "f16", "f8")


@dataclass(frozen=True)
class _Sent:
    """One array of a collective that sends at least TRAFFIC."""

    spot: Spot
    kind: str
    result: Spot
    operand: Spot
    ranks: int  # devices in a group
    count: int  # executions in a step

    @property
    def payload(self) -> int:
        return self.operand.shape.bytes * (self.ranks if self.kind == "all-gather" else 1)


def _large(walk: Walk, *kinds: str) -> Iterator[_Sent]:
    for spot, kind in walk.collectives(*kinds):
        ranks = len(groups_of(spot.instruction, walk.devices)[0])
        operands = walk.operands(spot)
        several = len(operands) > 1
        arrays = [
            _Sent(spot, kind, Spot(*spot[:2], (position,) if several else ()), operand, ranks, walk.count(spot))
            for position, operand in enumerate(operands)
        ]
        if ranks > 1 and sum(array.payload for array in arrays) >= TRAFFIC:
            yield from arrays


def find_all_reduce_then_slice(walk: Walk) -> Iterator[Finding]:
    """An all-reduce of whose result each device keeps a slice: a reduce-scatter sends half of it.

    XLA:GPU and XLA:TPU make a reduce-scatter of most that the partitioner writes so, and leave what jax.shard_map
    writes; XLA:CPU leaves both.
    """
    for sent in _large(walk, "all-reduce"):
        readers = walk.readers(sent.result)
        if not readers or not all(walk.by_device(reader) for reader in readers):
            continue
        advice = (
            "In jax.shard_map, jax.lax.psum_scatter(x, axis, scatter_dimension=..., tiled=True) instead of psum and a "
            "slice by axis_index."
        )
        if walk.view.target == "cpu":
            advice += " Under jit alone, XLA:GPU and XLA:TPU make a reduce-scatter of most of these by themselves."
        yield Finding(
            "all-reduce-then-slice",
            f"All {sent.ranks} devices get the sum {sent.operand.shape} ({human(sent.payload)}{times(sent.count)}), "
            f"and each keeps a slice of it ({readers[0].instruction.shape}); a reduce-scatter sends half as much.",
            advice,
            walk.source(sent.spot),
            walk.op_name(sent.spot),
            sent.payload * (sent.ranks - 1) // sent.ranks * sent.count,
        )


def find_reduction_in_loop(walk: Walk) -> Iterator[Finding]:
    """A reduction in a loop whose result is only added to a sum that the loop carries: once after the loop is enough.

    XLA:GPU and XLA:TPU move an all-reduce out of the loop that adds it up, and leave one that stands in a loop within
    it, as that of each layer in each microbatch; XLA:TPU moves a reduce-scatter too.
    """
    for sent in _large(walk, "all-reduce", "reduce-scatter"):
        trips = walk.view.runs.of(sent.spot.computation)[0].trips
        adds = [called.root.opcode == "add" for called in walk.module.called(sent.spot.instruction)]
        outward = _loops_to_sum(walk, sent.result) if trips and all(adds) else None
        if outward is None or outward >= len(trips) or trips[-1 - outward] < 2:
            continue
        turns, size = trips[-1 - outward], sent.payload * sent.count
        advice = (
            "Add up each device's own part and reduce once after the loop: the loop in jax.shard_map, the weights made "
            "varying by jax.lax.pcast(w, axis, to='varying') before jax.grad, and jax.lax.psum of the sum."
        )
        if sent.kind == "reduce-scatter":
            advice += f" With psum_scatter of the sum, which is then {sent.ranks} times as large on each device."
        yield Finding(
            "reduction-in-loop",
            f"A loop of {turns:,} turns reduces {sent.operand.shape} in each and only adds the results up: "
            f"{human(size)} of {sent.kind} a step, where {human(size // turns)} after the loop would do.",
            advice,
            walk.source(sent.spot),
            walk.op_name(sent.spot),
            size - size // turns,
        )


def _loops_to_sum(walk: Walk, result: Spot) -> int | None:
    """How many loops out from a reduction the loop stands that adds its result up, and does nothing else with the
    result or the sum; None when there is none."""
    here, outward = result, 0
    for _ in range(16):
        readers = walk.readers(here)
        if len(readers) != 1:
            return None
        reader = readers[0]
        if reader.opcode == "add":
            sides = reader.operands()
            if any(_is_carried_sum(walk, reader, side) for side in sides):
                return outward
            here = Spot(*reader[:2])
        elif walk.by_device(reader) or (reader.opcode in ("multiply", "divide") and _scales(walk, reader)):
            here = Spot(*reader[:2])
        elif reader.opcode == "dynamic-update-slice":
            stacked = walk.readers(Spot(*reader[:2]))
            loop = walk.caller(stacked[0].computation) if len(stacked) == 1 else None
            if loop is None or loop.opcode != "while" or stacked[0].instruction.id != stacked[0].computation.root_id:
                return None
            here, outward = Spot(loop.computation, loop.instruction, stacked[0].index), outward + 1
        else:
            return None
    return None


def _scales(walk: Walk, product: Spot) -> bool:
    """Whether one side of a product or a quotient is a constant."""
    for side in map(walk.origin, product.operands()):
        if side.opcode == "broadcast":
            side = walk.origin(side.operand())
        if side.opcode == "constant":
            return True
    return False


def _is_carried_sum(walk: Walk, add: Spot, side: Spot) -> bool:
    """Whether one side of an addition is what the loop carries, read by nobody else, and the result its next value."""
    carried, allowed = walk.origin(side), {add.instruction.id}
    if carried.opcode == "select":  # in the first turn it is 0
        allowed.add(carried.instruction.id)
        carried = next((o for o in map(walk.origin, carried.operands()[1:]) if o.opcode == "parameter"), carried)
    loop = walk.caller(carried.computation)
    if carried.opcode != "parameter" or not carried.index or loop is None or loop.opcode != "while":
        return False
    if any(reader.instruction.id not in allowed for reader in walk.readers(carried)):
        return False
    results = walk.readers(Spot(*add[:2]))
    root = carried.computation.root_id
    return [(result.instruction.id, result.index) for result in results] == [(root, carried.index)]


def find_gather_before_matmul(walk: Walk) -> Iterator[Finding]:
    """An all-gather of an operand of matmuls along a dim that they do not sum over, while their other operand is the
    same on all devices that gather: each could multiply with its own piece, and all of them do the same work.

    Weights that are gathered for rows of each device's own, as in FSDP, are none: there the other operand differs.
    """
    flops = {product.place.name: product.flops for product in walk.view.products}
    asked: dict[Groups, Alike] = {}
    for sent in _large(walk, "all-gather"):
        readers = walk.readers(sent.result, loops=True)
        if not readers or any(_free_dims(reader, 0) is None for reader in readers):
            continue
        along = [_gathered_along(walk, sent.spot, reader) for reader in readers]
        if None in along or not any(free for _, free in filter(None, along)):
            continue
        groups = groups_of(sent.spot.instruction, walk.devices)
        alike = asked.setdefault(groups, Alike(walk, groups))
        others = [reader.operand(1 - side[0]) for reader, side in zip(readers, along, strict=True) if side is not None]
        if any(alike.differs(other) for other in others):
            continue
        work = sum(flops.get(reader.instruction.name, 0) * walk.count(reader) for reader in readers)
        yield Finding(
            "gather-before-matmul",
            f"{sent.ranks} devices gather {sent.operand.shape} ({human(sent.payload)}{times(sent.count)}) and then do "
            f"the same matmul, {human(work, 'FLOP')} a step each, where 1/{sent.ranks} would do: their other operand "
            "is the same on all of them.",
            "Leave the operand sharded and let the result be sharded as it is: jax.lax.with_sharding_constraint(y, "
            "P(..., axis)) on the matmul's result, or out_sharding=P(..., axis) of jnp.einsum; or shard the other "
            "operand over that axis as well.",
            walk.source(sent.spot),
            walk.op_name(sent.spot),
            sent.payload * (sent.ranks - 1) // sent.ranks * sent.count,
        )


def _gathered_along(walk: Walk, gather: Spot, matmul: Spot) -> tuple[int, bool] | None:
    """Which operand of a matmul is a gathered array, and whether along a dim that is not summed over; None when the dim
    cannot be told any more."""
    for side in (0, 1):
        path = list(walk.path(matmul.operand(side)))
        for _ in range(8):  # as deep as loops nest
            outside = walk.outside(path[-1]) if path[-1].opcode == "parameter" else None
            if outside is None:
                break
            path += walk.path(outside)
        if path[-1].instruction is not gather.instruction or len(gather.instruction.proto.dimensions) != 1:
            continue
        dim: int | None = gather.instruction.proto.dimensions[0]
        for before, after in zip(path[::-1], path[-2::-1], strict=False):
            dim = _moved(before, after, dim) if dim is not None else None
        free = _free_dims(matmul, side)
        return None if dim is None or free is None else (side, dim in free)
    return None


def _moved(before: Spot, after: Spot, dim: int) -> int | None:
    """Where a dim of an array is after one step that hands it on; None when it was cut or merged."""
    if after.opcode == "transpose":
        order = list(after.instruction.proto.dimensions)
        return order.index(dim) if dim in order else None
    if after.opcode not in ("bitcast", "reshape"):
        return dim
    old, new = (_order(spot.shape, physical=after.opcode == "bitcast") for spot in (before, after))
    if dim not in old:
        return None
    outside = prod(before.shape.dims[other] for other in old[: old.index(dim)])
    reached = 1
    for other in new:
        if reached == outside and after.shape.dims[other] == before.shape.dims[dim]:
            return other
        reached *= after.shape.dims[other]
    return None


def _order(shape: Shape, physical: bool) -> tuple[int, ...]:
    """Dims from the outermost inwards, as they lie in memory or as they are written."""
    return shape.minor_to_major[::-1] if physical and shape.minor_to_major else tuple(range(len(shape.dims)))


def _free_dims(spot: Spot, side: int) -> set[int] | None:
    """Dims of one operand that a matmul neither sums over nor pairs with the other operand's; None for anything
    else."""
    proto = spot.instruction.proto
    if spot.opcode == "convolution":
        numbers = proto.convolution_dimension_numbers
        return {numbers.kernel_output_feature_dimension if side else numbers.input_batch_dimension}
    if spot.opcode == "dot":
        numbers = {field.name: list(value) for field, value in proto.dot_dimension_numbers.ListFields()}
    elif proto.custom_call_target.startswith("__cublas$") and len(spot.instruction.operand_ids) > 1:
        numbers = _config(proto).get("gemm_backend_config", {}).get("dot_dimension_numbers", {})
    else:
        return None
    dims, left = spot.operand(side).shape.dims, spot.operand().shape.dims
    taken, paired = (
        {int(dim) for dim in numbers.get(f"{hand}_dimensions", ()) if str(dim).isdigit()}
        for hand in (f"{'rhs' if side else 'lhs'}_contracting", "lhs_batch")
    )
    # which dims of the right operand are paired is not kept: those of such a size may be
    sizes = {left[dim] for dim in paired if dim < len(left)}
    return {
        dim for dim in range(len(dims)) if dim not in taken and (dims[dim] not in sizes if side else dim not in paired)
    }


def _config(proto: Any) -> dict[str, Any]:
    try:
        return json.loads(proto.backend_config)
    except ValueError:
        return {}


def find_f32_traffic(walk: Walk) -> Iterator[Finding]:
    """A collective in f32 of values that were bf16 just before, or are cast to it by all who read them.

    XLA:GPU moves such a cast before an all-gather by itself, XLA:TPU to the other side of all but a reduce-scatter and
    a permute. XLA:CPU sends f32 instead of bf16 by itself: that is not held against the program.
    """
    for sent in _large(walk, *_KINDS):
        wide = sent.operand.shape.dtype
        out = {leaf.dtype for leaf in sent.spot.instruction.shape.leaves}  # XLA:TPU casts as it sends
        promoted = any("promoted" in called.name for called in walk.module.called(sent.spot.instruction))
        if wide not in _WIDE or wide not in out or promoted:
            continue
        before = walk.origin(sent.operand, _CASTS_STOP)
        after = walk.readers(sent.result, _CASTS_STOP)
        narrow = before.operand().shape.dtype if _casts(walk, sent.spot, before) else ""
        was = narrow.startswith(_NARROW)
        if not was and after and all(_casts(walk, sent.spot, reader) for reader in after):
            narrow = max((reader.instruction.shape.dtype for reader in after), key=element_bits)
        if not narrow.startswith(_NARROW):
            continue
        how = f"was {narrow} directly before" if was else f"is cast to {narrow} directly after"
        yield Finding(
            "f32-traffic",
            f"{sent.kind} of {sent.operand.shape} ({human(sent.payload)}{times(sent.count)}) sends in {wide} what "
            f"{how} it.",
            "Cast after the collective, not before: jax.lax.psum(x, axis).astype(jnp.float32); where a sum in f32 is "
            "worth its traffic, leave it."
            if was
            else "Cast before the collective: jax.lax.all_gather(w.astype(jnp.bfloat16), ...), or under jit a "
            "with_sharding_constraint between the cast and the use, with the sharding that the array has.",
            walk.source(sent.spot),
            walk.op_name(sent.spot),
            sent.payload * sent.count * (element_bits(wide) - element_bits(narrow)) // element_bits(wide),
        )


_CASTS_STOP = HANDED_ON - {"convert"}


def _casts(walk: Walk, collective: Spot, spot: Spot) -> bool:
    """Whether an instruction is a cast that the program asks for: XLA:CPU's own have no name, or the collective's."""
    if spot.opcode != "convert":
        return False
    op_name = spot.instruction.op_name
    return walk.view.target in ("gpu", "tpu") or op_name not in ("", collective.instruction.op_name)
