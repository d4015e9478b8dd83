"""The circular pipeline of praxis and MaxText: a loop over ticks, and what autodiff makes of it."""

from __future__ import annotations

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def circular(stages: int, microbatches: int, chunks: int) -> Schedule:
    """All microbatches pass chunk 0, then all pass chunk 1, and so on; the backward pass is the mirror image in time.

    F of chunk r and microbatch i runs on stage s at tick r * microbatches + i + s (praxis,
    `LayerwiseShardablePipelined` with circular_repeat; MaxText, `pipeline.py`). With fewer microbatches than stages, a
    chunk would begin before its input has come round.
    """
    order = [Cell("F", index, chunk) for chunk in range(chunks) for index in range(microbatches)]
    order += [Cell("BW", cell.microbatch, cell.chunk) for cell in reversed(order)]
    return lay_out("circular", stages, microbatches, chunks, [order] * stages)


CIRCULAR = Named("circular", circular, "praxis and MaxText, circular pipelines", chunks=(2, None), fills=True)
