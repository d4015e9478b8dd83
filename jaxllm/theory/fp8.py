"""What products in 8 bits keep and send beside their operands: the amaxes of what each of them quantizes."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.fp8 import FORMATS, HISTORY
from jaxllm.spec.layout import TOKEN_AXES
from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.collectives import collective
from jaxllm.theory.products import products
from jaxllm.theory.symbols import Symbols

AMAX = 4  # bytes of an f32
SOURCE = "NVIDIA Transformer Engine, delayed scaling"


def history(s: Symbols) -> tuple[Term, ...]:
    """Bytes of the amaxes of the steps before, whole on every device: input, kernel and gradient of each product."""
    if not s.fp8:
        return ()
    number = f"{HISTORY} L {len(FORMATS)} {len(products(s))} 4"
    return (Term("amax histories", HISTORY * _tensors(s) * AMAX, number, SOURCE),)


def lines(s: Symbols) -> tuple[Line, ...]:
    """One all-reduce, of maxima, of all amaxes of a step over all devices: each of them sees a part of the tokens, of a
    sliced kernel, or of what is multiplied with it."""
    if not s.fp8:
        return ()
    term = ("amaxes of what is quantized", f"L {len(FORMATS)} {len(products(s))} 4", SOURCE)
    return (collective(s, "all-reduce", (*TOKEN_AXES, "tensor"), "update", "f32", 1, _tensors(s) * AMAX, term),)


def _tensors(s: Symbols) -> Any:
    """Tensors that are quantized, in all layers."""
    return s.L * len(products(s)) * len(FORMATS)
