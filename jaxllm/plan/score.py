"""Bytes at the peak and seconds of a step of all layouts of a block at once, by the formulas of `predict` and `step_time`.

What a pipeline's schedule adds is added last, for it depends on few of the other choices: the buffers that it takes, which
are the same on all stages, and what it idles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxllm.plan.space import KEPT, ROWS, SCHEDULES, STAGE, STATE, ZEROS, Block, along
from jaxllm.schedules.sizes import known, sizes
from jaxllm.spec import activations
from jaxllm.spec.attention import blocks as cut_in_blocks
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import merge
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory import activations as saved
from jaxllm.theory import peak, state
from jaxllm.theory.rates import Rates
from jaxllm.theory.stages import even
from jaxllm.theory.state import add
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.time import Work, bubble, cells_of, of_symbols
from jaxllm.theory.time import block as work_of_block

BUFFERS = ("stash", "weight_stash", "inbox")  # lines of what a schedule keeps


def peaks(block: Block, s: Symbols, layers: int, target: str) -> np.ndarray:
    """Bytes of a device at the peak, of the stage with the most, over all axes of the block; `layers` are the model's."""
    memory = merge((*state.lines(s), *saved.lines(s)))
    found = peak.total(s, memory, target)
    if block.pipe == 1:
        return np.broadcast_to(found[..., 0], block.shape)
    lines = {line.name: line.value for line in saved.lines(_scheduled(block, s, layers))}
    buffers = add(lines[name] for name in BUFFERS)[..., 0]
    return np.broadcast_to(_by_schedule(block, s, lambda of: found[..., of].max(STAGE)) + buffers, block.shape)


