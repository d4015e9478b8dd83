"""The weights of a block that multiply matrices: one description, from which parameters, FLOPs and what is saved follow.

Each has the model dim D on one side and another dim X on the other, and tensor parallelism slices X (Shoeybi et al.
2019, section 3): by columns where X is the output, by rows where it is the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.theory.symbols import Symbols, pick, remembered


EMBEDDING, ATTENTION, MLP, HEAD = "embedding", "block.attention", "block.mlp", "head"
OTHERS = "other stages"  # room that one program for all stages has for the weights of others
_PARTS = {"embed": EMBEDDING, "positions": EMBEDDING, "final_norm": HEAD, "head": HEAD} | dict.fromkeys(
    ("mlp_norm", "gate", "up", "down"), MLP
)


def part(name: str) -> str:
    """The part of the model that a weight or an activation belongs to."""
    return _PARTS.get(name.removesuffix("_bias"), ATTENTION)


@dataclass(frozen=True)
class Width:
    """Features of a token on one tensor rank, and the formula of their number; over how many ranks the tokens of a sequence
    are shared out; and the bytes of a feature, by their letter or as a number."""

    size: Any
    formula: str
    cut: Any = 1
    bytes: str = "c"


@dataclass(frozen=True)
class Product:
    """One weight and the matmul it takes part in: of tokens x `enters`, giving tokens x `leaves`.

    name    of the weight
    input   what it is multiplied with, by the name that jaxllm/model has for it: weights of one input share it
    enters  width of the input
    leaves  width of the output; by rows, the output of each rank is a part of a sum
    column  whether X is the output: the weight is sliced by columns, else by rows
    other   X of the whole model
    ways    slices in which the ranks hold X
    held    formula of what a rank holds of X
    shared  every rank holds all of X and adds to its gradient: keys and values with K < t
    """

    name: str
    input: str
    enters: Width
    leaves: Width
    column: bool
    other: Any
    ways: Any
    held: str
    shared: Any = False


@remembered
def products(s: Symbols) -> tuple[Product, ...]:
    """Those of one block, in the order in which a token meets them: attention up to `o`, then the feed-forward."""
    model = Width(s.D, "D")
    queries, hidden = Width(s.N * s.H // s.t, "N H/t"), Width(s.F // s.t, "F/t")
    # A rank computes its share of the key/value heads, or the one head that it shares. Written without NumPy's maximum,
    # whose 64 bits are too few for the FLOPs of a large model on one device.
    keys = Width((s.K // s.t + (s.K < s.t)) * s.H, "max(K/t, 1) H")
    shared = s.K % s.t != 0

    def by_columns(name: str, source: str, leaves: Width, other: Any) -> Product:
        return Product(name, source, model, leaves, True, other, s.t, leaves.formula)

    def by_rows(name: str, source: str, enters: Width, other: Any) -> Product:
        return Product(name, source, enters, model, False, other, s.t, enters.formula)

    def of_keys(name: str) -> Product:
        ways, held = np.where(shared, 1, s.t), pick(shared, "K H", "K H/t")
        return Product(name, "attention_input", model, keys, True, s.K * s.H, ways, held, shared)

    into = ("gate", "up") if s.family == "llama" else ("up",)
    return (
        by_columns("q", "attention_input", queries, s.N * s.H),
        of_keys("k"),
        of_keys("v"),
        by_rows("o", "attention", queries, s.N * s.H),
        *(by_columns(name, "mlp_input", hidden, s.F) for name in into),
        by_rows("down", "hidden", hidden, s.F),
    )
