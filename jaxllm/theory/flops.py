"""FLOPs of the matmuls, per device and step: 2 for each multiply-add.

Backward is twice forward: one matmul for the input's gradient, one for the weight's. So a token costs 6 Psi, and attention beside (the scaling book, chapter 4).
What is not saved is computed again, but for the last matmul of a block, whose output nobody needs.

Attention is over the whole T x T square, of which devices that share out a sequence have each 1/x. Block by block it is over the A (A + 1)/2 pairs of blocks, of C x C positions each, in
which a query meets a key of its past, those on the diagonal whole. Then its backward pass has five matmuls where forward
has two: the scores are made again there, whether the forward pass as a whole was computed again or not (Dao 2023,
algorithm 2). So it is in cuDNN's kernel, over the whole square: how much of what a mask takes away it leaves out, it does
not tell.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.fp8 import MATMUL
from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.products import HEAD, part, products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import BOOK, Symbols, pick, reference


def lines(s: Symbols) -> tuple[Line, ...]:
    """Matmul FLOPs of the forward pass, the recomputation and the backward pass."""
    tokens = s.m * s.b * s.S
    padded = -(-s.V // s.t)
    block = {}
    for product in products(s):
        if product.name == "o":
            block |= {"scores": square(s), "attention": square(s)}
        other = product.leaves if product.column else product.enters
        block[product.name] = (s.S * 2 * s.D * other.size, f"{s.here} 2 D {other.formula}")
    source = reference(BOOK, "chapter 4, transformer FLOPs")
    forward = tuple(
        Term(name, s.L * s.m * s.b * each, f"L m b {text}", source, part(name)) for name, (each, text) in block.items()
    )
    forward += (Term("head", s.last * tokens * 2 * s.D * padded, f"m b {s.here} 2 D V'/t", source, HEAD),)
    recompute = tuple(
        Term(term.label, s.again(term.label) * term.value, f"{term.detail}, as it is not saved", source, term.part)
        for term in forward
        if term.label != "head"
    )
    backward = tuple(
        Term(term.label, times * term.value, f"{text} {term.detail}", source, term.part)
        for term in forward
        for times, text in [(2 + s.w + s.f, pick(s.w + s.f, "3", "2")) if term.label == "scores" else (2, "2")]
    )
    return tuple(
        Line("flops", "matmul", add(term.value for term in found), phase=phase, dtype=dtype, terms=found)
        for phase, terms in (("forward", forward), ("recompute", recompute), ("backward", backward))
        for dtype, found in _by_dtype(s, terms).items()
    )


def _by_dtype(s: Symbols, terms: tuple[Term, ...]) -> dict[str, tuple[Term, ...]]:
    """The terms of matmuls in 8 bits, those of the weights of a block, under their dtype, and all others under none."""
    names = [product.name for product in products(s)] if s.fp8 else []
    narrow = tuple(term for term in terms if term.label in names)
    others = tuple(term for term in terms if term.label not in names)
    return {"": others} | ({MATMUL: narrow} if s.fp8 else {})


def pairs(s: Symbols) -> Any:
    """Pairs of blocks of positions in which a query meets a key of its past, that a device goes through one after another."""
    # In a ring a device meets the first half of a part before its own and both halves of one behind it, x - 1 times in all,
    # with both or one of its own: two pairs of halves. Those of its own part are 2 A blocks, one behind the other.
    return s.ring * (s.A * (2 * s.A + 1) + (s.x - 1) * 2 * s.A * s.A) + (1 - s.ring) * (s.A * (s.A + 1) // 2)


def square(s: Symbols) -> tuple[Any, str]:
    """One matmul over the positions that attend to each other, of one sequence; and its formula."""
    met = s.w * pairs(s) * s.C * s.C + (1 - s.w) * (s.T * s.T)
    heads = s.N // s.t // (s.ring + (1 - s.ring) * s.x)
    whole = pick(s.x > 1, pick(s.ring, "2 (2 x A^2 + A) C C N H/t", "A (A + 1) C C N H/(t x)"), "A (A + 1) C C N H/t")
    return 2 * met * heads * s.H, pick(s.w, whole, pick(s.x > 1, "T 2 T N H/(t x)", "T 2 T N H/t"))
