"""Memory that a program holds, copies or fills without need, and what XLA recomputes to save some."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

from jaxllm.hlo.graph import Shape
from jaxllm.hlo.memory import HBM
from jaxllm.hlo.phases import phase_of
from jaxllm.hlo.rules import tile_padded_bytes
from jaxllm.hlo.warn.walk import MEMORY, TRAFFIC, Spot, Walk, listed, times
from jaxllm.report.inspection import Finding
from jaxllm.report.units import human

_CLONE = re.compile(r"\.remat(\d|[._]|$)")
_BACKWARD = {"backward", "recompute"}

_LOSS = re.compile(r"log_softmax|logsumexp|cross_entropy|logits")


def find_xla_rematerialization(walk: Walk) -> Iterator[Finding]:
    """Instructions that XLA computes a second time, by itself, because the program would not fit otherwise.

    XLA:GPU and XLA:TPU do; XLA:CPU knows no limit of memory and never does.
    """
    clones = [operation for operation in walk.view.operations if _CLONE.search(operation.place.name)]
    sizes = [walk.by_name[clone.place.name].instruction.shape.bytes * clone.place.count for clone in clones]
    if sum(sizes) < TRAFFIC:
        return
    flops = [clone.flops * clone.place.count for clone in clones]
    largest = clones[max(range(len(clones)), key=lambda at: (flops[at], sizes[at]))].place
    yield Finding(
        "xla-rematerialization",
        f"XLA recomputes {len(clones):,} instructions by itself because memory is short: {human(sum(flops), 'FLOP')} "
        f"for {human(sum(sizes))} a step, most of it {largest.name}.",
        "Choose yourself what is computed again: jax.checkpoint(layer, "
        "policy=jax.checkpoint_policies.save_only_these_names(...)), a smaller batch on each device, or more devices "
        "to shard over.",
        largest.source,
        largest.op_name,
        sum(sizes),
    )


def find_donate(walk: Walk) -> Iterator[Finding]:
    """Arguments with the shape, type and layout of an output that has no argument's place."""
    entry = walk.module.entry
    taken = {number for _, number, _ in walk.module.aliases}
    given = {output for output, _, _ in walk.module.aliases}
    outputs = enumerate(entry.root.shape.elements) if entry.root.shape.dtype == "tuple" else [(None, entry.root.shape)]
    free: dict[Shape, int] = defaultdict(int)
    for position, shape in outputs:
        if (() if position is None else (position,)) not in given:
            free[shape] += 1
    fitting = []
    for number, parameter in sorted(entry.parameters.items()):
        if parameter.shape.bytes >= MEMORY and number not in taken and free[parameter.shape]:
            free[parameter.shape] -= 1
            fitting.append(parameter)
    if not fitting:
        return
    size = sum(parameter.shape.bytes for parameter in fitting)
    fitting.sort(key=lambda parameter: -parameter.shape.bytes)
    names = list(dict.fromkeys(re.split(r"[\[.]", p.op_name or p.name)[0] for p in fitting))
    yield Finding(
        "donate",
        f"{listed([f'{p.op_name or p.name} {p.shape}' for p in fitting])}: {human(size)} of arguments that outputs of "
        "the same shape could take the place of.",
        f"jax.jit(..., donate_argnames={tuple(names)}), for those that the caller does not use again.",
        walk.source(Spot(entry, fitting[0])),
        fitting[0].op_name,
        size,
    )


