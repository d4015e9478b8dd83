"""The letters that the formulas are written in: the scaling book's, with ours for the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from jaxllm.schedules.counts import slots
from jaxllm.spec import activations
from jaxllm.spec.attention import blocks
from jaxllm.spec.layout import AXES, Layout
from jaxllm.spec.ledger import DTYPE_BYTES
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.optimizers import Optimizer
from jaxllm.spec.workload import Workload
from jaxllm.theory.stages import Stages


@dataclass(frozen=True)
class Symbols:
    """Sizes of the model (integers) and of the layout and workload (integers, or arrays with one entry a layout).

    L layers, D model, F feed-forward, N query heads, K key/value heads, H head size, V vocabulary, P positions that a
    GPT learns; `family` says which weights and products a block has;
    r replica, n data, t tensor, z ZeRO stage, m microbatches; q ways in which the residual stream is cut along the
    sequence, t with sequence=true and else 1; saved has for each of spec.activations.NAMES 1 if the
    forward pass saves it, else 0, and away, for each of them and the block's input, 1 if it does so in host memory, else 0;
    w is 1 where attention goes block by block, else 0, and then takes A blocks of C positions, in a ring in each half of S; f is 1 where it is one
    kernel that keeps its scores to itself, else 0;
    x devices that share out the tokens of a sequence, ring 1 where keys and values go round them, else 0;
    b sequences per device and microbatch, T tokens in a sequence, S those of them that a device has, T/x;
    h is 1 where the optimizer's arrays are in host memory, else 0, and hp where parameters are too;
    p, c, g, o bytes of a held parameter, of an activation, of a gradient, of an element of optimizer state; `optimizer`
    says which arrays that has, `master` whether there is a copy of the parameters in f32 beside them, `scaled` whether
    the loss is scaled, and `fp8` whether the products of the blocks are in 8 bits.

    In a pipeline they are those of one stage: L is the number of its layers, and R of those that every stage has room
    for; first and last are 1 on the stage with the embedding and on that with the head, else 0. `pipe` is the number of
    stages, and of the schedule there are `ticks`, `ways` in which results go on at a tick, and buffers: `stash` and
    `kept`, each for `depth` layers of one microbatch, and `inbox`, each for one activation; apart is 1 where embedding
    and head are on two stages. Without a pipeline L = R.

    eager is 1 for a framework that runs each kernel as it is written: what nobody needs is computed all the same.
    """

    L: int
    D: int
    F: int
    N: int
    K: int
    H: int
    V: int
    P: int
    family: str
    tied: bool
    r: Any
    n: Any
    t: Any
    z: Any
    m: Any
    q: Any
    saved: tuple[Any, ...]
    away: tuple[Any, ...]
    w: Any
    f: Any
    A: Any
    C: Any
    x: Any
    ring: Any
    h: Any
    hp: Any
    b: Any
    T: Any
    S: Any
    p: int
    c: int
    g: int
    o: int
    dtypes: dict[str, str]  # the dtypes behind p, c and g, by letter
    optimizer: Optimizer
    master: bool
    scaled: bool
    fp8: bool
    R: Any
    first: Any = 1
    last: Any = 1
    pipe: Any = 1
    ticks: Any = 0
    ways: Any = 0
    stash: Any = 0
    kept: Any = 0
    inbox: Any = 0
    depth: Any = 0
    apart: Any = 0
    eager: Any = 0

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, workload: Workload) -> Symbols:
        """The symbols of one layout, of a pipeline without its stages. Raises SpecError when the batch leaves no whole
        sequence."""
        kind = workload.dtypes
        dtypes = {"p": kind.parameters, "c": kind.compute, "g": kind.gradients}
        number, size = blocks(workload.sequence // (2 * layout.context if layout.ring else 1))
        return cls(
            L=model.layers,
            D=model.d_model,
            F=model.d_ff,
            N=model.heads,
            K=model.kv_heads,
            H=model.head_dim,
            V=model.vocab,
            P=model.max_sequence,
            family=model.family,
            tied=model.tied,
            r=layout.replica,
            n=layout.data,
            t=layout.tensor,
            z=layout.zero,
            m=layout.microbatches,
            q=layout.cut,
            saved=tuple(int(name in layout.saved) for name in activations.NAMES),
            away=tuple(int(name in layout.offloaded) for name in (*activations.NAMES, activations.INPUT)),
            w=int(layout.attention == "blockwise"),
            f=int(layout.attention == "cudnn"),
            A=number,
            C=size,
            x=layout.context,
            ring=int(layout.ring),
            h=int(layout.state_on_host),
            hp=int(layout.parameters_on_host),
            b=workload.sequences_per_device(layout),
            T=workload.sequence,
            S=workload.sequence // layout.context,
            p=DTYPE_BYTES[kind.parameters],
            c=DTYPE_BYTES[kind.compute],
            g=DTYPE_BYTES[kind.gradients],
            o=DTYPE_BYTES[kind.state],
            dtypes=dtypes,
            optimizer=workload.keeps,
            master=kind.master,
            scaled=kind.scaled,
            fp8=kind.fp8,
            R=model.layers,
        )

    def on_stage(self, stages: Stages, stage: int) -> Symbols:
        """The symbols of one stage of a pipeline."""
        schedule = stages.schedule
        given = slots(schedule)
        return replace(
            self,
            L=sum(len(stages.layers(stage, chunk)) for chunk in range(schedule.chunks)),
            R=schedule.chunks * stages.rows,
            first=int(stage == stages.first),
            last=int(stage == stages.last),
            pipe=schedule.stages,
            ticks=schedule.ticks,
            # Up and down, which are the same where two stages make a ring.
            ways=1 if schedule.stages == 2 and schedule.placement == "ring" and schedule.chunks > 1 else 2,
            stash=given.stash,
            kept=given.weights,
            inbox=given.inputs,
            depth=stages.rows,
            apart=int(stages.first != stages.last),
        )

    def saves(self, name: str) -> Any:
        """1 where the forward pass saves the activation of that name, else 0: the statistics with what they are of."""
        return self._of(self.saved, name)

    def offloads(self, name: str) -> Any:
        """1 where it saves it in host memory, else 0."""
        return self._of(self.away, name)

    def _of(self, flags: tuple[Any, ...], name: str) -> Any:
        name = "attention" if name == activations.STATISTICS else name
        return flags[(*activations.NAMES, activations.INPUT).index(name)]

    def again(self, product: str) -> Any:
        """1 where the backward pass computes the product of that name again, else 0: that of `o` is in the residual
        stream, and nothing needs that of `down`, the last of a block, which no compiler computes again. Block by block attention is computed again as a
        whole or not at all. A kernel computes it again whatever is saved: the statistics of its softmax, which its own
        backward pass takes, come from nowhere else."""
        if product == "down":
            return self.eager * self.again("up")
        found = 1 - self.saves({"o": "residual"}.get(product, product))
        if product == "scores":
            return self.w * self.again("attention") + self.f + (1 - self.w - self.f) * found
        return found + self.f * (1 - found) if product == "attention" else found

    def degree(self, axes: tuple[str, ...]) -> Any:
        """Devices in a group over these mesh axes."""
        product: Any = 1
        for axis in axes:
            product = product * {
                "pipe": self.pipe, "replica": self.r, "data": self.n, "context": self.x, "tensor": self.t
            }[axis]
        return product

    @property
    def slices(self) -> Any:
        """Slices that ZeRO makes: its axes are data and context."""
        return self.n * self.x

    @property
    def over(self) -> str:
        """The same, as the formulas have it."""
        return pick(self.x > 1, "n x", "n")

    @property
    def here(self) -> str:
        """S, as the formulas have it."""
        return pick(self.x > 1, "T/x", "T")

    def present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes a collective is named by: those of a degree above 1, for a single layout; for arrays, all."""
        single = isinstance(self.n, int)
        return tuple(axis for axis in AXES if axis in axes and (not single or self.degree((axis,)) > 1))


