"""The peak of memory: an estimate. What is held all the time is exact; what lives for a moment depends on the schedule.

The peak comes in one of a few moments of a step: at the loss, where the logits are; at the turn, where the backward pass of
the layers begins; in a block, while its attention goes back, where the gradients of its input are summed, while its
feed-forward goes back, or where its weights' gradients wait to be reduced; behind the layers, with the gradients of
embedding and head; or at the update. Each has what must be alive at once, and the largest counts.

What is alive then was read off compiled programs (experiments/bench_peak.py says how far it is off). The compilers are alike
but for habits that have a comment each, and `target` tells which applies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.spec.activations import INPUT
from jaxllm.spec.ledger import Line, Term
from jaxllm.theory.activations import offloaded
from jaxllm.theory.muon import is_matrix
from jaxllm.theory.parameters import OUTER, weights
from jaxllm.theory.products import ATTENTION, MLP, part, products
from jaxllm.theory.state import add
from jaxllm.theory.symbols import Symbols, pick

Terms = tuple[Term, ...]

COMES = ("gradients", "residuals")  # lines that are not there all the time
COMBINED = 30 * 2**20  # bytes: xla_gpu_reduce_scatter_combine_threshold_bytes, as XLA has it


def total(s: Symbols, memory: tuple[Line, ...], target: str = "") -> Any:
    """The bytes of `estimate` alone."""
    lines = {line.name: line.value for line in memory}
    held = [line.value for line in memory if line.name not in (*COMES, "host")]
    largest: Any = 0
    for needed in _moments(s, lines["gradients"], lines["residuals"], target).values():
        largest = np.maximum(largest, add(term.value for term in needed))
    return add((*held, largest))


def estimate(s: Symbols, memory: tuple[Line, ...], target: str = "") -> tuple[Any, Terms]:
    """Bytes at the peak, and what they are: what is held throughout, and what the moment with the most has beside it.
    `target` is whose compiler it is for: `cpu` or `tpu`, or that of a gpu."""
    lines = {line.name: line.value for line in memory}
    held = [Term(line.name, line.value, "held throughout") for line in memory if line.name not in (*COMES, "host")]
    moments = _moments(s, lines["gradients"], lines["residuals"], target)
    sums = {name: add(term.value for term in needed) for name, needed in moments.items()}
    largest, found = 0, np.asarray(False)
    for value in sums.values():
        largest = np.maximum(largest, value)
    terms = held
    for name, needed in moments.items():
        here = (sums[name] == largest) & ~found  # of equals the first alone
        found = found | here
        for term in needed:
            label = term.label if term.label in COMES else f"{name}: {term.label}"
            terms.append(Term(label, term.value * here, term.detail))
    return add(term.value for term in terms), tuple(terms)


def _moments(s: Symbols, gradients: Any, residuals: Any, target: str) -> dict[str, Terms]:
    """The moments of a step, and what each has beside what is held throughout."""
    tpu = target == "tpu"
    # With one microbatch there is nothing to add to: the layers' accumulator is made behind the loss, the others at the end.
    before = 1 * ((s.m > 1) | (s.pipe > 1))
    outer = add(_bytes(s, weight, s.g, stage=2) for weight in weights(s) if weight.name in OUTER)
    earlier = Term("gradients", gradients * before, "of the microbatches before")
    layers = pick(before, "the accumulator", "the accumulator's layers")
    so_far = Term("gradients", gradients - outer + outer * before, layers)
    saved = Term("residuals", residuals, "until the backward pass is through")
    head = Term("gradient of the head", _head(s) * s.c, "D V/t c, until the microbatch ends")
    # XLA:GPU makes room for ZeRO 1's slices before the loops, XLA:TPU when they are reduced.
    slices = _slices(s)
    always = (_prepared(s),) if tpu else ()
    block = (saved, so_far, head, *always, *(() if tpu else (slices,)), _back(s, tpu=tpu))
    return {
        "loss": (saved, earlier, *always, *_loss(s, tpu=tpu)),
        "turn": () if target in ("cpu", "tpu") else (saved, _begun(s, gradients, outer, before), head, *_turn(s)),
        "attention": (*block, *_attention(s, tpu=tpu), *_around_attention(s)),
        "sum": (*block, *_sum(s)),
        "feed-forward": (*block, *_feed_forward(s)),
        "reduction": (*block, *_reduction(s)),
        "ends": (so_far, slices, *_ends(s)),
        "update": (Term("gradients", gradients, "of the whole step"), slices, *_update(s)),
    }


# ---------------------------------------------------------------- the moments


def _loss(s: Symbols, *, tpu: bool) -> Terms:
    """The loss and its backward pass. The f32 arithmetic from the logits to their gradient is fused, and takes no memory. On
    XLA:TPU the gradient does not take the logits' place where they are of one sequence, as was seen in four programs; in two
    programs of two sequences it does."""
    rows = s.b * s.S
    streams = (2 * rows + rows // s.q) * s.D
    both = tpu * (s.b == 1)
    label = pick(both, "logits and their gradient", "logits, then their gradient")
    return (
        Term(label, (1 + both) * rows * -(-s.V // s.t) * s.c, f"{pick(both, '2 ', '')}b {s.here} V/t c"),
        Term("streams and their gradients", streams * s.c, f"b {s.here} (2 D + D/q) c"),
        Term("weights of the head, then their gradient", _head(s) * s.c, "D V/t c"),
    )


def _update(s: Symbols) -> Terms:
    """Muon has all its matrices twice in f32: its momentum looked ahead, and what is made orthogonal of it, layer by layer."""
    if s.optimizer.name != "muon":
        return ()
    matrices = add(_bytes(s, weight, 4, stage=1) for weight in weights(s) if is_matrix(weight))
    return (Term("momentum looked ahead, and made orthogonal", 2 * matrices, "twice a layer's matrices, L times, 4 bytes each"),)


def _turn(s: Symbols) -> Terms:
    """Where the backward loop over the layers begins. XLA:GPU's products there want saved scores with other positions
    innermost than those of the forward pass, and it transposes them all at once."""
    scores = s.saves("scores") * (1 - s.offloads("scores")) * (s.pipe == 1) * s.L * s.b * s.S * (s.N // s.t) * s.T
    return (Term("scores of all layers, transposed", scores * s.c, f"L b {s.here} N T/t c, as they are saved"),)


def _begun(s: Symbols, gradients: Any, outer: Any, before: Any) -> Term:
    """The accumulator then. That of a single microbatch's layers takes the place of what was transposed; but where a
    collective of the head's is under way, over tensor or to gather it, XLA:GPU has begun the accumulator before."""
    collective = (s.t > 1) | (s.z >= 3) & (s.slices > 1)
    value = gradients * before + (gradients - outer) * collective * (1 - before)
    return Term("gradients", value, "the accumulator, where it is begun before the scores are transposed")


