"""What a scheduled module has one device do, task after task: shapes, bytes and collectives, and no seconds.

Loops, calls and what runs asynchronously keep their form, so that whoever knows how fast a machine is can play the program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from jaxllm.hlo import library
from jaxllm.hlo.collectives import axes_and_ranks, chain_of, kind_of, parts_of
from jaxllm.hlo.flops import WORKERS, work_of
from jaxllm.hlo.graph import Computation, Instruction, Module
from jaxllm.hlo.groups import UNKNOWN, pairs_of
from jaxllm.hlo.inspect import source_of
from jaxllm.hlo.loops import Context, Executions, executions, trip_count
from jaxllm.hlo.overlap import synchronous
from jaxllm.hlo.phases import join, phase_of
from jaxllm.hlo.traffic import names_only, traffic
from jaxllm.hlo.transfers import between_memories
from jaxllm.spec.ledger import wire_bytes


@dataclass(frozen=True)
class Multiplied:
    """`many` products of (rows x inner) by (inner x columns), of `flops` in all; rows 0 where nothing tells their shape.
    `narrow`: whether both operands are of 8 bits."""

    flops: int
    rows: int = 0
    inner: int = 0
    columns: int = 0
    many: int = 1
    narrow: bool = False


@dataclass(frozen=True)
class Sent:
    """A collective, of one execution: `wire` bytes that a device sends in a ring, and the other stages of a pipeline with
    which it meets."""

    kind: str
    axes: tuple[str, ...]
    wire: int
    meets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """An operation of one device, or a loop of them.

    id, name, opcode, source, phase   of the instruction; the phase "" where nothing tells it
    products      what it multiplies
    read, written bytes of HBM, of one execution
    host          bytes between device memory and host memory
    sent          the collective that it is, if it is one
    starts        it goes on beside what follows, until a task that `ends` its id
    body, turns   of a loop: its tasks, and how often they run; one number, or that at each turn of the loop `by`
    """

    id: int
    name: str
    opcode: str
    source: str = ""
    phase: str = ""
    products: tuple[Multiplied, ...] = ()
    read: int = 0
    written: int = 0
    host: int = 0
    sent: Sent | None = None
    starts: bool = False
    ends: int | None = None
    body: tuple[Task, ...] = ()
    turns: int | tuple[int, ...] = 1
    by: int | None = None

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)

    @cached_property
    def unlike(self) -> bool:
        """Of a loop: whether its turns are not alike, or meet those of other stages, so that each is to be played."""
        return any(self._unlike(task) for task in self.body)

    def _unlike(self, task: Task) -> bool:
        meets = task.sent is not None and bool(task.sent.meets)
        return meets or not isinstance(task.turns, int) or any(self._unlike(inner) for inner in task.body)


@dataclass(frozen=True)
class Program:
    """The tasks of one device, and a sentence for each thing in them that leaves their time open."""

    tasks: tuple[Task, ...]
    unknown: tuple[str, ...] = ()


def _all(tasks: Iterable[Task]) -> Iterator[Task]:
    for task in tasks:
        yield task
        yield from _all(task.body)


def programs(module: Module, axes: dict[str, int]) -> tuple[Program, ...]:
    """What one device of each stage of a pipeline does, by the degrees of the mesh axes, outermost first; without `pipe`
    among them, all devices do alike. The module is scheduled."""
    stages = axes.get("pipe", 1)
    return tuple(_Reader(module, axes, stage).program() for stage in range(stages))


@dataclass(frozen=True)
class _Link:
    """One of the copies of a collective that XLA:TPU spreads over a chain of fusions, of which `start` is the first's id."""

    home: Computation
    inner: Instruction
    start: int
    first: bool
    last: bool


