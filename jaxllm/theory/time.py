"""How long a step takes: matmuls by their tiles, memory by its bytes, collectives by the links that their axes use.

A block's kernels run one after another. A product takes the waves of tiles that its shape makes, or the time of its bytes;
what is no product takes that of its bytes. A collective over tensor is waited for; what ZeRO gathers and reduces layer by
layer, what goes round a ring, and what a cut residual stream is gathered again for, travel while blocks compute, and only the
rest is waited for. Where all of a block is less than the host needs to launch it, the device waits for the host. A pipeline
takes the work of its slowest stage, and what its schedule idles by closed form.

What a byte, a FLOP and a launch cost is in rates.py. Everything takes integers, or arrays with one entry a layout.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce
from typing import Any

import numpy as np

from jaxllm.schedules.closed_forms import CLOSED_FORMS
from jaxllm.schedules.order import earliest
from jaxllm.schedules.simulation import Simulation, simulate
from jaxllm.schedules.table import Cell
from jaxllm.schedules.times import Times
from jaxllm.spec.errors import SpecError
from jaxllm.spec.layout import ZERO_AXES, Layout
from jaxllm.spec.ledger import Line
from jaxllm.spec.machine import Mesh
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate
from jaxllm.spec.workload import Workload
from jaxllm.theory import collectives, flops, fp8, state, transfers, update
from jaxllm.theory.matmul import product
from jaxllm.theory.partition import stages_of
from jaxllm.theory.predict import PLAIN_AUTODIFF
from jaxllm.theory.products import products
from jaxllm.theory.rates import UNSURE, Rates
from jaxllm.theory.stages import Stages
from jaxllm.theory.state import add
from jaxllm.theory.symbols import Symbols

# Elements that kernels which are no products read and write. Of each feature of the residual stream: two norms of 2, and two
# sums of a branch, the stream and a mask of 3.5. Of each that a product gives by columns, or attention: in and out of what
# follows. Of each score: softmax in and out, and again with a mask of 0.5. Of each logit, some of them in f32: the loss.
STREAM, GIVEN, SCORE, LOGIT = 11.0, 2.0, 4.5, 12.0
EMBEDDING = 5.0  # of each feature that is looked up
OUTER_SENT = 3  # weights outside of the blocks: embedding, head and norm
BACK = 1.5  # such a kernel's backward pass has three arrays where it has two
KERNELS = 13  # in a block's forward pass
PAIR = 14  # kernels for a pair of attention's blocks, forward, and backward twice as many: XLA:GPU's (experiments/played.py)
# Of what a host launches of a block: the forward pass is one part, the backward pass two, and of what is computed again three
# quarters are outside of attention.
OUTSIDE = 0.75
PASSES = ("forward", "again", "inputs", "weights")
OWN_PARTS = ("products", "memory", "launch", "bubble", "optimizer", "host", "other")  # of a step, but for collectives


@dataclass(frozen=True)
class Pass:
    """Seconds on one device: of products, and of what else goes through memory."""

    products: Any = 0.0
    memory: Any = 0.0

    @property
    def seconds(self) -> Any:
        return self.products + self.memory

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.products + other.products, self.memory + other.memory)

    def __mul__(self, times: Any) -> Pass:
        return Pass(self.products * times, self.memory * times)


@dataclass(frozen=True)
class Work:
    """One microbatch of a block, the embedding or the head: forward, computed again, backward by inputs and by weights; and of
    a block the seconds of its attention, forward and backward."""

    forward: Pass = Pass()
    again: Pass = Pass()
    inputs: Pass = Pass()
    weights: Pass = Pass()
    attention: tuple[Any, Any] = (0.0, 0.0)

    @property
    def all(self) -> Pass:
        return self.forward + self.again + self.inputs + self.weights

    @property
    def backward(self) -> Pass:
        return self.again + self.inputs + self.weights


@dataclass(frozen=True)
class Traffic:
    """Seconds of all collectives over some mesh axes: those that are waited for in any case, those that blocks may hide, and
    the share of these that they do hide."""

    axes: tuple[str, ...]
    waited: Any
    may_hide: Any
    share: Any

    @property
    def exposed(self) -> Any:
        """Those that a device waits for."""
        return self.waited + self.may_hide * (1 - self.share)

    @property
    def hidden(self) -> Any:
        """Those that blocks hide."""
        return self.may_hide * self.share


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts, which add up to it but for what is hidden.

    products   matmuls
    memory     what else goes through memory
    launch     waiting for the host
    traffic    by mesh axes, waited for and hidden
    between    of that, what tensor parallelism waits for between the kernels of blocks
    bubble     what the stages of a pipeline idle, and the messages that nothing hides
    optimizer  the update, its matmuls included
    host       copies from and to host memory
    other      what grows with nothing
    counted    symbols of all stages, whose matmuls are counted when they are asked for
    rates      what it was reckoned with
    """

    products: Any
    memory: Any
    launch: Any
    traffic: tuple[Traffic, ...]
    between: Any
    bubble: Any
    optimizer: Any
    host: Any
    other: Any
    counted: tuple[Symbols, ...]
    rates: Rates

    @cached_property
    def seconds(self) -> Any:
        sent = add(each.waited for each in self.traffic)
        # Most axes have one share.
        shares = {id(each.share): each.share for each in self.traffic}
        shown = [
            add(each.may_hide for each in self.traffic if each.share is share) * (1 - share) for share in shares.values()
        ]
        return add((*(getattr(self, name) for name in OWN_PARTS), sent, *shown))

    @property
    def parts(self) -> dict[str, Any]:
        """Seconds by name, collectives by their axes."""
        sent = {"+".join(each.axes): each.exposed for each in self.traffic}
        return {name: getattr(self, name) for name in OWN_PARTS} | sent

    @cached_property
    def model_flops(self) -> Any:
        """FLOPs of the model's own matmuls on a device, in the mean over stages."""
        return add(map(model_flops, self.counted)) / len(self.counted)

    @cached_property
    def hardware_flops(self) -> Any:
        """The same of all that is multiplied, what is computed again included."""
        return add(map(hardware_flops, self.counted)) / len(self.counted)

    @property
    def waits(self) -> Any:
        """Seconds that are the least sure: for the host, for tensor parallelism, and of copies."""
        return self.launch + self.between + self.host

    @property
    def interval(self) -> tuple[Any, Any]:
        """Between which seconds four of five steps lie."""
        return interval(self.seconds, self.waits, strange(self.counted[0]), self.rates)

    @property
    def mfu(self) -> Any:
        """Share of the peak that the model's own matmuls take (Chowdhery et al. 2022, appendix B): three times the forward
        pass, attention over all pairs of positions."""
        return self.model_flops / self.seconds / self.rates.peak

    @property
    def hfu(self) -> Any:
        """The same with what is computed again."""
        return self.hardware_flops / self.seconds / self.rates.peak


