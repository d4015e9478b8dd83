"""What the papers say that a schedule idles, with the conditions under which the simulation agrees.

The idle time of a step is its span less the work of a stage, m (f + b + w). p stages, m microbatches, v chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.schedules.simulation import bubble_of
from jaxllm.schedules.table import Schedule
from jaxllm.schedules.times import Times

Counts = tuple[int, int, int]  # p, m, v


@dataclass(frozen=True)
class ClosedForm:
    """Idle time of the busiest span of a schedule.

    formula  as it is written; `idle` computes it
    when     under which conditions, as it is written; `holds` tells
    """

    formula: str
    when: str
    source: str
    idle: Callable[[Counts, Times], float]
    holds: Callable[[Counts, Times], bool]


def closed_bubble(schedule: Schedule, times: Times | None = None) -> float | None:
    """The share of a step's span that is idle, by closed form; None where none is known to hold."""
    times = Times() if times is None else times
    counts = schedule.stages, schedule.microbatches, schedule.chunks
    form = CLOSED_FORMS.get(schedule.name)
    if form is None or not form.holds(counts, times):
        return None
    work = schedule.microbatches * times.stage
    return bubble_of(work + form.idle(counts, times), schedule.microbatches, times)


def _at_once(counts: Counts, times: Times) -> bool:
    return times.comm == 0


def _in_groups(counts: Counts, times: Times) -> bool:
    p, m, _ = counts
    return times.comm == 0 and m % p == 0


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
        "(p - 1) (f + b + w) / v",
        "comm = 0, and p divides m",
        "Narayanan et al. 2021, 2104.04473, section 2.2.2",
        lambda n, t: (n[0] - 1) * t.stage / n[2],
        _in_groups,
    ),
    "circular": ClosedForm(
        "(p - 1) (f + b + w) / v",
        "comm = 0",
        "MaxText documentation, pipeline parallelism: (p - 1) / (p - 1 + v m) of a step",
        lambda n, t: (n[0] - 1) * t.stage / n[2],
        _at_once,
    ),
    "zb-h1": ClosedForm(
        "(p - 1) (f + b - w)",
        "comm = 0, w <= f, m >= p",
        "Qi et al. 2023, 2401.10241, table 2",
        lambda n, t: (n[0] - 1) * (t.f + t.b - t.w),
        lambda n, t: t.comm == 0 and t.w <= t.f and n[1] >= n[0],
    ),
    "zb-h2": ClosedForm(
        "(p - 1) (f + b - 2 w)",
        "comm = 0, w <= f, 2 w <= f + b, m >= 2 p - 1",
        "Qi et al. 2023, 2401.10241, table 2",
        lambda n, t: (n[0] - 1) * (t.f + t.b - 2 * t.w),
        lambda n, t: t.comm == 0 and t.w <= t.f and 2 * t.w <= t.f + t.b and n[1] >= 2 * n[0] - 1,
    ),
    "zb-v": ClosedForm(
        "max(0, 2 p - 1 - m) f / 2",
        "comm = 0, f = b = w",
        "Qi et al. 2023, 2401.10241, table 2 for many microbatches; for few of them measured here",
        lambda n, t: max(0, 2 * n[0] - 1 - n[1]) * t.f / 2,
        lambda n, t: t.comm == 0 and t.f == t.b == t.w,
    ),
    # DeepSeek's table has (p - 1) (F&B + B - 3 W); with F&B = F + B that is b / 2 more for each of the p - 1. It counts
    # pairs whose results leave together, at their end; here the first cell of a pair sends before the second begins.
    "dualpipev": ClosedForm(
        "(p - 1) (f + b - w) / 2",
        "comm = 0, w <= b <= f <= b + w, m >= 2 p",
        "measured here; DeepSeek-AI, repository DualPipe, whose pairs send later, has (p - 1) (f + 2 b - w) / 2",
        lambda n, t: (n[0] - 1) * (t.f + t.b - t.w) / 2,
        lambda n, t: t.comm == 0 and t.w <= t.b <= t.f <= t.b + t.w and n[1] >= 2 * n[0],
    ),
}