def seconds(block: Block, s: Symbols, rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a step, of the slowest stage and what a pipeline idles, and those of them that wait (StepTime.waits), over all
    axes of the block. NaN where the schedule's idle time or its
    buffers have no closed form."""
    of_block = work_of_block(s, rates)
    time = of_symbols(s, rates, of_block)
    found, waits = time.seconds, np.broadcast_to(time.waits, time.seconds.shape)
    if block.pipe == 1:
        return np.broadcast_to(found[..., 0], block.shape), np.broadcast_to(waits[..., 0], block.shape)

    def of_slowest(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        slowest = np.argmax(found[..., of], STAGE, keepdims=True)
        return np.take_along_axis(values[..., of], slowest, STAGE)[..., 0]

    seconds_ = _by_schedule(block, s, lambda of: found[..., of].max(STAGE)) + _idle(block, s, rates, of_block)
    waits = _by_schedule(block, s, lambda of: of_slowest(waits, of))
    return np.broadcast_to(seconds_, block.shape), np.broadcast_to(waits, block.shape)


def _by_schedule(block: Block, s: Symbols, of_stages: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What the stages of each schedule give, of which there are those of its placement."""
    each = {placement: of_stages(np.flatnonzero(s.apart == (placement == "ring"))) for placement in set(block.placements)}
    return np.concatenate([each[placement] for placement in block.placements], axis=SCHEDULES)


def _idle(block: Block, s: Symbols, rates: Rates, of_block: Work) -> np.ndarray:
    """What each schedule idles."""
    cells = {}
    for placement in set(block.placements):
        longest = replace(s, L=int(s.L[..., s.apart.ravel() == (placement == "ring")].max()), first=0, last=0, apart=0)
        cells[placement] = longest, cells_of(longest, rates, of_block)
    each = []
    for (name, chunks), placement in zip(block.schedules, block.placements, strict=True):
        found = np.where(known(name, block.pipe, s.m, chunks), bubble(*cells[placement], name, chunks), np.nan)
        each.append(found[..., 0])
    return np.concatenate(each, axis=SCHEDULES)


def symbols(block: Block, model: ModelConfig, workload: Workload) -> Symbols:
    """The symbols of a block, spread over its axes and the kinds of stages that it has. What depends on the schedule is
    left out: there are no buffers in them, and a single tick."""
    base = Symbols.of(model, Layout(), workload)
    column = block.column
    kept = [_layout(block, own) for own in block.kept]
    ring = block.exchange == "ring"

    def flags(of: Callable[[Layout], Any], names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        return tuple(along(KEPT, [int(name in of(layout)) for layout in kept]) for name in names)

    number, size = cut_in_blocks(workload.sequence // (2 * column("context") if ring else 1))
    s = replace(
        base,
        r=column("replica"),
        n=column("data"),
        x=column("context"),
        t=column("tensor"),
        m=column("microbatches"),
        q=np.where(column("sequence"), column("tensor"), 1),
        z=along(ZEROS, block.zeros),
        h=along(STATE, [int("optimizer" in text) for text in block.states]),
        hp=along(STATE, [int("parameters" in text) for text in block.states]),
        saved=flags(lambda layout: layout.saved, activations.NAMES),
        away=flags(lambda layout: layout.offloaded, (*activations.NAMES, activations.INPUT)),
        w=along(KEPT, [int(own.attention == "blockwise") for own in block.kept]),
        f=along(KEPT, [int(own.attention == "cudnn") for own in block.kept]),
        A=number,
        C=size,
        ring=int(ring) * (column("context") > 1),
        b=workload.batch // (column("replica") * column("data") * column("microbatches")),
        S=workload.sequence // column("context"),
    )
    if block.pipe == 1:
        return s
    kinds = [kind for placement in sorted(set(block.placements)) for kind in sorted(stages(block.pipe, placement, model.layers))]
    layers, first, last, rows, apart = zip(*kinds, strict=True)
    return replace(
        s,
        L=along(STAGE, layers),
        R=along(STAGE, rows),
        first=along(STAGE, first),
        last=along(STAGE, last),
        pipe=block.pipe,
        ticks=1,
        ways=2,
        apart=along(STAGE, apart),
    )


def stages(pipe: int, placement: str, layers: int) -> set[tuple[int, int, int, int, int]]:
    """(layers, with the embedding, with the head, rows of layers, ends on two stages) of the stages that differ, but for those
    that have less than another."""
    owner, sizes_ = _owners(pipe, placement), parts_of(pipe, placement, layers)
    held = [0] * pipe
    for part, stage in enumerate(owner):
        held[stage] += sizes_[part]
    rows = (2 if placement == "v" else 1) * max(sizes_)
    found = {(held[stage], int(stage == owner[0]), int(stage == owner[-1])) for stage in range(pipe)}
    most = {one for one in found if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in found)}
    return {(*one, rows, int(owner[0] != owner[-1])) for one in most}


def parts_of(pipe: int, placement: str, layers: int) -> tuple[int, ...]:
    """Layers in each part of the model; with several chunks in a ring these are divided once more, evenly."""
    return even(layers, _owners(pipe, placement))


def _owners(pipe: int, placement: str) -> list[int]:
    up = list(range(pipe))
    return up + up[::-1] if placement == "v" else up


def _scheduled(block: Block, s: Symbols, layers: int) -> Symbols:
    """The symbols with the buffers of each schedule, which all stages have."""
    found = [sizes(name, block.pipe, block.rows["microbatches"], chunks) for name, chunks in block.schedules]
    parts = {placement: max(parts_of(block.pipe, placement, layers)) for placement in set(block.placements)}
    depth = [
        parts[placement] // (chunks if placement == "ring" else 1)
        for (_, chunks), placement in zip(block.schedules, block.placements, strict=True)
    ]

    def of(name: str) -> np.ndarray:
        return np.stack([getattr(each, name) for each in found], axis=1)[:, :, None, None, None, None]

    return replace(
        s,
        stash=of("stash"),
        kept=of("weights"),
        inbox=of("inputs"),
        depth=along(SCHEDULES, depth),
        L=0,
        R=0,
    )


def _layout(block: Block, own: Any) -> Layout:
    context = 2 if block.exchange == "ring" else 1
    return Layout(remat=own.remat, save="" if own.save == "none" else own.save, attention=own.attention, offload="input" if own.away else "none", context=context)
