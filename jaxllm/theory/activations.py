"""What the forward pass saves for the backward pass, per device: one microbatch's, in bytes.

remat=full saves each block's input. remat=none also saves what the backward pass would need a matmul, or a
sum over devices, to compute again. Korthikanti et al. 2022 count the like for a GPT block: in section 4.1 all that is
saved, in section 4.2.1 divided by tensor parallelism, in section 5 the input alone. Theirs has dropout masks and a plain feed-forward, and saves the softmax's output;
ours saves the scores that go into it, as many bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.state import add
from jaxllm.theory.symbols import KORTHIKANTI, Symbols, reference


def kv_heads(s: Symbols) -> Any:
    """Key/value heads that one tensor rank computes: its share of them, or the one that it shares."""
    return np.maximum(s.K // s.t, 1)


def residuals(s: Symbols) -> Line:
    """The saved activations: b T c times the widths below, for each of L layers."""
    none = 1 - s.full
    widths = {
        "block input": (s.D, "D"),
        "q": (none * s.N * s.H // s.t, "N H/t"),
        "k": (none * kv_heads(s) * s.H, "max(K/t, 1) H"),
        "v": (none * kv_heads(s) * s.H, "max(K/t, 1) H"),
        "scores": (none * s.N // s.t * s.T, "N T/t"),
        "attention": (none * s.N * s.H // s.t, "N H/t"),
        "residual": (none * s.D, "D"),
        "gate": (none * s.F // s.t, "F/t"),
        "up": (none * s.F // s.t, "F/t"),
    }
    terms = tuple(
        Term(
            name,
            s.L * s.b * s.T * width * s.c,
            f"L b T {symbols} c" if name == "block input" else f"L b T {symbols} c, as remat=none",
            reference(KORTHIKANTI, "section 5" if name == "block input" else "sections 4.1 and 4.2.1"),
        )
        for name, (width, symbols) in widths.items()
    )
    return Line("memory", "residuals", add(term.value for term in terms), terms=terms)
