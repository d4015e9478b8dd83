"""What a device sends: each collective of a step by axes and phase, payload and ring wire bytes.

Payload is the output of an all-gather, the input of a reduce-scatter, the buffer of an all-reduce.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.layout import TOKEN_AXES, ZERO_AXES
from jaxllm.spec.ledger import Line, Term, merge, wire_bytes
from jaxllm.theory.parameters import Weight, weights
from jaxllm.theory.products import ATTENTION, EMBEDDING, HEAD, MLP, Width, part, products
from jaxllm.theory.symbols import KORTHIKANTI, MEGATRON, NARAYANAN, RING, ULYSSES, ZERO, Symbols, pick, reference

SCALAR = 4


def lines(s: Symbols) -> tuple[Line, ...]:
    """All collectives of a step. Those over a single device, and those that a layout does not need, are zero."""
    return merge((*pipe(s), *tensor(s), *others(s)))


def others(s: Symbols) -> tuple[Line, ...]:
    """Those that neither a pipeline nor tensor parallelism needs: of attention's context, scalars, weights and gradients."""
    table = weights(s)
    each = [*_context(s), *_scalars(s, table)]
    for weight in table:
        each += [*_gathers(s, weight), *_reductions(s, weight)]
    return merge(each)


def collective(
    s: Symbols,
    kind: str,
    axes: tuple[str, ...],
    phase: str,
    letter: str,
    times: Any,
    buffer: Any,
    term: tuple[str, str, str],
    of: str = "",
) -> Line:
    """A collective of `buffer` bytes that runs `times` a step, over axes whose product may be 1; `of` is the part of the model."""
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
        terms=(Term(label, payload, formula, source, of),),
    )


def pipe(s: Symbols) -> tuple[Line, ...]:
    """What goes from stage to stage at the end of each tick, up and down, and the exchange of a tied embedding's
    gradient. All stages send, whether they have something to say or not."""
    stream = s.b * s.S // s.q * s.D * s.c
    source = reference(NARAYANAN, "section 2.2")
    up = ("activations", f"ticks b {s.here}/q D c", source)
    down = ("their gradients", f"ticks b {s.here}/q D c", source)
    embed = next(weight for weight in weights(s) if weight.name == "embed")
    exchanged = embed.whole * s.g // np.where(s.z >= 1, embed.parts, 1)
    tied = ("gradient of the tied embedding", "D V'/t g, or its slice", "the first and the last stage both have it")
    return (
        collective(s, "permute", ("pipe",), "forward", "c", s.ticks, stream, up),
        collective(s, "permute", ("pipe",), "backward", "c", s.ticks * (s.ways - 1), stream, down),
        collective(s, "permute", ("pipe",), "backward", "g", s.tied * s.apart, exchanged, tied, EMBEDDING),
    )


