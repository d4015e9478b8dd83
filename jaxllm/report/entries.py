"""Lists whose figures stand in columns and whose texts take the room that is left, beside the figures or below them.

A figure is never cut: where the columns do not fit, lines grow. A text is folded at spaces, or, where one word is
longer than the line, inside of paths. The name of an operation is the exception: it loses its outermost scopes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxllm.report.units import exact, one_line

_BESIDE = 44  # cells that texts need to stand beside the figures
_BREAKS = re.compile(r"[^/,;]*[/,;]?")
_FIGURE = re.compile(r"[-+~<]?[\d.,]+(\0\S+)?")  # with its unit


@dataclass(frozen=True)
class Entry:
    """One thing: its figures, what is said of it, and the name of the operation that it is of. A single cell where
    others have several is a line of its own."""

    cells: tuple[int | str, ...]
    texts: tuple[str, ...] = ()
    op_name: str = ""
    style: str = ""
    inset: str = ""  # before the first cell


def shown(text: object, out: Console) -> str:
    """A text as it can be printed: on one line, with what a terminal would obey or cannot show written out."""
    encoding = out.encoding or "utf-8"
    return one_line(text).encode(encoding, "backslashreplace").decode(encoding)


def print_title(out: Console, title: str) -> None:
    out.print()
    say(out, title, "bold")


def say(out: Console, text: str, style: str = "", indent: str = "", more: str = "") -> None:
    """A sentence on as many lines as it takes; `more` is the further indent of those after the first."""
    for number, line in enumerate(fold(shown(text, out), out.width - len(indent) - len(more))):
        out.print(Text(indent + (more if number else "") + line, style), soft_wrap=True)


def print_entries(out: Console, heads: Sequence[str], entries: Sequence[Entry], empty: str = "nothing") -> None:
    """A head that begins with `>` stands over figures, which are set to the right. Heads may be one more than the
    cells: the last is then that of the texts."""
    if not entries:
        say(out, empty, indent="  ")
        return
    right = [head.startswith(">") for head in heads]
    names = [head.removeprefix(">") for head in heads]
    rows = [[exact(c) if isinstance(c, int) else shown(c, out) for c in entry.cells] for entry in entries]
    for entry, row in zip(entries, rows, strict=True):
        row[0] = entry.inset + row[0]
    columns = max(map(len, rows))
    full = [row for row in rows if len(row) == columns]
    kept = [
        column for column in range(columns) if not column or any(row[column] for row in full)
    ]  # nothing says nothing
    if len(kept) < columns:
        rows = [[row[column] for column in kept] if len(row) == columns else row for row in rows]
        names, right = ([*map(heads.__getitem__, kept), *heads[columns:]] for heads in (names, right))
        columns = len(kept)
    full = [names, *(row for row in rows if len(row) == columns)]
    widths = [max(cell_len(row[column]) for row in full) for column in range(columns)]
    begin = 2 + sum(widths) + 2 * columns
    beside = out.width - begin >= _BESIDE
    below = 4 if not right[0] or widths[0] > 24 else 4 + widths[0]

    head = "  " + "  ".join(_padded(*part) for part in zip(names, widths, right, strict=False))
    head = (head + "  " + names[-1] if beside and len(names) > columns else head).rstrip()
    if head:
        out.print(Text(head, "dim"), soft_wrap=True)
    for entry, row in zip(entries, rows, strict=True):
        line = "  " + "  ".join(_padded(*part) for part in zip(row, widths, right, strict=False))
        if len(row) < columns:
            line = "  " + "  ".join(row)
        indent = begin if beside else below
        texts = list(_packed(entry, out, out.width - indent))
        if beside and texts:
            line += "  " + texts.pop(0)
        out.print(Text(line.rstrip(), entry.style), soft_wrap=True)
        for text in texts:
            out.print(Text(" " * indent + text), soft_wrap=True)


def print_left_out(out: Console, number: int, what: str, rest: str = "") -> None:
    """That a list goes on, when it does."""
    if number:
        say(out, f"and {number:,} more {what}{'' if number == 1 else 's'}{rest}", indent="  ")


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _packed(entry: Entry, out: Console, room: int) -> Iterator[str]:
    """Texts side by side as far as they fit, then the name of the operation."""
    line = ""
    for text in entry.texts:
        if not text:
            continue
        for number, part in enumerate(fold(shown(text, out), room)):
            if line and not number and cell_len(line) + 2 + cell_len(part) <= room:
                line += "  " + part
                continue
            if line:
                yield line
            line = part
    if entry.op_name:
        name = shown(entry.op_name, out)
        left = room - cell_len(line) - 2
        if line and cell_len(name) <= left:
            line += "  " + name
        else:
            if line:
                yield line
            line = clipped(name, room)
    if line:
        yield line


def clipped(op_name: str, room: int) -> str:
    """The innermost scopes of an operation's name that fit: `.../attention/dot_general`."""
    if cell_len(op_name) <= room:
        return op_name
    for cut in re.finditer("/", op_name):
        tail = op_name[cut.start() :]
        if cell_len(tail) + 3 <= room:
            return "..." + tail
    tail = op_name[-room:]
    while cell_len(tail) + 3 > room:
        tail = tail[1:]
    return "..." + tail


def fold(text: str, room: int) -> list[str]:
    """Lines of at most so many cells, broken at spaces but not between a number and its unit; a longer word is broken
    inside, unless it is a number. At least 20 cells."""
    room = max(20, room)
    glued = re.sub(r"(?<=[0-9]) (?=%|[kMGTPEZ]?(?:B|FLOPs?)\b|(?:bytes|ms|us|ns|s)\b)", "\0", text)
    lines, line = [], ""
    for word in glued.split():
        for number, piece in enumerate(_pieces(word, room)):
            gap = " " if line and not number else ""
            if line and cell_len(line) + len(gap) + cell_len(piece) > room:
                lines.append(line)
                line = piece
            else:
                line += gap + piece
    return [line.replace("\0", " ") for line in [*lines, line]]


def _pieces(word: str, room: int) -> Iterator[str]:
    """A word that fits, whole; else what can stand on lines of its own."""
    if cell_len(word) <= room or _FIGURE.fullmatch(word):
        yield word
        return
    for part in _BREAKS.findall(word):
        piece = ""
        for character in part:
            if cell_len(piece + character) > room:
                yield piece
                piece = ""
            piece += character
        if piece:
            yield piece
