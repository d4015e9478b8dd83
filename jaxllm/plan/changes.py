"""When nothing fits: the smallest changes with which something would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from jaxllm.plan.plan import Plan, Say
from jaxllm.plan.search import Scored, search
from jaxllm.plan.space import Space
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError
from jaxllm.spec.machine import Machine, Mesh, slices

MOST_TIMES = 64  # as many devices are tried
SHORTEST = 128  # tokens


def changes(plan: Plan, progress: Say = lambda text: None) -> tuple[str, ...]:
    """Sentences, each of one change that would do: a condition left out, more devices, shorter sequences."""
    return tuple(_found(plan, progress))


def _found(plan: Plan, progress: Say) -> Iterator[str]:
    space = plan.space
    for condition in space.conditions:
        others = tuple(other for other in space.conditions if other != condition)
        progress(f"without {condition}")
        if fits := _first(replace(space, conditions=others)):
            yield f"without --fix {condition}: {_said(fits)}"
    for mesh in larger(space.mesh):
        progress(f"on {mesh}")
        try:
            fits = _first(Space.of(space.model, mesh, space.workload, space.conditions))
        except SpecError:
            continue
        if fits:
            yield f"on {mesh}: {_said(fits)}"
            break
    sequence = space.workload.sequence
    while sequence // 2 >= SHORTEST:
        sequence //= 2
        progress(f"with {sequence:,} tokens")
        if fits := _first(Space.of(space.model, space.mesh, replace(space.workload, sequence=sequence), space.conditions)):
            yield f"with sequences of {sequence:,} tokens: {_said(fits)}"
            break


def larger(mesh: Mesh) -> Iterator[Mesh]:
    """The same machine in sizes that exist, each about twice the one before, up to MOST_TIMES as many devices."""
    last = mesh.devices
    for found in sized(mesh, 2 * mesh.devices, MOST_TIMES * mesh.devices):
        if found.devices >= 2 * last:
            last = found.devices
            yield found


def sized(mesh: Mesh, least: int, most: int) -> Iterator[Mesh]:
    """The machine of a mesh in the sizes that exist between two numbers of devices, the smallest first: of cards by doubling and
    halving, of a torus the slices, the most compact of each size."""
    machine, name = mesh.machine, mesh.text.rpartition(":")[0]
    if mesh.target == "tpu":
        compact: dict[int, tuple[int, ...]] = {}
        for shape in sorted(slices(machine), key=lambda shape: (prod(shape), max(shape))):
            compact.setdefault(prod(shape) * machine.devices_per_chip, shape)
        texts = ["x".join(map(str, shape)) for devices, shape in compact.items() if least <= devices <= most]
    else:
        halves = [mesh.devices >> power for power in range(mesh.devices.bit_length()) if mesh.devices % (1 << power) == 0]
        doubles = [mesh.devices << power for power in range(1, MOST_TIMES.bit_length())]
        texts = [f"{cards}" for cards in sorted(halves) + doubles if least <= cards <= most]
    for text in texts:
        try:
            yield Machine.load(f"{name}:{text}")
        except SpecError:  # part of a node, above one
            continue


def _first(space: Space) -> Scored | None:
    found = search(space, 1)
    return found.best[0] if found.best else None


def _said(scored: Scored) -> str:
    return f"{scored.layout} takes {human(scored.peak)}"
