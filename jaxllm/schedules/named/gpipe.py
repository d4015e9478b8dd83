"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def gpipe(stages: int, microbatches: int, chunks: int) -> Schedule:
    """GPipe (Huang et al. 2019, 1811.06965, section 2.2), backwards in reverse order.

    Either order of the backwards takes the same ticks and frees one microbatch with each of them, so that no peak
    differs. Reversed, what was stored last goes first, on every stage: the stash is a stack, and it is the order in
    which autodiff takes a loop back.
    """
    order = [Cell("F", index) for index in range(microbatches)]
    order += [Cell("BW", index) for index in reversed(range(microbatches))]
    return lay_out("gpipe", stages, microbatches, chunks, [order] * stages)


GPIPE = Named("gpipe", gpipe, "Huang et al. 2019, 1811.06965, section 2.2")