def interval(seconds: Any, waits: Any, strange: Any, r: Rates) -> tuple[Any, Any]:
    """Between which seconds four of five steps lie that are reckoned to take so many, of which so many wait: as much wider, in
    logarithms, for a machine that nobody measured as it is anyway, and once more for a strange step."""
    width = np.exp((r.least + r.tensor * (waits / seconds)) * (UNSURE - r.measured + strange * (UNSURE - 1)))
    return seconds / width, seconds * width


def widest(r: Rates) -> float:
    """How many times its seconds the upper end of a step's interval can be."""
    return float(interval(1.0, 1.0, True, r)[1])


def strange(s: Symbols) -> Any:
    """Whether a step has what no measured one had (docs/time.md): ZeRO, attention without its scores in memory, context
    parallelism, offload, or products in 8 bits."""
    away = [s.h > 0, s.hp > 0, *(flag > 0 for flag in s.away)]
    return reduce(operator.or_, [(s.z > 0) & (s.n * s.x > 1), s.x > 1, s.w > 0, s.f > 0, *away, s.fp8 > 0])


def step_time(model: ModelConfig, layout: Layout, mesh: Mesh, workload: Workload) -> StepTime:
    """The time of one training step. Raises SpecError when the nouns do not go together, or the machine has no figures of
    speed."""
    validate(model, layout, mesh.devices, workload)
    s, rates = Symbols.of(model, layout, workload), Rates.of(mesh, workload)
    if layout.remat == "jax":
        raise SpecError(f"{PLAIN_AUTODIFF}, and so is its time; choose remat=none, selective or full.")
    if layout.offload != "none" and not rates.host:
        raise SpecError(
            f"mesh {mesh}: {mesh.machine.name} has no figure links.host, over which offload={layout.offload} is copied; leave "
            "offload out, or give a file with that figure."
        )
    stages = stages_of(model, layout, workload)
    return of_symbols(s, rates) if stages is None else of_stages(s, stages, rates)


