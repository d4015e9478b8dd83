"""The letters that the formulas are written in: the scaling book's, with ours for the layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.schedules.counts import slots
from jaxllm.spec.layout import AXES, Layout
from jaxllm.spec.ledger import DTYPE_BYTES
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload
from jaxllm.theory.stages import Stages


@dataclass(frozen=True)
class Symbols:
    """Sizes of the model (integers) and of the layout and workload (integers, or arrays with one entry a layout).

    L layers, D model, F feed-forward, N query heads, K key/value heads, H head size, V vocabulary, P positions that a
    GPT learns; `family` says which weights and products a block has;
    r replica, n data, t tensor, z ZeRO stage, m microbatches, full 1 for remat=full and 0 for remat=none;
    b sequences per device and microbatch, T tokens in a sequence;
    p, c, g bytes of a held parameter, of an activation, of a gradient; o optimizer bytes a parameter.

    In a pipeline they are those of one stage: L is the number of its layers, and R of those that every stage has room
    for; first and last are 1 on the stage with the embedding and on that with the head, else 0. `pipe` is the number of
    stages, and of the schedule there are `ticks`, `ways` in which results go on at a tick, and buffers: `stash` and
    `kept`, each for `depth` layers of one microbatch, and `inbox`, each for one activation; apart is 1 where embedding
    and head are on two stages. Without a pipeline L = R.
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
    full: Any
    b: Any
    T: Any
    p: int
    c: int
    g: int
    o: int
    dtypes: dict[str, str]  # the dtypes behind p, c and g, by letter
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

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, workload: Workload) -> Symbols:
        """The symbols of one layout, of a pipeline without its stages. Raises SpecError when the batch leaves no whole
        sequence."""
        kind = workload.dtypes
        dtypes = {"p": kind.parameters, "c": kind.compute, "g": kind.gradients}
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
            full=int(layout.remat == "full"),
            b=workload.sequences_per_device(layout),
            T=workload.sequence,
            p=DTYPE_BYTES[kind.parameters],
            c=DTYPE_BYTES[kind.compute],
            g=DTYPE_BYTES[kind.gradients],
            # Adam's m and v in f32, and a master copy: the ZeRO paper's K = 12 (section 3.1); 8 where none is kept.
            o=12 if kind.master else 8,
            dtypes=dtypes,
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

    def degree(self, axes: tuple[str, ...]) -> Any:
        """Devices in a group over these mesh axes."""
        product: Any = 1
        for axis in axes:
            product = product * {"pipe": self.pipe, "replica": self.r, "data": self.n, "tensor": self.t}[axis]
        return product

    def present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes a collective is named by: those of a degree above 1, for a single layout; for arrays, all."""
        single = isinstance(self.n, int)
        return tuple(axis for axis in AXES if axis in axes and (not single or self.degree((axis,)) > 1))


def pick(flag: Any, yes: str, no: str) -> str:
    """The formula that applies: `yes` where the flag holds. For arrays of layouts, both."""
    return f"{yes} or {no}" if np.ndim(flag) else yes if flag else no


def reference(paper: str, where: str) -> str:
    """How the formulas cite: paper and place."""
    return f"{paper}, {where}"


ZERO = "Rajbhandari et al. 2020 (ZeRO)"
ZERO_BUBBLE = "Qi et al. 2024 (zero bubble)"
NARAYANAN = "Narayanan et al. 2021 (Megatron-LM)"
MEGATRON = "Shoeybi et al. 2019 (Megatron-LM)"
BOOK = "How to Scale Your Model"
KORTHIKANTI = "Korthikanti et al. 2022"
