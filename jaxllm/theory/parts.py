"""A ledger taken apart by the parts of the model: what the embedding, each block and the head hold, compute and send."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import TO_DEVICE, TO_HOST, Line, Term
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate
from jaxllm.spec.workload import Workload
from jaxllm.theory.partition import stages_of
from jaxllm.theory.predict import of_symbols
from jaxllm.theory.products import ATTENTION, EMBEDDING, HEAD, MLP, OTHERS
from jaxllm.theory.symbols import Symbols

BLOCK, STEP = "block", "step"
DEPTHS = {"layer": (EMBEDDING, BLOCK, HEAD, OTHERS, STEP), "module": (EMBEDDING, ATTENTION, MLP, HEAD, OTHERS, STEP)}

_MEMORY = {name: name for name in ("parameters", "gradients", "optimizer")} | dict.fromkeys(
    ("residuals", "stash", "weight_stash"), "activations"
) | {"host": "host"}  # all other lines of memory are `other`
_COPIED = {TO_DEVICE: "to_device", TO_HOST: "to_host"}


@dataclass(frozen=True)
class Part:
    """What one device has of a part of the model, per step: bytes held, matmul FLOPs by phase, wire bytes sent.

    name    embedding, block, head; of a block its attention and its mlp apart; what is the step's own; and of a pipeline
            the room for weights of other stages
    times   how many blocks there are, and 1 of anything else; the figures are those of all of them together
    stage   of a pipeline, None without one
    other   batch, padding, and what a pipeline keeps until its turn
    host    bytes in the memory of the device's host, which `held` does not count; to_device and to_host are those copied
    """

    name: str
    times: int
    stage: int | None
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    other: int = 0
    forward: int = 0
    recompute: int = 0
    backward: int = 0
    update: int = 0
    sent: int = 0
    host: int = 0
    to_device: int = 0
    to_host: int = 0

    @property
    def held(self) -> int:
        """Bytes of all kinds on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.other


FIGURES = tuple(field.name for field in fields(Part) if field.name not in ("name", "times", "stage"))


def parts(model: ModelConfig, layout: Layout, workload: Workload, by: str = "layer") -> tuple[Part, ...]:
    """The closed form by part, as `predict` has it in all: by "layer", or by "module" with a block's two halves apart.

    In a pipeline the parts of each stage, first to last. Raises SpecError where `predict` does, for another `by`, and for
    remat=jax, which has no closed form.
    """
    if by not in DEPTHS:
        raise SpecError(f"a ledger by {by!r} is unknown; {nearest(by, DEPTHS)}")
    if layout.remat == "jax":
        raise SpecError("remat=jax has no closed form to take apart; choose remat=none, selective or full.")
    validate(model, layout, layout.devices, workload)
    s = Symbols.of(model, layout, workload)
    stages = stages_of(model, layout, workload)
    if stages is None:
        return _of(s, None, by)
    return tuple(
        part for stage in range(stages.schedule.stages) for part in _of(s.on_stage(stages, stage), stage, by)
    )


def _of(s: Symbols, stage: int | None, by: str) -> tuple[Part, ...]:
    found = {name: Part(name, s.L if name.startswith(BLOCK) else 1, stage) for name in DEPTHS[by]}
    for line in of_symbols(s).lines:
        figure = _figure(line)
        total = line.wire if figure == "sent" else line.value
        left = int(total)
        for term in line.terms:
            # Wire bytes are in proportion to the payload; what is rounded is the step's.
            share = _share(line, term) if figure == "sent" else int(term.value)
            name = term.part.partition(".")[0] if by == "layer" else term.part
            left -= share
            found[name or STEP] = _more(found[name or STEP], figure, share)
        found[STEP] = _more(found[STEP], figure, left)
    return tuple(part for part in found.values() if any(getattr(part, figure) for figure in FIGURES))


def _figure(line: Line) -> str:
    if line.section == "memory":
        return _MEMORY.get(line.name, "other")
    return "sent" if line.section == "collectives" else _COPIED.get(line.name, line.phase)


def _share(line: Line, term: Term) -> int:
    return int(line.wire) * int(term.value) // int(line.value) if line.value else 0


def _more(part: Part, figure: str, value: int) -> Part:
    return replace(part, **{figure: getattr(part, figure) + value})
