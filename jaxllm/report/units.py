"""Numbers for people: exact with thousands separators, and short with a prefix."""

from __future__ import annotations

import re
import textwrap

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def exact(value: int | None) -> str:
    """`20,215,246,848`, or a dash for what is unknown."""
    return "-" if value is None else f"{value:,}"


def human(value: int | float | None, unit: str = "B") -> str:
    """Three digits and a decimal prefix: `20.2 GB`, `1.55 PFLOP`, `28 B`; a dash for what is unknown."""
    if value is None:
        return "-"
    scaled, index = float(value), 0
    # 999.5 already prints as 1000 with three digits
    while abs(scaled) >= 999.5 and index < len(_PREFIXES) - 1:
        scaled, index = scaled / 1000, index + 1
    if index == 0:
        return f"{value:,} {unit}"
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {_PREFIXES[index]}{unit}"


def percent(fraction: float) -> str:
    """`+0.4 %`, `-12 %`: signed."""
    if 0 < abs(fraction) < 0.0005:
        return f"{'+' if fraction > 0 else '-'}<0.1 %"
    return f"{100 * fraction:+.{0 if abs(fraction) >= 0.0995 else 1}f} %"


def duration(seconds: float) -> str:
    """Three digits and a prefix: `1.27 ms`, `45.0 us`, `12.3 s`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.9995 * scale:
            return _digits(seconds / scale) + f" {unit}"
    return f"{_digits(seconds / 1e-9)} ns" if seconds else "0 s"


def _digits(value: float) -> str:
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def one_line(text: object) -> str:
    """Without line breaks, and with what a terminal would obey rather than show written out."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in " ".join(str(text).split()))


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of that width, never broken inside a word or between a number and its unit; `indent` after the first."""
    glued = re.sub(r"(?<=[0-9]) (?=%|[kMGTPEZ]?(?:B|FLOP)\b|bytes\b)", "\0", text)
    lines = textwrap.wrap(
        glued, max(20, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in lines] or [""]
