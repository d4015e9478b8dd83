"""Why one layout is out, or slower than the best: both taken apart line by line, and the smallest changes that help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxllm.plan.conditions import SEARCHED, Condition
from jaxllm.plan.plan import Plan
from jaxllm.plan.reasons import written
from jaxllm.plan.search import Scored, search
from jaxllm.plan.space import Space
from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.time import NAMES, ROUNDING
from jaxllm.report.units import duration, human, percent
from jaxllm.spec.errors import SpecError, TargetError
from jaxllm.spec.layout import Layout
from jaxllm.spec.validate import validate, validate_target
from jaxllm.theory.predict import predict
from jaxllm.theory.time import step_time, widest

# What is changed at once: of the degrees one grows as another shrinks, and a pipeline comes with its schedule.
GROUPS = (
    ("zero",), ("remat", "save"), ("offload",), ("sequence",), ("attention",), ("microbatches",), ("data", "tensor"),
    ("data", "replica"), ("data", "context", "exchange"), ("data", "pipe", "schedule", "virtual"), ("schedule", "virtual"),
)  # fmt: skip
MOST_ALONE = 5
SMALL = 2**20  # bytes: lines of less are not told


@dataclass(frozen=True)
class Side:
    """One of the two layouts: bytes by line of the ledger, the peak, seconds by part, and all of them."""

    layout: Layout
    memory: dict[str, int]
    peak: int
    parts: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Why:
    """The answer.

    refused  the sentence that refuses the layout, "" where it is one
    asked    the layout in question, and best: that of the plan, None where nothing fits
    faster   layouts that fit and are faster, None for more than are remembered
    changes  (what is changed, its layout): of one choice each, the fastest first, and then of more of them
    """

    plan: Plan
    layout: Layout
    refused: str = ""
    asked: Side | None = None
    best: Side | None = None
    faster: int | None = None
    changes: tuple[tuple[str, Scored], ...] = ()

    @property
    def fits(self) -> bool:
        capacity = self.plan.mesh.capacity
        return self.asked is not None and (capacity is None or self.asked.peak <= capacity)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists: bytes and seconds."""
        return {
            "schema": 1,
            "layout": f"{self.layout}",
            "refused": self.refused or None,
            "capacity": self.plan.mesh.capacity,
            "fits": self.fits,
            "asked": None if self.asked is None else _json(self.asked),
            "best": None if self.best is None else _json(self.best),
            "faster": self.faster,
            "changes": [
                {"change": what, "layout": f"{scored.layout}", "seconds": scored.seconds, "peak": scored.peak}
                for what, scored in self.changes
            ],
        }


def explain(plan: Plan, layout: Layout) -> Why:
    """Why a layout is not the best of a plan."""
    model, mesh, work = plan.space.model, plan.mesh, plan.workload
    try:
        validate(model, layout, mesh.devices, work)
        validate_target(mesh.target, layout, work)
        for condition in plan.space.conditions:
            if not condition.allows(_value(plan, layout, condition.name)) and (condition.name != "exchange" or layout.context > 1):
                raise SpecError(f"--fix {condition} excludes it; leave that out to compare.")
        asked = _side(plan, layout)
    except (SpecError, TargetError) as error:
        return Why(plan, layout, refused=str(error))
    best = _side(plan, plan.best[0].layout) if plan.best else None
    faster = None
    if best is not None and asked.seconds <= widest(plan.rates) * plan.found.front[0].seconds:
        faster = int((plan.found.near < asked.seconds * (1 - 1e-9)).sum())
    return Why(plan, layout, "", asked, best, faster, _changes(plan, layout, asked))


def print_why(why: Why, out: Console) -> None:
    """The answer for people."""
    plan, capacity = why.plan, why.plan.mesh.capacity
    print_fields(out, [("layout", f"{why.layout}")])
    if why.asked is None:
        print_fields(out, [("out", why.refused)])
        return
    if not why.fits:
        assert capacity is not None  # else it would fit
        over = why.asked.peak / capacity
        print_fields(out, [("out", f"it needs {human(why.asked.peak)} of the {human(capacity)} of a device, {over:.2f} times as much")])
    elif why.best is not None:
        ratio = why.asked.seconds / why.best.seconds
        ranked = "more are faster than are remembered" if why.faster is None else f"{why.faster:,} that fit are faster"
        text = "it is the fastest" if ratio <= 1 else f"a step takes {ratio:.2f} times as long as the best one's; {ranked}"
        if ratio < 1 - 1e-9:
            beyond = [name for name in ("partition", "save") if getattr(why.layout, name) != getattr(why.best.layout, name)]
            what = f"{beyond[0]}={getattr(why.layout, beyond[0])} is not searched" if beyond else "it is not among what is searched"
            text = f"a step takes {ratio:.2f} times as long as the best one's that was searched: {what}"
        tied = plan.found.front and why.asked.seconds <= plan.found.front[0].interval[1]
        print_fields(out, [("in", f"{text}{', within what is known of the fastest' if tied and ratio > 1 else ''}")])
    out.print()
    _print_sides(why, out)
    if why.changes:
        out.print()
        print_listing(
            out, ("step", "peak", "with this changed"), [(duration(each.seconds), human(each.peak), what) for what, each in why.changes]
        )


