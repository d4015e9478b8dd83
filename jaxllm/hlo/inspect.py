"""inspect: a compiled program of anybody's -> Report."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from jaxllm.hlo.classes import classes
from jaxllm.hlo.collectives import axes_and_ranks, collectives, emitted_parts, kind_of, produced_by, start_of
from jaxllm.hlo.flops import WORKERS, Range, Work, all_work, range_of, ranges, work_of
from jaxllm.hlo.footprint import footprint
from jaxllm.hlo.graph import Computation, Instruction, Module
from jaxllm.hlo.groups import UNKNOWN, Groups, groups_of, pairs_of, recovered_axes
from jaxllm.hlo.lifetimes import Lifetimes, lifetimes
from jaxllm.hlo.loops import Context, Executions, executions
from jaxllm.hlo.opcodes import known
from jaxllm.hlo.overlap import Overlap, overlaps
from jaxllm.hlo.phases import phase_of
from jaxllm.hlo.read import Program, uncollected
from jaxllm.hlo.roofline import bound
from jaxllm.hlo.rules import all_reduce_then_slice
from jaxllm.hlo.traffic import names_only, traffic
from jaxllm.hlo.view import View
from jaxllm.hlo.warn import findings
from jaxllm.report.inspection import Collective, Operation, Place, Product, Report
from jaxllm.spec.errors import SpecError
from jaxllm.spec.ledger import wire_bytes


def inspect_program(
    program: Program,
    *,
    mesh: dict[str, int] | None = None,
    sure: bool = True,
    machine: Any = None,
    messages: str = "",
    unmatched: tuple[tuple[str, str], ...] = (),
) -> Report:
    """The report of a scheduled module.

    Args:
        program: what `read_file` or `read_bytes` gave.
        mesh: degree of each axis, outermost first, over devices 0 .. n-1 in row-major order. Without it the axes are
            recovered from the groups of the collectives, and called axis0, axis1, ...
        sure: whether the mesh must be the program's; one that was found beside it need not be.
        machine: a Machine, for the least seconds that each operation takes.
        messages: what the compiler said while it compiled.
        unmatched: names in remat policies that match nothing, with the line of the policy.

    Raises SpecError when the mesh is not the program's.
    """
    with uncollected():
        return _inspected(program, mesh, sure, machine, messages, unmatched)


def _inspected(
    program: Program,
    mesh: dict[str, int] | None,
    sure: bool,
    machine: Any,
    messages: str,
    unmatched: tuple[tuple[str, str], ...],
) -> Report:
    begin = time.perf_counter()
    module = program.module
    runs = executions(module)
    lives = lifetimes(module)
    devices = module.devices or _devices_of_groups(module)
    axes = _axes(module, mesh, sure, devices)
    products, unknown = _products(module, runs)
    sent = _collectives(module, runs, lives, axes)
    work = _inside(module, runs)
    operations = _operations(module, runs, lives, sent, work, machine, axes)
    memory, buffers = footprint(module, program.buffers, runs, lives, classes(module, runs, lives))
    view = View(
        module, runs, axes, program.target, products, operations, sent, memory, buffers, messages, unmatched
    )
    unknown += [*runs.unknown_trips, *_unknown_opcodes(module), *_unknown_axes(sent)]
    return Report(
        name=module.name,
        target=program.target,
        devices=devices or 1,
        mesh=axes,
        products=products,
        operations=operations,
        collectives=sent,
        memory=memory,
        warnings=findings(view),
        not_understood=tuple(unknown),
        assumed=tuple(f"{text.removesuffix(': each counted once')}: one of them runs" for text in runs.open_branches),
        matmul_flops_range=work.least_and_most(module),
        machine=machine,
        seconds={"measure": round(time.perf_counter() - begin, 3)},
    )


# ---- the mesh ----


def _devices_of_groups(module: Module) -> int:
    """One more than the highest device that a collective names; 0 when none does."""
    most = -1
    for _, instruction in collectives(module):
        ids = [id_ for group in groups_of(instruction, 0) for id_ in group]
        ids += [id_ for pair in pairs_of(instruction) for id_ in pair]
        most = max([most, *ids])
    return most + 1


def _axes(module: Module, mesh: dict[str, int] | None, sure: bool, devices: int) -> dict[str, int]:
    if mesh is not None and not sure:
        if not devices or prod(mesh.values()) == devices:
            return mesh
        mesh = None
    if mesh is None:
        if devices < 2:
            return {}
        partitions, moves = _regular(module, devices)
        return _named(module, devices) or recovered_axes(partitions, moves, devices)
    text = ",".join(f"{name}={degree}" for name, degree in mesh.items())
    if devices and prod(mesh.values()) != devices:
        raise SpecError(
            f"the mesh {text} has {prod(mesh.values()):,} devices and the program {module.name} is for {devices:,}; "
            "give the mesh that it was compiled for, or none."
        )
    # what runs over all devices does so on any mesh
    partial = [i for _, i in collectives(module) if len(_first_group(i, devices)) < devices]
    if partial and all(axes_and_ranks(instruction, mesh)[0] == UNKNOWN for instruction in partial):
        first = partial[0]
        raise SpecError(
            f"no collective of {module.name} runs over axes of the mesh {text}: {first.name} has the group "
            f"{list(_first_group(first, devices))}; give the mesh that it was compiled for, outermost axis first, or none."
        )
    return mesh


def _first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective, or of the first pair of a permute."""
    if kind_of(instruction) in ("permute", "send"):
        return next(iter(pairs_of(instruction)), ())
    return next(iter(groups_of(instruction, devices)), ())


