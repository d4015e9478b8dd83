"""Interleaved 1F1B: Megatron's order of the chunks of a stage."""

from __future__ import annotations

from jaxllm.schedules.named import Named
from jaxllm.schedules.order import lay_out
from jaxllm.schedules.table import Cell, Schedule


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, 2104.04473, section 2.2.2), in the order of Megatron-LM's
    `forward_backward_pipelining_with_interleaving`: as many microbatches as stages pass a chunk before the next chunk
    takes them; stage s runs 2 * (stages - 1 - s) + (chunks - 1) * stages forwards ahead, then one forward and one
    backward in turn. It is made for the next multiple of the stages.
    """
    groups = -(-microbatches // stages)
    members = [
        (group * stages + index, chunk) for group in range(groups) for chunk in range(chunks) for index in range(stages)
    ]
    forwards = [Cell("F", index, chunk) for index, chunk in members]
    backwards = [Cell("BW", index, chunks - 1 - chunk) for index, chunk in members]
    orders = []
    for stage in range(stages):
        ahead = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, len(members))
        order = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            order += (forward, backward)
        orders.append(order + backwards[len(members) - ahead :])
    return lay_out("interleaved", stages, microbatches, chunks, orders)


INTERLEAVED = Named(
    "interleaved", interleaved, "Narayanan et al. 2021, 2104.04473, section 2.2.2", chunks=(2, None), fills=True
)