Found = TypeVar("Found")


def remembered(function: Callable[[Symbols], Found]) -> Callable[[Symbols], Found]:
    """What a function makes of one Symbols, made once: many formulas start from the same tables."""
    name = f"_{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def once(s: Symbols) -> Found:
        known = s.__dict__
        if name not in known:
            known[name] = function(s)
        return known[name]

    return once


_ALIKE = ("family", "tied", "p", "c", "g", "o", "dtypes", "optimizer", "master", "scaled", "fp8")


def stacked(each: Sequence[Symbols]) -> Symbols:
    """Many as one: every size an array with an entry for each. They are of one family, precision and optimizer."""

    def column(name: str) -> Any:
        values = [getattr(s, name) for s in each]
        if name in ("saved", "away"):
            return tuple(np.array(flags) for flags in zip(*values, strict=True))
        return values[0] if name in _ALIKE else np.array(values)

    return replace(each[0], **{field.name: column(field.name) for field in fields(Symbols)})


def pick(flag: Any, yes: str, no: str) -> str:
    """The formula that applies: `yes` where the flag holds. For arrays of layouts, both."""
    return f"{yes} or {no}" if np.ndim(flag) else yes if flag else no


def reference(paper: str, where: str) -> str:
    """How the formulas cite: paper and place."""
    return f"{paper}, {where}"


ZERO = "Rajbhandari et al. 2020 (ZeRO)"
INFINITY = "Rajbhandari et al. 2021 (ZeRO-Infinity)"
ZERO_BUBBLE = "Qi et al. 2024 (zero bubble)"
NARAYANAN = "Narayanan et al. 2021 (Megatron-LM)"
MEGATRON = "Shoeybi et al. 2019 (Megatron-LM)"
BOOK = "How to Scale Your Model"
KORTHIKANTI = "Korthikanti et al. 2022"
DAO = "Dao 2023 (FlashAttention-2)"
RING = "Liu et al. 2023 (Ring Attention)"
ULYSSES = "Jacobs et al. 2023 (DeepSpeed-Ulysses)"