def _named(module: Module, devices: int) -> dict[str, int]:
    """The mesh that a collective names its axes of, where they are more than XLA's own axis_0, axis_1, ..."""
    for _, instruction in collectives(module):
        mesh = instruction.proto.mesh_axes_replica_group_list.mesh
        axes = {axis.name.strip("'\""): axis.size for axis in mesh.axes}
        own = not any(re.fullmatch(r"axis_\d+", name) for name in axes)
        if axes and own and not mesh.device_ids and prod(axes.values()) == devices:
            return axes
    return {}


def _regular(module: Module, devices: int) -> tuple[list[Groups], list[tuple[tuple[int, int], ...]]]:
    partitions, moves = [], []
    for _, instruction in collectives(module):
        if kind_of(instruction) in ("permute", "send"):
            moves.append(pairs_of(instruction))
        else:
            partitions.append(groups_of(instruction, devices))
    return partitions, moves


# ---- products ----


def _products(module: Module, runs: Executions) -> tuple[tuple[Product, ...], list[str]]:
    products, unknown = [], []
    reasons: Counter[str] = Counter()
    for _, instruction, context, work in all_work(module, runs):
        if work.reason:
            reasons[f"{work.reason} ({module.source(instruction) or instruction.name})"] += context.count
            continue
        place = _place(module, instruction, context)
        products.append(Product(place, work.kind, work.dtype, work.shapes, work.flops, work.declared))
    for reason, count in reasons.items():
        unknown.append(f"{reason}: FLOPs not counted, {count:,} time{'s' if count > 1 else ''}")
    return tuple(products), unknown


def _place(module: Module, instruction: Instruction, context: Context, count: int | None = None) -> Place:
    op_name = context.op_name(instruction)
    return Place(
        instruction.name, op_name, module.source(instruction), phase_of(op_name),
        context.count if count is None else count, context.trips, context.conditional,
    )  # fmt: skip


# ---- collectives ----


def _collectives(
    module: Module, runs: Executions, lives: Lifetimes, axes: dict[str, int]
) -> tuple[Collective, ...]:
    """In the order of the schedule; those that are fused with other work behind the rest."""
    beside = overlaps(module)
    nothing = Overlap(False, ())
    found: dict[tuple[Any, ...], Collective] = {}
    parts = emitted_parts(module, runs, axes)
    for computation, instruction, context, part in sorted(
        parts, key=lambda item: lives.position.get(item[1].id, len(lives.order))
    ):
        key = (instruction.id, id(context), part.kind, part.axes, part.phase, part.dtype)
        wire = wire_bytes(part.kind, part.payload, part.ranks)
        if known := found.get(key):  # another array of the same collective
            found[key] = replace(known, payload=known.payload + part.payload, wire=known.wire + wire)
            continue
        over = beside.get(instruction.id, nothing)
        sliced = part.kind == "all-reduce" and all_reduce_then_slice(module, computation, instruction)
        found[key] = Collective(
            place=replace(
                _place(module, instruction, context),
                name=start_of(module, computation, instruction).name,
                phase=part.phase,
                source=source_of(module, computation, instruction),
            ),
            kind=part.kind,
            axes=part.axes,
            ranks=part.ranks,
            dtype=part.dtype,
            payload=part.payload,
            wire=wire,
            asynchronous=over.asynchronous,
            overlapped=over.beside,
            disguise="reduce-scatter" if sliced else "",
        )
    return tuple(found.values())


