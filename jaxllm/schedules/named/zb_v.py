"""ZB-V: two chunks on each stage, down and up again, with no bubble and the memory of 1F1B."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def zb_v(stages: int, microbatches: int, chunks: int) -> Schedule:
    """ZB-V (Qi et al. 2023, 2401.10241, section 6): the placement and the limit of memory are theirs, the order is
    found here, tick by tick, with one rule for all stages.

    A stage holds a chunk's activations from F to W, at most 2 * stages of them, which is as much as 1F1B. While it has
    forwards left: F if there is an input and room, else W if one waits, else B; after the last forward: B, else W. F
    prefers the later chunk, whose cotangent comes back first, and B the earlier one, whose activations are older.

    So the memory stays full until the last forward: forwards go out as early as they can, which starts the last
    backward early, and what is then left of W fills the wait for it.

    With equal times of F, B and W no stage idles from 2 * stages - 1 microbatches on, and with fewer of them each that
    is missing costs one tick.
    """
    state = _State(stages, microbatches)
    while state.left:
        state.tick()
    return lay_out("zb-v", stages, microbatches, chunks, state.orders, "v")


class _State:
    """How far each stage is. Cells of one kind and chunk run in the order of the microbatches."""

    def __init__(self, stages: int, microbatches: int) -> None:
        self.stages, self.microbatches = stages, microbatches
        self.parts = 2 * stages
        self.forward = [0] * self.parts  # how many microbatches each part has done
        self.backward = [0] * self.parts
        self.held = [0] * stages  # chunks whose activations are there
        self.waiting: list[list[Cell]] = [[] for _ in range(stages)]  # W to do
        self.orders: list[list[Cell]] = [[] for _ in range(stages)]
        self.left = 3 * self.parts * microbatches

    def tick(self) -> None:
        """One cell for each stage that has one to run. All choose before any of them is done."""
        chosen = [next(self._candidates(stage), None) for stage in range(self.stages)]
        for stage, cell in enumerate(chosen):
            if cell is not None:
                self._run(stage, cell)

    def _candidates(self, stage: int) -> Iterator[Cell]:
        """What a stage can run, best first."""
        if self.forward[self.parts - 1 - stage] == self.microbatches:
            yield from self._backwards(stage)
            yield from self.waiting[stage][:1]
            return
        if self.held[stage] < self.parts:
            yield from self._forwards(stage)
        yield from self.waiting[stage][:1]
        yield from self._backwards(stage)

    def _forwards(self, stage: int) -> Iterator[Cell]:
        for chunk, part in ((1, self.parts - 1 - stage), (0, stage)):
            before = self.forward[part - 1] if part else self.microbatches
            if self.forward[part] < before:
                yield Cell("F", self.forward[part], chunk)

    def _backwards(self, stage: int) -> Iterator[Cell]:
        for chunk, part in ((0, stage), (1, self.parts - 1 - stage)):
            after = self.backward[part + 1] if part < self.parts - 1 else self.microbatches
            if self.backward[part] < min(after, self.forward[part]):
                yield Cell("B", self.backward[part], chunk)

    def _run(self, stage: int, cell: Cell) -> None:
        part = self.parts - 1 - stage if cell.chunk else stage
        if cell.kind == "F":
            self.forward[part] += 1
            self.held[stage] += 1
        elif cell.kind == "B":
            self.backward[part] += 1
            self.waiting[stage].append(Cell("W", cell.microbatch, cell.chunk))
        else:
            self.waiting[stage].pop(0)
            self.held[stage] -= 1
        self.orders[stage].append(cell)
        self.left -= 1


ZB_V = Named("zb-v", zb_v, "Qi et al. 2023, 2401.10241, section 6; order found here", chunks=(2, 2), fills=True)
