"""A pipeline schedule as a table: what each stage does at each tick. Data that needs no device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxllm.spec.errors import SpecError, nearest

KINDS = ("F", "B", "W", "BW")
PLACEMENTS = ("ring", "v")

# (kind, microbatch, part): what a cell does for the model. The kind is F, B or W; a BW does both of the last two.
Work = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Cell:
    """One step of one stage.

    kind        F forward, B gradient of the inputs, W gradient of the weights, BW both in one
    microbatch  which one, from 0
    chunk       of the stage, from 0
    """

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Schedule:
    """A row for each tick, a cell for each stage. What a tick makes can be used from the next tick on.

    chunks     parts of the model on each stage, which has stages x chunks of them in all
    placement  ring: chunk c of stage s is part c * stages + s; v: chunk 0 of stage s is part s, and chunk 1 is part
               2 * stages - 1 - s, so that the first stage also has the last part
    table      ticks x stages; None is idle

    The shape is checked here. `validity.validate` tells whether the cells are all there and in an order that works.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    placement: str
    table: tuple[tuple[Cell | None, ...], ...]

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise SpecError(
                f"schedule {self.name}: placement {self.placement!r} is unknown; {nearest(self.placement, PLACEMENTS)}"
            )
        if self.placement == "v" and self.chunks != 2:
            raise SpecError(
                f"schedule {self.name}: placement v has 2 chunks on a stage, down and up again, and not {self.chunks}; "
                "take placement ring."
            )
        for tick, row in enumerate(self.table):
            if len(row) != self.stages:
                raise SpecError(
                    f"schedule {self.name}: tick {tick} has {len(row)} cells for {self.stages} stages; give each one."
                )

    def __hash__(self) -> int:
        # the table may have a million cells; comparing tables tells those apart that the rest does not
        return hash((self.name, self.stages, self.microbatches, self.chunks, self.placement, self.ticks))

    @property
    def ticks(self) -> int:
        return len(self.table)

    @property
    def parts(self) -> int:
        """Parts that the model is cut into."""
        return self.stages * self.chunks

    def part(self, stage: int, chunk: int) -> int:
        """Which part of the model, from 0, a chunk of a stage is."""
        if self.placement == "v" and chunk:
            return 2 * self.stages - 1 - stage
        return chunk * self.stages + stage

    def owner(self, part: int) -> tuple[int, int]:
        """The (stage, chunk) that has a part."""
        chunk, stage = divmod(part, self.stages)
        return (self.stages - 1 - stage if self.placement == "v" and chunk else stage), chunk

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """(tick, stage, cell) of all that is not idle, tick by tick."""
        for tick, row in enumerate(self.table):
            for stage, cell in enumerate(row):
                if cell is not None:
                    yield tick, stage, cell

    @cached_property
    def orders(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of each stage, one after another."""
        return tuple(tuple(cell for cell in column if cell is not None) for column in self._columns)

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """The ticks of the cells in `orders`."""
        return tuple(tuple(tick for tick, cell in enumerate(column) if cell is not None) for column in self._columns)

    @property
    def _columns(self) -> Iterator[tuple[Cell | None, ...]]:
        return zip(*self.table, strict=True) if self.table else iter([()] * self.stages)

    @cached_property
    def ticks_of(self) -> dict[Work, int]:
        """The tick of each piece of work."""
        return {work: tick for tick, stage, cell in self.cells() for work in self.works(stage, cell)}

    def works(self, stage: int, cell: Cell) -> tuple[Work, ...]:
        """What a cell does: one piece of work, or two for BW."""
        part = self.part(stage, cell.chunk)
        return tuple((kind, cell.microbatch, part) for kind in cell.kind)

    def needs(self, stage: int, cell: Cell) -> tuple[Work, ...]:
        """What must be done before a cell can run.

        F waits for the part before it; B and BW wait for their own F and for B of the part after them, which the last
        part does not have: its loss is its own; W waits for its B.
        """
        part, microbatch = self.part(stage, cell.chunk), cell.microbatch
        if cell.kind == "F":
            return (("F", microbatch, part - 1),) if part else ()
        if cell.kind == "W":
            return (("B", microbatch, part),)
        own = ("F", microbatch, part)
        return (own, ("B", microbatch, part + 1)) if part < self.parts - 1 else (own,)
