"""How fast a machine is at what a step consists of: its figures times what was measured of them.

A machine's file states peaks, and under [efficiency], [latency] and [interval] what was reached of them in measurements. One
without these is taken to reach what REFERENCE does, and is less sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.spec.errors import SpecError
from jaxllm.spec.figures import Curve
from jaxllm.spec.layout import AXES
from jaxllm.spec.machine import Machine, Mesh
from jaxllm.spec.workload import Workload
from jaxllm.theory.symbols import Symbols, remembered

REFERENCE = "a100-80"  # whose figures are fitted on measurements (experiments/fit_a100.py)
RINGS = ("all-gather", "reduce-scatter", "all-reduce")
UNSURE = 2  # how many times as wide the interval is of a machine that nobody measured, or of a step unlike the measured ones

# Tiles of a card's kernels and their speed relative to the largest: what a tile loads grows with its edges, what it
# multiplies with its area. XLA:TPU lays arrays out in tiles of 8 x 128, and pads to that.
GPU_TILES = ((256, 128, 1.0), (128, 128, 0.93), (64, 128, 0.85), (64, 64, 0.7))
GPU_FILL = 64  # a kernel loads a slice of the inner dim before it multiplies
TPU_TILES, TPU_DEEP = ((8, 128, 1.0),), 128


@dataclass(frozen=True)
class Rates:
    """What one device of a mesh does in a second, and what it takes whatever there is to do.

    peak              FLOP/s of products of the workload's dtype, as the machine's file has it; narrow: of those in 8 bits,
                      the same where the file has none
    matmul            share of it that tiles which fill the device reach
    cores             of the device, that take a tile each; tiles of (rows, columns, relative speed), and whether they may be
                      turned; deep: a multiple to which the inner dim is padded, and fill: what it is longer by
    memory            bytes/s of device memory; host: between it and host memory, 0 where no figure is known, at the share of
                      its peak that links inside of a node reach
    inside, between   bytes/s that a device sends to others of its node, and through its share of the network; infinite where
                      nothing is sent
    node              devices of a node
    torus             lengths of its axes, innermost last, the devices of a chip behind them, and whether each is closed into a
                      ring; link: bytes/s of one link
    collective        seconds that one takes at least; hop, far_hop: of a ring's hop inside of a node and between nodes
    kernel            seconds that a kernel takes at least
    block, issue      seconds in which the host launches the forward pass of a block, and a collective
    step              seconds of a step that grow with nothing
    least, tensor     half the interval's width on a machine that was measured, as a logarithm: at least, and for each share of
                      the step that waits for collectives over tensor or for the host
    measured          whether all of that was measured on this machine
    curve             shares that products of the workload's dtype reached, by their shape; None where nobody measured them
    """

    peak: float
    narrow: float
    matmul: float
    cores: int
    tiles: tuple[tuple[int, int, float], ...]
    turned: bool
    deep: int
    fill: int
    memory: float
    host: float
    inside: float
    between: float
    node: int
    torus: tuple[tuple[int, bool], ...]
    link: float
    collective: float
    hop: float
    far_hop: float
    kernel: float
    block: float
    issue: float
    step: float
    least: float
    tensor: float
    measured: bool
    curve: Curve | None = None

    @classmethod
    def of(cls, mesh: Mesh, workload: Workload) -> Rates:
        """The rates of a mesh for a workload's dtypes. Raises SpecError for a machine that has no figures of speed."""
        machine = mesh.machine
        dtype = workload.dtypes.compute
        peak = machine.rate(dtype)
        if peak is None or machine.bandwidth is None:
            lacking = "memory.bandwidth" if peak is not None else f"peak.{dtype}"
            raise SpecError(
                f"mesh {mesh}: {machine.name} has no figure {lacking}, which the time of a step takes; "
                "choose another machine, or give a file with its figures."
            )
        own = "efficiency.matmul" in machine.figures
        known = machine if own else Machine.read(REFERENCE)
        tpu = mesh.target == "tpu"
        share = lambda name: known.value(f"efficiency.{name}")  # noqa: E731
        seconds = lambda name: known.value(f"latency.{name}") * (own or not tpu)  # noqa: E731  a TPU runs one program
        inside, between = ("torus", "torus") if tpu else ("inside_node", "between_nodes")
        for name, needed in ((inside, mesh.devices > 1), (between, mesh.nodes > 1)):
            if needed and f"links.{name}" not in machine.figures:
                raise SpecError(
                    f"mesh {mesh}: {machine.name} has no figure links.{name}, over which its devices would send; take one "
                    "device, or give a file with that figure."
                )
        curve = machine.value("curve.matmul")
        return cls(
            peak=float(peak),
            narrow=float(max(peak, machine.peak_flops.get("fp8", 0))),
            matmul=share("matmul"),
            **tiling(machine),
            memory=machine.bandwidth * share("memory"),
            host=(machine.value("links.host") or 0) * share("inside_node"),
            inside=(machine.value(f"links.{inside}") or np.inf) * share("inside_node"),
            between=(machine.value(f"links.{between}") or np.inf) * share("between_nodes"),
            node=machine.node_size,
            torus=(*zip(mesh.shape, mesh.wraparound, strict=True), (machine.devices_per_chip, True)) if tpu else (),
            link=(machine.value("links.torus") or 0) * share("inside_node"),
            collective=seconds("collective"),
            hop=seconds("hop"),
            far_hop=seconds("far_hop"),
            kernel=seconds("kernel"),
            block=seconds("block"),
            issue=seconds("issue"),
            step=seconds("step"),
            least=known.value("interval.least"),
            tensor=known.value("interval.tensor"),
            measured=own,
            curve=curve if curve is not None and curve.dtype == dtype else None,
        )

    def seconds(self, s: Symbols, kind: str, axes: tuple[str, ...], wire: Any, launches: Any) -> Any:
        """Of collectives of a kind over these axes, of `wire` bytes that a device sends in all.

        Neighbours along the innermost axis are neighbouring devices. Round a ring the data leaves a node once, so that a group
        with several members on a node sends through all of their shares of the network. In an all-to-all each device sends
        what is for other nodes itself, and a permute goes from a device to one other. On a torus a ring has the links of the
        axes that it goes along, both ways where they are closed; an all-to-all's data goes a quarter of the longest of them
        on average, or a third where it is open.
        """
        stride, extent, degree = _group(s, axes)
        steps = 1 if kind == "permute" else (degree - 1) * (2 if kind == "all-reduce" else 1)
        if self.torus:
            rate, hop = self._torus_rate(s, axes, "ring" if kind in RINGS else kind), self.hop
            return wire / rate + launches * (self.collective + steps * hop)
        together = np.minimum(np.maximum(self.node // stride, 1), degree)  # members on one node
        near = extent <= self.node
        if kind == "all-to-all":
            others = np.maximum(degree - 1, 1)
            sent = np.maximum(wire * (together - 1) / others / self.inside, wire * (degree - together) / others / self.between)
        else:
            far = self.between * (1 if kind == "permute" else together)
            sent = wire / np.where(near, self.inside, np.minimum(far, self.inside))
        # Of a ring's hops one leaves each node.
        hop = np.where(near, self.hop, self.hop + (self.far_hop - self.hop) / (1 if kind == "permute" else together))
        return sent + launches * (self.collective + steps * hop)

    def _torus_rate(self, s: Symbols, axes: tuple[str, ...], kind: str) -> Any:
        known, key = _groups(s), (axes, kind, self.torus, self.link)
        if key not in known:
            stride, extent, _ = _group(s, axes)
            known[key] = self._rate_of(stride, extent, kind)
        return known[key]

    def _rate_of(self, stride: Any, extent: Any, kind: str) -> Any:
        both = np.stack(np.broadcast_arrays(stride, extent), -1).reshape(-1, 2)
        pairs, places = np.unique(both, axis=0, return_inverse=True)
        rates = np.array([_of_torus(self.torus, self.link, *map(int, pair), kind) for pair in pairs])
        return rates[places.reshape(-1)].reshape(np.broadcast(stride, extent).shape)[()]


def _group(s: Symbols, axes: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """Of a group of devices over these mesh axes: how far apart neighbours are, how far it extends, and how many they are."""
    known = _groups(s)
    if axes not in known:
        stride: Any = 1
        extent: Any = 1
        for axis in AXES:  # from the outermost; an axis of one device is none
            if axis in axes:
                degree, inner = s.degree((axis,)), s.degree(AXES[AXES.index(axis) + 1 :])
                stride = np.where(degree > 1, inner, stride)
                extent = np.maximum(extent, np.where(degree > 1, inner * degree, 1))
        known[axes] = stride, extent, s.degree(axes)
    return known[axes]


@remembered
def _groups(s: Symbols) -> dict[tuple[Any, ...], Any]:
    """What is known of groups of devices, by their axes."""
    return {}


def tiling(machine: Machine | None) -> dict[str, Any]:
    """How a machine cuts a product: cores, tiles, turned, deep and fill of Rates. What is not known, or a CPU, as it is."""
    if machine is not None and machine.target == "tpu":
        return {"cores": 1, "tiles": TPU_TILES, "turned": False, "deep": TPU_DEEP, "fill": 0}
    cores = machine.compiler.get("core_count") if machine is not None else None
    if cores is None:
        return {"cores": 1, "tiles": ((1, 1, 1.0),), "turned": False, "deep": 1, "fill": 0}
    return {"cores": cores, "tiles": GPU_TILES, "turned": True, "deep": 1, "fill": GPU_FILL}


def _of_torus(torus: tuple[tuple[int, bool], ...], link: float, stride: int, extent: int, kind: str = "ring") -> float:
    """bytes/s of a collective over devices that are `stride` apart and `extent` in all, laid out along a torus, last axis
    first. An axis that a ring goes along as a whole and that is closed has two links for it, else one."""
    inner, links, slowest = 1, 0, 0.0
    for length, closed in reversed(torus):
        outer = inner * length
        if length > 1 and stride < outer and extent > inner:
            members = min(outer, extent) // max(inner, stride)
            both = closed and stride <= inner and extent >= outer
            links += 2 if both else 1
            slowest = max(slowest, members / (8 if both else 4))
        inner = outer
    if kind == "permute" or not links:
        return link
    return link / slowest if kind == "all-to-all" else link * links
