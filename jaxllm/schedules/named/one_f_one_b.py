"""1F1B and what zero bubbles make of it: one order with two numbers, how many forwards first and how late W is."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def one_f_one_b(stages: int, microbatches: int, chunks: int) -> Schedule:
    """PipeDream-flush (Narayanan et al. 2021, 2006.09503, section 3.2), Megatron's without interleaving: a stage runs
    ahead by as many forwards as there are stages from it to the last, then one forward for each backward."""
    orders = [_fused(microbatches, stages - stage) for stage in range(stages)]
    return lay_out("1f1b", stages, microbatches, chunks, orders)


def zb_h1(stages: int, microbatches: int, chunks: int) -> Schedule:
    """ZB-H1 (Qi et al. 2023, 2401.10241, section 2.1): 1F1B with W put off until the stage would idle, which
    no stage pays for with memory: stage i keeps at most i of them for later."""
    orders = [_split(microbatches, stages - stage, stage) for stage in range(stages)]
    return lay_out("zb-h1", stages, microbatches, chunks, orders)


def zb_h2(stages: int, microbatches: int, chunks: int) -> Schedule:
    """ZB-H2 (the same, section 2.2): nearly twice as many forwards first, and no stage waits for its first backward."""
    orders = [_split(microbatches, 2 * (stages - stage) - 1, 2 * stage) for stage in range(stages)]
    return lay_out("zb-h2", stages, microbatches, chunks, orders)


def _fused(microbatches: int, ahead: int) -> Iterator[Cell]:
    yield from (Cell("F", index) for index in range(min(ahead, microbatches)))
    for index in range(microbatches):
        yield Cell("BW", index)
        if index + ahead < microbatches:
            yield Cell("F", index + ahead)


def _split(microbatches: int, ahead: int, late: int) -> Iterator[Cell]:
    yield from (Cell("F", index) for index in range(min(ahead, microbatches)))
    for index in range(microbatches):
        yield Cell("B", index)
        if index >= late:
            yield Cell("W", index - late)
        if index + ahead < microbatches:
            yield Cell("F", index + ahead)
    yield from (Cell("W", index) for index in range(max(0, microbatches - late), microbatches))


ONE_F_ONE_B = Named("1f1b", one_f_one_b, "Narayanan et al. 2021, 2006.09503, section 3.2")
ZB_H1 = Named("zb-h1", zb_h1, "Qi et al. 2023, 2401.10241, section 2.1")
ZB_H2 = Named("zb-h2", zb_h2, "Qi et al. 2023, 2401.10241, section 2.2")
