"""What the experiments share: cases that are measured one by one, a table, the same as CSV, and a picture.

An experiment is a module with

    CASES             what is measured, one row each: tuples of strings and numbers
    measure(case)     a row of the table: column -> text, whole number or number
    draw(rows, axes)  the picture, on matplotlib axes
    SAMPLE            positions in CASES that the tests measure again
    notes(rows)       sentences below the table: what is equal, and why the rest is not

`python experiments/NAME.py` measures all cases, prints the table and writes NAME.csv and NAME.png to docs/experiments/.
The page docs/experiments/NAME.md shows what is printed.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "experiments"

Row = dict[str, Any]


def main(experiment: ModuleType, arguments: Sequence[str] | None = None) -> int:
    """Measures all cases of an experiment, prints and writes what came out."""
    parser = argparse.ArgumentParser(
        description=experiment.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of the CSV and the PNG, docs/experiments")
    options = parser.parse_args(arguments)
    rows = []
    for number, case in enumerate(experiment.CASES, start=1):
        say(f"{number} of {len(experiment.CASES)}: {' '.join(map(str, case))}")
        rows.append(experiment.measure(case))
    name = Path(experiment.__file__).stem
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.out / f"{name}.csv")
    picture(lambda axes: experiment.draw(rows, axes), options.out / f"{name}.png")
    print(rendered(rows, experiment.notes(rows)), end="")
    return 0


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def rendered(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The table as text, and the notes below it."""
    from rich.console import Console

    from jaxllm.report.table import print_listing
    from jaxllm.report.units import wrap

    out = io.StringIO()
    heads = list(rows[0])
    print_listing(Console(file=out, width=100, highlight=False, markup=False), heads, [list(r.values()) for r in rows])
    for note in notes:
        out.write("\n" + "\n".join(wrap(note, 100)) + "\n")
    return out.getvalue()


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows as they were written: numbers as numbers."""
    with path.open(newline="") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def picture(draw: Callable[[Any], None], path: Path, size: tuple[float, float] = (8, 4.5)) -> None:
    """A PNG, drawn on axes without a window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path)
