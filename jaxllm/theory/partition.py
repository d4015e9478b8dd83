"""How the layers of a model are shared out among the parts of a pipeline: evenly, or by what the ends take as well.

The embedding and the head make the first and the last part heavier. A partition by time weighs FLOPs, one by memory the
bytes of parameters, gradients, optimizer and stash, both by the closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

from jaxllm.schedules import Schedule
from jaxllm.schedules.counts import slots
from jaxllm.schedules.files import load as load_schedule
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import Layout
from jaxllm.spec.ledger import Line
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory import activations, flops, state
from jaxllm.theory.products import OTHERS
from jaxllm.theory.stages import Stages, even, share_out
from jaxllm.theory.symbols import Symbols


DEFAULT = "1f1b"


@dataclass(frozen=True)
class Load:
    """What each stage takes in a step: FLOPs, and bytes that it needs of parameters, gradients, optimizer and stash."""

    time: tuple[int, ...]
    memory: tuple[int, ...]

    def imbalance(self, kind: str) -> float:
        """The stage with the most over the mean of all, less one."""
        values = getattr(self, kind)
        return max(values) * len(values) / sum(values) - 1


def stages_of(model: ModelConfig, layout: Layout, workload: Workload) -> Stages | None:
    """The stages of a layout; None without a pipeline.

    Raises SpecError when there are more parts than layers, or the schedule cannot be had with these numbers.
    """
    if layout.pipe == 1:
        return None
    schedule = load_schedule(layout.schedule or DEFAULT, layout.pipe, layout.microbatches, layout.virtual or None)
    parts = schedule.parts
    if parts > model.layers:
        split = f"pipe={layout.pipe}" + (f" x {schedule.chunks} chunks" if schedule.chunks > 1 else "")
        raise SpecError(
            f"{split} = {parts} parts are more than the {model.layers} layers of {model.name}; take "
            f"{max(1, model.layers // schedule.chunks)} stages or fewer{_fewer_chunks(model.layers, layout)}."
        )
    owner = _owners(schedule)
    if layout.partition == "even":
        if schedule.chunks > 1 and schedule.placement == "ring" and model.layers % parts:
            raise SpecError(
                f"virtual={schedule.chunks} does not divide the {model.layers} layers of {model.name} over pipe="
                f"{layout.pipe} stages; {_virtual(model.layers, layout.pipe)}, or partition=time, which need not be even."
            )
        return Stages(schedule, even(model.layers, owner))
    s = Symbols.of(model, layout, workload)
    each, base = _weighed(s, schedule, layout.partition)
    return Stages(schedule, share_out(model.layers, base, each, owner))


def load(model: ModelConfig, layout: Layout, workload: Workload, stages: Stages) -> Load:
    """What the stages of a layout take with their layers."""
    s = Symbols.of(model, layout, workload)
    totals = []
    for kind in ("time", "memory"):
        each, base = _weighed(s, stages.schedule, kind)
        totals.append([0] * stages.schedule.stages)
        for part, size in enumerate(stages.sizes):
            totals[-1][stages.schedule.owner(part)[0]] += base[part] + each[part] * size
    return Load(*(tuple(map(int, total)) for total in totals))


def described(model: ModelConfig, layout: Layout, workload: Workload, stages: Stages) -> tuple[str, ...]:
    """Sentences on how the layers lie, and how far the heaviest stage is above the mean: for the notes of a ledger."""
    here = load(model, layout, workload, stages)
    plain = load(model, layout, workload, Stages(stages.schedule, even(model.layers, _owners(stages.schedule))))
    of = "stage" if stages.schedule.chunks == 1 else "part of the model"
    text = f"partition={layout.partition}: {runs(stages.sizes)} layers by {of}; "
    parts = []
    for kind, what in (("time", "FLOPs"), ("memory", "bytes")):
        was = "" if layout.partition == "even" else f" (evenly {100 * plain.imbalance(kind):.1f} %)"
        parts.append(f"{100 * here.imbalance(kind):.1f} %{was} more {what}")
    return (f"{text}the heaviest stage has {' and '.join(parts)} than the mean",)


def _weighed(s: Symbols, schedule: Schedule, kind: str) -> tuple[list[int], list[int]]:
    """What a layer of each part adds, and what each part takes without one."""
    last = schedule.parts - 1
    owner = _owners(schedule)
    peaks = slots(schedule).stages

    @cache
    def weight(stash: int, kept: int, layers: int, first: bool, last: bool) -> int:
        # The stash of a stage is shared by its chunks.
        part = replace(
            s, stash=stash, kept=kept, inbox=0, depth=layers, pipe=schedule.stages, L=layers, R=layers, first=int(first), last=int(last)
        )
        return _weight(part, kind, schedule.chunks)

    each = [weight(peaks[stage].stash, peaks[stage].weights, 1, False, False) for stage in owner]
    base = [weight(peaks[stage].stash, peaks[stage].weights, 0, part == 0, part == last) for part, stage in enumerate(owner)]
    return each, base


def _weight(s: Symbols, kind: str, chunks: int) -> int:
    if kind == "time":
        return sum(int(line.value) for line in flops.lines(s))
    lines: dict[str, Line] = {line.name: line for line in (*state.lines(s), *activations.lines(s))}
    held = sum(int(lines[name].value) for name in ("parameters", "optimizer"))
    # Needed are the gradients of what is needed: those of other stages' weights are the program's, not the stage's.
    gradients = sum(int(term.value) for term in lines["gradients"].terms if term.part != OTHERS)
    return held + gradients + sum(int(lines[name].value) for name in ("stash", "weight_stash")) // chunks


def runs(sizes: Sequence[int]) -> str:
    """Numbers in order, with three or more of the same put together: `7, 14 x 8, 7`."""
    groups = [(size, len(list(group))) for size, group in groupby(sizes)]
    return ", ".join(f"{count} x {size}" if count > 2 else ", ".join([str(size)] * count) for size, count in groups)


def _fewer_chunks(layers: int, layout: Layout) -> str:
    """The other way out, where chunks were asked for."""
    return f", or virtual={layers // layout.pipe}" if layout.virtual > layers // layout.pipe > 1 else ""


def _owners(schedule: Schedule) -> list[int]:
    """The stage of each part."""
    return [schedule.owner(part)[0] for part in range(schedule.parts)]


def _virtual(layers: int, pipe: int) -> str:
    possible = [n for n in range(2, layers // pipe + 1) if layers % (pipe * n) == 0]
    return f"virtual={' or '.join(map(str, possible))} would do" if possible else "choose a pipe that divides the layers"