def of_symbols(s: Symbols, r: Rates, of_block: Work | None = None) -> StepTime:
    """The time of a step in the symbols given; of a stage of a pipeline, one that never idles. `of_block` is what `block` says
    of them, where it is known already."""
    of_block, head, embedding = of_block or block(s, r), of_head(s, r), of_embedding(s, r)
    blocks = s.L * s.m
    work = of_block.all * blocks + head.all * (s.last * s.m) + embedding.all * (s.first * s.m)
    between = collectives.tensor(s)
    sent = [(line, _seconds(s, r, line), _hides(s, line)) for line in between]
    waited = add(seconds * (1 - hides) for _, seconds, hides in sent)
    issued = add(line.count for line in between)
    launched = blocks * r.block * (3 + OUTSIDE * s.again("up") + (1 - OUTSIDE) * s.again("attention")) + issued * r.issue
    busy = of_block.all.seconds * blocks + waited
    launch = np.maximum(launched - busy, 0.0)
    # What a device idles for its host hides as much as what it computes.
    room = 1 + launch / np.where(busy > 0, busy, 1.0)
    forward, backward = (part.seconds * blocks * room for part in (of_block.forward, of_block.backward))
    updates = update.lines(s)
    others = (*collectives.others(s), *fp8.lines(s), *(line for line in updates if line.section == "collectives"))
    found = _traffic(s, r, sent, others, (forward, backward), tuple(part * blocks for part in of_block.attention))
    held = {line.name: line.value for line in state.lines(s)}
    on_host = add(term.value for term in state.host_arrays(s))
    # A norm and the update read the gradients, and the update all that is held, and writes it.
    moved = 2 * (held["gradients"] + held["parameters"] + held["optimizer"] + on_host)
    multiplied = add(line.value for line in updates if line.section == "flops") / (r.peak * r.matmul)
    copied = add(line.value for line in transfers.lines(s))
    return StepTime(
        products=work.products,
        memory=work.memory,
        launch=launch,
        traffic=found,
        between=waited,
        bubble=0.0,
        optimizer=moved / r.memory + multiplied,
        host=copied / (r.host or np.inf),
        other=r.step,
        counted=(s,),
        rates=r,
    )


def of_stages(s: Symbols, stages: Stages, r: Rates) -> StepTime:
    """The time of a step in a pipeline: of its slowest stage, and what the schedule idles between cells as long as those of a
    stage without embedding and head, by its closed form where that holds for them, else by simulation. Messages travel while
    the next cells compute; p - 1 of them go up before the last stage begins, and down when it is through."""
    schedule = stages.schedule
    each = [s.on_stage(stages, stage) for stage in range(schedule.stages)]
    slowest = max((of_symbols(symbols, r) for symbols in distinct(each)), key=lambda time: time.seconds)
    longest = max(each, key=lambda symbols: symbols.L)
    cells = cells_of(longest, r)
    idle = bubble(longest, cells, schedule.name, schedule.chunks)
    if np.isnan(idle):
        times = Times(float(cells.f), float(cells.b), float(cells.w))
        idle = simulate(schedule, times).span - schedule.microbatches * times.stage + cells.messages(schedule.stages)
    return replace(slowest, bubble=idle, counted=tuple(each))


def model_flops(s: Symbols) -> Any:
    """FLOPs of the model's own matmuls on a device: three times the forward pass, with attention over the whole square, however
    it is computed. Those of a step may be more than 64 bits count, so that they are floats."""
    # Devices in a ring may be more than a rank's heads, and share the square all the same.
    whole = flops.lines(replace(s, m=1.0 * s.m, w=0 * s.w, f=0 * s.f, ring=0 * s.ring, x=1))
    forward = [term for line in whole if line.phase == "forward" for term in line.terms]
    return 3 * add(term.value / (s.x if term.label in ("scores", "attention") else 1) for term in forward)


@dataclass(frozen=True)
class Timeline:
    """What a StepTime adds up, in the order in which a device does it.

    computed    (what, seconds) of products and of what else goes through memory: all forward, then all backward
    simulation  of a pipeline's schedule, the cells as long as on a stage without embedding and head, in microseconds
    """

    computed: tuple[tuple[str, float], ...]
    simulation: Simulation | None = None


