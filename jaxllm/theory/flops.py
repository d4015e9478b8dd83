"""FLOPs of the matmuls, per device and step: 2 for each multiply-add. Attention is over the whole T x T square.

Backward is twice forward: one matmul for the input's gradient, one for the weight's. So a token costs 6 Psi, and attention beside (the scaling book, chapter 4).
remat=full computes a block again but for its last matmul, whose output nobody needs.
"""

from __future__ import annotations

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.products import products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import BOOK, Symbols, reference


def lines(s: Symbols) -> tuple[Line, ...]:
    """Matmul FLOPs of the forward pass, the recomputation and the backward pass."""
    tokens = s.m * s.b * s.T
    padded = -(-s.V // s.t)
    block = {}
    for product in products(s):
        if product.name == "o":
            square = (2 * s.T * s.N * s.H // s.t, "2 T N H/t")
            block |= {"scores": square, "attention": square}
        other = product.leaves if product.column else product.enters
        block[product.name] = (2 * s.D * other.size, f"2 D {other.formula}")
    source = reference(BOOK, "chapter 4, transformer FLOPs")
    forward = tuple(Term(name, s.L * tokens * each, f"L m b T {text}", source) for name, (each, text) in block.items())
    forward += (Term("head", s.last * tokens * 2 * s.D * padded, "m b T 2 D V'/t", source),)
    recompute = tuple(
        Term(term.label, s.full * term.value, f"{term.detail}, as remat=full", source)
        for term in forward
        if term.label not in ("down", "head")
    )
    backward = tuple(Term(term.label, 2 * term.value, f"2 {term.detail}", source) for term in forward)
    return tuple(
        Line("flops", "matmul", add(term.value for term in terms), phase=phase, terms=terms)
        for phase, terms in (("forward", forward), ("recompute", recompute), ("backward", backward))
    )
