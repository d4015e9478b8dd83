"""Machine: one kind of chip in its node, from a TOML file in meshes/. Mesh: a machine with a size.

A machine file holds figures, each `name = { value = ..., unit = "...", source = "..." }`. All figures are per JAX
device. A figure without a checked source is not written down but listed under [absent] with the reason.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest

TARGETS = ("cpu", "gpu", "tpu")

_UNITS: dict[str, dict[str, int]] = {
    "bytes": {"B": 1, "MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9},
    "bytes/s": {"B/s": 1, "GB/s": 10**9, "TB/s": 10**12},
    "FLOP/s": {"FLOP/s": 1, "TFLOP/s": 10**12, "PFLOP/s": 10**15},
}


@dataclass(frozen=True)
class _Kind:
    """What a figure measures, for which targets a file must speak of it, and where it may say `absent`."""

    measure: str  # a key of _UNITS, or "count", "share", "shape", "shapes"
    needed: tuple[str, ...] = ()
    may_be_absent: tuple[str, ...] = TARGETS
    targets: tuple[str, ...] = TARGETS


_FIGURES = {
    "chip.devices": _Kind("count", ()),
    "memory.total": _Kind("bytes", TARGETS, may_be_absent=("cpu",)),
    "memory.usable_fraction": _Kind("share", TARGETS, may_be_absent=("cpu",)),
    "memory.reserve": _Kind("bytes", TARGETS, may_be_absent=("cpu",)),
    "memory.bandwidth": _Kind("bytes/s", TARGETS),
    "peak.bf16": _Kind("FLOP/s", TARGETS),
    "peak.f32": _Kind("FLOP/s", TARGETS),
    "peak.tf32": _Kind("FLOP/s"),
    "peak.fp8": _Kind("FLOP/s"),
    "peak.fp4": _Kind("FLOP/s"),
    "peak.int8": _Kind("FLOP/s"),
    "node.devices": _Kind("count", TARGETS, may_be_absent=()),
    # One direction, for one device: what it sends to the others of its node, and through its share of the network.
    "links.inside_node": _Kind("bytes/s", ("gpu",), targets=("gpu",)),
    "links.between_nodes": _Kind("bytes/s", ("gpu",), targets=("gpu",)),
    # One direction of one link of the torus; a chip has two links an axis. Then its share of the network.
    "links.torus": _Kind("bytes/s", ("tpu",), targets=("tpu",)),
    "links.between_slices": _Kind("bytes/s", ("tpu",), targets=("tpu",)),
    # Slices that exist: the listed shapes, and with `cube` all shapes of multiples of it in non-decreasing order.
    "torus.slices": _Kind("shapes", ("tpu",), may_be_absent=(), targets=("tpu",)),
    "torus.cube": _Kind("count", targets=("tpu",)),
    "torus.chips": _Kind("count", ("tpu",), may_be_absent=(), targets=("tpu",)),
    # An axis closes into a ring when its length is a multiple of this (with `cube`: and the slice is whole cubes).
    "torus.wraparound": _Kind("count", ("tpu",), may_be_absent=(), targets=("tpu",)),
}

# What a compiler has to be told of a device that is not there.
_COMPILER: dict[str, dict[str, type]] = {
    "cpu": {},
    "gpu": {
        "description": str,
        "compute_capability": list,
        "core_count": int,
        "fpus_per_core": int,
        "threads_per_core_limit": int,
        "clock_rate_ghz": float,
        "memory_bandwidth": int,
        "device_memory_size": int,
        "l2_cache_size": int,
        "shared_memory_per_core": int,
        "shared_memory_per_block_optin": int,
    },
    "tpu": {"topology": str, "chips_per_host_bounds": list},
}


@dataclass(frozen=True)
class Figure:
    """One figure of a machine, in bytes, bytes/s, FLOP/s or a plain number, with the public source it is from."""

    name: str  # "memory.total"
    value: Any  # int, float, or a tuple of shapes
    given: str  # as the file states it: "79.11 GiB"
    source: str
    kind: str = ""  # of a link: "NVLink 4"


@dataclass(frozen=True)
class Machine:
    """One kind of chip in its node. All figures are per JAX device; `devices_per_chip` of them share a chip."""

    name: str
    description: str
    target: str  # which compiler: cpu, gpu or tpu
    figures: Mapping[str, Figure] = field(hash=False)
    absent: Mapping[str, str] = field(hash=False)  # figure -> why it is not stated
    compiler: Mapping[str, Any] = field(hash=False)  # what the compiler needs to know of a card that is not there
    compiler_source: str = ""

    @staticmethod
    def names() -> list[str]:
        """The machines that come with jaxllm: one TOML file each."""
        return sorted(path.stem for path in _folder().glob("*.toml"))

    @classmethod
    def read(cls, text: str | os.PathLike[str]) -> Machine:
        """A known machine by its name, or the TOML file at a path. Raises SpecError on anything else."""
        text = os.fspath(text)
        known = cls.names()
        if text in known:
            return _read_file(_folder() / f"{text}.toml")
        if os.path.isfile(text):
            return _read_file(Path(text))
        if "/" in text or text.endswith(".toml"):
            raise SpecError(f"machine: there is no file {text!r}; give a TOML file, or one of {', '.join(known)}.")
        raise SpecError(f"machine: unknown name {text!r}; {nearest(text.lower(), known)}")

    @classmethod
    def load(cls, text: str) -> Mesh:
        """A machine with its size: `h100:16`, `h100:2048x8`, `v5p:4x4x4`, `my.toml:8`. Raises SpecError."""
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

    @property
    def links(self) -> dict[str, Figure]:
        """Links by where they lead; values in bytes/s, one direction."""
        return {
            name.removeprefix("links."): figure for name, figure in self.figures.items() if name.startswith("links.")
        }

    @property
    def node_size(self) -> int:
        """Devices of a node (one host)."""
        return self.value("node.devices")

    def describe(self) -> list[tuple[str, str, str]]:
        """Rows (figure, value with unit, source) for a table; absent figures come last with the reason."""
        rows = [("description", self.description, ""), ("target", self.target, "")]
        for name in _FIGURES:
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
                name: {"value": figure.value, "given": figure.given, "source": figure.source}
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

_SIZE = re.compile(r"[0-9]{1,6}(x[0-9]{1,6})*", re.ASCII)


def _examples(machine: Machine, name: str) -> str:
    if machine.target == "cpu":
        return f"{name}:8"
    if machine.target == "gpu":
        node = machine.node_size
        return f"{name}:{node}, {name}:{2 * node} or {name}:2x{node} (nodes x cards)"
    return " or ".join(f"{name}:{'x'.join(map(str, shape))}" for shape in _closest(machine, (4,)))


def _parse_size(machine: Machine, text: str, name: str, size: str) -> tuple[int, ...]:
    if not _SIZE.fullmatch(size):
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
        raise SpecError(f"mesh: {text!r} asks for {shape[0]} emulated devices; the limit of one process is {limit}.")


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


def _slices(machine: Machine) -> Iterator[tuple[int, ...]]:
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

    return sorted(set(_slices(machine)), key=lambda other: (distance(other), other))[:2]


# ---------------------------------------------------------------- files


def _folder() -> Path:
    """meshes/ lies in the package when it is installed, and beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "meshes", package.parent / "meshes"):
        if folder.is_dir():
            return folder
    raise SpecError("machine: the files of meshes/ are not part of this installation; install jaxllm again.")