def timeline(model: ModelConfig, layout: Layout, mesh: Mesh, workload: Workload) -> Timeline:
    """The order of a step's parts; in a pipeline, of those of its slowest stage. Raises what `step_time` does."""
    s, r = Symbols.of(model, layout, workload), Rates.of(mesh, workload)
    stages = stages_of(model, layout, workload)
    if stages is None:
        return Timeline(_computed(s, r))
    each = [s.on_stage(stages, stage) for stage in range(stages.schedule.stages)]
    slowest = max(distinct(each), key=lambda symbols: of_symbols(symbols, r).seconds)
    cells = cells_of(max(each, key=lambda symbols: symbols.L), r)
    times = Times(*(1e6 * float(seconds) for seconds in (cells.f, cells.b, cells.w, cells.message)))
    return Timeline(_computed(slowest, r), simulate(stages.schedule, times))


def _computed(s: Symbols, r: Rates) -> tuple[tuple[str, float], ...]:
    of_block, head, embedding = block(s, r), of_head(s, r), of_embedding(s, r)
    blocks, first, last = s.L * s.m, s.first * s.m, s.last * s.m
    found = (
        ("embedding, forward", embedding.forward * first),
        ("blocks, forward", of_block.forward * blocks),
        ("head and loss, forward", head.forward * last),
        ("head and loss, backward", head.backward * last),
        ("blocks, computed again", of_block.again * blocks),
        ("blocks, backward", (of_block.inputs + of_block.weights) * blocks),
        ("embedding, backward", embedding.backward * first),
    )
    return tuple((what, float(part.seconds)) for what, part in found)


def hardware_flops(s: Symbols) -> Any:
    """FLOPs of all that a device multiplies, as floats too."""
    return add(line.value for line in flops.lines(replace(s, m=1.0 * s.m)))


def distinct(each: Iterable[Symbols]) -> list[Symbols]:
    """The stages that differ."""
    return list({replace(s, dtypes=None): s for s in each}.values())  # a dict is no key


@dataclass(frozen=True)
class Cells:
    """Seconds of a microbatch's cells on a stage: forward, backward by inputs, and by weights, as
    schedules.Times has them, but of many layouts at once; and those of a message to the next stage, which travels while cells
    compute."""

    f: Any
    b: Any
    w: Any
    message: Any
    comm: float = 0.0

    @property
    def stage(self) -> Any:
        return self.f + self.b + self.w

    def messages(self, stages: Any) -> Any:
        """Of those that fill and drain a pipeline: p - 1 go up before the last stage begins, and down when it is through."""
        return 2 * (stages - 1) * self.message


def bubble(s: Symbols, cells: Cells, schedule: str, chunks: Any) -> Any:
    """What a pipeline of these cells idles by the closed form of its schedule, with the messages that fill and drain it; NaN
    where there is none, or none that holds for them. Of many layouts of one schedule at once."""
    form, counts = CLOSED_FORMS.get(schedule), (s.pipe, s.m, chunks)
    if form is None:
        return math.nan
    idle = np.maximum(form.idle(counts, cells), 0.0) + cells.messages(s.pipe)
    return np.where(form.holds(counts, cells), idle, math.nan)


def simulated(model: ModelConfig, layout: Layout, mesh: Mesh, workload: Workload) -> float:
    """Seconds of a step with a pipeline when each of its parts takes its own time, with its own layers, embedding and head, and
    each message its own: by event simulation, where `step_time` takes the slowest stage and what equal stages idle.

    Raises what `step_time` raises.
    """
    time = step_time(model, layout, mesh, workload)
    stages = stages_of(model, layout, workload)
    if stages is None:
        return float(time.seconds)
    s, schedule, parts = Symbols.of(model, layout, workload), stages.schedule, len(stages.sizes)
    of_stage = s.on_stage(stages, 0)

    @cache
    def cells(size: int, first: bool, last: bool) -> Cells:
        return ends_of(replace(of_stage, L=size, first=int(first), last=int(last)), time.rates)

    each = [cells(size, part == 0, part == parts - 1) for part, size in enumerate(stages.sizes)]
    kinds = [{"F": of.f, "B": of.b, "W": of.w, "BW": of.b + of.w} for of in each]

    def lasts(stage: int, cell: Cell) -> float:
        return float(kinds[schedule.part(stage, cell.chunk)][cell.kind])

    begins = earliest(schedule, schedule.orders, lasts, float(each[0].message))
    spans = [
        begin[-1] + lasts(stage, order[-1]) - begin[0]
        for stage, (begin, order) in enumerate(zip(begins, schedule.orders, strict=True))
    ]
    work = [0.0] * schedule.stages
    for part, of in enumerate(each):
        work[schedule.owner(part)[0]] += schedule.microbatches * float(of.stage)
    return float(time.seconds - time.bubble) - max(work) + max(spans)


