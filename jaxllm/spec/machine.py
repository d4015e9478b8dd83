"""Machine: one kind of chip in its node, from a TOML file in meshes/. Mesh: a machine with a size.

How a file states its figures, and which there are, is in figures.py. All figures are per JAX device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.figures import FIGURES, SHAPE, Curve, Figure, read


# The peaks at which products of a dtype may run. Where none of these is stated, bf16's bounds them.
_RATES = {
    "f32": ("tf32", "f32"),
    "s8": ("int8",),
    "u8": ("int8",),
    "s4": ("int4", "int8"),
    "u4": ("int4", "int8"),
    "f4e2m1fn": ("fp4", "fp8"),
}


@dataclass(frozen=True)
class Machine:
    """One kind of chip in its node. All figures are per JAX device; `devices_per_chip` of them share a chip."""

    name: str
    description: str
    target: str  # which compiler: cpu, gpu or tpu
    figures: Mapping[str, Figure] = field(hash=False)
    absent: Mapping[str, str] = field(hash=False)  # figure -> why it is not stated
    compiler: Mapping[str, Any] = field(hash=False)  # what the compiler needs to know of a device that is not there
    compiler_source: str = ""

    @staticmethod
    def names() -> list[str]:
        """The machines that come with jaxllm: one TOML file each."""
        return sorted(path.stem for path in folder().glob("*.toml"))

    @classmethod
    def read(cls, text: str | os.PathLike[str]) -> Machine:
        """A known machine by its name, or the TOML file at a path. Raises SpecError on anything else."""
        text = os.fspath(text)
        known = cls.names()
        if text in known:
            return cls(**read(folder() / f"{text}.toml"))
        if os.path.isfile(text):
            return cls(**read(Path(text)))
        if "/" in text or text.endswith(".toml"):
            raise SpecError(f"machine: there is no file {text!r}; give a TOML file, or one of {', '.join(known)}.")
        raise SpecError(f"machine: unknown name {text!r}; {nearest(text.lower(), known)}")

    @classmethod
    def load(cls, text: str) -> Mesh:
        """A machine with its size: `h100:16`, `h100:2048x8`, `v5p:4x4x4`, `my.toml:8`. Raises SpecError."""
        if not isinstance(text, str):
            raise SpecError(f"mesh: {text!r} is not a text; write it like 'h100:8'.")
        name, colon, size = text.rpartition(":")
        if not colon:
            machine = cls.read(text)
            raise SpecError(f"mesh: {text!r} has no size; write {_examples(machine, text)}.")
        machine = cls.read(name)
        return Mesh(machine, _parse_size(machine, text, name, size), text)

    def value(self, name: str) -> Any:
        """The value of a figure, or None when its file says that it is absent."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    @property
    def devices_per_chip(self) -> int:
        return self.value("chip.devices") or 1

    @property
    def memory_bytes(self) -> int | None:
        """All memory of a device; None for emulated devices, which share the host's."""
        return self.value("memory.total")

    @property
    def usable_fraction(self) -> float | None:
        return self.value("memory.usable_fraction")

    @property
    def reserve_bytes(self) -> int | None:
        return self.value("memory.reserve")

    @property
    def capacity(self) -> int | None:
        """Bytes that a program may use: usable_fraction x total - reserve. None: no limit is known, anything fits."""
        if self.memory_bytes is None:
            return None
        return int(self.memory_bytes * self.usable_fraction) - self.reserve_bytes

    @property
    def bandwidth(self) -> int | None:
        """Memory bandwidth in bytes/s."""
        return self.value("memory.bandwidth")

    @property
    def peak_flops(self) -> dict[str, int]:
        """Dense peak in FLOP/s by dtype; dtypes without a checked figure are left out."""
        return {
            name.removeprefix("peak."): figure.value
            for name, figure in self.figures.items()
            if name.startswith("peak.")
        }

    def rate(self, dtype: str) -> int | None:
        """FLOP/s of products of a dtype, as HLO names it; None when the file states none that could bound them. f32 runs as
        tf32 by default on GPUs, and in passes of bf16 on TPUs, which state no peak of f32."""
        names = _RATES.get(dtype, ("fp8",) if dtype.startswith("f8") else ("bf16",))
        known = [self.peak_flops[name] for name in names if self.peak_flops.get(name)]
        return max(known, default=self.peak_flops.get("bf16"))

    @property
    def links(self) -> dict[str, Figure]:
        """Links by where they lead; values in bytes/s, one direction."""
        return {
            name.removeprefix("links."): figure for name, figure in self.figures.items() if name.startswith("links.")
        }

    @property
    def predict_only(self) -> str:
        """Why no compiler is asked about this machine, so that it is only predicted or emulated; "" where one is."""
        return self.absent.get("compiler", "")

    @property
    def node_size(self) -> int:
        """Devices of a node (one host)."""
        return self.value("node.devices")

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (figure, value with unit, source) for a table; absent figures come last with the reason."""
        rows = [("description", self.description, ""), ("target", self.target, "")]
        for name in FIGURES:
            figure = self.figures.get(name)
            if figure is None:
                continue
            rows.append((name, f"{figure.given} ({figure.kind})" if figure.kind else figure.given, figure.source))
            if name == "memory.reserve":
                rows.append(("memory.capacity", _bytes_text(self.capacity), "usable_fraction x total - reserve"))
        for key, value in self.compiler.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
            rows.append((f"compiler.{key}", shown, self.compiler_source))
        rows += [(name, "absent", reason) for name, reason in self.absent.items()]
        return rows

    def to_json(self) -> dict[str, Any]:
        """The machine as JSON takes it: values in bytes, bytes/s and FLOP/s."""
        return {
            "name": self.name,
            "description": self.description,
            "target": self.target,
            "capacity": self.capacity,
            "figures": {
                name: {"value": _plain(figure.value), "given": figure.given, "source": figure.source}
                | ({"kind": figure.kind} if figure.kind else {})
                for name, figure in self.figures.items()
            },
            "absent": dict(self.absent),
            "compiler": dict(self.compiler) | ({"source": self.compiler_source} if self.compiler else {}),
        }


@dataclass(frozen=True)
class Mesh:
    """A machine with a size.

    shape is (nodes, cards a node) on gpu, the chips along each axis of the torus on tpu, and (devices,) on cpu.
    """

    machine: Machine
    shape: tuple[int, ...]
    text: str  # as it was typed: "h100:16"

    def __post_init__(self) -> None:
        if not self.shape or not all(type(n) is int and n > 0 for n in self.shape):
            raise SpecError(f"mesh: {self.text!r} has the shape {self.shape}, which holds no devices.")
        _CHECKS[self.machine.target](self.machine, self.shape, self.text)

    @property
    def target(self) -> str:
        return self.machine.target

    @property
    def devices(self) -> int:
        """JAX devices in all."""
        return math.prod(self.shape) * self.machine.devices_per_chip

    @property
    def nodes(self) -> int:
        """Hosts: 1 for emulated devices and for less than a whole host."""
        return self.shape[0] if self.target == "gpu" else -(-self.devices // self.machine.node_size)

    @property
    def devices_per_node(self) -> int:
        """Neighbouring devices of one node that the mesh uses."""
        return self.shape[1] if self.target == "gpu" else min(self.devices, self.machine.node_size)

    @property
    def topology(self) -> str:
        """The mesh in the words of its compiler: slices x hosts x GPUs, `v5p:4x4x4`, or the number of devices."""
        shape = "x".join(map(str, self.shape))
        if self.target == "tpu":
            return f"{self.machine.compiler['topology']}:{shape}"
        return f"1x{shape}" if self.target == "gpu" else shape

    @property
    def host_bounds(self) -> tuple[int, ...] | None:
        """Chips of a host along three axes, as libtpu wants to be told them; None on cpu and gpu."""
        if self.target != "tpu":
            return None
        bounds = self.machine.compiler["chips_per_host_bounds"]
        return tuple(min(bound, chips) for bound, chips in zip(bounds, (*self.shape, 1), strict=False))

    @property
    def wraparound(self) -> tuple[bool, ...]:
        """For each axis of the torus, whether its ends are linked; empty on cpu and gpu."""
        if self.target != "tpu":
            return ()
        every, cube = self.machine.value("torus.wraparound"), self.machine.value("torus.cube")
        whole = cube is None or all(length % cube == 0 for length in self.shape)
        return tuple(whole and length % every == 0 for length in self.shape)

    @property
    def capacity(self) -> int | None:
        """Bytes a program may use on one device; None when no limit is known, so that anything fits."""
        return self.machine.capacity

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (figure, value with unit, source): the size, then the machine."""
        rows = [
            ("mesh", self.text, ""),
            ("devices", f"{self.devices:,}", ""),
            ("nodes", f"{self.nodes:,}", ""),
            ("topology", self.topology, ""),
        ]
        return rows + self.machine.describe()

    def to_json(self) -> dict[str, Any]:
        """The size and the name of the machine, as JSON takes them."""
        return {
            "text": self.text,
            "machine": self.machine.name,
            "target": self.target,
            "devices": self.devices,
            "nodes": self.nodes,
            "shape": list(self.shape),
            "topology": self.topology,
            "capacity": self.capacity,
        }

    def __str__(self) -> str:
        return self.text


