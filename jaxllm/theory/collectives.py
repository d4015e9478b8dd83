"""What a device sends: each collective of a step by axes and phase, payload and ring wire bytes.

Payload is the output of an all-gather, the input of a reduce-scatter, the buffer of an all-reduce.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term, merge, wire_bytes
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.products import products
from jaxllm.theory.symbols import MEGATRON, NARAYANAN, ZERO, Symbols, pick, reference

BATCH = ("replica", "data")
SCALAR = 4


def lines(s: Symbols) -> tuple[Line, ...]:
    """All collectives of a step. Those over a single device, and those that a layout does not need, are zero."""
    table = weights(s)
    each = [*_pipe(s), *_tensor(s), *_scalars(s, table)]
    for weight in table:
        each += [*_gathers(s, weight), *_reductions(s, weight)]
    return merge(each)


def _line(
    s: Symbols,
    kind: str,
    axes: tuple[str, ...],
    phase: str,
    letter: str,
    times: Any,
    buffer: Any,
    term: tuple[str, str, str],
) -> Line:
    """A collective of `buffer` bytes that runs `times` a step, over axes whose product may be 1."""
    degree = s.degree(axes)
    times = times * (degree > 1)
    payload = times * buffer
    label, formula, source = term
    return Line(
        "collectives",
        kind,
        payload,
        phase=phase,
        axes=s.present(axes),
        dtype=s.dtypes.get(letter, letter),
        wire=times * wire_bytes(kind, buffer, degree),
        count=times,
        terms=(Term(label, payload, formula, source),),
    )


def _pipe(s: Symbols) -> tuple[Line, ...]:
    """What goes from stage to stage at the end of each tick, up and down, and the exchange of a tied embedding's
    gradient. All stages send, whether they have something to say or not."""
    stream = s.b * s.T * s.D * s.c
    source = reference(NARAYANAN, "section 2.2")
    up = ("activations", "ticks b T D c", source)
    down = ("their gradients", "ticks b T D c", source)
    embed = next(weight for weight in weights(s) if weight.name == "embed")
    exchanged = embed.whole * s.g // np.where(s.z >= 1, embed.parts, 1)
    tied = ("gradient of the tied embedding", "D V'/t g, or its slice", reference(NARAYANAN, "section 3.4"))
    return (
        _line(s, "permute", ("pipe",), "forward", "c", s.ticks, stream, up),
        _line(s, "permute", ("pipe",), "backward", "c", s.ticks * (s.ways - 1), stream, down),
        _line(s, "permute", ("pipe",), "backward", "g", s.tied * s.apart, exchanged, tied),
    )


def _tensor(s: Symbols) -> tuple[Line, ...]:
    """Megatron's f and g in each block, and the sliced vocabulary at both ends."""
    stream = s.b * s.T * s.D * s.c
    block = reference(MEGATRON, "section 3, two all-reduces forward and two backward")
    ends = reference(MEGATRON, "section 3, vocabulary-parallel embedding and loss")

    def over_tensor(phase: str, times: Any, label: str, formula: str, source: str) -> Line:
        return _line(s, "all-reduce", ("tensor",), phase, "c", times, stream, (label, formula, source))

    return (
        over_tensor("forward", 2 * s.L * s.m, "after o and after down", "2 L m b T D c", block),
        over_tensor("forward", s.first * s.m, "embedding lookup", "m b T D c", ends),
        # The last matmul of a block is not computed again, so neither is its sum.
        over_tensor("recompute", s.L * s.m * s.full, "after o", "L m b T D c, as remat=full", block),
        over_tensor("backward", 2 * s.L * s.m, f"inputs of {_parting(s)}", "2 L m b T D c", block),
        over_tensor("backward", s.last * s.m, "input of the head", "m b T D c", ends),
        _line(
            s,
            "all-reduce",
            ("tensor",),
            "forward",
            "f32",
            3 * s.last * s.m,
            s.b * s.T * 4,
            ("softmax of the loss: maximum, sum, target", "3 m b T 4", ends),
        ),
    )


def _parting(s: Symbols) -> str:
    """The weights at the two inputs where the slices of a block part."""
    parting: dict[str, list[str]] = {}
    for product in products(s):
        if product.column:
            parting.setdefault(product.input, []).append(product.name)
    return " and of ".join(", ".join(names) for names in parting.values())