def cells_of(s: Symbols, r: Rates, of_block: Work | None = None) -> Cells:
    """The cells of a stage with as many layers, but without embedding and head; `of_block` as for `of_symbols`."""
    return ends_of(replace(s, first=0, last=0), r, of_block)


def ends_of(s: Symbols, r: Rates, of_block: Work | None = None) -> Cells:
    """The cells of a stage, with its embedding and its head."""
    ends = Work()
    if np.any(s.first) or np.any(s.last):
        head, embedding = of_head(s, r), of_embedding(s, r)
        ends = Work(*(getattr(head, name) * s.last + getattr(embedding, name) * s.first for name in PASSES))
    of_block = of_block or block(s, r)
    sent = {"forward": 0.0, "backward": 0.0}
    for line in collectives.tensor(s):
        phase = "forward" if line.phase == "forward" else "backward"
        sent[phase] = sent[phase] + _seconds(s, r, line) * (1 - _hides(s, line)) / s.m
    (up, *_) = collectives.pipe(s)
    return Cells(
        s.L * of_block.forward.seconds + ends.forward.seconds + sent["forward"],
        s.L * (of_block.again + of_block.inputs).seconds + ends.inputs.seconds + sent["backward"],
        s.L * of_block.weights.seconds + ends.weights.seconds,
        message=_seconds(s, r, up) / s.ticks,
    )


# ---------------------------------------------------------------- what computes


