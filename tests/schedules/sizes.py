"""Schedules of many sizes, and what each of them can have."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from jaxllm.schedules import Cell, Schedule, make, names
from jaxllm.schedules.named import registry
from jaxllm.schedules.order import lay_out


def sizes(name: str, stages: tuple[int, ...] = (2, 3, 4, 5, 8)) -> Iterator[tuple[int, int, int]]:
    """(stages, microbatches, chunks): few and many microbatches, also such as the stages do not divide."""
    named = registry()[name]
    least, most = named.chunks
    for p in stages:
        for chunks in (least,) if most == least else (least, least + 1):
            for m in sorted({1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p + 2}):
                if m >= (p if named.fills else 1):
                    yield p, m, chunks


def every(stages: tuple[int, ...] = (2, 3, 4, 5, 8)) -> Iterator[Schedule]:
    """Each schedule that has a name, in those sizes."""
    for name in names():
        for size in sizes(name, stages):
            yield make(name, *size)


def at_random(seed: int) -> Schedule:
    """A valid schedule that nobody would want: any order that can run, some B and W apart, some ticks idle."""
    dice = Random(seed)
    p, m = dice.randint(2, 5), dice.randint(1, 5)
    placement = dice.choice(("ring", "v"))
    v = 2 if placement == "v" else dice.randint(1, 3)
    shape = Schedule(f"random {seed}", p, m, v, placement, ())
    left = {(s, Cell("F", mb, c)) for s in range(p) for c in range(v) for mb in range(m)}
    for s, c, mb in product(range(p), range(v), range(m)):
        left |= {(s, Cell(kind, mb, c)) for kind in dice.choice((("BW",), ("B", "W")))}
    done, orders = set(), [[] for _ in range(p)]
    while left:
        ready = sorted((one for one in left if done.issuperset(shape.needs(*one))), key=str)
        stage, cell = dice.choice(ready)
        left.remove((stage, cell))
        done.update(shape.works(stage, cell))
        orders[stage].append(cell)
    made = lay_out(shape.name, p, m, v, orders, placement)
    rows = [row for row in made.table for row in ((None,) * p, row)[dice.random() < 0.8 :]]
    return Schedule(made.name, p, m, v, placement, tuple(rows))
