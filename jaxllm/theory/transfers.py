"""What goes between a device's memory and its host's in a step.

The optimizer's arrays come to the device in an update and go back. A layer's matrices come for each use, as ZeRO 3 gathers
them, and in an update, where no master copy has their values; and go back from there. Other parameters come once a step and
stay until it ends. Activations that are saved in host memory go there and come back once in each microbatch.
ZeRO-Offload (Ren et al. 2021, section 3) sends 2 bytes of a gradient to the host and 2 bytes of a weight back, as the host
computes the update; here the device does, which takes the state there and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxllm.spec.ledger import TO_DEVICE, TO_HOST, TRANSFERS, Line, Term, merge
from jaxllm.theory.activations import copies
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.products import part
from jaxllm.theory.state import add, host_arrays
from jaxllm.theory.symbols import INFINITY, Symbols, pick, reference


def lines(s: Symbols) -> tuple[Line, ...]:
    """Bytes copied to the device and to the host, by dtype."""
    parameters = (line for weight in weights(s) for line in _parameters(s, weight)) if np.any(s.hp) else ()
    return merge((*_state(s), *parameters, *(copies(s) if any(map(np.any, s.away)) else ())))


def _state(s: Symbols) -> Iterator[Line]:
    terms = host_arrays(s)
    total = add(term.value for term in terms)
    for name in TRANSFERS:
        yield Line("transfers", name, total, dtype="f32", terms=terms)


def _parameters(s: Symbols, weight: Weight) -> Iterator[Line]:
    """A layer's matrix for its forward and its backward pass, and its update; any other weight for all of a step."""
    one = s.hp * weight.whole * s.p // np.where(s.z >= 3, weight.parts, 1)
    source = reference(INFINITY, "section 5")
    if weight.stacked and len(weight.dims) > 1:
        moves = (
            (TO_DEVICE, s.m * weight.layers, "before use", "m L "),
            (TO_DEVICE, s.m * weight.layers, "again, for the backward pass", "m L "),
            (TO_DEVICE, weight.held * (1 - s.master), "to be updated", "L "),
            (TO_HOST, weight.held, "updated", "L "),
        )
    else:
        layers = "L " if weight.stacked else ""
        moves = ((TO_DEVICE, weight.held, "before use", layers), (TO_HOST, weight.held, "updated", layers))
    for name, times, what, prefix in moves:
        formula = f"{prefix}{weight.formula} p{pick((s.z >= 3) & (weight.parts > 1), pick(s.x > 1, '/(n x)', '/n'), '')}"
        term = Term(f"{weight.name}, {what}", one * times, formula, source, part(weight.name))
        yield Line("transfers", name, one * times, dtype=s.dtypes["p"], count=times, terms=(term,))