# ---------------------------------------------------------------- sizes

def _examples(machine: Machine, name: str) -> str:
    if machine.target == "cpu":
        return f"{name}:8"
    if machine.target == "gpu":
        node = machine.node_size
        return f"{name}:{node}, {name}:{2 * node} or {name}:2x{node} (nodes x cards)"
    return " or ".join(f"{name}:{'x'.join(map(str, shape))}" for shape in _closest(machine, (4,)))


def _parse_size(machine: Machine, text: str, name: str, size: str) -> tuple[int, ...]:
    if not SHAPE.fullmatch(size):
        raise SpecError(f"mesh: {size!r} in {text!r} is not a size below a million; write {_examples(machine, name)}.")
    numbers = tuple(int(number) for number in size.split("x"))
    if 0 in numbers:
        raise SpecError(f"mesh: {text!r} has no devices; write {_examples(machine, name)}.")
    if machine.target == "gpu" and len(numbers) == 1:
        return _whole_nodes(machine, numbers[0], text, name)
    return numbers


def _whole_nodes(machine: Machine, cards: int, text: str, name: str) -> tuple[int, int]:
    """One node holds up to `node_size` cards; more cards come as whole nodes."""
    node = machine.node_size
    if cards <= node:
        return (1, cards)
    if cards % node:
        fewer = cards // node * node
        raise SpecError(
            f"mesh: {text!r} takes part of a node, and above one node of {node} cards come whole nodes; "
            f"write {name}:{fewer} or {name}:{fewer + node}."
        )
    return (cards // node, node)


def _check_cpu(machine: Machine, shape: tuple[int, ...], text: str) -> None:
    limit = machine.node_size
    if len(shape) != 1:
        raise SpecError(f"mesh: {text!r} gives a shape, but emulated devices are only counted; write cpu:8.")
    if shape[0] > limit:
        raise SpecError(f"mesh: {text!r} asks for {shape[0]} emulated devices, and {machine.name} has up to {limit:,} (node.devices); take fewer.")


def _check_gpu(machine: Machine, shape: tuple[int, ...], text: str) -> None:
    if len(shape) != 2:
        raise SpecError(f"mesh: {text!r} has {len(shape)} axes; write cards, or nodes x cards as in 2x8.")
    if shape[1] > machine.node_size:
        raise SpecError(f"mesh: {text!r} puts {shape[1]} cards in a node, which holds {machine.node_size}.")
    if shape[0] > 1 and shape[1] != machine.node_size:
        raise SpecError(
            f"mesh: {text!r} takes {shape[1]} cards of each node, and of several nodes all {machine.node_size} cards are "
            f"taken; write {shape[0]}x{machine.node_size}, or a machine file with a smaller node."
        )


def _check_tpu(machine: Machine, shape: tuple[int, ...], text: str) -> None:
    if shape in machine.value("torus.slices"):
        return
    cube, chips = machine.value("torus.cube"), machine.value("torus.chips")
    if cube and _is_cubes(shape, cube, chips):
        return
    near = " or ".join("x".join(map(str, other)) for other in _closest(machine, shape))
    axes = len(machine.value("torus.slices")[0])
    if len(shape) != axes:
        raise SpecError(f"mesh: {text!r} is no shape of chips, which has {axes} axes here; write {near}.")
    if math.prod(shape) > chips:
        raise SpecError(f"mesh: {text!r} is {math.prod(shape)} chips, and a pod has {chips}; the nearest is {near}.")
    raise SpecError(f"mesh: {text!r} is no slice that exists; the nearest is {near}.")


_CHECKS = {"cpu": _check_cpu, "gpu": _check_gpu, "tpu": _check_tpu}


def _is_cubes(shape: tuple[int, ...], cube: int, chips: int) -> bool:
    ordered = all(a <= b for a, b in zip(shape, shape[1:], strict=False))
    return len(shape) == 3 and ordered and all(n % cube == 0 for n in shape) and math.prod(shape) <= chips


def slices(machine: Machine) -> Iterator[tuple[int, ...]]:
    """Every slice that exists."""
    yield from machine.value("torus.slices")
    cube, chips = machine.value("torus.cube"), machine.value("torus.chips")
    if cube:
        cubes = chips // cube**3
        for a in range(1, cubes + 1):
            for b in range(a, cubes // a + 1):
                for c in range(b, cubes // (a * b) + 1):
                    yield (a * cube, b * cube, c * cube)


def _closest(machine: Machine, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The slice nearest to a shape that does not exist, and the runner-up: by chips, then by sides."""

    def distance(other: tuple[int, ...]) -> tuple[float, float]:
        sides = sum(abs(math.log(a / b)) for a, b in zip(sorted(other), sorted(shape), strict=False))
        return (round(abs(math.log(math.prod(other) / math.prod(shape))), 9), sides)

    return sorted(set(slices(machine)), key=lambda other: (distance(other), other))[:2]


# ---------------------------------------------------------------- files


def folder() -> Path:
    """meshes/ lies in the package when it is installed, and beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for found in (package / "meshes", package.parent / "meshes"):
        if found.is_dir():
            return found
    raise SpecError("machine: the files of meshes/ are not part of this installation; install jaxllm again.")


def _plain(value: Any) -> Any:
    """A figure's value as JSON takes it."""
    return asdict(value) if isinstance(value, Curve) else value


def _bytes_text(count: int | None) -> str:
    return "no limit" if count is None else f"{count / 2**30:,.2f} GiB ({count:,} B)"