def block(s: Symbols, r: Rates) -> Work:
    """One microbatch of a block."""
    rows = s.b * s.S
    forward, again, inputs, of_weights = 0.0, 0.0, 0.0, 0.0
    speed = r.narrow / r.peak if s.fp8 else 1.0
    for each in products(s):
        enters, leaves = each.enters.size, each.leaves.size
        seconds = product(r, rows, enters, leaves, s.c, speed=speed)
        forward = forward + seconds
        again = again + seconds * s.again(each.name)
        inputs = inputs + product(r, rows, leaves, enters, s.c, speed=speed)
        # With several microbatches a product reads what it adds to, and writes it in the gradients' dtype.
        adds = (s.m > 1) * (2 * s.g / s.c - 1) * enters * leaves
        of_weights = of_weights + product(r, enters, rows, leaves, s.c, speed=speed, spared=-adds)
    heads = s.K // s.t + (s.K < s.t)  # of keys, each with a group of queries
    group = s.N // s.t // heads
    met = flops.square(s)[0] / (2 * s.S * s.T * (s.N // s.t) * s.H)  # of all pairs of positions
    kept = s.f * s.b * heads * s.S * group * s.T
    scores = product(r, s.S * group, s.H, s.T, s.c, s.b * heads, spared=kept) * met
    values = product(r, s.S * group, s.T, s.H, s.c, s.b * heads, spared=kept) * met
    stream = rows * (s.D / s.q) * STREAM * s.c / r.memory + KERNELS * r.kernel
    given = rows * (add(each.leaves.size for each in products(s) if each.column) + s.N // s.t * s.H) * GIVEN * s.c / r.memory
    square = (1 - s.f) * s.b * (s.N // s.t) * s.S * s.T * met * SCORE * s.c / r.memory
    moved = stream + given + square
    one_by_one = s.w * flops.pairs(s) * PAIR * r.kernel
    return Work(
        Pass(forward + scores + values, moved + one_by_one),
        Pass(
            again + scores * s.again("scores") + values * s.again("attention"),
            (stream + given) * s.again("up") + (square + one_by_one) * s.again("attention"),
        ),
        Pass(inputs + (2 + s.w + s.f) * scores + 2 * values, BACK * moved + 2 * one_by_one),
        Pass(of_weights),
        attention=_attention(s, scores + values + square + one_by_one, scores, values, square, one_by_one),
    )


def _attention(s: Symbols, forward: Any, scores: Any, values: Any, square: Any, one_by_one: Any) -> tuple[Any, Any]:
    """Seconds of a block's attention, forward, and backward with what is computed again of it."""
    backward = (2 + s.w + s.f) * scores + 2 * values + BACK * square + 2 * one_by_one
    return forward, backward + forward * s.again("attention")


def of_head(s: Symbols, r: Rates) -> Work:
    """One microbatch of the head and the loss."""
    rows, columns = s.b * s.S, -(-s.V // s.t)
    moved = rows * columns * (LOGIT / 2) * s.c / r.memory
    return Work(
        forward=Pass(product(r, rows, s.D, columns, s.c), moved),
        inputs=Pass(product(r, rows, columns, s.D, s.c), moved),
        weights=Pass(product(r, s.D, rows, columns, s.c)),
    )


def of_embedding(s: Symbols, r: Rates) -> Work:
    """One microbatch of the lookup, and its gradient's sums."""
    moved = Pass(memory=EMBEDDING * s.b * s.S * s.D * s.c / r.memory)
    return Work(forward=moved, weights=moved)


# ---------------------------------------------------------------- what travels


def _seconds(s: Symbols, r: Rates, line: Line) -> Any:
    """Of a collective, each of them launched by its own."""
    return r.seconds(s, line.name, line.axes, line.wire, line.count)


def _traffic(
    s: Symbols,
    r: Rates,
    between: Sequence[tuple[Line, Any, Any]],
    others: Iterable[Line],
    room: tuple[Any, Any],
    attention: tuple[Any, Any],
) -> tuple[Traffic, ...]:
    """What is sent between the kernels of blocks, of which seconds and what hides are known, and all else but a pipeline's
    messages. `room`: seconds that hide at most as much, forward and backward; `attention`: those of attention, behind which
    alone a ring's hops go on, as each turn meets the keys and values of the one before."""
    (*_, tied) = collectives.pipe(s)
    # A compiler makes one collective of what a block's weights send at once.
    most = (s.L + OUTER_SENT) * s.m
    together = [
        (line, r.seconds(s, line.name, line.axes, line.wire, np.minimum(line.count, most)), _hides(s, line))
        for line in (*others, tied)
        if line.axes
    ]
    waits: dict[tuple[str, ...], list[Any]] = {}
    # By axes, and by whether it goes round a ring: what may be hidden forward, and backward.
    may: dict[tuple[tuple[str, ...], bool], tuple[list[Any], list[Any]]] = {}
    for line, seconds, hides in (*(each for each in between if each[0].axes), *together):
        always, never = isinstance(hides, int) and hides == 1, isinstance(hides, int) and hides == 0
        waits.setdefault(line.axes, []).append(0.0 if always else seconds if never else seconds * (1 - hides))
        if not never:
            around = line.name == "permute"
            may.setdefault((line.axes, around), ([], []))[line.phase != "forward"].append(seconds if always else seconds * hides)
    turns, others_ = (
        tuple(add(value for (_, around), phases in may.items() if around == ring for value in phases[phase]) for phase in (0, 1))
        for ring in (True, False)
    )
    by_attention = tuple(map(np.minimum, turns, attention))
    left = tuple(np.minimum(wants, has - taken) for wants, has, taken in zip(others_, room, by_attention, strict=True))
    share = {True: _share(by_attention, turns), False: _share(left, others_)}
    found = []
    for axes, waited in waits.items():
        hidden = [(add(add(phase) for phase in may[axes, around]), share[around]) for around in share if (axes, around) in may]
        if len(hidden) > 1:  # ZeRO has context alone, as a ring has
            total = add(seconds for seconds, _ in hidden)
            hidden = [(total, add(seconds * of for seconds, of in hidden) / np.where(total > 0, total, 1.0))]
        found.append(Traffic(axes, add(waited), *(hidden[0] if hidden else (0.0, share[False]))))
    return tuple(found)


def _share(hidden: tuple[Any, Any], wanted: tuple[Any, Any]) -> Any:
    total = wanted[0] + wanted[1]
    return (hidden[0] + hidden[1]) / np.where(total > 0, total, 1.0)


def _hides(s: Symbols, line: Line) -> Any:
    """1 where blocks hide a collective, else 0."""
    if line.axes == s.present(("context",)) and line.name == "permute":
        return 1
    # What a weight's gradient needs of all positions travels while that of the input is computed (Korthikanti et al. 2022,
    # section 4.2.2).
    if line.phase == "recompute" and line.name == "all-gather":
        return 1
    if line.axes == s.present(ZERO_AXES) and line.phase != "update":
        return 1 * (s.z >= {"all-gather": 3, "reduce-scatter": 2}.get(line.name, 4))
    return 0
