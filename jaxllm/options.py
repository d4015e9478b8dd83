"""What commands share: numbers as they are typed, and how progress is told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.spec.errors import SpecError


MOST, SMALLEST = 10**9, 1e-9


def count(option: str, text: str | None, default: Any, *, least: int = 1, word: str = "") -> Any:
    """A whole number from `least` on, the word where there is one, or the default when left out. Raises SpecError."""
    if text is None:
        return default
    if word and text == word:
        return word
    if not (text.isascii() and text.isdecimal()) or not least <= int(text[:20]) <= MOST:
        kind = f"neither a whole number from {least} to 10^9 nor {word}" if word else f"no whole number from {least} to 10^9"
        raise SpecError(f"{option} {text!r} is {kind}; write it like {option} 8.")
    return int(text)


def number(option: str, text: str, *, most: float, example: str) -> float:
    """A number from SMALLEST up to `most`. Raises SpecError."""
    try:
        value = float(text) if text.isascii() else -1.0
    except ValueError:
        value = -1.0
    if not SMALLEST <= value <= most:
        raise SpecError(f"{option} {text!r} is no number above 0, from {SMALLEST:g} up to {most:,g}; write it like {option} {example}.")
    return value


@contextlib.contextmanager
def progress(wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """Yields a function that says what is being done: a spinner on a terminal, else a line each."""
    if not wanted:
        yield lambda message: None
        return
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield lambda message: print(f"jaxllm: {message}", file=stream, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False, markup=False).status("starting") as status:
        yield status.update
