"""What the forward pass saves for the backward pass, per device: one microbatch's, in bytes.

remat=full saves each block's input. remat=none also saves what the backward pass would need a matmul, or a sum over
devices, to compute again. Korthikanti et al. 2022 count the like for a GPT block: in section 4.1 all that is saved, in
section 4.2.1 divided by tensor parallelism, in section 5 the input alone. Of their s b h (10 + 24/t + 5 a s/(h t)) bytes
a GPT here saves s b h (4 + 16/t + 2 a s/(h t)), for it has no dropout and so none of its masks, computes what is
elementwise again (the norms, which are the inputs of q, k, v and up, and GELU, which is the input of down), and saves
scores in the place of their softmax.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.products import Width, products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import KORTHIKANTI, ZERO_BUBBLE, Symbols, reference


def lines(s: Symbols) -> tuple[Line, ...]:
    """`residuals`: for each of L layers b T c times the widths of what is saved. In a pipeline they lie in its `stash`,
    in as many slots as the schedule takes, each for all layers of a chunk; what B keeps for W is the `weight_stash`, and
    what waits for its cell the `inbox`."""
    none = 1 - s.full
    where = {True: reference(KORTHIKANTI, "section 5"), False: reference(KORTHIKANTI, "sections 4.1 and 4.2.1")}
    saved = {"block input": Width(s.D, "D")} | {
        name: Width(none * width.size, width.formula) for name, width in _saved(s).items()
    }
    staged = s.pipe > 1
    rows = s.b * s.T * s.c

    def terms(
        times: Any, formula: str, widths: dict[str, Width], extra: dict[str, str], source: str = ""
    ) -> tuple[Term, ...]:
        return tuple(
            Term(name, times * rows * width.size, f"{formula} b T {width.formula} c{extra.get(name, '')}",
                 source or where[name == "block input"])
            for name, width in widths.items()
        )  # fmt: skip

    only = dict.fromkeys(_saved(s), ", as remat=none")
    stash = terms(s.stash * s.depth, "slots layers", saved, only)
    kept = terms(s.kept * s.depth, "slots layers", _for_weights(s), {}, reference(ZERO_BUBBLE, "section 2"))
    inbox = (Term("activations and gradients", s.inbox * rows * s.D, "slots b T D c"),)
    return tuple(
        Line("memory", name, add(term.value for term in found), terms=found)
        for name, found in (
            ("residuals", terms((1 - staged) * s.L, "L", saved, only)),
            ("stash", stash),
            ("weight_stash", kept),
            ("inbox", inbox),
        )
    )


def _for_weights(s: Symbols) -> dict[str, Width]:
    """What the gradients of a block's weights are made of: the input of each product and the gradient of its output
    (Qi et al. 2024, zero bubble, section 2). Products of one input share it."""
    inputs = {product.input: product.enters for product in products(s)}
    return inputs | {f"gradient of {product.name}'s output": product.leaves for product in products(s)}


def _saved(s: Symbols) -> dict[str, Width]:
    """What remat=none saves of a block beside its input, as each family's SAVED in jaxllm/model."""
    widths = {}
    for product in products(s):
        if product.column:
            widths[product.name] = product.leaves
        if product.name == "o":
            widths["scores"] = Width(s.N // s.t * s.T, "N T/t")
            widths["attention"] = product.enters
            widths["residual"] = product.leaves
    return widths
