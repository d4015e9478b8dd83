"""What the forward pass saves for the backward pass, per device: one microbatch's, in bytes.

remat=full saves each block's input, and what `save` names. remat=none also saves what the backward pass would need a
matmul, or a sum over devices, to compute again, and remat=selective all of that but the scores, which grow with the
square of the sequence. Korthikanti et al. 2022 count the like for a GPT block: in section 4.1 all that is saved, in
section 4.2.1 divided by tensor parallelism, in section 5 without the attention core (selective) and the input alone. Of their s b h (10 + 24/t + 5 a s/(h t)) bytes
a GPT here saves s b h (4 + 16/t + 2 a s/(h t)), for it has no dropout and so none of its masks, computes what is
elementwise again (the norms, which are the inputs of q, k, v and up, and GELU, which is the input of down), and saves
scores in the place of their softmax.

Where attention goes block by block there are no scores to save. Its output is saved with the statistics of its softmax,
one f32 number for each query and head (Dao 2023, section 3.1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxllm.spec.activations import INPUT, STATISTICS
from jaxllm.spec.ledger import TO_DEVICE, TO_HOST, Line, Term
from jaxllm.theory.products import Width, part, products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import DAO, INFINITY, KORTHIKANTI, ZERO_BUBBLE, Symbols, pick, reference

BLOCK_INPUT = "block input"  # spec.activations.INPUT, as the ledger calls it


def lines(s: Symbols) -> tuple[Line, ...]:
    """`residuals`: for each of L layers b T c times the widths of what is saved, and `host`, of those saved there. In a
    pipeline they lie in its `stash`, in as many slots as the schedule takes, each for all layers of a chunk; what B keeps for
    W is the `weight_stash`, and what waits for its cell the `inbox`."""
    staged = s.pipe > 1
    on_device, away = _saved(s, on_host=0), _saved(s, on_host=1)
    only, as_offloaded = (dict.fromkeys(_named(s), f", as it is {kept}") for kept in ("saved", "offloaded"))
    stash = _terms(s, s.stash * s.depth, "slots layers", on_device, only)
    kept = _terms(s, s.kept * s.depth, "slots layers", _for_weights(s), {}, reference(ZERO_BUBBLE, "section 2"))
    stream = _stream(s)
    inbox = (Term("activations and gradients", s.inbox * _bytes(s, stream), f"slots b {s.here} {stream.formula} c"),)
    return tuple(
        Line("memory", name, add(term.value for term in found), terms=found)
        for name, found in (
            ("residuals", _terms(s, (1 - staged) * s.L, "L", on_device, only)),
            ("host", _terms(s, (1 - staged) * s.L, "L", away, as_offloaded)),
            ("stash", stash),
            ("weight_stash", kept),
            ("inbox", inbox),
        )
    )


def copies(s: Symbols) -> tuple[Line, ...]:
    """What is saved in host memory goes there in the forward pass of each microbatch, and comes back in its backward pass."""
    source = reference(INFINITY, "section 5.1.2")
    times = s.m * s.L

    def line(name: str, when: str, label: str, width: Width) -> Line:
        (term,) = _terms(s, times, "m L", {label: width}, {label: f", {when}"}, source)
        dtype = s.dtypes["c"] if width.bytes == "c" else "f32"
        return Line("transfers", name, term.value, dtype=dtype, count=times, terms=(term,))

    return tuple(
        line(name, when, label, width)
        for name, when in ((TO_DEVICE, "for the backward pass"), (TO_HOST, "saved"))
        for label, width in _saved(s, on_host=1).items()
    )


def offloaded(s: Symbols) -> Any:
    """Bytes that one layer saves in host memory."""
    return add(_bytes(s, width) for width in _saved(s, on_host=1).values())


def _saved(s: Symbols, *, on_host: int) -> dict[str, Width]:
    """Features of a token in each activation of a block that is saved, on the device or in host memory; none where it is
    not."""

    def there(name: str) -> Any:
        return s.offloads(name) if on_host else 1 - s.offloads(name)

    stream = _stream(s)
    named = {name: replace(width, size=s.saves(name) * there(name) * width.size) for name, width in _named(s).items()}
    return {BLOCK_INPUT: replace(stream, size=there(INPUT) * stream.size)} | named


def _terms(
    s: Symbols, times: Any, formula: str, widths: dict[str, Width], extra: dict[str, str], source: str = ""
) -> tuple[Term, ...]:
    """Bytes of what has these widths, so many `times`, as the formula has it."""
    where = {
        BLOCK_INPUT: reference(KORTHIKANTI, f"section {pick(s.q > 1, '4.2.2', '5')}"),
        STATISTICS: reference(DAO, "section 3.1"),
    }
    elsewhere = reference(KORTHIKANTI, f"sections 4.1 and {pick(s.q > 1, '4.2.2', '4.2.1')}")
    if not isinstance(s.b, int) and widths:  # of many layouts their sum, for there are terms by the hundred
        return (Term("all of them", times * add(_bytes(s, width) for width in widths.values())),)
    return tuple(
        Term(name, times * _bytes(s, width), f"{formula} b {s.here} {width.formula} {width.bytes}{extra.get(name, '')}",
             source or where.get(name, elsewhere), part(name))
        for name, width in widths.items()
    )  # fmt: skip


def _for_weights(s: Symbols) -> dict[str, Width]:
    """What the gradients of a block's weights are made of: the input of each product and the gradient of its output
    (Qi et al. 2024, zero bubble, section 2). Products of one input share it."""
    inputs = {product.input: product.enters for product in products(s)}
    return inputs | {f"gradient of {product.name}'s output": product.leaves for product in products(s)}


def _named(s: Symbols) -> dict[str, Width]:
    """The activations of a block that can be saved, by their names in spec.activations."""
    widths = {}
    for product in products(s):
        if product.column:
            widths[product.name] = product.leaves
        if product.name == "o":
            widths["scores"] = Width(s.N // s.t * s.T, "N T/t")
            widths["attention"] = product.enters
            widths[STATISTICS] = Width(s.w * (s.N // s.t), "N/t", bytes="4")
            widths["residual"] = _stream(s)
    return widths


def _stream(s: Symbols) -> Width:
    """The residual stream: of all positions, or cut along the sequence."""
    return Width(s.D, pick(s.q > 1, "D/q", "D"), s.q)


def _bytes(s: Symbols, width: Width) -> Any:
    return s.b * (s.S // width.cut) * width.size * (s.c if width.bytes == "c" else int(width.bytes))
