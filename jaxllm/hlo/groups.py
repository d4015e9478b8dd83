"""Which mesh axes a collective runs over, recovered from its groups of devices.

XLA writes groups in three forms: a literal list, an iota (a range reshaped, transposed and cut into rows), and a mesh
with the axes that vary. All three become a partition of the devices, which is compared with the one that each subset of
the mesh's axes gives over device ids 0 .. n-1 in row-major order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from math import prod

from jaxllm.hlo.graph import Instruction
from jaxllm.hlo.protos import classes

UNKNOWN = ("unknown",)

Groups = tuple[tuple[int, ...], ...]


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The groups of a collective, each in its own order. No groups written means one group of all devices."""
    proto = instruction.proto
    if proto.HasField("mesh_axes_replica_group_list"):
        return _from_mesh(proto.mesh_axes_replica_group_list.SerializeToString())
    iota = proto.iota_collective_device_list
    if not iota.num_replica_groups:
        iota = proto.collective_device_list.iota_replica_group_list
    if iota.num_replica_groups:
        ids = iota_order(tuple(iota.iota_reshape_dims), tuple(iota.iota_transpose_perm))
        return _rows(ids, iota.num_devices_per_group)
    literal = proto.collective_device_list.replica_groups or proto.replica_groups
    return tuple(tuple(group.replica_ids) for group in literal) or (tuple(range(devices)),)