def _read_file(path: Path) -> Machine:
    where = f"machine file {str(path)!r}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{where} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError):  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise SpecError(f"{where} is not a TOML text that can be read.") from None

    groups = {name.partition(".")[0] for name in _FIGURES}
    known = {"description", "target", "compiler", "absent"} | groups
    for key in data:
        if key not in known:
            raise SpecError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
    description, target = data.get("description"), data.get("target")
    if not isinstance(description, str) or not description.strip():
        raise SpecError(f"{where}: description is missing; say in a line what the machine is.")
    if target not in TARGETS:
        raise SpecError(f"{where}: target={target!r} is unknown; choose cpu, gpu or tpu.")

    figures = dict(_read_figures(where, target, {group: data[group] for group in data if group in groups}))
    absent = _read_absent(where, data.get("absent", {}), figures)
    for name, kind in _FIGURES.items():
        if target not in kind.needed or name in figures:
            continue
        if name not in absent:
            way_out = " or say why not under [absent]" if target in kind.may_be_absent else ""
            raise SpecError(f"{where}: {name} is missing; write {_example(name, kind)}{way_out}.")
        if target not in kind.may_be_absent:
            raise SpecError(f"{where}: {name} cannot be absent; write {_example(name, kind)}.")
    _check_memory(where, figures)
    if target == "tpu":
        _check_torus(where, figures)
    compiler, compiler_source = _read_compiler(where, target, data.get("compiler", {}))
    return Machine(path.stem, description.strip(), target, figures, absent, compiler, compiler_source)