@dataclass
class _Reader:
    module: Module
    axes: dict[str, int]
    stage: int
    unknown: dict[str, None] = field(default_factory=dict)

    @cached_property
    def runs(self) -> Executions:
        return executions(self.module, self.stage * self._width)

    @property
    def _stages(self) -> int:
        return self.axes.get("pipe", 1)

    @property
    def _width(self) -> int:
        """Devices of a stage."""
        return prod(self.axes.values()) // self._stages

    def program(self) -> Program:
        tasks = tuple(self._tasks(self.module.entry, ""))
        self.unknown |= dict.fromkeys(self.runs.unknown_trips)
        return Program(tasks, tuple(self.unknown))

    # ---------------------------------------------------------------- computations

    def _tasks(self, computation: Computation, caller: str) -> Iterator[Task]:
        started: dict[int, int] = {}  # id of an instruction that hands a start on -> of the start
        phases: dict[int, str] = {}
        chains = self._chains(computation)
        for instruction in computation.instructions:
            phase = self._phase(computation, instruction, caller, phases)
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._loop(computation, instruction, caller)
            elif opcode == "call":
                inside = join(caller, instruction.op_name)
                yield from (task for called in self.module.called(instruction) for task in self._tasks(called, inside))
            elif opcode == "conditional":
                yield from self._dearest(instruction, caller)
            elif opcode.endswith(("-done", "-update")):
                given = next((started[id_] for id_ in instruction.operand_ids if id_ in started), None)
                if given is not None and opcode.endswith("-update"):
                    started[instruction.id] = given
                elif given is not None:
                    yield Task(instruction.id, instruction.name, opcode, ends=given)
            elif instruction.id in chains:
                yield from self._links(computation, instruction, caller, phase, chains[instruction.id])
            elif opcode == "async-start" or not (names_only(instruction) or self._nothing(instruction)):
                task = self._task(computation, instruction, caller, phase)
                if task.starts:
                    started[instruction.id] = instruction.id
                yield task

    def _phase(self, computation: Computation, instruction: Instruction, caller: str, phases: dict[int, str]) -> str:
        """By its own name, else by that of what a fusion holds, else by the first operand's that has one."""
        told = phase_of(join(caller, instruction.op_name))
        if not told and instruction.opcode == "fusion":
            inner = self.module.called(instruction)[0].instructions
            told = next((phase for one in reversed(inner) if (phase := phase_of(join(caller, one.op_name)))), "")
        if not told and not instruction.op_name:
            told = next((phase for id_ in instruction.operand_ids if (phase := phases.get(id_))), "")
        phases[instruction.id] = told
        return told

    def _chains(self, computation: Computation) -> dict[int, list[_Link]]:
        """Of each fusion in which collectives go on, what they are there."""
        chains: dict[str, list[tuple[Instruction, Computation, Instruction]]] = {}
        for fusion in computation.instructions:
            for called, inner, chain in self._in_chains(fusion):
                chains.setdefault(chain, []).append((fusion, called, inner))
        found: dict[int, list[_Link]] = {}
        for members in chains.values():
            for number, (fusion, called, inner) in enumerate(members):
                link = _Link(called, inner, members[0][2].id, number == 0, number == len(members) - 1)
                found.setdefault(fusion.id, []).append(link)
        return found

    def _in_chains(self, fusion: Instruction) -> Iterator[tuple[Computation, Instruction, str]]:
        """The copies of collectives in a fusion that belong to a chain, with its name."""
        for called in self.module.called(fusion) if fusion.opcode == "fusion" else ():
            for inner in called.instructions:
                if kind_of(inner) and (chain := chain_of(called, inner)):
                    yield called, inner, chain

    def _links(
        self, computation: Computation, fusion: Instruction, caller: str, phase: str, links: list[_Link]
    ) -> Iterator[Task]:
        """A fusion beside which collectives go on: what begins there, what it computes, and what ends there."""
        for link in links:
            if link.first:
                sent, source = self._sent(link.home, link.inner), source_of(self.module, link.home, link.inner)
                yield Task(link.start, fusion.name, link.inner.opcode, source, phase, sent=sent, starts=True)
        if not any(library.is_end(one) for called in self.module.called(fusion) for one in called.instructions):
            yield replace(self._task(computation, fusion, caller, phase), sent=None)
        for link in links:
            if link.last:
                yield Task(fusion.id, fusion.name, "fusion", ends=link.start)

    def _loop(self, computation: Computation, loop: Instruction, caller: str) -> Iterator[Task]:
        """A loop whose trip count is known is not asked for its condition: it is two numbers."""
        body, _ = self.module.while_parts(loop)
        turns, by = self._turns(computation, loop, body)
        if turns == 0:
            return
        inside = tuple(self._tasks(body, caller))
        source = self.module.source(loop)
        yield Task(loop.id, loop.name, "while", source, phase_of(join(caller, loop.op_name)), body=inside, turns=turns, by=by)

    def _turns(self, computation: Computation, loop: Instruction, body: Computation) -> tuple[int | tuple[int, ...], int | None]:
        """How often the body runs in each run of its loop, and the loop by whose turns that differs."""
        known = trip_count(self.module, computation, loop)
        if known is not None:
            return known, None
        inside, around = self.runs.of(body), self.runs.of(computation)
        if not inside:
            return 0, None
        told = inside[0].turns
        if told is None:
            return 1, None  # `executions` has said so
        each = [int(turns) for turns in told.each]
        outer = _turns_around(around, told.loop)
        if outer is not None:
            each = [turns // max(1, times) for turns, times in zip(each, outer, strict=True)]
        return (each[0], None) if told.loop is None else (tuple(each), told.loop)

    def _dearest(self, instruction: Instruction, caller: str) -> Iterator[Task]:
        """Of a conditional's branches the one with the most to do: which runs nobody knows before."""
        inside = join(caller, instruction.op_name)
        branches = [tuple(self._tasks(called, inside)) for called in self.module.called(instruction)]
        cost = [
            (sum(task.flops for task in _all(branch)), sum(task.read + task.written for task in _all(branch)))
            for branch in branches
        ]
        if len(branches) > 1 and max(cost) > min(cost):
            self.unknown[f"{self._named(instruction)} runs one of {len(branches)} branches: the dearest is played"] = None
        yield from branches[cost.index(max(cost))]

    # ---------------------------------------------------------------- instructions

    def _named(self, instruction: Instruction) -> str:
        source = self.module.source(instruction)
        return f"{instruction.name} ({source})" if source else instruction.name

    def _nothing(self, instruction: Instruction) -> bool:
        """Whether an instruction is a call by which a compiler marks or names something."""
        return instruction.opcode == "custom-call" and library.marks(instruction.proto.custom_call_target)

    def _task(self, computation: Computation, instruction: Instruction, caller: str, phase: str) -> Task:
        made = Task(
            instruction.id, instruction.name, instruction.opcode, source_of(self.module, computation, instruction), phase,
            starts=instruction.opcode.endswith("-start") and not synchronous(instruction),
        )  # fmt: skip
        if instruction.opcode != "async-start":
            return replace(made, **self._done(computation, instruction, caller))
        each = [
            self._done(called, inner, caller)
            for called in self.module.called(instruction)
            for inner in called.instructions
            if not names_only(inner)
        ]
        return replace(
            made,
            products=tuple(product for one in each for product in one["products"]),
            read=sum(one["read"] for one in each),
            written=sum(one["written"] for one in each),
            host=sum(one["host"] for one in each),
            sent=next((one["sent"] for one in each if one["sent"]), None),
        )

    def _done(self, computation: Computation, instruction: Instruction, caller: str) -> dict:
        """What one instruction does in one execution, as fields of a Task."""
        read, written = traffic(self.module, computation, instruction)
        return {
            "products": tuple(self._products(computation, instruction, caller)),
            "read": read,
            "written": written,
            "host": self._host(computation, instruction),
            "sent": self._sent(computation, instruction),
        }

    def _host(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes to or from host memory, a slice in a fusion too."""
        inside = self.module.called(instruction) if instruction.opcode == "fusion" else ()
        fused = sum(between_memories(called, inner) for called in inside for inner in called.instructions)
        return fused + between_memories(computation, instruction)

    def _products(self, computation: Computation, instruction: Instruction, caller: str) -> Iterator[Multiplied]:
        if instruction.opcode == "fusion":
            for called in self.module.called(instruction):
                for inner in called.instructions:
                    yield from self._products(called, inner, caller)
        elif instruction.opcode in WORKERS:
            work = work_of(self.module, computation, instruction, join(caller, instruction.op_name))
            if work is not None and work.reason:
                self.unknown[f"{self._named(instruction)} takes no time: {work.reason}"] = None
            elif work is not None and work.kind != "multiply+reduce":  # that is a sum, and as long as its bytes take
                yield replace(_shape(computation, instruction, work.flops), narrow=work.narrow)

    def _sent(self, computation: Computation, instruction: Instruction) -> Sent | None:
        """A collective, by itself or in a fusion that scatters what it sums, as XLA:TPU has it."""
        kind, inside, home = kind_of(instruction), instruction, computation
        if instruction.opcode == "fusion":
            for called in self.module.called(instruction):
                found = next((one for one in called.instructions if kind_of(one)), None)
                if found is not None:
                    kind, inside, home = kind_of(found), found, called
                    if kind == "all-reduce" and "all-reduce-scatter" in called.name:
                        kind = "reduce-scatter"
        if not kind:
            return None
        axes, ranks = axes_and_ranks(inside, self.axes)
        if not axes:
            return None
        if axes == UNKNOWN:
            self.unknown[f"{self._named(inside)} takes no time: its groups run along no mesh axes"] = None
            return None
        parts = parts_of(self.module, home, inside, Context(), self.axes)
        return Sent(kind, axes, sum(wire_bytes(kind, part.payload, ranks) for part in parts), self._meets(inside, axes))

    def _meets(self, instruction: Instruction, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The other stages that must be there, too: of a permute those from which and to which data goes."""
        if "pipe" not in axes or self._stages == 1:
            return ()
        if kind_of(instruction) not in ("permute", "send"):
            return tuple(stage for stage in range(self._stages) if stage != self.stage)
        pairs = {(source // self._width, target // self._width) for source, target in pairs_of(instruction)}
        ends = {stage for pair in pairs if self.stage in pair for stage in pair}
        return tuple(sorted(ends - {self.stage}))


def _turns_around(contexts: tuple[Context, ...], loop: int | None) -> list[int] | None:
    """How often the computation runs at each turn of a loop, where a table tells."""
    told = contexts[0].turns if contexts else None
    return [int(times) for times in told.each] if told is not None and told.loop == loop else None


def _shape(computation: Computation, instruction: Instruction, flops: int) -> Multiplied:
    """The product that an instruction is: of a convolution, positions by the features that come out; of a library's call, the
    last two dims of its result."""
    opcode = instruction.opcode.removesuffix("-start")
    result = next((leaf for leaf in instruction.shape.leaves if leaf.dtype), instruction.shape)
    if not flops or not result.size:
        return Multiplied(flops)
    inner = max(1, -(-flops // (2 * result.size)))
    if opcode in ("dot", "scaled-dot"):
        numbers, left = instruction.proto.dot_dimension_numbers, computation.operand(instruction).shape
        many = prod(left.dims[dim] for dim in numbers.lhs_batch_dimensions)
        rows = left.size // max(1, many * inner)
        return Multiplied(flops, rows, inner, result.size // max(1, many * rows), many)
    if opcode == "convolution":
        columns = result.dims[instruction.proto.convolution_dimension_numbers.output_feature_dimension]
        return Multiplied(flops, result.size // columns, inner, columns)
    if opcode == "custom-call" and len(result.dims) > 1 and library.multiplies(instruction.proto.custom_call_target):
        *many, rows, columns = result.dims
        return Multiplied(flops, rows, inner, columns, prod(many))
    return Multiplied(flops)
