"""The closed form by layer or by module, for people and for programs; what is uneven in it, and what evens it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from jaxllm.report.compare import Setup
from jaxllm.report.table import print_fields, print_listing
from jaxllm.report.units import human
from jaxllm.spec.errors import SpecError, nearest
from jaxllm.spec.layout import Layout
from jaxllm.theory.parts import BLOCK, DEPTHS, FIGURES, Part, parts
from jaxllm.theory.products import EMBEDDING, HEAD, OTHERS

MEMORY = ("parameters", "gradients", "optimizer", "activations", "other", "held")
WORK = ("forward", "recompute", "backward", "update", "sent")
HOST = ("host", "to_device", "to_host")
# Six columns in 80 characters
_SHORT = {
    "parameters": "weights", "optimizer": "state", "activations": "saved", "host": "held", "to_device": "to the device",
    "to_host": "to the host",
}  # fmt: skip
TABLES = (
    ("what one device holds", MEMORY, "B"),
    ("what one device computes, and sends on the wire", WORK, ""),
    ("what is held in host memory for one device, and copied", HOST, "B"),
)

# The kinds of memory that a layout makes smaller: what each is called in a sentence, and the ZeRO stage that slices it.
KINDS = {
    "optimizer": ("optimizer state", 1),
    "gradients": ("gradients", 2),
    "parameters": ("parameters", 3),
    "activations": ("activations", None),
}
EVENING = {"time": "partition=time evens out their work", "memory": "partition=memory evens out what they need"}


def check_by(by: str, remat: str) -> None:
    """Raises SpecError where there is no such way to take a ledger apart."""
    if by not in DEPTHS:
        raise SpecError(f"--by {by!r} is unknown; {nearest(by, DEPTHS)}")
    if remat == "jax":
        raise SpecError("--by takes the closed form apart, and remat=jax has none; choose another remat, or leave out --by.")


def document(setup: Setup, by: str) -> list[dict[str, Any]]:
    """The parts as plain dicts: bytes held, FLOPs and wire bytes of one device in a step, over all blocks of a row."""
    return [asdict(part) | {"held": part.held} for part in _parts(setup, by)]


def _parts(setup: Setup, by: str) -> tuple[Part, ...]:
    return parts(setup.model, setup.layout, setup.workload, by)


def print_parts(setup: Setup, by: str, out: Console) -> None:
    """Tables of what each part holds, of what it computes and sends, and, where it is used, of host memory; a row of blocks
    is for each of them where they are alike. Then what is uneven."""
    found = _parts(setup, by)
    for title, figures, unit in TABLES:
        if not any(getattr(part, figure) for part in found for figure in figures):
            continue
        out.print()
        out.print(f"By {by}, closed form: {title}", style="bold")
        figures = [figure for figure in figures if figure != "update" or any(part.update for part in found)]
        rows = [_row(part, figures, unit) for part in found if any(getattr(part, figure) for figure in figures)]
        if len({part.stage for part in found}) == 1:
            every = Part("all", 1, None, **{name: sum(getattr(part, name) for part in found) for name in FIGURES})
            rows.append(_row(every, figures, unit))
        print_listing(out, ("", *(_SHORT.get(figure, figure) for figure in figures)), rows)
    out.print()
    print_fields(out, [(name, text) for name, text in uneven(found, setup.layout)])


def bars(setup: Setup, by: str) -> list[tuple[str, dict[str, int]]]:
    """Bytes of one device by what they are, host memory last: of each part, or of one of the blocks that are alike; of a
    pipeline of each stage."""
    found, kinds = _parts(setup, by), (*MEMORY[:-1], "host")
    if found[0].stage is None:
        held = [part for part in found if part.held or part.host]
        return [(_name(part), {kind: getattr(part, kind) // part.times for kind in kinds}) for part in held]
    return [
        (f"stage {stage}", {kind: sum(getattr(part, kind) for part in found if part.stage == stage) for kind in kinds})
        for stage in sorted({part.stage for part in found})
    ]


def _name(part: Part) -> str:
    name = part.name.removeprefix(f"{BLOCK}.")
    if part.name.startswith(BLOCK):
        name = f"{name}, each of {part.times}" if part.stage is None else f"{part.times} x {name}"
    return name if part.stage is None else f"stage {part.stage}: {name}"


def _unit(figure: str, unit: str) -> str:
    return unit or ("B" if figure == "sent" else "FLOP")


def _row(part: Part, figures: Sequence[str], unit: str) -> tuple[str, ...]:
    # In a pipeline a stage's room may be for more blocks than it has: only all of them together are its own.
    each = part.times if part.stage is None else 1
    values = (getattr(part, figure) for figure in figures)
    shown = zip(figures, values, strict=True)
    return (_name(part), *(human(value // each, _unit(figure, unit)) if value else "-" for figure, value in shown))


def remedy(kind: str, layout: Layout) -> str:
    """What makes one of KINDS smaller on a device, beside what the layout has already."""
    _, stage = KINDS[kind]
    if stage is not None:
        if layout.zero >= stage:
            return "more of data, context or tensor slices them further"
        least = f"zero={stage}{'' if stage == 3 else ' or more'}"
        return f"{least} over {layout.zero_ways} ranks slices them" if layout.zero_ways > 1 else f"{least} with data slices them"
    ways = [{"none": "remat=selective or full", "selective": "remat=full"}.get(layout.remat, "")]
    ways += ["attention=blockwise"] if "scores" in layout.saved else []
    ways += ["sequence=true"] if layout.tensor > 1 and not layout.sequence else []
    *first, last = [way for way in (*ways, "context", "more microbatches") if way]
    return f"{', '.join(first)} or {last} leave less of them"


def uneven(found: Sequence[Part], layout: Layout) -> list[tuple[str, str]]:
    """Sentences on what is held most, and on how uneven parts or stages are, each with what helps."""
    total = {name: sum(getattr(part, name) for part in found) for name in MEMORY}
    spare = sum(part.held for part in found if part.name == OTHERS)
    largest = max(KINDS, key=lambda name: total[name])
    share = f"{100 * total[largest] / total['held']:.0f} % of what is held"
    lines = [("most", f"{share}: {KINDS[largest][0]}; {remedy(largest, layout)}")]
    stages = sorted({part.stage for part in found if part.stage is not None})
    if not stages:
        ends = sum(part.held for part in found if part.name in (EMBEDDING, HEAD))
        block = sum(part.held / part.times for part in found if part.name.startswith(BLOCK))
        return [*lines, ("ends", f"embedding and head together hold as much as {ends / block:.2f} blocks")]
    needed = [sum(part.held for part in found if part.stage == stage and part.name != OTHERS) for stage in stages]
    mean = sum(needed) / len(needed)
    text = f"stage {needed.index(max(needed))} needs {100 * (max(needed) / mean - 1):.1f} % more than the mean"
    if max(needed) > 1.05 * mean:
        text += f"; {', '.join(way for name, way in EVENING.items() if name != layout.partition)}"
    lines.append(("stages", text))
    if spare:
        lines.append(
            ("uniform", f"{human(round(spare / len(stages)))} a stage, {100 * spare / total['held']:.0f} % of all, is room for "
             "weights that only others need: one program for all stages allocates on each what any needs")
        )  # fmt: skip
    return lines
