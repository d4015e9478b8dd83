"""A plan for people: the best layouts, what each choice costs, why regions are out, and what to type next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console

from jaxllm.plan import follow
from jaxllm.plan.cost import Cost
from jaxllm.plan.plan import Plan
from jaxllm.plan.reasons import Reason, choices, reasons, slower, written
from jaxllm.plan.search import Scored
from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.units import duration, human, percent
from jaxllm.theory.rates import REFERENCE, UNSURE

if TYPE_CHECKING:
    from jaxllm.plan.compiled import Verified

SLOWEST = 3  # times as slow as the fastest is the front shown
FRONT = 8  # points of the front that are listed; --plot and --json have all


def print_plan(plan: Plan, costs: Sequence[Cost], out: Console) -> None:
    """The whole report of a plan in which something fits, with what a dollar trains on smaller meshes."""
    print_fields(out, _header(plan))
    out.print()
    _print_best(plan, out)
    _print_front(plan, out)
    if costs:
        out.print()
        rows = [
            (f"{cost.mesh}", duration(cost.best.seconds), f"{cost.tokens_per_dollar:,.0f}", _words(cost.best)) for cost in costs
        ]
        print_listing(out, ("mesh", "step", "tokens/$", "the fastest there"), rows)
    _print_choices(plan, out)
    _print_next(plan, out)


def print_nothing(plan: Plan, would_fit: tuple[str, ...], out: Console) -> None:
    """The report of a plan in which nothing fits: by how much, and what would."""
    print_fields(out, _header(plan))
    least, capacity = plan.found.least, plan.mesh.capacity
    assert least is not None and capacity is not None  # something was scored, and did not fit in that
    out.print()
    print_listing(out, ("nothing fits",), [(f"the least is {human(least.peak)} of {human(capacity)}: {_words(least)}",)])
    out.print()
    tried = would_fit or ("no condition to leave out, no larger mesh and no shorter sequence that was tried",)
    print_listing(out, ("what would",), [(re.sub(r",(?=[a-z])", ", ", sentence),) for sentence in tried])
    _print_reasons(plan, out)


def print_verified(found: Sequence[Verified], out: Console) -> None:
    """The first layouts of a plan as compilers have them, those that compile to something else last."""
    rows = [
        (
            f"{one.rank}", f"{one.equal} of {one.lines}" if one.lines else "-", _beside(one.peak, one.compiled_peak),
            _beside(one.wire, one.compiled_wire), "moves down" if one.reason else "as planned",
        )
        for one in found
    ]  # fmt: skip
    out.print()
    print_listing(out, ("planned as", "lines equal", "peak, and as compiled", "sent, and as compiled", ""), rows)
    moved = [one for one in found if one.reason]
    if moved:
        out.print()
        print_listing(out, ("planned as", "why it moves down"), [(f"{one.rank}", one.reason) for one in moved])


def _beside(predicted: int | None, compiled: int | None) -> str:
    if predicted is None or compiled is None:
        return "-"
    return f"{human(predicted)}, {human(compiled)}" + (f" ({percent(compiled / predicted - 1)})" if predicted != compiled else "")


def _header(plan: Plan) -> list[tuple[str, str]]:
    work, found, model = plan.workload, plan.found, plan.space.model
    left = f"; {found.unscored:,} more have a schedule without closed form for their microbatches" if found.unscored else ""
    capacity = plan.mesh.capacity
    fields = [
        ("model", f"{model.name}, {model.parameters:,} parameters"),
        ("mesh", f"{plan.mesh}, {plan.mesh.devices:,} device{'s' * (plan.mesh.devices > 1)} of {human(plan.rates.peak, 'FLOP/s')}"),
        ("workload", work.words),
    ]
    if plan.space.conditions:
        fields.append(("demanded", ", ".join(map(str, plan.space.conditions))))
    return [
        *fields,
        ("scored", f"{found.scored:,} layouts, memory and time, in {duration(plan.elapsed)}{left}"),
        ("fit", f"{found.fits:,} of them" + (f" in the {human(capacity)} of a device" if capacity is not None else "")),
        ("rates", _rates(plan)),
    ]


def _rates(plan: Plan) -> str:
    name = plan.mesh.machine.name
    wider = "wider for what no measured step had, as ZeRO or a fused attention kernel"
    if plan.rates.measured:
        return f"efficiencies of {name}: {plan.mesh.machine.figures['efficiency.matmul'].source}; intervals are {wider}"
    return (
        f"{name} has figures of a data sheet alone, and is taken to reach as much of them as {REFERENCE}, which was measured: "
        f"intervals are {UNSURE} times as wide, and {wider}"
    )


def _print_best(plan: Plan, out: Console) -> None:
    priced = plan.price is not None
    heads = ("rank", "step", "four of five", "peak", "MFU", *(("tokens/$",) if priced else ()), "layout")
    rows = []
    for rank, scored in enumerate(plan.best, start=1):
        low, high = scored.interval
        cost = (f"{plan.tokens_per_dollar(scored):,.0f}",) if priced else ()
        rows.append((
            f"{rank}{' =' if plan.ties(scored) else ''}", duration(scored.seconds), f"{duration(low)} to {duration(high)}",
            human(scored.peak), f"{100 * follow.mfu(plan, scored):.1f} %", *cost, _words(scored),
        ))  # fmt: skip
    print_listing(out, heads, rows)
    out.print()
    fields = [("=", f"may be as fast as the fastest for all that is known; so may {plan.near:,} layouts in all")]
    best = plan.best[0]
    if (seconds := follow.simulated(plan, best)) is not None:
        text = f"{duration(seconds)} for the first, {percent(seconds / best.seconds - 1)}: each stage with its own layers and ends"
        fields.append(("simulated", text))
    print_fields(out, fields)


def _print_front(plan: Plan, out: Console) -> None:
    """Points of the front, evenly over it."""
    whole = plan.found.front
    front = [each for each in whole if each.seconds <= SLOWEST * whole[0].seconds]
    if len(front) < 2:
        return
    shown = front if len(front) <= FRONT else [front[round(index * (len(front) - 1) / (FRONT - 1))] for index in range(FRONT)]
    fastest = front[0].seconds
    more = f" ({len(shown)} of {len(whole)})" if len(shown) < len(whole) else ""
    out.print()
    rows = [
        (duration(each.seconds), f"{each.seconds / fastest:.2f} x", human(each.peak), _words(each)) for each in shown
    ]
    print_listing(out, ("step", "of the best", "peak", f"nothing is both faster and smaller{more}"), rows)


def _print_choices(plan: Plan, out: Console) -> None:
    rows = []
    for name, each in choices(plan).items():
        by: dict[str, list[str]] = {}
        for choice in each:
            by.setdefault(slower(plan, choice), []).append(written(choice.value))
        rows.append((name, "; ".join(f"{', '.join(values)}: {cost}" for cost, values in by.items())))
    if rows:
        out.print()
        print_listing(out, ("choice", "the fastest step with each of its values, over the best; or the least memory that it needs"), rows)
    _print_reasons(plan, out)


def _print_reasons(plan: Plan, out: Console) -> None:
    # What needs more memory than there is stands with its choice already.
    found = [each for each in reasons(plan) if each.refused or plan.found.choices[each.name, each.value].fits]
    if found:
        out.print()
        # Of one choice several values may be refused alike: the first says why.
        groups = [list(group) for _, group in groupby(found, key=lambda each: (each.name, each.refused or each.sentence))]
        rows = [
            (f"{group[0].name}={'|'.join(written(each.value) for each in group)}", _said(group[0])) for group in groups
        ]
        print_listing(out, ("out, or slower", "why"), rows)


def _said(reason: Reason) -> str:
    """Without what the row says already."""
    return reason.sentence.removeprefix(f"{reason.name}={reason.value}: ")


def _print_next(plan: Plan, out: Console) -> None:
    out.print()
    for name, text in follow.commands(plan, plan.best[0]).items():
        out.print(name, style="bold", end="\n")
        for line in text.splitlines():
            out.print(f"  {line}" if line else "", soft_wrap=True, highlight=False, markup=False)


def _words(scored: Scored) -> str:
    """A layout so that it can be wrapped; typed, it has no spaces."""
    return f"{scored.layout}".replace(",", ", ")