def find_heavy_residuals(walk: Walk) -> Iterator[Finding]:
    """Arrays that the forward pass keeps for the backward pass although they are cheap to make again: weights as they
    were gathered, softmax in f32. Kept one by one, or stacked by a loop.

    XLA:GPU and XLA:TPU compute a softmax that no loop stacks again by themselves, within a fusion.
    """
    kinds = {buffer.name: buffer.kind for buffer in walk.view.buffers}
    seen = set()
    for made, held in _kept(walk):
        if made.instruction.id in seen or held.bytes < MEMORY:
            continue
        seen.add(made.instruction.id)
        op_name = walk.op_name(made)
        if made.opcode in ("all-gather", "all-gather-start"):
            if _read_soon(walk, made):
                continue  # to gather it again would free nothing in between
            weight = kinds.get(made.instruction.name) == "gathered weight"
            what = f"{'a weight' if weight else 'an array'} as it was gathered"
            advice = (
                "Gather it again in the backward pass: jax.checkpoint around the layer with a policy that leaves it "
                "out, as jax.checkpoint_policies.save_any_names_but_these('w') and "
                "jax.ad_checkpoint.checkpoint_name(w, 'w')."
            )
        elif held.dtype == "f32" and _is_softmax(walk, made):
            loss = kinds.get(made.instruction.name) == "logits" or _LOSS.search(op_name)
            what = f"{'the softmax of a loss' if loss else 'a softmax'} in f32"
            advice = (
                "Compute it again: jax.checkpoint around the loss, or the loss over one block of tokens after the other."
                if loss
                else "Compute it again: jax.checkpoint around the attention; or jax.nn.dot_product_attention, whose "
                "kernels keep no scores; or the softmax in bf16."
            )
        else:
            continue
        yield Finding(
            "heavy-residuals",
            f"The forward pass keeps {what} for the backward pass, {held} ({human(held.bytes)}).",
            advice,
            walk.source(made),
            op_name,
            held.bytes,
        )


def _read_soon(walk: Walk, made: Spot) -> bool:
    """Whether the last reader of an array comes without a loop in between, and before a quarter of the rest."""
    order, loops = walk.order(made.computation)
    here = [order[r.instruction.id] for r in walk.readers(made) if r.instruction.id in order]
    begin, end = order[made.instruction.id], max(here, default=len(order))
    return bisect_left(loops, begin) == bisect_left(loops, end) and end - begin < len(order) / 4


def _is_softmax(walk: Walk, made: Spot) -> bool:
    """Whether an array is made by a softmax: by its name, or as the exponential of a difference, that to a maximum."""
    if "softmax" in walk.op_name(made):
        return True
    if made.opcode == "divide":
        made = walk.origin(made.operand())
    return made.opcode == "exponential" and walk.origin(made.operand()).opcode == "subtract"


def _kept(walk: Walk) -> Iterator[tuple[Spot, Shape]]:
    """What the forward pass makes and the backward pass reads: what makes it, or a piece of it, and the shape of
    all."""
    for loop in walk.by_opcode["while"]:
        if phase_of(walk.op_name(loop)) != "forward":
            continue
        body, _ = walk.module.while_parts(loop.instruction)
        for slot, shape in enumerate(loop.shape.elements):
            if shape.bytes < MEMORY:
                continue
            end = walk.origin(Spot(body, body.root, (slot,)))
            readers = walk.readers(Spot(*loop[:2], (slot,))) if end.opcode == "dynamic-update-slice" else []
            if any(phase_of(walk.op_name(reader)) in _BACKWARD for reader in readers):
                yield walk.origin(end.operand(1)), shape
    singly = [(spot, spot.shape.leaves[-1]) for spot, _ in walk.collectives("all-gather")]
    residuals = [buffer for buffer in walk.view.buffers if buffer.kind == "residual" and buffer.bytes >= MEMORY]
    spots = (walk.by_name.get(buffer.name) for buffer in residuals)
    singly += [(walk.origin(spot), spot.shape) for spot in spots if spot is not None and spot.shape.dtype != "tuple"]
    for made, shape in singly:
        if shape.bytes < MEMORY:
            continue
        phases = {phase_of(walk.op_name(reader)) for reader in walk.readers(made)}
        made_in = phase_of(walk.op_name(made)) or "forward" * ("forward" in phases)
        if made_in == "forward" and phases & _BACKWARD:
            yield made, shape


