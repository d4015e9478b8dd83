"""schedule: a pipeline's table, counted and drawn."""

from __future__ import annotations

import json
import sys

from jaxllm.options import count


def run(
    name: str,
    stages: str,
    microbatches: str,
    *,
    virtual: str | None,
    times: str | None,
    as_json: bool,
    png: str | None,
    trace: str | None,
) -> int:
    from jaxllm.report.files import output_path
    from jaxllm.schedules.files import load
    from jaxllm.schedules.simulation import simulate
    from jaxllm.schedules.times import Times

    counts = count("--stages", stages, None, least=2), count("--microbatches", microbatches, None)
    given = Times() if times is None else Times.parse(times)
    picture = None if png is None else output_path("--png", png, (".png", ".svg", ".pdf"), "a picture")
    timetable = None if trace is None else output_path("--trace", trace, (".json",), "a trace")
    simulation = simulate(load(name, *counts, count("--virtual", virtual, None)), given)
    if picture is not None:
        from jaxllm.report.schedule_plot import save_picture

        save_picture(simulation, picture)
        print(f"jaxllm: wrote {picture}", file=sys.stderr)
    if timetable is not None:
        from jaxllm.report.schedule_trace import save_trace

        save_trace(simulation, timetable)
        print(f"jaxllm: wrote {timetable}", file=sys.stderr)
    from jaxllm.report.schedule import document, print_schedule

    if as_json:
        print(json.dumps(document(simulation)))
    else:
        from jaxllm.report.table import console

        print_schedule(simulation, console())
    return 0
