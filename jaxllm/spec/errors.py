"""The ways in which a request can be wrong. The command line prints them as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecError(ValueError):
    """Bad input: the message names the value, the limit and a way out. Exit code 2."""


class TargetError(RuntimeError):
    """The target cannot be used here: the message says what installs it, or why nothing can. Exit code 3."""


class DoesNotFit(RuntimeError):
    """A device has less memory than the work takes: the message says what said so. Exit code 4."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to end an 'unknown ...' message with: the nearest known name, or all of them."""
    word, known = str(word), sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
