"""The peak of memory: an estimate. What is held all the time is exact; what lives for a moment depends on the schedule.

The peak comes in the backward pass, while the saved activations of all layers are still there, either at the loss
(logits in several forms) or in a block (its attention square and its weights' gradients); the larger counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.parameters import OUTER, weights
from jaxllm.theory.products import products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import Symbols


def estimate(s: Symbols, memory: tuple[Line, ...]) -> tuple[Any, tuple[Term, ...]]:
    """Bytes at the peak: all memory lines, and the larger of the working sets of the loss and of a block."""
    held = tuple(Term(line.name, line.value, "held throughout the backward pass") for line in memory)
    block, loss = _block(s), _loss(s)
    of_block, of_loss = (add(term.value for term in terms) for terms in (block, loss))
    larger = of_block >= of_loss
    working = tuple(Term(f"block: {t.label}", t.value * larger, t.detail) for t in block) + tuple(
        Term(f"loss: {t.label}", t.value * ~np.asarray(larger), t.detail) for t in loss
    )
    terms = (*held, *working)
    return add(term.value for term in terms), terms


def _block(s: Symbols) -> tuple[Term, ...]:
    """A block's backward pass: attention square, activations and their gradients, weights and theirs."""
    layer = add(weight.whole for weight in weights(s) if weight.name not in OUTER)
    rows = s.b * s.T
    width = {product.name: product.leaves.size for product in products(s)}
    stream = 4 * s.D + 2 * (width["q"] + width["k"]) + 4 * width["up"]
    return (
        Term("scores and their gradients", rows * s.T * (s.N // s.t) * (4 + 2 * s.c), "b N/t T^2 (4 + 2 c)"),
        Term("activations and their gradients", rows * stream * s.c, "b T (4 D + 2 (N + K) H/t + 4 F/t) c"),
        Term("weights of the layer", layer * s.c * _copied(s), "a layer's weights, c bytes each, gathered or cast"),
        Term("their gradients", layer * (s.c + s.g), "the same in c and g bytes, on the way to the accumulator"),
        Term("gradient of the head", _head(s) * s.c, "D V/t c, until the microbatch ends"),
    )


def _loss(s: Symbols) -> tuple[Term, ...]:
    """The loss and its backward pass: logits and their gradient, the f32 arithmetic between them fused."""
    columns = -(-s.V // s.t)
    return (
        Term("logits and their gradient", s.b * s.T * columns * 2 * s.c, "2 b T V/t c"),
        Term("activations", 3 * s.b * s.T * s.D * s.c, "3 b T D c"),
        Term("weights of the head", _head(s) * s.c * _copied(s), "D V/t c, gathered or cast"),
        Term("gradient of the head", _head(s) * s.c, "D V/t c, until the microbatch ends"),
    )


def _head(s: Symbols) -> Any:
    """Elements of the head that one tensor rank holds."""
    return add(weight.whole for weight in weights(s) if weight.name == ("embed" if s.tied else "head"))


def _copied(s: Symbols) -> Any:
    """Whether the compute uses copies of the weights, gathered or cast, or the held ones."""
    return (s.z >= 3) | (s.p != s.c)
