"""What a dollar trains on meshes of fewer devices: a smaller one waits less for its network, and takes longer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxllm.plan.changes import sized
from jaxllm.plan.plan import Plan, Say
from jaxllm.plan.search import Scored, search
from jaxllm.plan.space import Space
from jaxllm.spec.machine import Mesh

MOST = 6  # sizes that are looked at


@dataclass(frozen=True)
class Cost:
    """The fastest layout that fits on a mesh, and the tokens that a dollar trains it on."""

    mesh: Mesh
    best: Scored
    tokens_per_dollar: float


def costs(plan: Plan, progress: Say = lambda text: None) -> tuple[Cost, ...]:
    """The mesh of a plan and smaller ones, each about half of the one before, as long as something fits; nothing without a
    price."""
    return tuple(_costs(plan, progress)) if plan.price is not None else ()


def _costs(plan: Plan, progress: Say) -> Iterator[Cost]:
    if not plan.found.front:
        return
    yield _cost(plan, plan.mesh, plan.found.front[0])
    space = plan.space
    for mesh in smaller(plan.mesh):
        progress(f"on {mesh}")
        found = search(Space.of(space.model, mesh, space.workload, space.conditions), 1)
        if not found.front:
            return
        yield _cost(plan, mesh, found.front[0])


def _cost(plan: Plan, mesh: Mesh, best: Scored) -> Cost:
    assert plan.price is not None
    return Cost(mesh, best, plan.tokens / (best.seconds / 3600 * plan.price * mesh.devices))


def smaller(mesh: Mesh) -> Iterator[Mesh]:
    """The same machine in sizes that exist, each at most half of the one before."""
    last = mesh.devices
    for found in list(sized(mesh, 1, mesh.devices // 2))[::-1]:
        if 2 * found.devices <= last and last * 2**MOST > mesh.devices:
            last = found.devices
            yield found
