"""Ticks and buffers of the schedules that have a name, as closed forms: of one size, or of millions of them at once.

They are what `make` and `counts.slots` count in the table, which takes milliseconds to seconds to write out. p stages, m
microbatches, v chunks; integers, or integer arrays that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.schedules.named import registry
from jaxllm.spec.errors import SpecError, nearest


@dataclass(frozen=True)
class Sizes:
    """Sizes of a schedule's table, integers or arrays of them.

    ticks    rows of the table
    stash    buffers of what F keeps for B or BW, on the stage that needs most; each of one microbatch and one chunk
    weights  the same of what B keeps for W
    inputs   the same of activations and cotangents that wait for the cell that uses them
    """

    ticks: Any
    stash: Any
    weights: Any
    inputs: Any


@dataclass(frozen=True)
class _Form:
    """sizes  (p, m, v) -> Sizes
    known  (p, m, v) -> where they are those of the table, of sizes that the schedule can have
    """

    sizes: Callable[[Any, Any, Any], Sizes]
    known: Callable[[Any, Any, Any], Any] = lambda p, m, v: True


def sizes(name: str, stages: Any, microbatches: Any, chunks: Any) -> Sizes:
    """Ticks and buffers of a schedule, those of its table wherever `known` says so. Raises SpecError on a name of none.

    Where it is not known, they are those of the nearest pattern that is, and off by some.
    """
    found = _form(name).sizes(stages, microbatches, chunks)
    # a formula without m, as of a stash that is full, has a value for each m nevertheless
    each = np.broadcast_shapes(*(np.shape(count) for count in (stages, microbatches, chunks)))
    if not each:
        return Sizes(int(found.ticks), int(found.stash), int(found.weights), int(found.inputs))
    return Sizes(*(np.broadcast_to(value, each) for value in (found.ticks, found.stash, found.weights, found.inputs)))


def known(name: str, stages: Any, microbatches: Any, chunks: Any) -> Any:
    """Where `sizes` are those of the table: a bool, or an array of them. False for sizes that the schedule cannot have.
    Raises SpecError on a name of none."""
    form, named = _form(name), registry()[name]
    least, most = named.chunks
    can = (stages >= 2) & (microbatches >= (stages if named.fills else 1)) & (chunks >= least)
    if most is not None:
        can = can & (chunks <= most)
    holds = can & form.known(stages, microbatches, chunks)
    return holds if np.ndim(holds) else bool(holds)


def _form(name: str) -> _Form:
    if name not in _FORMS:
        raise SpecError(f"schedule: {name!r} has no closed form of its sizes; {nearest(name, _FORMS)}")
    return _FORMS[name]


def _gpipe(p: Any, m: Any, v: Any) -> Sizes:
    """All forwards, then all backwards, p - 1 ticks to fill and p - 1 to drain each way. The second to last stage is
    done with its forwards when the last begins its backwards, and the last has all cotangents of its own loss."""
    return Sizes(2 * (m + p - 1), m, 0, m)


def _circular(p: Any, m: Any, v: Any) -> Sizes:
    """As GPipe with v m forwards; of a chunk's outputs, all m come round before the next chunk takes the first."""
    return Sizes(2 * (v * m + p - 1), v * m, 0, m)


def _one_f_one_b(p: Any, m: Any, v: Any) -> Sizes:
    """Stage 0 keeps what the p stages have in flight. A cotangent and an activation wait at once."""
    return Sizes(2 * (m + p - 1), np.minimum(m, p), 0, np.minimum(m, 2))


def _zb_h1(p: Any, m: Any, v: Any) -> Sizes:
    """As 1F1B, but that each of the min(m, p) - 1 W that the last stage has left fills a tick of the drain."""
    kept = np.minimum(m, p)
    return Sizes(3 * m + 2 * p - 1 - kept, kept, kept, np.minimum(m, 2))


def _zb_h2(p: Any, m: Any, v: Any) -> Sizes:
    """Stage 0 runs 2 p - 1 forwards ahead, and the last stage puts off 2 (p - 1) W. Half of them fill the drain: the
    last stage starts p - 1 ticks after the first, which ends as much before it."""
    kept = np.minimum(m, 2 * p - 1)
    return Sizes(3 * m + 2 * (p - 1) - kept // 2, kept, kept, np.minimum(m, 2))


def _interleaved(p: Any, m: Any, v: Any) -> Sizes:
    """Groups of p microbatches pass a chunk before the next chunk takes them. Where the last group lacks d microbatches
    of p, each chunk but the first waits d ticks longer for what comes round.

    Stage 0 runs 2 (p - 1) + (v - 1) p forwards ahead and then keeps one more. Inputs pile up on the last stage, where
    they come in at each tick and are used at every second: half of p, and less where the last group is not full.
    """
    d = -m % p
    piled = np.maximum((p - (v + 1) * d + 2) // 2, np.where(d == 1, (p + 1) // 3, 0))
    steady = np.minimum(np.minimum(4, p + 1), 2 + (m - p) * (p // 2))
    return Sizes(
        2 * (v * m + p - 1) + (v - 1) * d,
        np.minimum((v - 1) * p + m, (v + 1) * p - 1),
        0,
        np.maximum(piled, steady),
    )


def _last_group_keeps_pace(p: Any, m: Any, v: Any) -> Any:
    """Beyond this the last group's forwards fall behind as well, by 0 to p ticks, and no simple form was found."""
    d = -m % p
    return (d <= 1) | ((v - 1) * d <= p)


def _zb_v(p: Any, m: Any, v: Any) -> Sizes:
    """The memory of 1F1B, full, all of it with W to do at the end. With m = p the last forward comes before most of
    them; between p and 2 p - 1 the order, which is found tick by tick, has no simple form."""
    few = m < 2 * p - 1
    return Sizes(
        6 * m + p - 1,
        2 * p,
        np.where(few, 2 * (p // 2 + 1), 2 * p),
        np.where(few, np.maximum(2, (p + 1) // 2), 3),
    )


def _dualpipev(p: Any, m: Any, v: Any) -> Sizes:
    """The order for 2 p microbatches, cut: `more` of the second p are there. The B that the last stages have apart from
    their W are of the last microbatches, which are the first to be cut."""
    more = np.minimum(m, 2 * p) - p
    return Sizes(
        np.maximum(3 * m + 4 * p - 2 - (more == 0), 4 * m + 2 * p - 1),
        2 * p + (more > 0),
        np.maximum(np.maximum(1, (more + 1) // 2), 2 * more - p),
        2,
    )


_FORMS = {
    "gpipe": _Form(_gpipe),
    "1f1b": _Form(_one_f_one_b),
    "interleaved": _Form(_interleaved, _last_group_keeps_pace),
    "circular": _Form(_circular),
    "zb-h1": _Form(_zb_h1),
    "zb-h2": _Form(_zb_h2),
    "zb-v": _Form(_zb_v, lambda p, m, v: (m == p) | (m >= 2 * p - 1)),
    "dualpipev": _Form(_dualpipev),
}
