"""inspect: a report of any compiled program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxllm.options import progress
from jaxllm.spec.errors import SpecError


def run(
    file: str,
    *,
    machine: str | None,
    mesh: str | None,
    against: str | None,
    as_json: bool,
    plot: str | None,
    trace: str | None,
) -> int:
    from jaxllm.inspection import inspect_file
    from jaxllm.report.files import output_path, plot_path
    from jaxllm.spec.axes import parse_axes
    from jaxllm.spec.machine import Machine

    known = None if machine is None else Machine.read(machine)
    axes = None if mesh is None else parse_axes("--mesh", mesh)
    if against is not None and (plot is not None or trace is not None):
        raise SpecError("--plot and --trace draw one program; leave --against out, or them.")
    picture = plot_path(plot)
    timetable = None if trace is None else output_path("--trace", trace, (".json",), "a trace")
    with progress() as say:
        say(f"reading {file}")
        report = inspect_file(file, mesh=axes, machine=known)
        if against is not None:
            say(f"reading {against}")
            other = inspect_file(against, mesh=axes, machine=known)
    if against is not None:
        return _show_difference(report, other, as_json)
    # before the table, whose reader may have enough of it early
    if picture is not None:
        from jaxllm.report.inspection_plot import save_timeline

        save_timeline(report, picture)
        print(f"jaxllm: wrote {picture}", file=sys.stderr)
    if timetable is not None:
        from jaxllm.report.trace import save_trace

        save_trace(report, timetable)
        print(f"jaxllm: wrote {timetable}", file=sys.stderr)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        from jaxllm.report.inspection_table import print_report
        from jaxllm.report.table import console

        print_report(report, console())
    return 0


def _show_difference(before: Any, after: Any, as_json: bool) -> int:
    """1 when something changed, as `diff` has it."""
    from jaxllm.report.difference import difference, print_difference
    from jaxllm.report.table import console

    found = difference(before, after)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_difference(found, console())
    return int(found.changed)