def pairs_of(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    """Source and target of each transfer of a permute, or of a `send` that a permute was made into."""
    if instruction.opcode == "send":
        text = next(
            (p.value for p in instruction.proto.frontend_attributes.map if p.key.endswith("send_recv_source_target_pairs")),
            "",
        )
        return tuple((int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", text))
    return tuple((pair.source, pair.target) for pair in instruction.proto.source_target_pairs)


def recovered_axes(partitions: Iterable[Groups], pairs: Iterable[tuple[tuple[int, int], ...]], devices: int) -> dict[str, int]:
    """Axes of a mesh that nobody named, outermost first, from what the collectives of a program run over: {} when they
    do not tell.

    A group that holds device 0 lists, in a mesh in row-major order, sums of multiples of a few strides. Strides and the
    ends of their ranges are where one axis ends and the next begins; a cut that does not divide the others is left out.
    """
    cuts: dict[int, int] = {}
    for groups in partitions:
        for cut in _cuts(sorted(next((group for group in groups if 0 in group), ()))):
            cuts[cut] = cuts.get(cut, 0) + 1
    for moves in pairs:
        for cut in _cuts_of_pairs(moves):
            cuts[cut] = cuts.get(cut, 0) + 1
    kept: list[int] = []
    for cut in sorted((c for c in cuts if 1 < c < devices and devices % c == 0), key=lambda c: (-cuts[c], c)):
        if all(cut % other == 0 or other % cut == 0 for other in kept):
            kept.append(cut)
    if not cuts:
        return {}
    bounds = [1, *sorted(kept), devices]
    degrees = [high // low for low, high in zip(bounds, bounds[1:], strict=False)][::-1]
    return {f"axis{index}": degree for index, degree in enumerate(degrees)}


def _cuts(group: Sequence[int]) -> list[int]:
    """Strides of the axes of one sorted group that begins with 0, and where their ranges end."""
    cuts, size = [], 1
    while size < len(group):
        stride = group[size]
        count = size
        while count < len(group) and group[count] == (count // size) * stride:
            count += size
        cuts += [stride, stride * (count // size)]
        size = count
    return cuts


def _cuts_of_pairs(moves: Iterable[tuple[int, int]]) -> list[int]:
    """A shift along an axis goes one stride on, or from its end back to its beginning."""
    steps = {target - source for source, target in moves if source != target}
    ahead = [step for step in steps if step > 0]
    back = [-step for step in steps if step < 0]
    if len(ahead) == 1 and len(back) <= 1:
        stride = ahead[0]
        return [stride, stride + back[0]] if back else [stride]
    return []


@cache
def _from_mesh(wire: bytes) -> Groups:
    """Groups of the devices that differ only in the axes named; an axis may be split, of which one part varies.

    Takes the wire form of a MeshAxesReplicaGroupListProto, because that can be a key of the cache.
    """
    proto = classes()["MeshAxesReplicaGroupListProto"].FromString(wire)
    sizes = [axis.size for axis in proto.mesh.axes]
    devices = tuple(proto.mesh.device_ids)
    if not devices and proto.mesh.iota_transform.reshape_dims:
        transform = proto.mesh.iota_transform
        devices = iota_order(tuple(transform.reshape_dims), tuple(transform.transpose_perm))
    devices = devices or tuple(range(prod(sizes)))
    # Split each axis into (before, part, after) so that a sub-axis is a dimension of its own.
    parts: dict[int, list[tuple[int, int]]] = {}
    for axis in proto.axes:
        sub = axis.sub_axis_info
        part = (sub.pre_size, sub.size) if axis.HasField("sub_axis_info") else (1, sizes[axis.mesh_axis_index])
        parts.setdefault(axis.mesh_axis_index, []).append(part)
    dims, varies, position = [], [], {}
    for index, size in enumerate(sizes):
        done = 1
        for before, part in sorted(parts.get(index, [])):
            dims += [before // done, part]
            varies += [False, True]
            position[index, before] = len(dims) - 1
            done = before * part
        dims.append(size // done)
        varies.append(False)
    order = [position[axis.mesh_axis_index, axis.sub_axis_info.pre_size or 1] for axis in proto.axes]
    kept = [i for i, v in enumerate(varies) if not v]
    ids = _transpose(devices, dims, kept + order)
    return _rows(ids, prod(dims[i] for i in order))


@cache
def iota_order(dims: tuple[int, ...], permutation: tuple[int, ...]) -> tuple[int, ...]:
    return _transpose(range(prod(dims)), dims, permutation or range(len(dims)))


def _transpose(values: Sequence[int], dims: Sequence[int], permutation: Iterable[int]) -> tuple[int, ...]:
    """The row-major `values` of an array of `dims`, read in the order of the permuted dimensions."""
    strides = [prod(dims[i + 1 :]) for i in range(len(dims))]
    offsets = [0]
    for dim in permutation:
        offsets = [offset + k * strides[dim] for offset in offsets for k in range(dims[dim])]
    return tuple(values[offset] for offset in offsets)


@cache
def _rows(ids: tuple[int, ...], width: int) -> Groups:
    return tuple(ids[i : i + width] for i in range(0, len(ids), width))


@cache
def _partition(degrees: tuple[int, ...], chosen: tuple[int, ...]) -> tuple[int, ...]:
    """For each device the smallest id in its group, when devices of a group differ only in the chosen axes."""
    kept = [i for i in range(len(degrees)) if i not in chosen]
    label = [0] * prod(degrees)
    for group in _rows(iota_order(degrees, (*kept, *chosen)), prod(degrees[i] for i in chosen)):
        for device in group:
            label[device] = group[0]
    return tuple(label)


@cache
def axes_of(groups: Groups, axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The mesh axes, in the mesh's order, over which these groups run; UNKNOWN when no subset of axes gives them.

    Args: groups; axes as (name, degree), outermost first. Axes of degree 1 are never named.
    """
    degrees = tuple(degree for _, degree in axes)
    label = [-1] * prod(degrees)
    for group in groups:
        smallest = min(group)
        for device in group:
            if device >= len(label):
                return UNKNOWN
            label[device] = smallest
    wide = [i for i, degree in enumerate(degrees) if degree > 1]
    for count in range(len(wide) + 1):
        for chosen in combinations(wide, count):
            if prod(degrees[i] for i in chosen) == len(groups[0]) and _partition(degrees, chosen) == tuple(label):
                return tuple(axes[i][0] for i in chosen)
    return UNKNOWN


def axes_of_pairs(pairs: Iterable[tuple[int, int]], axes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The axes along which a permute moves data: those in which some source and target differ."""
    moved = set()
    for source, target in pairs:
        for name, degree in reversed(axes):
            if source % degree != target % degree:
                moved.add(name)
            source, target = source // degree, target // degree
        if source or target:
            return UNKNOWN
    return tuple(name for name, _ in axes if name in moved)
