"""A report as JSON, as docs/inspect.schema.json has it: integers, of one device and step, loops multiplied out."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.report.inspection import Buffer, Collective, Finding, Memory, Operation, Place, Product, Report
from jaxllm.report.inspection_lines import (
    CollectiveLine,
    FlopsLine,
    collective_lines,
    flops_lines,
    phase_flops,
    roofline,
)

SCHEMA = 1


def document(report: Report) -> dict[str, Any]:
    """The report as plain dicts and lists, ready for json.dumps."""
    read, written = report.bytes
    return {
        **heading("report"),
        "name": report.name,
        "target": report.target,
        "devices": report.devices,
        "mesh": dict(report.mesh),
        "matmul_flops": report.matmul_flops,
        "matmul_flops_least": report.matmul_flops_range[0],
        "declared_flops": report.declared_flops,
        "phase_flops": phase_flops(report),
        "flops": [_flops(line) for line in flops_lines(report)],
        "bytes": {"read": read, "written": written},
        "operations": [_operation(operation) for operation in report.operations],
        "roofline": _roofline(report),
        "collectives": [_collective(line) for line in collective_lines(report)],
        "peak_bytes": report.peak_bytes,
        "peak_classes": dict(report.memory.classes),
        "memory": _memory(report.memory),
        "warnings": [finding_json(finding) for finding in report.warnings],
        "not_understood": list(report.not_understood),
        "assumed": list(report.assumed),
        "seconds": {name: finite(value) for name, value in report.seconds.items()},
    }


def heading(kind: str) -> dict[str, Any]:
    """How each of our documents begins: which version of the schema, which of its documents, and who wrote it."""
    from jaxllm import __version__

    return {"schema": SCHEMA, "document": kind, "versions": {"jaxllm": __version__}}


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: null says that there is no number."""
    return float(value) if value is not None and math.isfinite(value) else None


def place_json(place: Place) -> dict[str, Any]:
    """Where an instruction comes from, and how often it runs."""
    return {
        "name": place.name,
        "op_name": place.op_name,
        "source": place.source,
        "phase": place.phase,
        "count": place.count,
        "trips": list(place.trips),
        "conditional": place.conditional,
    }


def _flops(line: FlopsLine) -> dict[str, Any]:
    return {
        "phase": line.phase,
        "source": line.source,
        "kind": line.kind,
        "dtype": line.dtype,
        "declared": line.declared,
        "flops": line.flops,
        "count": line.count,
        "instances": [_product(product) for product in line.products],
    }


def _product(product: Product) -> dict[str, Any]:
    return place_json(product.place) | {"shapes": product.shapes, "flops": product.flops}


def _operation(operation: Operation) -> dict[str, Any]:
    return place_json(operation.place) | {
        "opcode": operation.opcode,
        "flops": operation.flops,
        "read": operation.read,
        "written": operation.written,
        "seconds": finite(operation.seconds),
        "bound": operation.bound,
        "step": operation.step,
    }


def _roofline(report: Report) -> dict[str, Any] | None:
    bound = roofline(report)
    if bound is None or report.machine is None:
        return None
    return {
        "machine": report.machine.name,
        "capacity": report.machine.capacity,
        "seconds": finite(bound.hidden),
        "serial_seconds": finite(bound.serial),
        "bounds": {name: finite(seconds) for name, seconds in bound.bounds.items()},
        "unknown": bound.unknown,
    }


def _collective(line: CollectiveLine) -> dict[str, Any]:
    return {
        "kind": line.kind,
        "axes": list(line.axes),
        "phase": line.phase,
        "dtype": line.dtype,
        "compiled": line.payload,
        "wire_compiled": line.wire,
        "count": line.count,
        "ranks": list(line.ranks),
        "depth": line.depth,
        "sources": list(line.sources),
        "overlapped": line.overlapped,
        "disguise": line.disguise,
        "instances": [_instance(collective) for collective in line.collectives],
    }


def _instance(collective: Collective) -> dict[str, Any]:
    return place_json(collective.place) | {
        "ranks": collective.ranks,
        "payload": collective.payload,
        "wire": collective.wire,
        "asynchronous": collective.asynchronous,
        "overlapped": list(collective.overlapped),
        "disguise": collective.disguise,
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {
        "exact": memory.exact,
        "at": memory.at,
        "steps": memory.steps,
        "where": None if memory.where is None else place_json(memory.where),
        "live": [buffer_json(buffer) for buffer in memory.live],
        "timeline": [list(point) for point in memory.timeline],
        "aliased": memory.aliased,
        "host": memory.host,
        "on_chip": memory.on_chip,
    }


def buffer_json(buffer: Buffer) -> dict[str, Any]:
    """A buffer that is alive at the peak."""
    return {
        "name": buffer.name,
        "class": buffer.kind,
        "bytes": buffer.bytes,
        "shape": buffer.shape,
        "op_name": buffer.op_name,
        "source": buffer.source,
        "start": buffer.start,
        "end": buffer.end,
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """A warning."""
    return {
        "kind": finding.kind,
        "message": finding.message,
        "advice": finding.advice,
        "source": finding.source,
        "op_name": finding.op_name,
        "bytes": finding.bytes,
    }
