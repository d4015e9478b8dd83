"""DualPipeV: DeepSeek's two-way pipeline, cut in half and folded into a V."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def dualpipev(stages: int, microbatches: int, chunks: int) -> Schedule:
    """DualPipeV (DeepSeek-AI, repository DualPipe, `dualpipev.py`; Sea AI Lab's cut in half of DeepSeek-V3's DualPipe,
    2412.19437, section 3.2.1), in its eight steps. It is made for at least twice as many microbatches as stages.

    B and W are apart where DeepSeek takes them apart. Where it runs a forward and a backward of different microbatches
    at once, to hide one's communication behind the other's work, they are two cells here, one after the other.
    """
    count = max(microbatches, 2 * stages)
    orders = [list(_Stage(stages, stage, count).run()) for stage in range(stages)]
    return lay_out("dualpipev", stages, microbatches, chunks, orders, "v")


class _Stage:
    """The cells of one stage. Each kind of a chunk counts its own microbatches; W is first in, first out."""

    def __init__(self, stages: int, stage: int, microbatches: int) -> None:
        self.stages, self.stage, self.microbatches = stages, stage, microbatches
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: deque[Cell] = deque()

    def run(self) -> Iterator[Cell]:
        ahead, own = self.stages - 1 - self.stage, self.stage + 1
        for _ in range(2 * ahead):  # 1: nF0
            yield self.forward(0)
        for _ in range(own):  # 2: nF0F1
            yield self.forward(0)
            yield self.forward(1)
        for _ in range(ahead):  # 3: nB1W1F1
            yield self.backward(1, apart=True)
            yield self.waiting.popleft()
            yield self.forward(1)
        for _ in range(self.microbatches - 2 * self.stages + own):  # 4: nF0B1F1B0
            yield self.forward(0)
            yield self.backward(1)
            yield self.forward(1)
            yield self.backward(0)
        for _ in range(ahead):  # 5: nB1F1B0
            yield self.backward(1)
            yield self.forward(1)
            yield self.backward(0)
        for place in range(2 * own):  # 6: nB1B0, the second half apart: from B1 on stages 1, 3, ..., else from B0
            yield self.backward(1 - place % 2, apart=place >= 2 * (own // 2) + (1 - self.stage % 2))
        for _ in range(ahead):  # 7: nWB0
            yield self.waiting.popleft()
            yield self.backward(0, apart=True)
        while self.waiting:  # 8: nW
            yield self.waiting.popleft()

    def forward(self, chunk: int) -> Cell:
        self.forwards[chunk] += 1
        return Cell("F", self.forwards[chunk] - 1, chunk)

    def backward(self, chunk: int, apart: bool = False) -> Cell:
        microbatch = self.backwards[chunk]
        self.backwards[chunk] += 1
        if apart:
            self.waiting.append(Cell("W", microbatch, chunk))
        return Cell("B" if apart else "BW", microbatch, chunk)


DUALPIPEV = Named("dualpipev", dualpipev, "DeepSeek-AI, repository DualPipe, dualpipev.py", chunks=(2, 2), fills=True)
