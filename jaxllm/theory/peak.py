"""The peak of memory: an estimate. What is held all the time is exact; what lives for a moment depends on the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.state import add
from jaxllm.theory.symbols import Symbols


def estimate(s: Symbols, memory: tuple[Line, ...]) -> tuple[Any, tuple[Term, ...]]:
    """Bytes at the peak: all memory lines, and the larger of the working sets of the loss and of a block."""
    held = tuple(Term(line.name, line.value) for line in memory)
    return add(term.value for term in held), held
