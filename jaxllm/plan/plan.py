"""plan: the best layouts of a model on a mesh, how sure their order is, and why others are out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jaxllm.plan.conditions import Condition
from jaxllm.plan.search import OBJECTIVES, Found, Scored, search
from jaxllm.plan.space import Space
from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import Layout
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate_sequence
from jaxllm.spec.workload import Workload
from jaxllm.theory.rates import Rates

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What was searched, what was found, and in how many seconds; `price` is dollars for an hour of one device, and `name` what
    the model is called by whoever asks."""

    space: Space
    objective: str
    found: Found
    rates: Rates
    elapsed: float
    price: float | None = None
    name: str = ""

    @property
    def mesh(self) -> Mesh:
        return self.space.mesh

    @property
    def workload(self) -> Workload:
        return self.space.workload

    @property
    def best(self) -> list[Scored]:
        """The best that fit, first to last; none where nothing fits."""
        return self.found.best

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.workload.batch * self.workload.sequence

    @cached_property
    def near(self) -> int:
        """Layouts that fit and whose time is within the interval of the fastest's."""
        if not self.found.front:
            return 0
        return int(np.count_nonzero(self.found.near <= self.found.front[0].interval[1]))

    def ties(self, scored: Scored) -> bool:
        """Whether a layout may be as fast as the fastest, for all that is known."""
        return scored.seconds <= self.found.front[0].interval[1]

    def tokens_per_dollar(self, scored: Scored) -> float | None:
        """Tokens that are trained on for a dollar; None without a price."""
        if self.price is None:
            return None
        return self.tokens / (scored.seconds / 3600 * self.price * self.mesh.devices)


def plan(
    model: ModelConfig,
    mesh: Mesh,
    workload: Workload,
    *,
    conditions: tuple[Condition, ...] = (),
    objective: str = "time",
    top: int = 10,
    price: float | None = None,
    name: str = "",
    origin: Layout | None = None,
    progress: Say = lambda text: None,
) -> Plan:
    """Scores every layout of the model on the mesh: bytes at the peak as `predict` has them, seconds of a step as `step_time`.

    Args: conditions, as `conditions.parse` reads them; the objective, one of OBJECTIVES; how many of the best are kept; dollars
    for an hour of one device; what to call the model by in the commands that follow, its own name by default; and a layout whose
    neighbours are to be told.

    Raises SpecError when there is no layout at all, which says what leaves none, or the machine has no figures of speed.
    """
    if objective not in OBJECTIVES:
        raise SpecError(f"--objective {objective!r} is unknown; {nearest(objective, OBJECTIVES)}")
    if objective == "cost" and price is None:
        raise SpecError("--objective cost needs a price; add --price with dollars for an hour of one device, as --price 2.5.")
    if price is not None and not price > 0:
        raise SpecError(f"--price {price:g} is no price above 0; write dollars for an hour of one device, as --price 2.5.")
    validate_sequence(model, Layout(), workload.sequence)
    rates = Rates.of(mesh, workload)
    space = Space.of(model, mesh, workload, conditions)
    began = time.perf_counter()
    found = search(space, top, objective, progress, origin)
    elapsed = time.perf_counter() - began
    if not found.scored:
        raise SpecError(_nothing(space))
    return Plan(space, objective, found, rates, elapsed, price, name or model.name)


def _nothing(space: Space) -> str:
    """What leaves no layout: a batch that no layout divides, or one of the conditions, alone or beside the others."""
    where = f"{space.model.name} on {space.mesh}"
    free = replace(space, conditions=())
    if not _any(free):
        batch, devices = space.workload.batch, space.mesh.devices
        parts = min(_ranks(free))
        near = max(1, round(batch / parts)) * parts
        return (
            f"plan: batch {batch:,} cannot be shared out over the {devices:,} devices of {space.mesh} in any layout of "
            f"{space.model.name}; take a batch that {parts:,} divides, as {near:,}, or another mesh."
        )
    for condition in space.conditions:
        if not _any(replace(space, conditions=(condition,))):
            return f"--fix {condition} leaves no layout of {where}: {_reason(space, condition)}"
    for condition in space.conditions:
        others = tuple(other for other in space.conditions if other != condition)
        if _any(replace(space, conditions=others)):
            beside = ",".join(map(str, others))
            return f"--fix {condition} leaves no layout of {where} beside {beside}; leave {condition} out."
    conditions = ",".join(map(str, space.conditions))
    return f"--fix {conditions} together leave no layout of {where}; leave some of them out."


def _any(space: Space) -> bool:
    return any(np.any(block.allowed) for block in space.blocks())


def _ranks(space: Space) -> Iterator[int]:
    """Into how many parts layouts would share out a batch that all devices divide."""
    whole = replace(space, workload=replace(space.workload, batch=space.mesh.devices))
    for block in whole.blocks():
        yield int((block.rows["replica"] * block.rows["data"]).min())


def _reason(space: Space, condition: Condition) -> str:
    """Why a condition can be met by no layout."""
    for value in condition.values:
        if sentence := space.refused.get((condition.name, value)):
            return sentence
    known = sorted({value for name, value in _values(space) if name == condition.name}, key=lambda value: (str(type(value)), value))
    return f"what there is of {condition.name} is {', '.join(str(value).lower() for value in known)}."


def _values(space: Space) -> set[tuple[str, object]]:
    return {key for key in search(replace(space, conditions=()), 1).choices}
