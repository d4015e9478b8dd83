"""Assertions for anybody's tests: the collectives, the peak memory and the warnings of a compiled program.

A program is a report (`jaxllm.inspect(jitted, *arguments)`, `jaxllm.inspect_file(path)`) or a `jax.stages.Compiled`. With
XLA_FLAGS=--xla_force_host_platform_device_count=8 eight emulated devices are enough, and nothing runs. What fails says
which instruction it is, and from which line of the program.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxllm.report.inspection import Collective, Report
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError, nearest

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SHOWN = 8  # as many buffers or warnings as a message lists


def assert_collectives(
    program: Any, expected: Mapping[str, int | None], *, at_least: int = 0
) -> None:
    """Fails unless the program's collectives are exactly those expected.

    Args:
        program: a Report or a jax.stages.Compiled.
        expected: how often each kind runs in a step, loops multiplied out; None for any number of times. A key names the
            kind, and what else it must be: `all-gather`, `all-gather/data`, `all-reduce/data+tensor/backward/f32`. Of
            several keys that fit a collective the most specific counts it, or each of those that are equally specific.
        at_least: collectives with a smaller payload, in bytes, are left out, as the mean of a loss.

    Raises AssertionError that lists the offending collectives with their lines; SpecError for a key that is none.
    """
    report = _report(program)
    wanted = {key: _parts(key) for key in expected}
    counted: dict[str, list[Collective]] = {key: [] for key in expected}
    failures = []
    for item in report.collectives:
        if item.payload < at_least:
            continue
        fitting = [key for key, parts in wanted.items() if parts <= _facts(item)]
        if not fitting:
            failures.append(f"not expected: {_shown(item)}")
            continue
        closest = max(len(wanted[key]) for key in fitting)
        for key in fitting:
            if len(wanted[key]) == closest:
                counted[key].append(item)
    for key, number in expected.items():
        times = sum(item.place.count for item in counted[key])
        if number is not None and times != number:
            found = "".join(f"\n      {_shown(item)}" for item in counted[key])
            failures.append(f"{key}: {times:,} times a step, {number:,} expected{found}")
    if failures:
        raise AssertionError(_message(f"the collectives of {report.name} are not those expected", failures))


def assert_peak_below(program: Any, limit: int | str) -> None:
    """Fails unless the peak memory of one device is below a limit in bytes, or as `"16 GiB"` or `"80 GB"`.

    The message lists the largest buffers alive at the peak, with the lines that make them. Raises SpecError for a limit
    that cannot be read. Without a buffer assignment the peak is a lower bound, and the message says so.
    """
    report = _report(program)
    allowed = _bytes(limit)
    memory = report.memory
    if memory.peak < allowed:
        return
    bound = "" if memory.exact else " at least, from lifetimes alone"
    lines = [f"{kind}: {human(size)}" for kind, size in sorted(memory.classes.items(), key=lambda item: -item[1])]
    lines += [
        f"{human(buffer.bytes)} {buffer.kind} {buffer.shape} {buffer.name}, {buffer.source or buffer.op_name or 'no line'}"
        for buffer in memory.live[:_SHOWN]
    ]
    where = f", in {memory.where.name} ({memory.where.source})" if memory.where else ""
    raise AssertionError(
        _message(
            f"the peak of {report.name} is {memory.peak:,} bytes ({human(memory.peak)}){bound}, not below "
            f"{allowed:,}{where}",
            lines,
        )
    )


def assert_no_warnings(program: Any, *, ignore: Collection[str] = ()) -> None:
    """Fails when the program has a warning of a kind that is not in `ignore`. Raises SpecError for an unknown kind."""
    from jaxllm.hlo.warn import kinds

    for kind in ignore:
        if kind not in kinds():
            raise SpecError(f"ignore: there is no warning {kind!r}; {nearest(kind, kinds())}")
    report = _report(program)
    found = [item for item in report.warnings if item.kind not in ignore]
    if found:
        lines = [f"{item.kind}: {item.message} {item.source} {item.advice}" for item in found]
        raise AssertionError(_message(f"{report.name} has {len(found)} warning{'s' if len(found) > 1 else ''}", lines))


def _report(program: Any) -> Report:
    if isinstance(program, Report):
        return program
    from jaxllm.inspection import measure

    return measure(program)


_KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute", "ragged-all-to-all", "broadcast", "send",
)  # fmt: skip


def _parts(key: str) -> frozenset[str]:
    kind, *rest = key.split("/")
    if kind not in _KINDS or not all(rest):
        raise SpecError(f"expected: {key!r} names no collective; {nearest(kind, _KINDS)}, as in all-gather/data/forward.")
    return frozenset((kind, *rest))


def _facts(item: Collective) -> frozenset[str]:
    return frozenset((item.kind, "+".join(item.axes), item.place.phase, item.dtype)) - {""}


def _shown(item: Collective) -> str:
    name = "/".join(part for part in (item.kind, "+".join(item.axes), item.place.phase, item.dtype) if part)
    often = f", {item.place.count:,} times" if item.place.count > 1 else ""
    return (
        f"{name} of {human(item.payload)}{often}: {item.place.name}, {item.place.source or 'no line'} "
        f"({item.place.op_name})"
    )


def _bytes(limit: int | str) -> int:
    if isinstance(limit, (int, float)):
        return int(limit)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", str(limit))
    if not found or found[2] not in _UNITS:
        raise SpecError(f"limit {limit!r} is no amount of memory; give bytes, or a text as '16 GiB' or '80 GB'.")
    return int(float(found[1]) * _UNITS[found[2]])


def _message(title: str, lines: list[str]) -> str:
    left = f"\n  and {len(lines) - 4 * _SHOWN:,} more" if len(lines) > 4 * _SHOWN else ""
    return f"{title}:" + "".join(f"\n  {line}" for line in lines[: 4 * _SHOWN]) + left
