"""What an optimizer computes and sends beside the update of one element by its own: nothing, but for those named here."""

from __future__ import annotations

from jaxllm.spec.ledger import Line
from jaxllm.theory import adafactor, muon
from jaxllm.theory.symbols import Symbols

LINES = {"adafactor": adafactor.collectives, "muon": muon.lines}


def lines(s: Symbols) -> tuple[Line, ...]:
    """Matmuls and collectives in the phase update, without the gradient's norm and the gathers of ZeRO."""
    return tuple(LINES[s.optimizer.name](s)) if s.optimizer.name in LINES else ()
