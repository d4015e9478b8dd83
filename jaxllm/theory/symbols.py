"""The letters that the formulas are written in: the scaling book's, with ours for the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.spec.layout import AXES, Layout
from jaxllm.spec.ledger import DTYPE_BYTES
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.workload import Workload


@dataclass(frozen=True)
class Symbols:
    """Sizes of the model (integers) and of the layout and workload (integers, or arrays with one entry a layout).

    L layers, D model, F feed-forward, N query heads, K key/value heads, H head size, V vocabulary;
    r replica, n data, t tensor, z ZeRO stage, m microbatches, full 1 for remat=full and 0 for remat=none;
    b sequences per device and microbatch, T tokens in a sequence;
    p, c, g bytes of a held parameter, of an activation, of a gradient; o optimizer bytes a parameter.
    """

    L: int
    D: int
    F: int
    N: int
    K: int
    H: int
    V: int
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

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, workload: Workload) -> Symbols:
        """The symbols of one layout. Raises SpecError when the batch leaves no whole sequence."""
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
        )

    def degree(self, axes: tuple[str, ...]) -> Any:
        """Devices in a group over these mesh axes."""
        product: Any = 1
        for axis in axes:
            product = product * {"replica": self.r, "data": self.n, "tensor": self.t}[axis]
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
MEGATRON = "Shoeybi et al. 2019 (Megatron-LM)"
BOOK = "How to Scale Your Model"
KORTHIKANTI = "Korthikanti et al. 2022"
