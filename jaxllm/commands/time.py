"""time: how long a step takes, by closed form and as its compiled program is played."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from jaxllm.options import count, progress

if TYPE_CHECKING:
    from pathlib import Path

    from jaxllm.report.played import Played
    from jaxllm.report.time import Timed


def run(
    model_text: str, mesh_text: str, layout_text: str, *, batch: str | None, seq: str | None, precision: str, optimizer: str,
    gradient_dtype: str | None, compiled: bool, trace: str | None, as_json: bool,
) -> int:  # fmt: skip
    from jaxllm.report.files import output_path
    from jaxllm.report.time import Timed, document, print_time
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_batch, default_sequence
    from jaxllm.spec.workload import Workload
    from jaxllm.theory import predict
    from jaxllm.theory.time import step_time

    model, mesh, layout = ModelConfig.load(model_text), Machine.load(mesh_text), Layout.parse(layout_text)
    sequences, tokens = count("--batch", batch, default_batch(layout)), count("--seq", seq, default_sequence(model, layout))
    timetable = None if trace is None else output_path("--trace", trace, (".json",), "a trace")
    workload = Workload(sequences, tokens, precision, optimizer, gradient_dtype or "")
    time = step_time(model, layout, mesh, workload)
    timed = Timed(model, layout, mesh, workload, time, predict(model, layout, workload, target=mesh.target).peak)
    played = _play(timed) if compiled else None
    if timetable is not None:
        _write(timed, played, timetable)
    if as_json:
        print(json.dumps(document(timed) | _compiled(played), indent=2))
        return 0
    from jaxllm.report.table import console

    out = console()
    print_time(timed, out)
    if played is not None:
        from jaxllm.report.played import print_played

        out.print()
        print_played(played, out)
    return 0


def _play(timed: Timed) -> Played:
    """What the compiler makes of the step, played. Raises TargetError when the machine's target cannot be used here."""
    from jaxllm.played import played_time
    from jaxllm.spec.validate import validate_target
    from jaxllm.targets import start, validate

    target = timed.mesh.target
    validate(target, timed.mesh)
    validate_target(target, timed.layout, timed.workload)
    with progress() as say:
        say("starting JAX")
        start.prepare(target, timed.mesh.devices)  # some of it is read when JAX is imported
        with start.quiet():
            return played_time(timed.model, timed.layout, timed.mesh, timed.workload, progress=say)


def _compiled(played: Played | None) -> dict[str, Any]:
    if played is None:
        return {}
    from jaxllm.report.played import document

    return {"compiled": document(played)}


def _write(timed: Timed, played: Played | None, path: Path) -> None:
    """Before the table, whose reader may have enough of it early."""
    from jaxllm.report import time_trace
    from jaxllm.report.trace_events import save
    from jaxllm.theory.time import timeline

    if played is not None:
        save(time_trace.played(timed, played), path)
    else:
        save(time_trace.closed(timed, timeline(timed.model, timed.layout, timed.mesh, timed.workload)), path)
    print(f"jaxllm: wrote {path}", file=sys.stderr)
