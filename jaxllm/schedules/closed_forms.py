"""What a schedule idles, with the conditions under which the simulation agrees: as the papers have it, and for other times
and fewer microbatches as it is found here.

The idle time of a step is its span less the work of a stage, m (f + b + w). p stages, m microbatches, v chunks. All of it
takes numbers, or arrays with one entry a case.

The order of a stage does not depend on the times, so that a span is that of the longest way through what waits for what: the
largest of some sums of f, b and w. Those found here are the sums that are the largest for some times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from jaxllm.schedules.simulation import bubble_of
from jaxllm.schedules.table import Schedule
from jaxllm.schedules.times import Times

Counts = tuple[Any, Any, Any]  # p, m, v: integers, or arrays of them


@dataclass(frozen=True)
class ClosedForm:
    """Idle time of the busiest span of a schedule.

    formula  as it is written; `idle` computes it, in the unit of the times, and what is more with few microbatches
    when     under which conditions, as it is written; `holds` tells

    The times are `Times`, or what has arrays for f, b, w and comm.
    """

    formula: str
    when: str
    source: str
    idle: Callable[[Counts, Any], Any]
    holds: Callable[[Counts, Any], Any]


def closed_bubble(schedule: Schedule, times: Times | None = None) -> float | None:
    """The share of a step's span that is idle, by closed form; None where none is known to hold."""
    times = Times() if times is None else times
    counts = schedule.stages, schedule.microbatches, schedule.chunks
    form = CLOSED_FORMS.get(schedule.name)
    if form is None or not form.holds(counts, times):
        return None
    work = schedule.microbatches * times.stage
    return bubble_of(work + form.idle(counts, times), schedule.microbatches, times)


def _largest(*values: Any) -> Any:
    """Of numbers, or entry by entry of arrays. Only these load NumPy: a schedule's report does without."""
    if all(isinstance(value, int | float) for value in values):
        return max(values)
    import numpy as np

    return reduce(np.maximum, values)


def _least(*values: Any) -> Any:
    return -_largest(*(-value for value in values))


def _at_once(counts: Counts, times: Any) -> Any:
    return times.comm == 0


def _lacking(counts: Counts) -> Any:
    """Microbatches that the last group of p lacks."""
    p, m, _ = counts
    return -m % p


def _interleaved(counts: Counts, times: Any) -> Any:
    """Each chunk but the last waits for a backward of each microbatch that the last group lacks."""
    p, _, v = counts
    back = times.b + times.w
    return ((p - 1) * (times.f + back) + (v - 1) * _lacking(counts) * back) / v


def _last_group_keeps_pace(counts: Counts, times: Any) -> Any:
    """Beyond this the last group's forwards wait for each other as well, and no simple form was found."""
    p, _, v = counts
    lacking = _lacking(counts)
    waits = (times.f <= times.b + times.w) & ((lacking == 1) | ((v - 1) * lacking <= p))
    return (times.comm == 0) & ((lacking == 0) | waits)


def _zb_h1(counts: Counts, times: Any) -> Any:
    """With n = min(m, p): (p - 1) (f + b) - (n - 1) min(f, w)."""
    p, m, _ = counts
    return (p - 1) * (times.f + times.b) - (_least(m, p) - 1) * _least(times.f, times.w)


def _zb_h2(counts: Counts, times: Any) -> Any:
    """With n = 2 p - 1, of all microbatches that the first stage can run ahead: (p - 1) max(f + b - 2 w, b - f, 0)."""
    p, m, _ = counts
    f, b, w = times.f, times.b, times.w
    n = _least(m, 2 * p - 1)
    half, odd = (n - 1) // 2, (n - 1) % 2
    return _largest(
        (p - 1) * (f + b) - (n - 1) * w,
        (p - n) * f + (p - 1) * b,
        (p - 1 - half) * (f + b) - odd * _least(f, w),
    )


def _zb_v(counts: Counts, times: Any) -> Any:
    """The first sum is for any times, with m >= 2 p - 1. What fewer microbatches add is known for equal times alone."""
    p, m, _ = counts
    f, b, w = times.f, times.b, times.w
    many = (p - 1) * _largest(f - (w + _least(b, w)) / 2, b - w, (f - b) / 2, (b - f) / 2, (w - f) / 2)
    return many + _largest(0, 2 * p - 1 - m) * f / 2


