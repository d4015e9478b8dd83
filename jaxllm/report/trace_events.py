"""Chrome's trace-event format, which ui.perfetto.dev and chrome://tracing open: its events, and a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.report.units import one_line
from jaxllm.spec.errors import SpecError

PROCESS = 1


def named(event: str, track: int, *, process: int = PROCESS, **args: Any) -> dict[str, Any]:
    """The name or the place of a track or a process."""
    return {"ph": "M", "name": event, "pid": process, "tid": track, "args": args}


def span(
    name: str, category: str, track: int, start: float, end: float, args: dict[str, Any], *, process: int = PROCESS
) -> dict[str, Any]:
    """What lasts from `start` to `end`, in microseconds: to the nanosecond, so that the end of one is the start of the next."""
    begin = round(start, 3)
    return {
        "ph": "X", "name": one_line(name), "cat": category, "pid": process, "tid": track, "ts": begin,
        "dur": round(round(end, 3) - begin, 3), "args": args,
    }  # fmt: skip


def save(trace: dict[str, Any], path: Path) -> None:
    """Writes a trace as JSON. Raises SpecError when the file cannot be written."""
    text = json.dumps(trace, separators=(",", ":"), allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--trace {path} cannot be written: {error.strerror or error}; name another file.") from None
