"""A model as prefill sees it: the shape of each weight and of each array on the way from tokens to logits, and the cache
of keys and values that decoding reads.

The names are those of jaxllm/model. Rotary positions and softmax change no shape and have no entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from jaxllm.spec.layout import Layout
from jaxllm.spec.model import ModelConfig
from jaxllm.spec.validate import validate
from jaxllm.spec.workload import Workload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """A step of the forward pass.

    weights  shapes of its weights, the matrix first, then the bias; none where it only combines
    output   shape of what it gives: b sequences, T tokens, then features
    times    how often the model has it: L in a block, else once
    """

    name: str
    weights: tuple[Shape, ...]
    output: Shape
    times: int = 1

    @property
    def parameters(self) -> int:
        """Of one of them."""
        return sum(map(prod, self.weights))


def modules(model: ModelConfig, batch: int, sequence: int) -> tuple[Module, ...]:
    """All steps of a forward pass over `batch` sequences of `sequence` tokens, those of a block once. Raises SpecError
    where the sequence is longer than the model takes."""
    validate(model, Layout(), 1, Workload(batch=batch, sequence=sequence))
    D, F, V, T = model.d_model, model.d_ff, model.vocab, sequence
    N, K, H = model.heads, model.kv_heads, model.head_dim
    biased = model.family == "gpt"

    def gives(*features: int) -> Shape:
        return (batch, T, *features)

    def norm(name: str, times: int = model.layers) -> Module:
        return Module(name, ((D,),) * (1 + biased), gives(D), times)

    def matmul(name: str, enters: int, leaves: int) -> Module:
        return Module(name, ((enters, leaves), *([(leaves,)] if biased else [])), gives(leaves), model.layers)

    def joins(name: str, output: Shape) -> Module:
        return Module(name, (), output, model.layers)

    return (
        Module("embed", ((V, D),), gives(D)),
        *([Module("positions", ((model.max_sequence, D),), gives(D))] if biased else []),
        norm("attention_norm"),
        matmul("q", D, N * H),
        matmul("k", D, K * H),
        matmul("v", D, K * H),
        joins("scores", (batch, K, N // K, T, T)),
        joins("attention", gives(N * H)),
        matmul("o", N * H, D),
        joins("residual", gives(D)),
        norm("mlp_norm"),
        *([] if biased else [matmul("gate", D, F)]),
        matmul("up", D, F),
        joins("hidden", gives(F)),
        matmul("down", F, D),
        joins("block", gives(D)),
        norm("final_norm", 1),
        Module("head", () if model.tied else ((D, V),), gives(V)),
    )


def cache_bytes(model: ModelConfig, batch: int, sequence: int, element: int, heads: int | None = None) -> int:
    """Bytes of the keys and values of `sequence` tokens in every block, `element` bytes each, for the model's key/value
    heads or another number of them: 2 L b T K H (Kwon et al. 2023, section 3; Ainslie et al. 2023 on fewer heads)."""
    return 2 * model.layers * batch * sequence * (heads or model.kv_heads) * model.head_dim * element
