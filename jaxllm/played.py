"""The compiled step played on its machine: what a compiler scheduled, operation after operation, at the closed form's rates.

A device computes one thing after another in the order of the schedule. What the compiler starts goes on beside that, on the
lane of its mesh axes (one collective at a time) or of its copies, and where it ends the device waits for what is left of it.
The stages of a pipeline are played together: at a collective between them each waits for the others to get there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.hlo.tasks import Multiplied, Program, Sent, Task, programs
from jaxllm.report.played import BUBBLE, HOST, OTHER, Played, PlayedOperation, Sending, Slice
from jaxllm.spec.errors import DoesNotFit
from jaxllm.theory.rates import Rates
from jaxllm.theory.symbols import Symbols
from jaxllm.theory.matmul import product
from jaxllm.theory.time import StepTime, step_time

if TYPE_CHECKING:
    from jaxllm.hlo.graph import Module
    from jaxllm.spec.layout import Layout
    from jaxllm.spec.machine import Mesh
    from jaxllm.spec.model import ModelConfig
    from jaxllm.spec.workload import Workload

COMPUTE, COPIES = "compute", "copies"  # lanes; the others are named by mesh axes

# What the closed form knows no rule for goes as the kind that sends alike.
ALIKE = {"send": "permute", "broadcast": "all-gather", "ragged-all-to-all": "all-to-all"}

Meeting = tuple[int, int]  # id of a collective between stages, and which of its runs


def played_time(
    model: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    workload: Workload,
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> Played:
    """Compiles one training step for the machine's target, memory unbounded, and plays it beside the closed form.

    Raises what `step_time` and `build` raise; TargetError when the target cannot be used here; DoesNotFit when its compiler
    refuses the program for memory.
    """
    from jaxllm.check import build, dump_of
    from jaxllm.hlo.read import read_file
    from jaxllm.targets import compiler

    closed = step_time(model, layout, mesh, workload)
    progress(f"building {model.name} for {layout} on {mesh}")
    lowered = compiler.lower(build(model, layout, mesh, workload))
    progress(f"compiling with XLA:{lowered.compiler.upper()}")
    compiled = compiler.compile(lowered, progress)
    optimized = dump_of(compiled).optimized
    if optimized is None:
        raise DoesNotFit(
            f"XLA:{lowered.compiler.upper()} refused the step for memory, so there is nothing to play: {compiled.refused}; "
            "choose a smaller batch or more remat, or leave out --compiled."
        )
    progress("playing the compiled step")
    module = read_file(optimized, scheduled=True).module
    return play(module, lowered.built.axes, Symbols.of(model, layout, workload), closed, lowered.compiler)


def play(module: Module, axes: dict[str, int], s: Symbols, closed: StepTime, compiler: str = "") -> Played:
    """The scheduled module of a step, with the degrees of its mesh axes, at the rates of the closed form."""
    each = programs(module, axes)
    devices = [Device(stage, s, closed.rates) for stage in range(len(each))]
    together(devices, each)
    end = max(device.now for device in devices)
    # What a stage does not wait for the others to do. The rest, up to the end of the slowest, is the pipeline's bubble.
    busiest = min(devices, key=lambda device: device.idle + (end - device.now))
    idle = busiest.idle + (end - busiest.now)
    return _played(busiest, idle, closed, each[busiest.stage], compiler, stages=len(devices))


def _played(device: Device, idle: float, closed: StepTime, program: Program, compiler: str, *, stages: int) -> Played:
    parts = {"products": 0.0, "memory": 0.0, "optimizer": 0.0, HOST: 0.0, BUBBLE: idle, OTHER: closed.rates.step}
    sent: dict[str, list[float]] = {}
    operations = sorted(device.operations(), key=lambda one: -one.seconds)
    for one in operations:
        if one.part in parts:
            parts[one.part] += one.waited
        else:  # a collective, by its mesh axes
            waited, hidden = sent.setdefault(one.part, [0.0, 0.0])
            sent[one.part] = [waited + one.waited, hidden + one.hidden]
    traffic = tuple(Sending(tuple(axes.split("+")), waited, hidden) for axes, (waited, hidden) in sent.items())
    return Played(
        closed=closed,
        seconds=sum(parts.values()) + sum(each.exposed for each in traffic),
        parts=parts,
        traffic=traffic,
        operations=tuple(operations),
        slices=tuple(device.slices),
        notes=program.unknown,
        compiler=compiler,
        stage=device.stage if stages > 1 else None,
    )


def together(devices: Sequence[Device], each: Sequence[Program]) -> None:
    """Plays one device of each stage, each as far as it gets until it has to meet another."""
    there: dict[tuple[int, Meeting], float] = {}  # when a device is at a meeting
    playing = {device.stage: device.play(program.tasks, there) for device, program in zip(devices, each, strict=True)}
    while playing:
        before = len(there), len(playing)
        for stage, steps in list(playing.items()):
            if all((other, meeting) in there for meeting, others in steps for other in others):
                del playing[stage]  # it went on to its end
        if before == (len(there), len(playing)):
            raise AssertionError("the stages of a pipeline wait for each other in a circle")


@dataclass
class _Started:
    """What goes on beside the device: its seconds, and when it ends; for a meeting, when it could begin."""

    task: Task
    seconds: float
    end: float
    meeting: Meeting | None = None


@dataclass
class _Tally:
    seconds: float = 0.0
    waited: float = 0.0
    runs: int = 0


@dataclass
class Device:
    """One device in time.

    now      when its compute lane is free; lanes: when the others are
    idle     seconds in which it waited for other stages
    scale    how many runs stand behind what is played: the turns of loops that are played once
    """

    stage: int
    s: Symbols
    r: Rates
    now: float = 0.0
    idle: float = 0.0
    scale: int = 1
    lanes: dict[str, float] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    _started: dict[int, _Started] = field(default_factory=dict)
    _tallies: dict[int, tuple[Task, _Tally]] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)
    _met: dict[int, int] = field(default_factory=dict)
    _turn: dict[int, int] = field(default_factory=dict)  # of the loops around that are played turn by turn

    def operations(self) -> list[PlayedOperation]:
        return [
            PlayedOperation(
                task.name, task.opcode, task.source, task.phase, _part(task), tally.seconds, tally.waited, tally.runs,
                task.flops, task.read, task.written, task.sent.wire if task.sent else 0, task.host,
            )
            for task, tally in self._tallies.values()
        ]  # fmt: skip

    # ---------------------------------------------------------------- one task after another

    def play(self, tasks: Sequence[Task], there: dict[tuple[int, Meeting], float]) -> Generator[tuple[Meeting, tuple[int, ...]]]:
        """Goes through the tasks. Yields what has to be met, and whom, again and again until they are `there`."""
        for task in tasks:
            if task.body:
                yield from self._loop(task, there)
            elif task.ends is not None:
                started = self._started.pop(task.ends)
                if started.meeting is not None:
                    yield from self._meet(started, there)
                self._wait(started)
            elif task.starts:
                self._start(task, there)
            elif task.sent is not None or task.host:  # on its lane, and nothing beside it
                started = self._start(task, there)
                if started.meeting is not None:
                    yield from self._meet(started, there)
                self._wait(started)
            else:
                self._run(task)

    def _loop(self, task: Task, there: dict[tuple[int, Meeting], float]) -> Generator[tuple[Meeting, tuple[int, ...]]]:
        """Turn by turn where turns are not alike, or while something that was started before is on its way; the rest once,
        for all of them."""
        left = task.turns if isinstance(task.turns, int) else task.turns[self._turn[task.by]]
        turn, begin = 0, self.now
        place = len(self.slices)
        while left and (task.unlike or (left > 1 and any(end > self.now for end in self.lanes.values()))):
            self._turn[task.id] = turn
            yield from self.play(task.body, there)
            turn, left = turn + 1, left - 1
        if left:
            before, idle = self.now, self.idle
            self.scale *= left
            yield from self.play(task.body, there)
            self.scale //= left
            self._more(task, left, before)
            self.now = before + left * (self.now - before)
            self.idle = idle + left * (self.idle - idle)
        if self.now > begin:
            self.slices.insert(place, Slice(COMPUTE, f"{task.name}, {_turns(turn + left)}", begin, self.now))

    def _more(self, task: Task, turns: int, begin: float) -> None:
        """The slice of the turns that are like the one that was played."""
        length = self.now - begin
        if turns > 1 and length > 0:
            name = f"{_turns(turns - 1)} of {task.name} more"
            self.slices.append(Slice(COMPUTE, name, self.now, begin + turns * length))

    def _run(self, task: Task) -> None:
        seconds = self.seconds(task)
        self._count(task, seconds, seconds)
        self._slice(COMPUTE, task, self.now, self.now + seconds)
        self.now += seconds

    def _start(self, task: Task, there: dict[tuple[int, Meeting], float]) -> _Started:
        """Puts a task on its lane. One that has to meet others begins when they are there."""
        lane, seconds = _lane(task), self.seconds(task)
        begin = max(self.now, self.lanes.get(lane, 0.0))
        started = _Started(task, seconds, begin + seconds)
        if task.sent is not None and task.sent.meets:
            started.meeting = task.id, self._met.get(task.id, 0)
            self._met[task.id] = started.meeting[1] + 1
            there[self.stage, started.meeting] = begin
        else:
            self._slice(lane, task, begin, started.end)
        self.lanes[lane] = started.end
        if task.starts:
            self._started[task.id] = started
        return started

    def _meet(
        self, started: _Started, there: dict[tuple[int, Meeting], float]
    ) -> Generator[tuple[Meeting, tuple[int, ...]]]:
        """Waits until the others are there, too. Where the device has nothing to do but wait, it idles."""
        assert started.meeting is not None and started.task.sent is not None
        others, lane = started.task.sent.meets, _lane(started.task)
        while not all((other, started.meeting) in there for other in others):
            yield started.meeting, others
        mine = there[self.stage, started.meeting]
        begin = max([mine, *(there[other, started.meeting] for other in others)])
        if begin > self.now:
            self.idle += begin - self.now
            self._idle(self.now, begin)
            self.now = begin
        started.end = begin + started.seconds
        self.lanes[lane] = max(self.lanes[lane], started.end)
        self._slice(lane, started.task, begin, started.end)

    def _wait(self, started: _Started) -> None:
        """Up to the end of what was started."""
        waited = max(0.0, started.end - self.now)
        self._count(started.task, started.seconds, waited)
        if waited:
            self.slices.append(Slice(COMPUTE, f"wait for {started.task.name}", self.now, started.end, started.task.name))
        self.now += waited

    # ---------------------------------------------------------------- records

    def _count(self, task: Task, seconds: float, waited: float) -> None:
        _, tally = self._tallies.setdefault(task.id, (task, _Tally()))
        tally.seconds += self.scale * seconds
        tally.waited += self.scale * waited
        tally.runs += self.scale

    def _slice(self, lane: str, task: Task, start: float, end: float) -> None:
        if end > start:
            self.slices.append(Slice(lane, task.name, start, end, task.name))

    def _idle(self, start: float, end: float) -> None:
        self.slices.append(Slice(COMPUTE, "wait for another stage", start, end))

    # ---------------------------------------------------------------- seconds

    def seconds(self, task: Task) -> float:
        """Of one run."""
        if task.id not in self._seconds:
            self._seconds[task.id] = float(_seconds(task, self.s, self.r))
        return self._seconds[task.id]


def _turns(count: int) -> str:
    return f"{count:,} turn{'s' * (count != 1)}"


def _seconds(task: Task, s: Symbols, r: Rates) -> Any:
    if task.sent is not None:
        return _of_sent(task.sent, s, r)
    if task.host:
        return task.host / r.host if r.host else 0.0
    moved = (task.read + task.written) / r.memory
    if task.starts and not task.products:
        return moved
    return max(sum(_of_product(one, r) for one in task.products), moved) + r.kernel


def _of_sent(sent: Sent, s: Symbols, r: Rates) -> Any:
    return r.seconds(s, ALIKE.get(sent.kind, sent.kind), sent.axes, sent.wire, 1)


def _of_product(one: Multiplied, r: Rates) -> Any:
    """Its tiles alone: the bytes and the launch are those of the operation that it is in."""
    speed = r.narrow / r.peak if one.narrow else 1.0
    if not one.rows:
        return one.flops / (r.peak * r.matmul * speed)
    moved = one.many * (one.rows * one.inner + one.inner * one.columns + one.rows * one.columns)
    return product(r, one.rows, one.inner, one.columns, 1, one.many, speed=speed, spared=moved) - r.kernel


def _lane(task: Task) -> str:
    if task.sent is not None:
        return "+".join(task.sent.axes)
    return HOST if task.host else COPIES


def _part(task: Task) -> str:
    """By the names of Played.parts, or the mesh axes of a collective."""
    if task.sent is not None:
        return "+".join(task.sent.axes)
    if task.host:
        return HOST
    if task.phase == "update":
        return "optimizer"
    return "products" if task.products else "memory"