def _zb_v_holds(counts: Counts, times: Any) -> Any:
    p, m, _ = counts
    return (times.comm == 0) & ((m >= 2 * p - 1) | ((times.f == times.b) & (times.b == times.w)))


def _dualpipev(counts: Counts, times: Any) -> Any:
    """Each microbatch beyond p + 1, until there are 2 p of them, fills the wait for half of w + min(b, w)."""
    p, m, _ = counts
    f, b, w = times.f, times.b, times.w
    saved = _largest(0, _least(m, 2 * p) - p - 1)
    longest = _largest(2 * (p - 1) * f, (p - 1) * (f + b + w), (p - 1) * (2 * b + w) - (m > p) * f)
    return (longest - saved * (w + _least(b, w))) / 2


CLOSED_FORMS = {
    "gpipe": ClosedForm(
        "(p - 1) (f + b + w + 2 comm)",
        "always",
        "Huang et al. 2019, 1811.06965, section 2.3; Narayanan et al. 2021, 2104.04473, section 2.2.1",
        lambda n, t: (n[0] - 1) * (t.stage + 2 * t.comm),
        lambda n, t: True,
    ),
    "1f1b": ClosedForm(
        "(p - 1) (f + b + w)",
        "comm = 0",
        "Narayanan et al. 2021, 2104.04473, section 2.2.1",
        lambda n, t: (n[0] - 1) * t.stage,
        _at_once,
    ),
    "interleaved": ClosedForm(
        "(p - 1) (f + b + w) / v; more where p does not divide m",
        "comm = 0, d = -m mod p: d = 0, or f <= b + w and d = 1 or (v - 1) d <= p",
        "Narayanan et al. 2021, 2104.04473, section 2.2.2, where p divides m; else found here",
        _interleaved,
        _last_group_keeps_pace,
    ),
    "circular": ClosedForm(
        "(p - 1) (f + b + w) / v",
        "comm = 0",
        "MaxText documentation, pipeline parallelism: (p - 1) / (p - 1 + v m) of a step",
        lambda n, t: (n[0] - 1) * t.stage / n[2],
        _at_once,
    ),
    "zb-h1": ClosedForm(
        "(p - 1) (f + b) - (min(m, p) - 1) min(f, w)",
        "comm = 0",
        "Qi et al. 2023, 2401.10241, table 2: (p - 1) (f + b - w), which holds where w <= f and m >= p; else found here",
        _zb_h1,
        _at_once,
    ),
    "zb-h2": ClosedForm(
        "(p - 1) max(f + b - 2 w, b - f, 0); more where m < 2 p - 1",
        "comm = 0",
        "Qi et al. 2023, 2401.10241, table 2: (p - 1) (f + b - 2 w), which holds where w <= f, 2 w <= f + b and m >= 2 p - 1; "
        "else found here",
        _zb_h2,
        _at_once,
    ),
    "zb-v": ClosedForm(
        "(p - 1) max(f - (w + min(b, w)) / 2, b - w, |f - b| / 2, (w - f) / 2); more where m < 2 p - 1",
        "comm = 0, and m >= 2 p - 1 or f = b = w",
        "Qi et al. 2023, 2401.10241, table 2: 0 for equal times and many microbatches; else found here, as the order is",
        _zb_v,
        _zb_v_holds,
    ),
    # DeepSeek's table has (p - 1) (F&B + B - 3 W); with F&B = F + B that is b / 2 more for each of the p - 1. It counts
    # pairs whose results leave together, at their end; here the first cell of a pair sends before the second begins.
    # With w <= b <= f <= b + w and m >= 2 p it is (p - 1) (f + b - w) / 2.
    "dualpipev": ClosedForm(
        "(max((p - 1) (f + max(b, f - w)), 2 (p - 1) b - f) - (p - 1) min(b, w)) / 2; more where m < 2 p",
        "comm = 0",
        "found here; DeepSeek-AI, repository DualPipe, whose pairs send later, has (p - 1) (f + 2 b - w) / 2",
        _dualpipev,
        _at_once,
    ),
}