def tensor(s: Symbols) -> tuple[Line, ...]:
    """Megatron's f and g in each block, and the sliced vocabulary at both ends.

    Where the residual stream is cut along the sequence, each all-reduce is an all-gather of it at one of the two and a
    reduce-scatter at the other, which together send as much. What is gathered is not saved, but gathered again.
    """
    stream = s.b * s.S * s.D * s.c
    block = reference(MEGATRON, "section 3, two all-reduces forward and two backward")
    ends = reference(MEGATRON, "section 3, vocabulary-parallel embedding and loss")

    whole, cut = 1 * (s.q == 1), 1 * (s.q > 1)
    parted = reference(KORTHIKANTI, "section 4.2.2")
    layers, formula = s.L * s.m, f"L m b {s.here} D c"
    # Where the slices of a block part, and where they meet again.
    blocks = tuple(zip((ATTENTION, MLP), _parting(s), ("o", "down"), strict=True))

    def over_tensor(kind: str, phase: str, times: Any, of: str, label: str, formula: str, source: str) -> Line:
        return collective(s, kind, ("tensor",), phase, "c", times, stream, (label, formula, source), of)

    def meet(phase: str, times: Any, of: str, label: str, formula: str, source: str) -> tuple[Line, ...]:
        """Partial results of all positions meet in the residual stream, or the gradients of what parted from it."""
        return (
            over_tensor("all-reduce", phase, times * whole, of, label, formula, source),
            over_tensor("reduce-scatter", phase, times * cut, of, label, f"{formula}, as q > 1", parted),
        )

    def parting(phase: str, times: Any, of: str, label: str, formula: str) -> Line:
        """What each rank needs of all positions of the residual stream, or of its gradient."""
        return over_tensor("all-gather", phase, times * cut, of, label, f"{formula}, as q > 1", parted)

    lines_: list[Line] = []
    for of, into, out in blocks:
        lines_ += [
            parting("forward", layers, of, f"input of {into}", formula),
            *meet("forward", layers, of, f"after {out}", formula, block),
            parting("recompute", layers, of, f"input of {into}, again", formula),
            *meet("recompute", layers * s.again(out), of, f"after {out}", f"{formula}, as it is not saved", block),
            parting("backward", layers, of, f"gradient after {out}", formula),
            *meet("backward", layers, of, f"gradient of the input of {into}", formula, block),
        ]
    return (
        *lines_,
        *meet("forward", s.first * s.m, EMBEDDING, "embedding lookup", f"m b {s.here} D c", ends),
        parting("backward", s.first * s.m, EMBEDDING, "gradient of the embedding lookup", f"m b {s.here} D c"),
        parting("forward", s.last * s.m, HEAD, "input of the head", f"m b {s.here} D c"),
        *meet("backward", s.last * s.m, HEAD, "gradient of the input of the head", f"m b {s.here} D c", ends),
        collective(
            s,
            "all-reduce",
            ("tensor",),
            "forward",
            "f32",
            3 * s.last * s.m,
            s.b * s.S * 4,
            ("softmax of the loss: maximum, sum, target", f"3 m b {s.here} 4", ends),
            HEAD,
        ),
    )


def _context(s: Symbols) -> tuple[Line, ...]:
    """What attention needs of the positions that other devices have.

    In a ring each device's keys and values go to all others, one hop at a time; in the backward pass too, each followed by
    the sums of their gradients in f32, which end where they belong. By heads each device gives those of the others away,
    for all positions of its own, and takes them back; what is saved of attention is saved as the heads have it, so that
    its output is brought back a second time.
    """
    each = {product.name: product.leaves for product in products(s) if product.name in ("q", "k", "v")}
    hops = s.ring * (s.x - 1)
    by_heads = 1 * (s.x > 1) * (1 - s.ring)
    liu, jacobs = reference(RING, "section 3"), reference(ULYSSES, "section 3.1")

    def goes(kind: str, phase: str, times: Any, what: str, width: Width, source: str, letter: str = "c") -> Line:
        size, each = (s.c, "c") if letter == "c" else (4, "4")
        formula = f"L m {'(x - 1) ' if kind == 'permute' else ''}b {s.here} {width.formula} {each}"
        buffer = s.b * s.S * width.size * size
        return collective(s, kind, ("context",), phase, letter, s.L * s.m * times, buffer, (what, formula, source), ATTENTION)

    lines_ = []
    for name, width in (("k", each["k"]), ("v", each["v"])):
        lines_ += [
            goes("permute", "forward", hops, f"{name} of each part", width, liu),
            goes("permute", "recompute", hops * s.again("attention"), f"{name} of each part, again", width, liu),
            goes("permute", "backward", hops, f"{name} of each part, for the gradients", width, liu),
            goes("permute", "backward", hops, f"gradient of {name}", width, liu, "f32"),
        ]
    # The output is as wide as the queries.
    for name, width, again in (*((name, width, s.again(name)) for name, width in each.items()), ("attention", each["q"], 1)):
        lines_ += [
            goes("all-to-all", "forward", by_heads, name, width, jacobs),
            goes("all-to-all", "recompute", by_heads * again, f"{name}, again", width, jacobs),
            goes("all-to-all", "backward", by_heads, f"gradient of {name}", width, jacobs),
        ]
    return tuple(lines_)


