"""Why choices are out, or slower: each value of each choice with the fastest step that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.plan.conditions import SEARCHED
from jaxllm.plan.plan import Plan
from jaxllm.plan.search import Choice
from jaxllm.report.units import human, percent

SLOWER = 1.5  # from here on it is said in multiples


@dataclass(frozen=True)
class Reason:
    """A value of a choice that no layout with it has the memory for, that the nouns refuse, or that makes a step much slower."""

    name: str
    value: Any
    sentence: str
    refused: bool = False  # by the nouns


def written(value: Any) -> str:
    """As a layout has it."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def choices(plan: Plan) -> dict[str, list[Choice]]:
    """The values of each choice that there are several of, in order."""
    found: dict[str, list[Choice]] = {}
    for name in SEARCHED:
        each = [choice for (of, _), choice in plan.found.choices.items() if of == name]
        if len(each) > 1:
            found[name] = sorted(each, key=lambda choice: _order(choice.value))
    return found


def slower(plan: Plan, choice: Choice) -> str:
    """`+3 %` over the fastest of all, or `2.4 x`; the least bytes where nothing with it fits."""
    if not choice.fits:
        return f"needs {human(int(choice.least))}"
    ratio = choice.seconds / plan.found.front[0].seconds
    if ratio < 1 + 1e-9:
        return "best"
    return f"{ratio:.1f} x" if ratio >= SLOWER else percent(ratio - 1)


def reasons(plan: Plan) -> tuple[Reason, ...]:
    """The regions that are out, and those that leave the fast links, in the order of the choices."""
    found = []
    capacity, node = plan.mesh.capacity, plan.mesh.machine.node_size
    tested = {name: {choice.value for choice in each} for name, each in choices(plan).items()}
    for name, each in choices(plan).items():
        for choice in each:
            if not choice.fits and capacity is not None:
                found.append(Reason(name, choice.value, f"needs {human(int(choice.least))} at least, of {human(capacity)}"))
            elif name == "tensor" and plan.mesh.target == "gpu" and choice.value > node and np.isfinite(choice.seconds):
                cost = slower(plan, choice)
                found.append(
                    Reason(name, choice.value, f"leaves the node of {node} devices and its links{'' if cost == 'best' else f': {cost} at best'}")
                )
    for (name, value), sentence in plan.space.refused.items():
        if value not in tested.get(name, ()) and plan.space.allows(name, value):
            found.append(Reason(name, value, sentence, refused=True))
    return tuple(found)


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int) else (1, value)
