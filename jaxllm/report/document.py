"""The comparison as JSON: integers, per device and step, loops multiplied out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from jaxllm.report.compare import NOT_COMPARABLE, Comparison, Row, Setup, worst
from jaxllm.spec.ledger import Rule

SCHEMA = 1

_PACKAGES = {
    "": ("jaxllm", "jax", "jaxlib", "flax", "optax", "numpy", "protobuf"),
    "gpu": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12"),
    "tpu": ("libtpu",),
}


def versions(target: str) -> dict[str, str]:
    """Versions of all that takes part in a check on that target, read without importing any of it."""
    found = {}
    for name in (*_PACKAGES[""], *_PACKAGES.get(target, ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def document(comparison: Comparison, setup: Setup) -> dict[str, Any]:
    """The comparison as plain dicts and lists, ready for json.dumps."""
    peak = comparison.peak
    return {
        "schema": SCHEMA,
        "versions": dict(setup.versions),
        "model": plain(setup.model),
        "mesh": plain(setup.mesh),
        "layout": plain(setup.layout),
        "workload": plain(setup.workload) | {"gradient_dtype": setup.workload.dtypes.gradients},
        "target": setup.target,
        "memory": [_memory(row) for row in comparison.section("memory")],
        "pipeline": [_memory(row) for row in comparison.section("pipeline")],
        "stages": _stages(setup),
        "flops": [_flops(row) for row in comparison.section("flops")],
        "collectives": [_collective(row) for row in comparison.section("collectives")],
        "transfers": [_transfer(row) for row in comparison.section("transfers")],
        "unexplained": list(comparison.unexplained),
        "notes": list(comparison.notes),
        "peak": {
            "predicted": peak.predicted,
            "compiled": peak.compiled,
            "capacity": peak.capacity,
            "fits": peak.fits,
            "tolerance": peak.tolerance,
            "within_tolerance": peak.within,
            "refused": peak.refused,
        },
        "run": _run(comparison),
        "seconds": {name: round(value, 3) for name, value in comparison.seconds.items()},
        "cached": comparison.cached,
        "agrees": comparison.agrees,
    }


def plain(noun: Any) -> Any:
    """A noun of spec as JSON: its own to_json() where it has one, else its fields."""
    if hasattr(noun, "to_json"):
        return noun.to_json()
    if dataclasses.is_dataclass(noun) and not isinstance(noun, type):
        return {item.name: plain(getattr(noun, item.name)) for item in dataclasses.fields(noun)}
    if isinstance(noun, Mapping):
        return {str(key): plain(value) for key, value in noun.items()}
    if isinstance(noun, tuple | list):
        return [plain(value) for value in noun]
    return noun


def _stages(setup: Setup) -> list[dict[str, Any]]:
    """What each stage of a pipeline takes in a step by closed form; empty without one."""
    from jaxllm.theory.partition import load, stages_of  # they import NumPy, which a help text should not

    stages = stages_of(setup.model, setup.layout, setup.workload)
    if stages is None:
        return []
    taken = load(setup.model, setup.layout, setup.workload, stages)
    return [
        {
            "stage": stage,
            "layers": [len(stages.layers(stage, chunk)) for chunk in range(stages.schedule.chunks)],
            "flops": taken.time[stage],
            "needed_bytes": taken.memory[stage],
        }
        for stage in range(stages.schedule.stages)
    ]


def _memory(row: Row) -> dict[str, Any]:
    return {
        "line": row.name,
        "predicted": row.predicted,
        "compiled": row.compiled,
        "status": row.status,
        "rules": _rules(row.rules),
        **_reason(row),
    }


def _flops(row: Row) -> dict[str, Any]:
    return {
        "line": row.name,
        "phase": row.phase,
        **({"dtype": row.dtype} if row.dtype else {}),
        "predicted": row.predicted,
        "compiled": row.compiled,
        "status": row.status,
        **_reason(row),
    }


def _transfer(row: Row) -> dict[str, Any]:
    return {
        "kind": row.name,
        "dtype": row.dtype,
        "predicted": row.predicted,
        "compiled": row.compiled,
        "status": row.status,
        **_reason(row),
    }


def _collective(row: Row) -> dict[str, Any]:
    return {
        "kind": row.name,
        "axes": list(row.axes),
        "phase": row.phase,
        "dtype": row.dtype,
        "predicted": row.predicted,
        "compiled": row.compiled,
        "wire_predicted": row.wire_predicted,
        "wire_compiled": row.wire_compiled,
        "emitted": row.emitted,
        "count": row.count,
        "status": row.status,
        "rules": _rules(row.rules),
        **_reason(row),
    }


def _reason(row: Row) -> dict[str, Any]:
    """Why a line is not comparable; and what each stage of a pipeline has of it, where they are not alike."""
    found: dict[str, Any] = {"reason": row.reason} if row.status == NOT_COMPARABLE else {}
    if row.predicted_stages or row.compiled_stages:
        found["stages"] = {"predicted": list(row.predicted_stages), "compiled": list(row.compiled_stages)}
    return found


def _rules(rules: tuple[Rule, ...]) -> list[dict[str, Any]]:
    return [{"name": rule.name, "bytes": int(rule.bytes), "why": rule.why} for rule in rules]


def _run(comparison: Comparison) -> dict[str, Any] | None:
    run = comparison.run
    if run is None:
        return None
    return {
        "steps": run.steps,
        "max_relative_error": _finite(run.max_relative_error),
        "losses": [_finite(loss) for loss in run.losses],
        "tolerance": run.tolerance,
        "worst": worst(run.errors),
        "max_size_error": _finite(run.sizes[worst(run.sizes)]) if run.sizes else None,
        "size_tolerance": run.size_tolerance if run.sizes else None,
        "agrees": run.agrees,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN: null says that there is no number."""
    return float(value) if math.isfinite(value) else None