def _example(name: str, kind: _Kind) -> str:
    units = list(_UNITS.get(kind.measure, {}))
    unit = f', unit = "{units[1]}"' if units else ""
    return f'{name} = {{ value = ...{unit}, source = "..." }}'


def _read_figures(where: str, target: str, groups: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for group, entries in groups.items():
        if not isinstance(entries, dict):
            raise SpecError(f"{where}: {group} is not a table; write [{group}] and its figures below.")
        for key, entry in entries.items():
            name = f"{group}.{key}"
            if name not in _FIGURES:
                raise SpecError(f"{where}: unknown figure {name!r}; {nearest(name, _FIGURES)}")
            if target not in _FIGURES[name].targets:
                raise SpecError(f"{where}: {name} has no meaning for target {target!r}; remove it.")
            yield name, _read_figure(f"{where}: {name}", name, _FIGURES[name], entry)


def _read_figure(where: str, name: str, kind: _Kind, entry: Any) -> Figure:
    if not isinstance(entry, dict):
        raise SpecError(f"{where} is not a figure with its source; write {_example(name, kind)}.")
    units = _UNITS.get(kind.measure)
    allowed = ["value", "source"] + (["unit"] if units else []) + (["kind"] if name.startswith("links.") else [])
    for key in entry:
        if key not in allowed:
            raise SpecError(f"{where}: unknown key {key!r}; {nearest(key, allowed)}")
    source, link = entry.get("source"), entry.get("kind", "")
    if not isinstance(source, str) or not source.strip():
        raise SpecError(f"{where} has no source; say where the figure is from, or list it under [absent].")
    if not isinstance(link, str):
        raise SpecError(f"{where}: kind={link!r} is not a text.")
    if "value" not in entry:
        raise SpecError(f"{where} has no value; write {_example(name, kind)}.")
    value = entry["value"]
    if kind.measure == "shapes":
        shapes = _read_shapes(where, value)
        return Figure(name, shapes, ", ".join(value), source)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e30:
        raise SpecError(f"{where}: value={value!r} is not a positive number of reasonable size.")
    if value == 0 and name != "memory.reserve":
        raise SpecError(f"{where}: value={value!r} has to be above 0; a figure that is not known goes under [absent].")
    if kind.measure == "count" and not isinstance(value, int):
        raise SpecError(f"{where}: value={value!r} is not a whole number.")
    if kind.measure == "share" and value > 1:
        raise SpecError(f"{where}: value={value!r} is not a fraction; it lies above 0 and up to 1.")
    if not units:
        return Figure(name, value, f"{value:,}", source)
    unit = entry.get("unit")
    if not isinstance(unit, str) or unit not in units:
        raise SpecError(f"{where}: unit={unit!r} is unknown; choose {', '.join(units)}.")
    return Figure(name, round(value * units[unit]), f"{value:,} {unit}", source, link)


def _read_shapes(where: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise SpecError(f'{where}: value is not a list of shapes; write ["2x2", "2x4"].')
    shapes = []
    for text in value:
        shape = tuple(int(number) for number in text.split("x")) if _SIZE.fullmatch(text) else ()
        if len(shape) not in (2, 3) or 0 in shape:
            raise SpecError(f"{where}: {text!r} is not the shape of a slice; write 2x4 or 2x2x1.")
        shapes.append(shape)
    if len({len(shape) for shape in shapes}) > 1:
        raise SpecError(f"{where}: the shapes have two axes and three axes; a torus has one number of axes.")
    return tuple(shapes)


def _read_absent(where: str, absent: Any, figures: dict[str, Figure]) -> dict[str, str]:
    if not isinstance(absent, dict):
        raise SpecError(f'{where}: absent is not a table; write [absent] and memory.bandwidth = "why" below.')
    reasons = {}
    for group, entry in absent.items():  # TOML reads memory.bandwidth as a table, and "memory.bandwidth" as one key
        nested = entry if isinstance(entry, dict) else {"": entry}
        reasons |= {f"{group}.{key}".rstrip("."): reason for key, reason in nested.items()}
    for name, reason in reasons.items():
        if name not in _FIGURES:
            raise SpecError(f"{where}: unknown figure {name!r} under [absent]; {nearest(name, _FIGURES)}")
        if not isinstance(reason, str) or not reason.strip():
            raise SpecError(f"{where}: {name} is absent without a reason; say why no figure is given.")
        if name in figures:
            raise SpecError(f"{where}: {name} is given and listed under [absent]; keep one of them.")
    return reasons


def _check_memory(where: str, figures: dict[str, Figure]) -> None:
    parts = ("memory.total", "memory.usable_fraction", "memory.reserve")
    lacking = [part for part in parts if part not in figures]
    if len(lacking) == len(parts):  # emulated devices
        return
    if lacking:
        raise SpecError(f"{where}: without {', '.join(lacking)} nobody knows what fits; give all of memory or none.")
    total, fraction, reserve = (figures[part].value for part in parts)
    if reserve >= int(total * fraction):
        raise SpecError(f"{where}: memory.reserve={reserve} B leaves nothing of {total} B x {fraction}; lower it.")


def _check_torus(where: str, figures: dict[str, Figure]) -> None:
    axes = len(figures["torus.slices"].value[0])
    if "torus.cube" in figures and axes != 3:
        raise SpecError(f"{where}: torus.cube needs slices of three axes, and torus.slices have {axes}; remove it.")
    if figures["torus.chips"].value > 10**5:
        raise SpecError(f"{where}: torus.chips={figures['torus.chips'].value} is above the limit of 100,000.")


def _read_compiler(where: str, target: str, compiler: Any) -> tuple[dict[str, Any], str]:
    needed = _COMPILER[target]
    if not isinstance(compiler, dict):
        raise SpecError(f"{where}: compiler is not a table; write [compiler] and its figures below.")
    for key in compiler:
        if key not in needed and key != "source":
            if not needed:
                raise SpecError(f"{where}: [compiler] holds {key!r}, but the cpu compiler needs nothing; remove it.")
            raise SpecError(f"{where}: unknown key {key!r} under [compiler]; {nearest(key, needed)}")
    missing = [key for key in needed if key not in compiler]
    if missing:
        raise SpecError(f"{where}: [compiler] lacks {', '.join(missing)}, which the {target} compiler needs.")
    source = compiler.get("source", "")
    if needed and (not isinstance(source, str) or not source.strip()):
        raise SpecError(f"{where}: [compiler] has no source; say where its figures are from.")
    for key, kind in needed.items():
        if not _is_valid(key, kind, compiler[key]):
            raise SpecError(f"{where}: [compiler] {key}={compiler[key]!r} is not {_WANTED[kind]}.")
    return {key: compiler[key] for key in needed}, source


_WANTED = {str: "a text", int: "a positive whole number", float: "a positive number", list: "a list as in [9, 0]"}
_LENGTHS = {"compute_capability": (2, 0), "chips_per_host_bounds": (3, 1)}  # how many numbers, and their least value


def _is_valid(key: str, kind: type, value: Any) -> bool:
    if kind is str:
        return isinstance(value, str) and bool(value.strip())
    if kind is list:
        length, least = _LENGTHS[key]
        return isinstance(value, list) and len(value) == length and all(type(n) is int and n >= least for n in value)
    if kind is float:
        return type(value) in (int, float) and 0 < value < 1e30
    return type(value) is int and 0 < value < 2**63


def _bytes_text(count: int | None) -> str:
    return "no limit" if count is None else f"{count / 2**30:,.2f} GiB ({count:,} B)"
