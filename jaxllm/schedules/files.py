"""Tables of one's own: as CSV, a row for each tick and a column for each stage, or as rows in Python."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxllm.schedules import MOST_PARTS, check_size, make, names
from jaxllm.schedules.table import KINDS, PLACEMENTS, Cell, Schedule
from jaxllm.schedules.validity import validate
from jaxllm.spec.errors import SpecError, nearest

_CELL = re.compile(rf"({'|'.join(sorted(KINDS, key=len, reverse=True))})([0-9]{{1,6}})(?:\.([0-9]{{1,4}}))?", re.ASCII)
_IDLE = ("", ".")
MOST_BYTES = 64_000_000  # a million cells are 10 MB

Row = str | Sequence[Cell | str | None]


def load(text: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """A schedule by its name, or a table by the path of its file, which ends in .csv. Raises SpecError."""
    if not text.lower().endswith(".csv"):
        if text not in names() and Path(text).is_file():
            raise SpecError(f"schedule {text}: the name of a file with a table ends in .csv; rename it.")
        return make(text, stages, microbatches, chunks)
    schedule = read_csv(Path(text), stages, microbatches)
    if chunks not in (None, schedule.chunks):
        raise SpecError(
            f"schedule {text}: its cells are of {schedule.chunks} chunk{'s' if schedule.chunks > 1 else ''}, and "
            f"{chunks} are asked for; the table tells that itself: leave it out."
        )
    return schedule


def read_csv(path: Path | str, stages: int, microbatches: int) -> Schedule:
    """A table from a file, checked by `validity.validate`.

    A row for each tick, a column for each stage; cells as F0, B0, W0, BW0, with the chunk as in F0.1; idle is blank.
    There may be a first row `stage 0,stage 1,...`, and lines of comment that begin with #, of which `# placement: v`
    tells the placement, else it is a ring. Blank lines are skipped.

    Raises SpecError, with the number of the line, when the file cannot be read as such, or the table is no schedule.
    """
    check_size(stages, microbatches, 1)
    name = str(path)
    placement, rows = "ring", []
    for line, text in enumerate(_lines(Path(path)), start=1):
        where = f"schedule {name}: line {line}"
        if text.lstrip().startswith("#"):
            placement = _placement(where, text) or placement
        elif text.strip():
            texts = _fields(where, text)
            if not rows and texts[0].lower().startswith("stage "):
                _check_columns(where, texts, stages)
                if [field.lower() for field in texts] != [f"stage {stage}" for stage in range(stages)]:
                    raise SpecError(f"{where} does not name the stages in order; write stage 0,stage 1, and so on.")
                continue
            _check_columns(where, texts, stages)
            rows.append(tuple(_cell(where, field) for field in texts))
    if not rows:
        raise SpecError(f"schedule {name}: the file has no ticks; write a row for each, as F0,, for three stages.")
    return _checked(name, rows, microbatches, placement)


def of_rows(
    rows: Iterable[Row], microbatches: int | None = None, placement: str = "ring", name: str = "table"
) -> Schedule:
    """A table from Python, checked by `validity.validate`: a row for each tick, either of cells (Cell, text or None),
    or a text with spaces between the cells and a dot for idle, as "F1 F0 .".

    Args: microbatches, by default as many as the cells tell.

    Raises SpecError when a cell cannot be read, or the table is no schedule.
    """
    if name in names():
        raise SpecError(f"schedule {name}: that is the name of a schedule of its own; give the table another.")
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise SpecError(f"schedule {name}: {rows!r} is no table; give a list with a row for each tick.")
    read = []
    for tick, row in enumerate(rows):
        fields = row.split() if isinstance(row, str) else row
        where = f"schedule {name}: tick {tick}"
        if not isinstance(fields, Sequence) or not all(isinstance(field, Cell | str | None) for field in fields):
            raise SpecError(f"{where}: {row!r} is no row of cells; write it like 'F1 F0 .'.")
        read.append(tuple(_cell(where, field) if isinstance(field, str) else field for field in fields))
    if not read:
        raise SpecError(f"schedule {name}: it has no ticks; give a row for each.")
    if microbatches is None:
        microbatches = 1 + max((cell.microbatch for row in read for cell in row if cell is not None), default=0)
    return _checked(name, read, microbatches, placement)


def write_csv(schedule: Schedule, path: Path | str) -> None:
    """Writes a table as `read_csv` reads it. Raises SpecError when the file cannot be written."""
    text = io.StringIO()
    if schedule.placement != "ring":
        text.write(f"# placement: {schedule.placement}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f"stage {stage}" for stage in range(schedule.stages))
    writer.writerows(["" if cell is None else str(cell) for cell in row] for row in schedule.table)
    try:
        Path(path).write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path} cannot be written: {error.strerror or error}; name another file.") from None


def _lines(path: Path) -> list[str]:
    try:
        # a named pipe would be waited for
        regular, size = path.is_file() or path.is_dir(), path.stat().st_size
        if regular and size <= MOST_BYTES:
            return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SpecError(f"schedule {path}: the file cannot be read: {error.strerror or error}; name another.") from None
    except ValueError:
        raise SpecError(f"schedule {path}: the file is no UTF-8 text; save the table as CSV.") from None
    if not regular:
        raise SpecError(f"schedule {path}: it is no file with a table; name one.")
    raise SpecError(
        f"schedule {path}: its {size:,} bytes are more than a table has, and {MOST_BYTES:,} is the most; name another file."
    )


def _fields(where: str, text: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([text]))]
    except csv.Error as error:
        raise SpecError(f"{where} cannot be taken apart: {error}; write it like F0,BW0.") from None


def _placement(where: str, text: str) -> str | None:
    key, colon, value = (part.strip().lower() for part in text.lstrip(" #").partition(":"))
    if key != "placement" or not colon:
        return None
    if value not in PLACEMENTS:
        raise SpecError(f"{where}: placement {value!r} is unknown; {nearest(value, PLACEMENTS)}")
    return value


def _check_columns(where: str, texts: Sequence[str], stages: int) -> None:
    if len(texts) != stages:
        raise SpecError(
            f"{where} has {len(texts)} column{'s' if len(texts) > 1 else ''} for {stages} stages; give each stage one, "
            "blank where it is idle."
        )


def _cell(where: str, text: str) -> Cell | None:
    if text in _IDLE:
        return None
    found = _CELL.fullmatch(text)
    if found is None:
        raise SpecError(
            f"{where}: {text!r} is no cell; write F0, B0, W0 or BW0, with a chunk as in F0.1, or leave it blank."
        )
    kind, microbatch, chunk = found.groups()
    return Cell(kind, int(microbatch), int(chunk or 0))


def _checked(name: str, rows: Sequence[tuple[Cell | None, ...]], microbatches: int, placement: str) -> Schedule:
    stages = len(rows[0])
    chunks = 1 + max((cell.chunk for row in rows for cell in row if cell is not None), default=0)
    if placement == "v":
        chunks = max(chunks, 2)
    most = max((cell for row in rows for cell in row if cell is not None), key=lambda cell: cell.chunk, default=None)
    if chunks * stages > MOST_PARTS:
        raise SpecError(f"schedule {name}: {most} is of chunk {most.chunk}; {MOST_PARTS // stages - 1} is the highest there is.")
    check_size(stages, microbatches, chunks)
    schedule = Schedule(name, stages, microbatches, chunks, placement, tuple(rows))
    validate(schedule)
    return schedule