def _parting(s: Symbols) -> tuple[str, ...]:
    """The weights at each of the two inputs where the slices of a block part."""
    parting: dict[str, list[str]] = {}
    for product in products(s):
        if product.column:
            parting.setdefault(product.input, []).append(product.name)
    return tuple(", ".join(names) for names in parting.values())


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
    of = part(weight.name)
    return (
        collective(
            s, "all-gather", ZERO_AXES, "forward", "c", stage3 * weight.uses * s.m, gather,
            (f"{weight.name}, before use", f"{prefix} {weight.formula} c, as z = 3", reference(ZERO, "section 7.2.2")),
            of,
        ),
        collective(
            s, "all-gather", ZERO_AXES, "backward", "c", stage3 * weight.layers * s.m * layered * weight.again, gather,
            (f"{weight.name}, again", f"{prefix} {weight.formula} c, as z = 3", reference(ZERO, "section 7.2.2")),
            of,
        ),
        collective(
            s, "all-gather", ZERO_AXES, "update", "p", stage12 * weight.held, weight.whole * s.p,
            (f"{weight.name}, updated", f"{prefix[:-2]} {weight.formula} p, as z is 1 or 2".strip(),
             reference(ZERO, "section 7.2.1")),
            of,
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
    why = pick(s.z == 0, "as z = 0", pick(s.slices == 1, "as n = 1", f"as {s.over} divides none of its dims"))
    lines_: list[Line] = []
    for shared in (False, True):
        here = np.equal(weight.shared, shared)
        extra = ("tensor",) if shared else ()
        source = "every tensor rank has a part of it" if shared else reference(ZERO, "section 7.1")
        lines_ += [
            collective(
                s, "all-reduce", (*TOKEN_AXES, *extra), "backward", "g", 1 * (~in_parts & here), whole,
                (f"gradient of {weight.name}", f"{formula}, {why}", source),
                part(weight.name),
            ),
            collective(
                s, "all-reduce", ("replica", *extra), "backward", "g", 1 * (in_parts & here), whole // weight.parts,
                (f"slice of the gradient of {weight.name}", f"{formula}/{pick(s.x > 1, '(n x)', 'n')}, as z >= 1",
                 source if shared else "hybrid sharding"),
                part(weight.name),
            ),
        ]  # fmt: skip
    detail = pick(s.z >= 2, f"m {formula}, as z >= 2", f"{formula}, as z = 1")
    scatter = collective(
        s, "reduce-scatter", ZERO_AXES, "backward", "g", in_parts * times, weight.whole * s.g,
        (f"gradient of {weight.name}", detail, reference(ZERO, "section 7.2")),
        part(weight.name),
    )  # fmt: skip
    return (*lines_, scatter)


def _scalars(s: Symbols, table: tuple[Weight, ...]) -> tuple[Line, ...]:
    """Numbers of 4 bytes: unmasked tokens, the loss, and the gradient norm over whatever slices the gradients."""
    lines_ = [
        collective(s, "all-reduce", TOKEN_AXES, "forward", "f32", 1, SCALAR, ("unmasked tokens", "4", "")),
        collective(s, "all-reduce", ("pipe", *TOKEN_AXES), "forward", "f32", 1, SCALAR, ("loss", "4", "")),
    ]
    groups = (
        ((*ZERO_AXES, "tensor"), True, True),
        (ZERO_AXES, False, True),
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
        lines_.append(collective(s, "all-reduce", ("pipe", *axes), "update", "f32", 1 * alike, SCALAR, ("gradient norm", "4", "")))
    return tuple(lines_)