def find_conditional_copies(walk: Walk) -> Iterator[Finding]:
    """A conditional in a loop that copies what the loop carries, in a branch, before it or after it.

    All compilers copy where the array is read again beside the conditional; XLA:GPU of jax 0.10 wherever a branch
    updates it or hands it on.
    """
    copies: dict[int, list[Spot]] = defaultdict(list)
    for copy in walk.by_opcode["copy"] if walk.by_opcode["conditional"] else ():
        if copy.shape.bytes >= TRAFFIC and copy.shape.memory_space == copy.operand().shape.memory_space:
            copies[copy.computation.id].append(copy)
    for spot in walk.by_opcode["conditional"]:
        loop = walk.caller(spot.computation)
        if loop is None or loop.opcode != "while":
            continue
        inside = [
            [copy for copy in copies[branch.id] if _is_carried(walk, spot, position, walk.origin(copy))]
            for position, branch in enumerate(walk.module.called(spot.instruction))
        ]
        most = max(inside, key=lambda branch: sum(copy.shape.bytes for copy in branch), default=[])
        made = [*most, *(copy for copy in copies[spot.computation.id] if _is_beside(walk, spot, copy))]
        size = sum(copy.shape.bytes for copy in made) * walk.count(spot)
        if size < MEMORY:
            continue
        shapes = ", ".join(dict.fromkeys(str(copy.shape) for copy in made))
        yield Finding(
            "conditional-copies",
            f"A conditional in a loop copies what the loop carries ({shapes}{times(walk.count(spot))}): {human(size)} "
            "a step.",
            "Let the conditional choose what changes only, as the row to write, and write it after: row = "
            "jax.lax.cond(...), cache = jax.lax.dynamic_update_slice(cache, row, ...); or jnp.where(flag, row, "
            "old_row) in its place.",
            walk.source(spot),
            walk.op_name(spot),
            size,
        )


def _is_carried(walk: Walk, conditional: Spot, branch: int, array: Spot) -> bool:
    """Whether an array of a branch is what the loop around the conditional carries."""
    if array.opcode != "parameter" or branch + 1 >= len(conditional.instruction.operand_ids):
        return False
    outside = walk.origin(Spot(*conditional.operand(branch + 1)[:2], array.index))
    return outside.opcode == "parameter" and outside.computation is conditional.computation


def _is_beside(walk: Walk, conditional: Spot, copy: Spot) -> bool:
    """Whether a copy is of a result of a conditional that the loop carries on, or of what it carries for a
    conditional."""
    origin = walk.origin(copy)
    if origin.instruction is conditional.instruction:
        return any(reader.instruction.id == copy.computation.root_id for reader in walk.readers(copy))
    carried = origin.opcode == "parameter" and origin.computation is copy.computation
    return carried and any(reader.instruction is conditional.instruction for reader in walk.readers(copy))


def find_tpu_padding(walk: Walk) -> Iterator[Finding]:
    """Arrays that tiles pad by more than a tenth. XLA:CPU and XLA:GPU lay arrays out without tiles."""
    for buffer in walk.view.buffers:
        spot = walk.by_name.get(buffer.name)
        if buffer.bytes < MEMORY or spot is None:
            continue
        shape = next((leaf for leaf in spot.instruction.shape.leaves if str(leaf) == buffer.shape and leaf.tiles), None)
        if shape is None or shape.memory_space != HBM:
            continue
        padding = tile_padded_bytes(shape) - shape.bytes
        if padding < MEMORY or 10 * padding <= shape.bytes:
            continue
        yield Finding(
            "tpu-padding",
            f"{buffer.op_name or buffer.name} {shape} lies in tiles of {'x'.join(map(str, shape.tiles[0]))} and takes "
            f"{human(shape.bytes + padding)} for {human(shape.bytes)}: {100 * padding // max(1, shape.bytes):,} % "
            "more.",
            "Make the last dim a multiple of 128 and the one before it of 8 (16 in bf16), or merge small dims into one "
            "with reshape; of a sharded array, the dims of each device's piece count.",
            walk.source(spot),
            buffer.op_name,
            padding,
        )
