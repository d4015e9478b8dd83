"""The figures of a machine: which there are, in which units, and how a TOML file states them.

A figure is `name = { value = ..., unit = "...", source = "..." }`, per JAX device. A figure without a checked source
is not written down but listed under [absent] with the reason. So is `compiler`, for a card that is only predicted.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import SpecError, nearest

TARGETS = ("cpu", "gpu", "tpu")

_UNITS: dict[str, dict[str, float]] = {
    "bytes": {"B": 1, "MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9},
    "bytes/s": {"B/s": 1, "GB/s": 10**9, "TB/s": 10**12},
    "FLOP/s": {"FLOP/s": 1, "TFLOP/s": 10**12, "PFLOP/s": 10**15},
    "seconds": {"s": 1, "ms": 1e-3, "us": 1e-6},
}


@dataclass(frozen=True)
class _Kind:
    """What a figure measures, for which targets a file must speak of it, and where it may say `absent`."""

    measure: str  # a key of _UNITS, or "count", "share", "width", "shapes", "curve"
    needed: tuple[str, ...] = ()
    may_be_absent: tuple[str, ...] = TARGETS
    targets: tuple[str, ...] = TARGETS


FIGURES = {
    "chip.devices": _Kind("count", ()),
    "memory.total": _Kind("bytes", TARGETS, may_be_absent=("cpu",)),
    "memory.usable_fraction": _Kind("share", TARGETS, may_be_absent=("cpu",)),
    "memory.reserve": _Kind("bytes", TARGETS, may_be_absent=("cpu",)),
    "memory.bandwidth": _Kind("bytes/s", TARGETS),
    "peak.bf16": _Kind("FLOP/s", TARGETS),
    "peak.f16": _Kind("FLOP/s"),
    "peak.f32": _Kind("FLOP/s", TARGETS),
    "peak.tf32": _Kind("FLOP/s"),
    "peak.fp8": _Kind("FLOP/s"),
    "peak.fp4": _Kind("FLOP/s"),
    "peak.int8": _Kind("FLOP/s"),
    "node.devices": _Kind("count", TARGETS, may_be_absent=()),
    # One direction, for one device: what it sends to the others of its node, and through its share of the network.
    "links.inside_node": _Kind("bytes/s", ("gpu",), targets=("gpu", "cpu")),
    "links.between_nodes": _Kind("bytes/s", ("gpu",), targets=("gpu",)),
    # One direction of one link of the torus; a chip has two links an axis. Then its share of the network.
    "links.torus": _Kind("bytes/s", ("tpu",), targets=("tpu",)),
    "links.between_slices": _Kind("bytes/s", ("tpu",), targets=("tpu",)),
    # Between a device and its host's memory.
    "links.host": _Kind("bytes/s", targets=("gpu", "tpu")),
    # What was measured: the share that is reached of a peak or a link, what things take at least, and how far a step's time may
    # be off in four of five cases, see theory/rates.py. All of them or none.
    "efficiency.matmul": _Kind("share"),
    "efficiency.memory": _Kind("share"),
    "efficiency.inside_node": _Kind("share"),
    "efficiency.between_nodes": _Kind("share"),
    # Shares of the peak by shape, where they were measured: what the rule of tiles has of a product is brought to them.
    "curve.matmul": _Kind("curve"),
    "latency.collective": _Kind("seconds"),
    "latency.hop": _Kind("seconds"),
    "latency.far_hop": _Kind("seconds"),
    "latency.kernel": _Kind("seconds"),
    "latency.block": _Kind("seconds"),
    "latency.issue": _Kind("seconds"),
    "latency.step": _Kind("seconds"),
    "interval.least": _Kind("width"),
    "interval.tensor": _Kind("width"),
    # Slices that exist: the listed shapes, and with `cube` all shapes of multiples of it in non-decreasing order.
    "torus.slices": _Kind("shapes", ("tpu",), may_be_absent=(), targets=("tpu",)),
    "torus.cube": _Kind("count", targets=("tpu",)),
    "torus.chips": _Kind("count", ("tpu",), may_be_absent=(), targets=("tpu",)),
    # An axis closes into a ring when its length is a multiple of this (with `cube`: and the slice is whole cubes).
    "torus.wraparound": _Kind("count", ("tpu",), may_be_absent=(), targets=("tpu",)),
}

MEASURED = ("efficiency", "latency", "interval")
WIDEST = 5  # of half an interval, as a logarithm

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

CURVE_DTYPES = ("bf16", "f32")

# Where [compiler] may be absent: a tpu mesh is named by it, and cpu needs none.
_PREDICT_ONLY = ("gpu",)


@dataclass(frozen=True)
class Curve:
    """Shares of the peak of a dtype that products reach: of rows, inner dim and columns of these sizes, innermost last."""

    dtype: str
    sizes: tuple[int, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Figure:
    """One figure of a machine, in bytes, bytes/s, FLOP/s or a plain number, with the public source it is from."""

    name: str  # "memory.total"
    value: Any  # int, float, a tuple of shapes, or a Curve
    given: str  # as the file states it: "79.11 GiB"
    source: str
    kind: str = ""  # of a link: "NVLink 4"


SHAPE = re.compile(r"[0-9]{1,6}(x[0-9]{1,6})*", re.ASCII)


def read(path: Path) -> dict[str, Any]:
    """The fields of the Machine that a file describes. Raises SpecError for whatever is missing, unknown or wrong."""
    where = f"machine file {str(path)!r}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{where} cannot be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError):  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise SpecError(f"{where} is not a TOML text that can be read.") from None

    groups = {name.partition(".")[0] for name in FIGURES}
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
    absent = _read_absent(where, target, data.get("absent", {}), figures.keys() | data.keys() & {"compiler"})
    for name, kind in FIGURES.items():
        if target not in kind.needed or name in figures:
            continue
        if name not in absent:
            way_out = " or say why not under [absent]" if target in kind.may_be_absent else ""
            raise SpecError(f"{where}: {name} is missing; write {_example(name, kind)}{way_out}.")
        if target not in kind.may_be_absent:
            raise SpecError(f"{where}: {name} cannot be absent; write {_example(name, kind)}.")
    _check_memory(where, figures)
    _check_measured(where, figures)
    if target == "tpu":
        _check_torus(where, figures)
    predicted = "compiler" in absent
    compiler, compiler_source = ({}, "") if predicted else _read_compiler(where, target, data.get("compiler"))
    return {
        "name": path.stem,
        "description": description.strip(),
        "target": target,
        "figures": figures,
        "absent": absent,
        "compiler": compiler,
        "compiler_source": compiler_source,
    }


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
            if name not in FIGURES:
                raise SpecError(f"{where}: unknown figure {name!r}; {nearest(name, FIGURES)}")
            if target not in FIGURES[name].targets:
                raise SpecError(f"{where}: {name} has no meaning for target {target!r}; remove it.")
            yield name, _read_figure(f"{where}: {name}", name, FIGURES[name], entry)


def _read_figure(where: str, name: str, kind: _Kind, entry: Any) -> Figure:
    if not isinstance(entry, dict):
        raise SpecError(f"{where} is not a figure with its source; write {_example(name, kind)}.")
    units = _UNITS.get(kind.measure)
    allowed = ["value", "source"] + (["unit"] if units else []) + (["kind"] if name.startswith("links.") else [])
    allowed += ["dtype", "sizes"] if kind.measure == "curve" else []
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
    if kind.measure == "curve":
        curve = _read_curve(where, entry)
        flat = [share for plane in curve.shares for row in plane for share in row]
        given = f"{min(flat):.2g} to {max(flat):.2g} of the peak of {curve.dtype}, {len(flat)} shapes of {curve.sizes[0]:,} to {curve.sizes[-1]:,} a side"
        return Figure(name, curve, given, source)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e30:
        raise SpecError(f"{where}: value={value!r} is not a positive number of reasonable size.")
    if value == 0 and name != "memory.reserve":
        raise SpecError(f"{where}: value={value!r} has to be above 0; a figure that is not known goes under [absent].")
    if kind.measure == "count" and not isinstance(value, int):
        raise SpecError(f"{where}: value={value!r} is not a whole number.")
    if kind.measure == "share" and value > 1:
        raise SpecError(f"{where}: value={value!r} is not a fraction; it lies above 0 and up to 1.")
    if kind.measure == "width" and value > WIDEST:
        raise SpecError(f"{where}: value={value!r} is above {WIDEST}, a factor of {math.exp(WIDEST):.0f} either way; nothing is known then.")
    if not units:
        return Figure(name, value, f"{value:,}", source)
    unit = entry.get("unit")
    if not isinstance(unit, str) or unit not in units:
        raise SpecError(f"{where}: unit={unit!r} is unknown; choose {', '.join(units)}.")
    scaled = value * units[unit] if kind.measure == "seconds" else round(value * units[unit])
    return Figure(name, scaled, f"{value:,} {unit}", source, link)


def _read_shapes(where: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise SpecError(f'{where}: value is not a list of shapes; write ["2x2", "2x4"].')
    shapes = []
    for text in value:
        shape = tuple(int(number) for number in text.split("x")) if SHAPE.fullmatch(text) else ()
        if len(shape) not in (2, 3) or 0 in shape:
            raise SpecError(f"{where}: {text!r} is not the shape of a slice; write 2x4 or 2x2x1.")
        shapes.append(shape)
    if len({len(shape) for shape in shapes}) > 1:
        raise SpecError(f"{where}: the shapes have two axes and three axes; a torus has one number of axes.")
    return tuple(shapes)


def _read_curve(where: str, entry: dict[str, Any]) -> Curve:
    dtype, sizes, value = entry.get("dtype"), entry.get("sizes"), entry["value"]
    if dtype not in CURVE_DTYPES:
        raise SpecError(f"{where}: dtype={dtype!r} is unknown; choose {' or '.join(CURVE_DTYPES)}.")
    whole = isinstance(sizes, list) and len(sizes) > 1 and all(type(size) is int and 0 < size <= 10**6 for size in sizes)
    if not whole or sizes != sorted(set(sizes)):
        raise SpecError(f"{where}: sizes={sizes!r} are not two or more whole numbers up to 1,000,000, each above the one before.")
    count = len(sizes)

    def cube(values: Any, depth: int) -> bool:
        if depth == 0:
            return type(values) in (int, float) and 0 < values <= 1
        return isinstance(values, list) and len(values) == count and all(cube(each, depth - 1) for each in values)

    if not cube(value, 3):
        raise SpecError(f"{where}: value is not {count} x {count} x {count} shares above 0 and up to 1, by rows, inner dim and columns.")
    return Curve(dtype, tuple(sizes), tuple(tuple(tuple(map(float, row)) for row in plane) for plane in value))


def _read_absent(where: str, target: str, absent: Any, given: set[str]) -> dict[str, str]:
    if not isinstance(absent, dict):
        raise SpecError(f'{where}: absent is not a table; write [absent] and memory.bandwidth = "why" below.')
    reasons = {}
    for group, entry in absent.items():  # TOML reads memory.bandwidth as a table, and "memory.bandwidth" as one key
        nested = entry if isinstance(entry, dict) else {"": entry}
        reasons |= {f"{group}.{key}".rstrip("."): reason for key, reason in nested.items()}
    known = {*FIGURES, "compiler"}
    for name, reason in reasons.items():
        if name not in known:
            raise SpecError(f"{where}: unknown figure {name!r} under [absent]; {nearest(name, known)}")
        if not isinstance(reason, str) or not reason.strip():
            raise SpecError(f"{where}: {name} is absent without a reason; say why no figure is given.")
        if name in given:
            raise SpecError(f"{where}: {name} is given and listed under [absent]; keep one of them.")
        if name == "compiler" and target not in _PREDICT_ONLY:
            raise SpecError(f"{where}: compiler cannot be absent for target {target!r}; remove it from [absent].")
        if name == "compiler" and not reason.isprintable():  # it becomes part of a sentence
            raise SpecError(f"{where}: compiler is absent for a reason of several lines; say it in one.")
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


def _check_measured(where: str, figures: dict[str, Figure]) -> None:
    wanted = [name for name in FIGURES if name.partition(".")[0] in MEASURED]
    lacking = [name for name in wanted if name not in figures]
    if "curve.matmul" in figures and len(lacking) == len(wanted):
        raise SpecError(f"{where}: curve.matmul comes with {', '.join(MEASURED)}, and none of them is given; write them, or remove it.")
    if lacking and len(lacking) < len(wanted):
        verb = "are" if len(lacking) > 1 else "is"
        raise SpecError(f"{where}: {', '.join(lacking)} {verb} missing beside what was measured; give all of it or none.")


def _check_torus(where: str, figures: dict[str, Figure]) -> None:
    axes = len(figures["torus.slices"].value[0])
    if "torus.cube" in figures and axes != 3:
        raise SpecError(f"{where}: torus.cube needs slices of three axes, and torus.slices have {axes}; remove it.")
    if figures["torus.chips"].value > 10**5:
        raise SpecError(f"{where}: torus.chips={figures['torus.chips'].value} is above the limit of 100,000.")


def _read_compiler(where: str, target: str, compiler: Any) -> tuple[dict[str, Any], str]:
    needed = _COMPILER[target]
    if compiler is None:
        if needed:
            why = ", or say why not under [absent]" if target in _PREDICT_ONLY else ""
            raise SpecError(f"{where}: [compiler] is missing; write it with {', '.join(needed)}{why}.")
        return {}, ""
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


_WANTED = {str: "a text without quotes", int: "a positive whole number below 10^15", float: "a positive number", list: "a list as in [9, 0]"}
_LENGTHS = {"compute_capability": (2, 0), "chips_per_host_bounds": (3, 1)}  # how many numbers, and their least value


def _is_valid(key: str, kind: type, value: Any) -> bool:
    if kind is str:  # it is quoted in what the compiler is given
        return isinstance(value, str) and bool(value.strip()) and value.isprintable() and not set(value) & set("\"\\")
    if kind is list:
        length, least = _LENGTHS[key]
        return isinstance(value, list) and len(value) == length and all(type(n) is int and n >= least for n in value)
    if kind is float:
        return type(value) in (int, float) and 0 < value < 1e30
    return type(value) is int and 0 < value < 10**15
