"""Metrics: one row a step in a CSV file, on disk before the next step begins."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """What is told of one step. Losses in nats a token; `held_out` after the step's update, where it was evaluated."""

    step: int
    tokens: int  # in all steps so far
    loss: float
    gradient_norm: float
    held_out: float | None
    seconds: float


COLUMNS = tuple(field.name for field in fields(Step))


def append(path: Path, step: Step) -> None:
    """Adds a row. Raises OSError."""
    with path.open("a", newline="", encoding="utf-8") as file:
        if not file.tell():
            file.write(_line(COLUMNS))
        file.write(_line(astuple(step)))
        file.flush()


def read(path: Path) -> list[Step]:
    """The rows up to the first that is damaged: a kill may cut the last one short. No file is no rows."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    steps = []
    for line in content.splitlines(keepends=True)[1:]:
        cells = next(csv.reader([line]), [])
        try:
            whole = line.endswith("\n") and len(cells) == len(COLUMNS)
            step, tokens, loss, norm, held_out, seconds = cells if whole else ()
            row = Step(
                int(step), int(tokens), float(loss), float(norm), float(held_out) if held_out else None, float(seconds)
            )
        except ValueError:
            break
        steps.append(row)
    return steps


def keep(path: Path, last: int) -> list[Step]:
    """Leaves the rows up to a step, which are returned: what a checkpoint does not know is done again. Raises OSError."""
    steps = [step for step in read(path) if step.step <= last]
    lines = "".join(_line(row) for row in (COLUMNS, *map(astuple, steps))) if steps else ""
    part = path.with_suffix(".part")
    part.write_text(lines, encoding="utf-8", newline="")
    os.replace(part, path)
    return steps


def _line(cells: tuple[object, ...]) -> str:
    # repr of a float gives it back to the bit
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow("" if cell is None else cell for cell in cells)
    return out.getvalue()
