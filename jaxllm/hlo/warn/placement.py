"""What the partitioner left whole on every device, or made whole on the way from one sharding to another."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod

from jaxllm.hlo.flops import instruction_flops
from jaxllm.hlo.groups import groups_of
from jaxllm.hlo.warn.alike import Alike
from jaxllm.hlo.warn.walk import MEMORY, TRAFFIC, Spot, Walk, listed, times
from jaxllm.report.inspection import Finding
from jaxllm.report.units import human

_SAID = re.compile(
    r"Involuntary full rematerialization\.[^\n]*? from sharding (\{.+?\}) to (\{.+?\}) (?:efficiently|without)[^\n]*?"
    r"HLO operation:? %?(\S+) = (?:\w+\[([\d,]*)\])?[^\n]*"
)
_MOST_PRODUCTS = 64  # of which it is asked whether all devices compute the same; the largest


def find_involuntary_rematerialization(walk: Walk) -> Iterator[Finding]:
    """An array that the partitioner gathers whole and cuts anew, because it knows no way from one sharding to the
    other: told by an all-gather of which each device reads a slice of its own, and by what the partitioner said.

    XLA:TPU does the same and says nothing. What was said and left no such trace is told as well.
    """
    said = {found.groups(): found[0] for found in _SAID.finditer(walk.view.messages)}
    advice = (
        "Go there in steps that each move one axis: jax.lax.with_sharding_constraint (or jax.sharding.reshard) to a "
        "sharding between the two, as P('a', 'b') on the way from P(None, 'a') to P('b', None); or give both ends the "
        "same."
    )
    for spot, _ in walk.collectives("all-gather"):
        ranks = len(groups_of(spot.instruction, walk.devices)[0])
        size, count = sum(operand.shape.bytes for operand in walk.operands(spot)) * ranks, walk.count(spot)
        if size < TRAFFIC or ranks < 2:
            continue
        readers = walk.readers(spot)
        if not readers or not all(walk.by_device(reader) for reader in readers):
            continue
        operand = walk.operands(spot)[0].shape
        key = next((key for key in said if _whole(*key) == operand.size * ranks), None)
        way = f", from {key[0]} to {key[1]}" if key else ""
        if key:
            del said[key]
        yield Finding(
            "involuntary-rematerialization",
            f"Each device gathers all of an array ({operand}, {human(size)}{times(count)}) and keeps a slice of it, "
            f"{readers[0].instruction.shape}: so the partitioner goes between two shardings when it knows no way{way}.",
            advice,
            walk.source(spot),
            walk.op_name(spot),
            size * (ranks - 1) // ranks * count,
        )
    for (old, new, name, _), text in said.items():
        op_name = re.search(r'op_name="([^"]*)"', text)
        source = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', text)
        yield Finding(
            "involuntary-rematerialization",
            f"The partitioner says that it replicates {name} and cuts it anew, to go from {old} to {new}.",
            advice,
            f"{source[1].rpartition('/')[2]}:{source[2] or '?'}" if source else "",
            op_name[1] if op_name else "",
        )


def _whole(old: str, _new: str, _name: str, piece: str | None) -> int:
    """Elements of the array that a message is about; its shape there is that of a device's piece. A sharding is written
    as `{devices=[1,2,4]<=[8] last_tile_dim_replicate}` or, since jax 0.12, `{mesh['a'=2,'b'=4], [{}, {'a'}]}`."""
    if found := re.search(r"devices=\[([\d,]+)\]", old):
        dims = [int(dim) for dim in found[1].split(",")]
        pieces = prod(dims[:-1] if "last_tile_dim_replicate" in old else dims)
    else:
        mesh, _, dims_of = old.partition("],")
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
        pieces = prod(
            int(part or sizes.get(name, 1)) for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", dims_of)
        )
    return pieces * prod(int(dim) for dim in (piece or "").split(",") if dim)


def find_replicated(walk: Walk) -> Iterator[Finding]:
    """Large arguments of which devices hold the same piece, and matmuls that all devices compute alike from such
    ones."""
    if walk.devices < 2:
        return
    held: dict[int, list[Spot]] = defaultdict(list)
    for _, parameter in sorted(walk.module.entry.parameters.items()):
        pieces = walk.pieces(parameter) if parameter.shape.bytes >= MEMORY else None
        copies = walk.devices // len(set(pieces)) if pieces is not None else 1
        if parameter.shape.bytes * (copies - 1) // copies >= MEMORY:
            held[copies].append(Spot(walk.module.entry, parameter))
    for copies, spots in held.items():
        spots.sort(key=lambda spot: -spot.shape.bytes)
        size = sum(spot.shape.bytes for spot in spots)
        yield Finding(
            "replicated",
            f"{listed([f'{spot.instruction.op_name or spot.instruction.name} {spot.shape}' for spot in spots])}: each "
            f"of {copies} devices holds the same {human(size)} of arguments, where 1/{copies} would do.",
            "Shard a dim over the axis that does not: jax.NamedSharding(mesh, P(..., axis)) for the argument in "
            "jax.device_put or in_shardings, for parameters and optimizer over the data axis (FSDP, ZeRO).",
            walk.source(spots[0]),
            spots[0].instruction.op_name,
            size - size // copies,
        )
    yield from _alike_work(walk)


def _alike_work(walk: Walk) -> Iterator[Finding]:
    everywhere = Alike(walk, (tuple(range(walk.devices)),))
    products = [
        spot
        for spot in (*walk.by_opcode["dot"], *walk.by_opcode["convolution"])
        if spot.shape.bytes >= MEMORY and walk.count(spot)
    ]
    for spot in sorted(products, key=lambda spot: -spot.shape.bytes)[:_MOST_PRODUCTS]:
        if everywhere.differs(spot):
            continue
        flops = instruction_flops(*spot[:2]) * walk.count(spot)
        yield Finding(
            "replicated",
            f"All {walk.devices} devices compute the same {spot.shape} ({human(spot.shape.bytes)}"
            f"{times(walk.count(spot))}), {human(flops, 'FLOP')} a step each: what goes into it is the same on all of them.",
            "Shard its batch or another dim: jax.lax.with_sharding_constraint(x, P(axis)) on what goes into it, where "
            "an earlier operation has lost its sharding, or in_shardings of the batch.",
            walk.source(spot),
            walk.op_name(spot),
            spot.shape.bytes - spot.shape.bytes // walk.devices,
        )