def _gathers(s: Symbols, weight: Weight) -> tuple[Line, ...]:
    """ZeRO 3 gathers a weight for each layer and microbatch, forward and again backward; ZeRO 1 and 2 once a step.

    Embedding, positions, final norm and head are gathered once a microbatch: the head's backward pass follows at once,
    and the embedding's needs no weights. A bias is gathered again only where what it is added to is computed again.
    """
    stage3 = (s.z >= 3) & (weight.parts > 1)
    stage12 = ((s.z == 1) | (s.z == 2)) & (weight.parts > 1)
    layered = weight.stacked
    prefix = "L m" if layered else "m"
    gather = weight.whole * s.c
    return (
        _line(
            s, "all-gather", ("data",), "forward", "c", stage3 * weight.uses * s.m, gather,
            (f"{weight.name}, before use", f"{prefix} {weight.formula} c, as z = 3", reference(ZERO, "section 7.2.2")),
        ),
        _line(
            s, "all-gather", ("data",), "backward", "c", stage3 * weight.layers * s.m * layered * weight.again, gather,
            (f"{weight.name}, again", f"{prefix} {weight.formula} c, as z = 3", reference(ZERO, "section 7.2.2")),
        ),
        _line(
            s, "all-gather", ("data",), "update", "p", stage12 * weight.held, weight.whole * s.p,
            (f"{weight.name}, updated", f"{prefix[:-2]} {weight.formula} p, as z is 1 or 2".strip(),
             reference(ZERO, "section 7.2.1")),
        ),
    )  # fmt: skip


def _reductions(s: Symbols, weight: Weight) -> tuple[Line, ...]:
    """Gradients: all-reduced once a step, or reduce-scattered once a step (z = 1) or in each microbatch (z >= 2).

    A weight that ZeRO cannot slice is all-reduced. What every tensor rank holds whole, yet computes a part of the
    gradient of, is summed over tensor as well; a slice is all-reduced over replica.
    """
    whole = weight.elements * s.g
    in_parts = (s.z >= 1) & (weight.parts > 1)
    layered = weight.stacked
    times = np.where(s.z >= 2, s.m * weight.uses, weight.held)
    formula = f"{'L ' if layered else ''}{weight.formula} g"
    why = pick(s.z == 0, "as z = 0", pick(s.n == 1, "as n = 1", "as n divides none of its dims"))
    lines_: list[Line] = []
    for shared in (False, True):
        here = np.equal(weight.shared, shared)
        extra = ("tensor",) if shared else ()
        source = "every tensor rank has a part of it" if shared else reference(ZERO, "section 7.1")
        lines_ += [
            _line(
                s, "all-reduce", (*BATCH, *extra), "backward", "g", 1 * (~in_parts & here), whole,
                (f"gradient of {weight.name}", f"{formula}, {why}", source),
            ),
            _line(
                s, "all-reduce", ("replica", *extra), "backward", "g", 1 * (in_parts & here), whole // weight.parts,
                (f"slice of the gradient of {weight.name}", f"{formula}/n, as z >= 1",
                 source if shared else "hybrid sharding"),
            ),
        ]  # fmt: skip
    detail = pick(s.z >= 2, f"m {formula}, as z >= 2", f"{formula}, as z = 1")
    scatter = _line(
        s, "reduce-scatter", ("data",), "backward", "g", in_parts * times, weight.whole * s.g,
        (f"gradient of {weight.name}", detail, reference(ZERO, "section 7.2")),
    )  # fmt: skip
    return (*lines_, scatter)


def _scalars(s: Symbols, table: tuple[Weight, ...]) -> tuple[Line, ...]:
    """Numbers of 4 bytes: unmasked tokens, the loss, and the gradient norm over whatever slices the gradients."""
    lines_ = [
        _line(s, "all-reduce", BATCH, "forward", "f32", 1, SCALAR, ("unmasked tokens", "4", "")),
        _line(s, "all-reduce", ("pipe", *BATCH), "forward", "f32", 1, SCALAR, ("loss", "4", "")),
    ]
    groups = (
        (("data", "tensor"), True, True),
        (("data",), False, True),
        (("tensor",), True, False),
        ((), False, False),
    )
    for axes, by_tensor, by_data in groups:
        # One sum for all the weights that are sliced alike, if there is any.
        alike = False
        for weight in table:
            tensor_sliced = weight.sliced & ~np.asarray(weight.shared) & (s.t > 1)
            data_sliced = (s.z >= 1) & (weight.parts > 1)
            alike = alike | ((tensor_sliced == by_tensor) & (data_sliced == by_data))
        lines_.append(_line(s, "all-reduce", ("pipe", *axes), "update", "f32", 1 * alike, SCALAR, ("gradient norm", "4", "")))
    return tuple(lines_)