def _attention(s: Symbols, *, tpu: bool) -> Terms:
    """What attention itself has in its backward pass, in each of its forms."""
    rows, width = s.b * s.S, _widths(s)
    heads = s.N // s.t // (s.ring + (1 - s.ring) * s.x)
    held = pick((s.x > 1) & (s.ring == 0), "N/(t x)", "N/t")
    each, formula = _each_pair(s, tpu=tpu)
    square, tile = s.T * s.T * each, s.C * s.C * (8 + 2 * s.c)
    statistics = 2 * (s.N // s.t) + 2 * width["k"]
    # In a ring the queries' gradients are added up in f32 too; of keys and values two parts are here beside the own one,
    # and of the sums of their gradients another.
    going_round = (width["q"] + 2 * width["k"]) * 4 + 4 * width["k"] * s.c
    formula_of_ring = f"b {s.here} ((N + 2 K) H/t 4 + 4 K H/t c), as context > 1"
    return (
        Term("scores and their gradients", s.b * heads * (s.w * tile + (1 - s.w - s.f) * square),
             pick(s.w, f"b {held} C^2 (8 + 2 c)", pick(s.f, "0, in a kernel", f"b {held} T^2 {formula}"))),
        Term("statistics and accumulators", s.w * rows * statistics * 4, f"b {s.here} (2 N + 2 K H)/t 4, block by block"),
        Term("what goes round the ring", s.ring * rows * going_round, formula_of_ring),
    )  # fmt: skip


def _each_pair(s: Symbols, *, tpu: bool) -> tuple[Any, str]:
    """Bytes of a pair of positions and a head in attention's backward pass, and their formula.

    Scores, the gradient of the probabilities, and on XLA:GPU the softmax's derivative in f32, which XLA:TPU keeps inside of
    fusions. Probabilities that were computed again wait for the gradient of the values, which both take after that of the
    scores; under ZeRO 3 before, where it frees a gathered weight. XLA:GPU does so only without tensor parallelism, and with
    as many heads of keys as of queries only where the gradient of the values' weights can be reduced then. With one head of
    keys and one sequence XLA:GPU writes no f32, but all four in c bytes: with c = 2 as much as without waiting.
    """
    first = 1 if tpu else (s.t == 1) & ((s.K < s.N) | ~_reduced_with_queries(s))
    waits = s.again("attention") * (1 - (s.z >= 3) * first)
    if tpu:
        return (2 + waits) * s.c, pick(waits, "3 c", "2 c")
    waits = waits * (1 - (s.K <= s.t) * (s.b == 1))
    return 4 + (2 + waits) * s.c, pick(waits, "(4 + 3 c)", "(4 + 2 c)")


def _around_attention(s: Symbols) -> Terms:
    """What else is there of a block then, whose feed-forward has gone back already."""
    return (_streams(s, whole=3, cut=4), _of_attention(s, 4), _waiting(s), _weights(s, ATTENTION))


def _sum(s: Symbols) -> Terms:
    """Behind attention, where the gradients of its input by way of queries, keys and values are added up: three and their
    sum, beside the input and the gradient of the output."""
    return (_streams(s, whole=6, cut=2), _of_attention(s, 2), _waiting(s), _weights(s, ATTENTION))


def _feed_forward(s: Symbols) -> Terms:
    """A block's feed-forward on its way back, with all that attention's way back will take."""
    return (
        _streams(s, whole=2, cut=4),
        _of_attention(s, 2),
        _hidden(s),
        _weights(s),
    )


def _reduction(s: Symbols) -> Terms:
    """The end of a block, where its weights' gradients are, to be reduced together from ZeRO 2 on; else they are added to
    the accumulator as they are made."""
    return (
        _streams(s, whole=2, cut=4),
        _of_attention(s, 2),
        Term("gradients of the layer's weights", _reduced(s) * _layer(s) * s.g, "g bytes each, as z >= 2"),
        Term("one of them", s.D * _widths(s)["up"] * s.c, "D F/t c, as it is made"),
        _weights(s, ATTENTION),
    )


def _ends(s: Symbols) -> Terms:
    """Behind the layers: the gradients of embedding and head, made in c bytes each and reduced in g."""
    one = s.D * -(-s.V // s.t)
    return (
        Term("gradients of embedding and head", (2 - s.tied) * one * s.g, "2 D V/t g"),
        Term("one of them", (s.c != s.g) * one * s.c, "D V/t c, as it was made"),
    )


# ---------------------------------------------------------------- what they are made of


def _streams(s: Symbols, *, whole: int, cut: int) -> Term:
    """The residual stream and its gradients: `cut` along the sequence where it is, as it goes through a block, and `whole`,
    gathered or on the way into a sum."""
    value = s.b * (s.S * whole + s.S // s.q * cut) * s.D * s.c
    return Term("streams and their gradients", value, f"b {s.here} ({whole} D + {cut} D/q) c")


def _back(s: Symbols, *, tpu: bool) -> Term:
    """What came back from host memory of a layer's activations. XLA:TPU has all of it throughout a turn of the loop, which
    takes it from the turn before and fetches that of the next. XLA:GPU fetches it in its own turn, and has as much of it as
    where it is computed again; but a block's input is else read where all of them lie."""
    if tpu:
        return Term("back from host memory", offloaded(s), "what a layer has offloaded")
    value = s.offloads(INPUT) * s.b * (s.S // s.q) * s.D * s.c
    return Term("back from host memory", value, f"the block's input, b {s.here} D/q c, as it is offloaded")


def _of_attention(s: Symbols, count: int) -> Term:
    """Queries, keys, values and the output of attention, so many times half of them: twice, or with their gradients."""
    width = _widths(s)
    value = count * s.b * s.S * (width["q"] + width["k"]) * s.c
    return Term("queries, keys, values, output", value, f"b {s.here} {count} (N + K) H/t c")


def _waiting(s: Symbols) -> Term:
    """What the feed-forward has left: what the gradients of its weights are made of, or from ZeRO 2 on these gradients, which
    wait for attention's, to be reduced with them."""
    hidden, gradients = _hidden(s).value, _reduced(s) * _layer(s, MLP) * s.g
    formula = f"{_hidden(s).detail}, or where that is more the gradients, g bytes each, as z >= 2"
    return Term("of the feed-forward, or its weights' gradients", np.maximum(hidden, gradients), formula)


def _hidden(s: Symbols) -> Term:
    """What the feed-forward's first products give, and the gradients of it."""
    given = [product.leaves.size for product in products(s) if product.column and part(product.name) == MLP]
    return Term("hidden and its gradients", 2 * s.b * s.S * add(given) * s.c, f"b {s.here} {2 * len(given)} F/t c")


def _weights(s: Symbols, of: str = "") -> Term:
    """A layer's weights, or those of one part of it, where the compute uses copies: gathered, cast, or from host memory."""
    label = f"weights of the layer's {of.rpartition('.')[2]}" if of else "weights of the layer"
    copied = (s.z >= 3) & (s.slices > 1) | (s.p != s.c) | np.equal(s.hp, 1)
    return Term(label, _layer(s, of) * s.c * copied, "c bytes each, gathered or cast")


def _reduced(s: Symbols) -> Any:
    """Whether each layer's gradients are reduced at once."""
    return (s.z >= 2) & (s.slices > 1)


def _reduced_with_queries(s: Symbols) -> Any:
    """Whether XLA:GPU reduces the gradient of the values' weights together with that of the queries' or the keys', which is
    made later. Reduce-scatters that follow each other by name become one up to COMBINED bytes of slices; a larger one stays
    alone."""
    group, filled, groups = 0, 0, {}
    for weight in sorted((weight for weight in weights(s) if weight.stacked), key=lambda weight: weight.name):
        size = weight.whole * s.g // weight.parts
        alone, opens = size > COMBINED, filled + size > COMBINED
        group = group + (opens & ~np.asarray(alone))
        filled = np.where(alone, filled, size + np.where(opens, 0, filled))
        groups[weight.name] = np.where(alone, -1, group)
    return (groups["v"] >= 0) & ((groups["v"] == groups["q"]) | (groups["v"] == groups["k"]))


def _slices(s: Symbols) -> Term:
    """What ZeRO 1 reduces the layers' gradients into behind the backward pass."""
    sliced = add(_bytes(s, weight, s.g, stage=1) for weight in weights(s) if weight.stacked)
    return Term("slices of the gradients", (s.z == 1) * (s.slices > 1) * sliced, f"g/({s.over}), that ZeRO 1 reduces into")


def _prepared(s: Symbols) -> Term:
    """XLA:TPU prepares the weights of all layers before the loop over them: it casts them, and where there is nothing to cast
    lays those of the queries out anew, and of keys and values as wide as these, if they are multiplied with again in the
    backward pass. XLA:GPU does so with each layer's in its turn."""
    stacked = {weight.name: _bytes(s, weight, s.c, stage=3) for weight in weights(s) if weight.stacked}
    anew = stacked["q"] * s.again("q") + (s.N == s.K) * (stacked["k"] * s.again("k") + stacked["v"] * s.again("v"))
    value = (1 - s.hp) * ((s.p != s.c) * add(stacked.values()) + (s.p == s.c) * anew)
    formula = pick(s.p != s.c, "L times all that a layer has, c bytes each", "L D N H/t c for each of them")
    return Term("weights, cast or laid out anew", value, f"{formula}, as they are sliced")


def _bytes(s: Symbols, weight: Any, size: int, *, stage: int) -> Any:
    """A weight's at `size` bytes an element, sliced from a ZeRO stage on."""
    return weight.elements * size // np.where(s.z >= stage, weight.parts, 1)


def _head(s: Symbols) -> Any:
    """Elements of the head that one tensor rank holds."""
    return add(weight.whole for weight in weights(s) if weight.name == ("embed" if s.tied else "head"))


def _layer(s: Symbols, of: str = "") -> Any:
    """Elements of a layer's weights on one tensor rank, or those of one part of it."""
    return add(weight.whole for weight in weights(s) if weight.stacked and (not of or part(weight.name) == of))


def _widths(s: Symbols) -> dict[str, Any]:
    """Features of a token on one tensor rank behind each product."""
    return {product.name: product.leaves.size for product in products(s)}
