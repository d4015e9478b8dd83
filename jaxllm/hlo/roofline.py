"""The least time that an operation takes on a machine: no kernel multiplies, moves or sends faster than the machine.

A bound and no estimate (Williams, Waterman, Patterson, 2009): of compute, memory and network the slowest, each at its
peak, and network with all links of a device busy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"


def link_speed(machine: Any, devices: Iterable[int]) -> float | None:
    """Bytes a second that one device can send to those of its group at most; None when the file states no link."""
    group = list(devices)
    if torus := machine.value("links.torus"):
        dims = len(next(iter(machine.value("torus.slices")), (1, 1, 1)))
        return 2 * dims * torus
    inside = len({device // machine.node_size for device in group}) == 1
    return machine.value("links.inside_node") if inside else machine.value("links.between_nodes")


def bound(
    machine: Any, flops: int, dtype: str, moved: int, wire: int = 0, group: Iterable[int] = ()
) -> tuple[float | None, str]:
    """(seconds, what sets them) of one execution; (None, "") where the machine states nothing of what is used.

    Args: FLOPs and the type of what is multiplied; bytes of HBM moved; bytes sent to devices of the group.
    """
    times: dict[str, float] = {}
    if flops and (peak := machine.rate(dtype)):
        times[COMPUTE] = flops / peak
    if moved and (bandwidth := machine.value("memory.bandwidth")):
        times[MEMORY] = moved / bandwidth
    if wire and (speed := link_speed(machine, group)):
        times[NETWORK] = wire / speed
    if not times:
        return None, ""
    slowest = max(times, key=times.__getitem__)
    return times[slowest], slowest