def source_of(module: Module, computation: Computation, instruction: Instruction) -> str:
    """The line of a collective; of one that a compiler made without saying from what, that of what it takes, else of who
    takes it."""
    home, made = computation, instruction
    for _ in range(8):
        source = _own_source(module, made)
        producer = produced_by(module, home, made)
        if source or producer is None:
            break
        home, made = producer
    for _ in range(8):
        users = computation.users.get(instruction.id, ())
        if source or not users:
            break
        source = next((told for user in users if (told := _own_source(module, user))), "")
        instruction = users[0]
    return source


def _own_source(module: Module, instruction: Instruction) -> str:
    """The line of an instruction, or of what a fusion without one ends with."""
    source = module.source(instruction)
    if not source and instruction.opcode == "fusion" and instruction.called_ids:
        source = module.source(module.called(instruction)[0].root)
    return source


def _unknown_axes(collectives: tuple[Collective, ...]) -> Iterator[str]:
    for item in collectives:
        if item.axes == UNKNOWN:
            yield f"mesh axes of {item.kind} {item.place.name} ({item.place.source}): its groups are no subset of axes"


def _unknown_opcodes(module: Module) -> Iterator[str]:
    for opcode, places in module.by_opcode.items():
        count = len(places)
        if known(opcode):
            continue
        yield f"opcode {opcode}: not known, {count:,} instruction{'s' if count > 1 else ''}"


# ---- operations ----


@dataclass(frozen=True)
class _Inside:
    """The work of instructions, and of computations that run as a part of one operation: least and most FLOPs of one
    execution, and the type of most of them. What kernels declare of themselves is in `declared` alone."""

    works: dict[int, Work]
    flops: dict[int, Range]
    declared: dict[int, Range]
    dtypes: dict[int, str]

    def least_and_most(self, module: Module) -> Range:
        least, most = self.flops[module.entry.id]
        return int(least), int(most)  # of the whole: the parts of turns add up


def _inside(module: Module, runs: Executions) -> _Inside:
    works: dict[int, Work] = {}
    for opcode in WORKERS & module.by_opcode.keys():
        for computation, instruction in module.by_opcode[opcode]:
            if (work := work_of(module, computation, instruction, instruction.op_name)) is not None:
                works[instruction.id] = work

    def flops(declared: bool) -> dict[int, Range]:
        return ranges(module, runs, {id_: work.flops for id_, work in works.items() if work.declared == declared})

    found = flops(declared=False)
    declared = flops(declared=True) if any(work.declared for work in works.values()) else {}
    dtypes: dict[int, str] = {}
    for computation in module.computations.values():
        best = 0
        for instruction in computation.instructions:
            work = works.get(instruction.id)
            if work is not None and work.flops > best:
                best, dtypes[computation.id] = work.flops, work.dtype
            for called in instruction.called_ids:
                if called in dtypes and found[called][1] > best:
                    best, dtypes[computation.id] = found[called][1], dtypes[called]
    return _Inside(works, found, declared, dtypes)


def _operations(
    module: Module,
    runs: Executions,
    lives: Lifetimes,
    collectives: tuple[Collective, ...],
    inside: _Inside,
    machine: Any,
    axes: dict[str, int],
) -> tuple[Operation, ...]:
    sent: dict[str, list[Collective]] = defaultdict(list)
    for item in collectives:
        sent[item.place.name].append(item)
    made = []
    for step, (computation, instruction) in enumerate(lives.order):
        contexts = runs.of(computation)
        if not contexts or names_only(instruction):
            continue
        work = inside.works.get(instruction.id)
        flops, dtype = (work.flops, work.dtype) if work else (0, "")
        if instruction.called_ids:
            inner = sum(range_of(module, runs, computation, instruction, found)[1] for found in (inside.flops, inside.declared))
            if inner > flops:
                dtype = next((inside.dtypes[c] for c in instruction.called_ids if c in inside.dtypes), "")
            flops += int(inner)
        read, written = traffic(module, computation, instruction)
        name = start_of(module, computation, instruction).name
        sends = sent.get(name, ())
        count = sum(context.count for context in contexts)
        seconds, by = None, ""
        if machine is not None:
            wire = sum(item.wire for item in sends)
            seconds, by = bound(machine, flops, dtype, read + written, wire, _group(instruction, axes) if sends else ())
        place = replace(_place(module, instruction, contexts[0], count), name=name)
        made.append(Operation(place, instruction.opcode, flops, read, written, seconds, by, step))
    return tuple(made)


def _group(instruction: Instruction, axes: dict[str, int]) -> tuple[int, ...]:
    """The devices of the group whose members lie furthest apart."""
    if kind_of(instruction) in ("permute", "send"):
        return max(pairs_of(instruction), key=lambda pair: abs(pair[0] - pair[1]), default=())
    groups = groups_of(instruction, prod(axes.values()))
    return max(groups, key=lambda group: max(group) - min(group) if group else 0)
