"""What experiments share: their options, one check from text, a table on the screen, and the files they leave."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxllm.report import Comparison
    from jaxllm.spec.model import ModelConfig

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "experiments"
COMMITTED = ROOT / "docs" / "measurements"

Row = Mapping[str, Any]

INK, FIRST, SECOND, THIRD, PALE = "#222222", "#1d4e89", "#e07a1f", "#4a8fc7", "#9aa5b1"


def options(doc: str, *more: Callable[[argparse.ArgumentParser], Any]) -> argparse.Namespace:
    """The options of an experiment: `--out DIR` for its CSV and PNG, and what each of `more` adds to the parser."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in more:
        add(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=RUNS,
        metavar="DIR",
        help="where its files go, runs/experiments by default; docs/measurements is what is committed",
    )
    found = parser.parse_args()
    try:
        found.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {found.out} cannot be written: {error.strerror}; name another folder.")
    return found


def checked(
    model: ModelConfig | str,
    mesh: str,
    layout: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    precision: str = "bf16-f32",
    optimizer: str = "adamw",
    target: str = "",
) -> Comparison:
    """`jaxllm check` from Python: a comparison of both ledgers. Raises what it raises."""
    from jaxllm.check import check
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Machine
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.validate import default_batch, default_sequence
    from jaxllm.spec.workload import Workload
    from jaxllm.targets import start

    config = ModelConfig.load(model) if isinstance(model, str) else model
    split, machine = Layout.parse(layout), Machine.load(mesh)
    workload = Workload(
        batch or default_batch(split), sequence or default_sequence(config, split), precision, optimizer
    )
    start.prepare(target or machine.target, machine.devices)
    with start.quiet():
        return check(config, split, machine, workload, target=target)


def progress(message: str) -> None:
    """Says on standard error what takes a while."""
    print(message, file=sys.stderr, flush=True)


def lines_equal(comparison: Comparison) -> dict[str, int]:
    """How many lines both ledgers have, and how many of them are equal."""
    rows = [row for row in comparison.rows if not row.empty]
    return {"lines": len(rows), "equal": sum(row.status == "equal" for row in rows)}


def largest_temporaries(comparison: Comparison, count: int) -> str:
    """The largest arrays that the compiler has at its peak beside what is held throughout: bytes in GB and shape."""
    held = ("arguments", "outputs", "constants", "other temporaries", "rest")
    found = [term for term in comparison.peak.compiled_terms if term.label not in held]
    found = sorted(found, key=lambda term: -term.value)[:count]
    return ", ".join(f"{term.value / 1e9:.1f} GB {term.detail.split()[0]}" for term in found)


def off(predicted: int, compiled: int) -> str:
    """How far a closed form is off what the compiler has: `-4.9 %`."""
    from jaxllm.report.units import percent

    return percent((predicted - compiled) / compiled)


def show(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Prints the rows: `columns` gives the title of each key that is shown. Blanks are what is not known."""
    from jaxllm.report.table import console, print_listing

    shown = [_column(title, [row.get(key) for row in rows]) for key, title in columns.items()]
    titles, *cells = zip(*shown, strict=True)
    print_listing(console(), titles, cells)


def _column(title: str, values: Sequence[Any]) -> list[str]:
    """A title and what stands below it, as text: numbers, and texts that are numbers, to the right."""
    texts = [title, *("" if v is None else f"{v:,}" if isinstance(v, int) else str(v) for v in values)]
    if not all(re.fullmatch(r"[-+]?[\d,.]+( %)?|", text) for text in texts[1:]):
        return texts
    width = max(map(len, texts))
    return [text.rjust(width) for text in texts]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows, with the keys of the first as columns, and says so."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {_short(path)}")


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows again: numbers as int or float, blanks as None."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text or None

    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def figure(width: float = 9, height: float = 4.5) -> Figure:
    """A figure in the project's style."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"})
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def save_png(drawn: Figure, path: Path) -> None:
    """Writes the picture, without a date in it, and says so."""
    drawn.savefig(path, metadata={"Software": None})
    print(f"wrote {_short(path)}")


def gigabytes(count: float) -> float:
    """In GB of 10^9 bytes, three digits behind the point."""
    return round(count / 1e9, 3)


def wire(lines: Iterable[Any], attribute: str = "wire") -> Any:
    """Bytes that a device sends in a step: `wire` of a ledger's lines, `wire_predicted` or `wire_compiled` of rows."""
    sent = [getattr(line, attribute) for line in lines]
    return sum(count for count in sent if count is not None)


def elements(lines: Iterable[Any], attribute: str = "wire") -> Any:
    """Weights and gradients that a device sends over data in a step, in elements: the papers' unit, whatever the dtype.

    Left out are the all-reduces of numbers of 4 bytes, for tokens, loss and norm: all those outside the backward pass.
    """
    from jaxllm.spec.ledger import DTYPE_BYTES

    weights = [line for line in lines if line.name != "all-reduce" or line.phase == "backward"]
    return sum(getattr(line, attribute) // DTYPE_BYTES[line.dtype] for line in weights if line.axes == ("data",))


def _short(path: Path) -> Path:
    """The path from the root of the checkout, where it lies in there."""
    return path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