def _print_sides(why: Why, out: Console) -> None:
    asked, best = why.asked, why.best
    assert asked is not None
    if best is not None and best.layout == asked.layout:
        best = None
    rows: list[tuple[str, ...]] = []

    def add(name: str, one: Any, other: Any, shown: Any) -> None:
        there = () if best is None else (shown(other), _beside(one, other))
        rows.append((name, shown(one), *there))

    for name in dict.fromkeys((*asked.memory, *(best.memory if best else ()))):
        add(name, asked.memory.get(name, 0), best.memory.get(name, 0) if best else 0, human)
    add("peak of memory", asked.peak, best.peak if best else 0, human)
    names = dict.fromkeys((*asked.parts, *(best.parts if best else ())))
    for name in sorted(names, key=lambda name: -asked.parts.get(name, 0.0)):
        one, other = asked.parts.get(name, 0.0), best.parts.get(name, 0.0) if best else 0.0
        if max(one, other) > ROUNDING:
            add(NAMES.get(name, f"collectives over {name}"), one, other, duration)
    add("step", asked.seconds, best.seconds if best else 0.0, duration)
    heads = ("of a device", "this one", *(() if best is None else ("the best", "difference")))
    print_listing(out, heads, rows)
    if best is not None:
        print_fields(out, [("the best", f"{best.layout}")])


def _beside(one: float, other: float) -> str:
    """By how much one is more than the other."""
    if not (one and other):
        return ""
    return percent(one / other - 1) if one < 2 * other else f"{one / other:,.1f} x"


def _side(plan: Plan, layout: Layout) -> Side:
    model, mesh, work = plan.space.model, plan.mesh, plan.workload
    ledger, time = predict(model, layout, work, target=mesh.target), step_time(model, layout, mesh, work)
    memory: dict[str, int] = {}
    for term in ledger.peak_terms:  # which add up to the peak
        name = term.label.partition(": ")[2] or term.label
        if term.value > SMALL:
            memory[name] = memory.get(name, 0) + int(term.value)
    if away := sum(int(line.value) for line in ledger.section("memory") if line.name == "host"):
        memory["in host memory, beside"] = away
    parts = {name: float(seconds) for name, seconds in time.parts.items()}
    return Side(layout, memory, ledger.peak, parts, float(time.seconds))


def _changes(plan: Plan, layout: Layout, asked: Side) -> tuple[tuple[str, Scored], ...]:
    """The best layouts that fit and are faster: with each choice changed alone, and with more of them the fastest for so
    many."""
    fixed = [Condition(name, "=", (_value(plan, layout, name),)) for name in SEARCHED]
    capacity = plan.mesh.capacity
    fits = capacity is None or asked.peak <= capacity
    found: dict[str, Scored] = {}
    for group in GROUPS:
        own = (condition for condition in fixed if condition.name not in group and _applies(condition, layout))
        conditions = (*plan.space.conditions, *own)
        best = search(Space.of(plan.space.model, plan.mesh, plan.workload, conditions), 1).best
        if best and best[0].layout != layout and (not fits or best[0].seconds < asked.seconds * (1 - 1e-9)):
            found[_said(layout, best[0].layout)] = best[0]
    alone = sorted(found.items(), key=lambda each: each[1].seconds)[:MOST_ALONE]
    more = [(_said(layout, scored.layout), scored) for count, scored in sorted(plan.found.closest.items()) if count > 1]
    least = alone[0][1].seconds if alone else asked.seconds if fits else float("inf")
    helpful = []
    for what, scored in more:
        if scored.seconds < least * (1 - 1e-9):
            least = scored.seconds
            helpful.append((what, scored))
    return (*alone, *helpful)


def _applies(condition: Condition, layout: Layout) -> bool:
    """Whether a choice is one at all: schedules are of pipelines alone, exchanges of context."""
    if condition.name in ("schedule", "virtual"):
        return layout.pipe > 1
    return condition.name != "exchange" or layout.context > 1


def _value(plan: Plan, layout: Layout, name: str) -> Any:
    if name == "virtual":
        from jaxllm.schedules import default_chunks

        return layout.virtual or (default_chunks(layout.schedule or "1f1b") if layout.pipe > 1 else 1)
    if name == "schedule":
        return layout.schedule or ("1f1b" if layout.pipe > 1 else "")
    return getattr(layout, name) or ("none" if name == "save" else getattr(layout, name))


def _said(before: Layout, after: Layout) -> str:
    """`zero=3` for what is changed."""
    changed = [name for name in SEARCHED if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name}={written(getattr(after, name)) or 'none'}" for name in changed)


def _json(side: Side) -> dict[str, Any]:
    return {
        "layout": f"{side.layout}", "memory": side.memory, "peak": side.peak, "parts": side.parts, "seconds": side.seconds
    }  # fmt: skip
