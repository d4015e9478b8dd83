"""Which layers each stage of a pipeline holds: the schedule's parts of the model, and how many layers are in each.

The embedding stands before the first part, and the final norm and the head behind the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxllm.schedules import Schedule
from jaxllm.schedules.order import lay_out


@dataclass(frozen=True)
class Stages:
    """A schedule and the layers of its parts, which are counted from the embedding on.

    sizes  number of layers in each part of the model
    """

    schedule: Schedule
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Layers that the one program of all stages has room for in each chunk: as many as the largest part has."""
        return max(self.sizes)

    @cached_property
    def even(self) -> bool:
        """Whether all parts have the same number of layers."""
        return len(set(self.sizes)) == 1

    def layers(self, stage: int, chunk: int) -> range:
        """The layers of a chunk, counted from the embedding on."""
        part = self.schedule.part(stage, chunk)
        first = sum(self.sizes[:part])
        return range(first, first + self.sizes[part])

    @cached_property
    def held(self) -> tuple[int, ...]:
        """The layer in each row of the stacked weights, stage by stage and chunk by chunk; -1 in rows without one."""
        return tuple(
            layer
            for stage in range(self.schedule.stages)
            for chunk in range(self.schedule.chunks)
            for layer in (*self.layers(stage, chunk), *[-1] * (self.rows - len(self.layers(stage, chunk))))
        )

    @property
    def first(self) -> int:
        """The stage with the embedding."""
        return self.schedule.owner(0)[0]

    @property
    def last(self) -> int:
        """The stage with the final norm and the head."""
        return self.schedule.owner(len(self.sizes) - 1)[0]


def forward_only(schedule: Schedule) -> Schedule:
    """The forward cells of a schedule alone, in their order: what an evaluation runs."""
    orders = [[cell for cell in order if cell.kind == "F"] for order in schedule.orders]
    return lay_out(
        schedule.name, schedule.stages, schedule.microbatches, schedule.chunks, orders, schedule.placement
    )


def even(layers: int, owner: Sequence[int]) -> tuple[int, ...]:
    """Layers in each part, whose stage `owner` tells. Where they do not divide, the last part has one less, then the first,
    then those inside of them, for the ends have the head and the embedding too (Llama 3 405B, arXiv:2407.21783, section
    3.3.2); but a stage with several parts gives one up again only when no stage has more layers."""
    parts = len(owner)
    sizes = [-(-layers // parts)] * parts
    from_the_ends = [k for pair in zip(reversed(range(parts)), range(parts), strict=True) for k in pair]
    waiting = list(dict.fromkeys(from_the_ends))
    load = [sizes[0] * owner.count(stage) for stage in range(max(owner) + 1)]
    for _ in range(sum(sizes) - layers):
        part = max(waiting, key=lambda k: load[owner[k]])  # the first of those with the most
        waiting.remove(part)
        sizes[part] -= 1
        load[owner[part]] -= 1
    return tuple(sizes)


def share_out(layers: int, base: Sequence[float], each: Sequence[float], owner: Sequence[int]) -> tuple[int, ...]:
    """Layers in each part, at least one, so that the stage with the most has as little as can be.

    Args: `base` is what a part takes without layers and `each` what a layer of it adds; `owner` is its stage.
    One by one each layer goes where it makes the least of a stage: equal layers, so no exchange could be better.
    """
    sizes = [1] * len(base)
    load = [0.0] * (max(owner) + 1)
    for part, stage in enumerate(owner):
        load[stage] += base[part] + each[part]
    for _ in range(layers - len(base)):
        part = min(range(len(base)), key=lambda k: (load[owner[k]] + each[k], sizes[k], k))
        sizes[part] += 1
        load[owner[part]] += each[part]
    return tuple(sizes)
