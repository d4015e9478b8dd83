"""Which device holds which piece of a sharded array: an xla.OpSharding, read."""

from __future__ import annotations

from math import prod
from typing import Any

from jaxllm.hlo.groups import iota_order

_REPLICATED, _MAXIMAL, _TILED = 0, 1, 3  # xla.OpSharding.Type

Pieces = tuple[int, ...]


def pieces_of(sharding: Any, devices: int) -> Pieces | None:
    """Of each device, which piece of an array it holds; None for a sharding that does not tell."""
    if sharding.HasField("named_sharding"):
        return _named(sharding.named_sharding, devices)
    if sharding.type in (_REPLICATED, _MAXIMAL):
        return (0,) * devices
    dims = tuple(sharding.tile_assignment_dimensions)
    if sharding.type != _TILED or prod(dims) != devices or any(sharding.last_tile_dims):
        return None
    order = tuple(sharding.tile_assignment_devices) or _order(
        tuple(sharding.iota_reshape_dims), tuple(sharding.iota_transpose_perm), devices
    )
    if sorted(order) != list(range(devices)):
        return None
    copies = len(sharding.last_tile_dims) or int(sharding.replicate_on_last_tile_dim)  # dims that are none of the array
    held = prod(dims[len(dims) - copies :])
    pieces = [0] * devices
    for position, device in enumerate(order):
        pieces[device] = position // held
    return tuple(pieces)


def _order(dims: tuple[int, ...], permutation: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """Devices in the order of an iota; () when it is none of so many."""
    known = prod(dims) == devices and sorted(permutation or range(len(dims))) == list(range(len(dims)))
    return iota_order(dims, permutation) if known else ()


def _named(sharding: Any, devices: int) -> Pieces | None:
    """Of a sharding by axes of a mesh: devices with the same place along all axes named hold the same piece."""
    sizes = [axis.size for axis in sharding.mesh.axes]
    named = [axis for dim in sharding.dim_shardings for axis in dim.axes]
    if not named:
        return (0,) * devices
    transform = sharding.mesh.iota_transform
    order = tuple(sharding.mesh.device_ids) or _order(
        tuple(transform.reshape_dims) or (devices,), tuple(transform.transpose_perm), devices
    )
    if prod(sizes) != devices or sorted(order) != list(range(devices)):
        return None
    places = []  # of each axis or part of one: how many devices on the next place is, and how many places there are
    for axis in named:
        if not 0 <= axis.mesh_axis_index < len(sizes):
            return None
        size, inside = sizes[axis.mesh_axis_index], prod(sizes[axis.mesh_axis_index + 1 :])
        sub = axis.sub_axis_info
        before, part = (sub.pre_size, sub.size) if axis.HasField("sub_axis_info") else (1, size)
        if before < 1 or part < 1 or size % (before * part):
            return None
        places.append((inside * size // (before * part), part))
    numbers: dict[tuple[int, ...], int] = {}
    pieces = [0] * devices
    for position, device in enumerate(order):
        place = tuple(position // step % count for step, count in places)
        pieces[device] = numbers.setdefault(place, len(numbers))
    return tuple(pieces)
