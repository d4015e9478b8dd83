"""What a training step has to know of a model beside its weights: one entry a family, found by ModelConfig.family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxllm.model import gpt, llama
from jaxllm.model.parts import Shards, lookup
from jaxllm.spec.model import ModelConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A kind of decoder: embedding, a stack of equal blocks, a norm and a head.

    model     the NNX module of all of it, whose parameters are {"layers": one tree, stacked, ...and the outer ones}
    block     the NNX module of a block, called as block(x, context, shards, save, tap, attend, multiply)
    products  the weights of a block that multiply matrices, and the name of what each is multiplied with
    context   (config, positions that attention is among (t,) in f32) -> what every block gets beside x
    entry     names of the outer weights that `embed` takes, head and embedding of a tied model being one
    exit      names of the outer weights that `finish` takes
    embed     (config, {name: weight}, tokens (b, t), shards) -> x (b, t, D)
    finish    (config, {name: weight}, y (b, t, D)) -> what the head multiplies (b, t, D)
    """

    model: type[nnx.Module]
    block: type[nnx.Module]
    products: Mapping[str, str]
    context: Callable[[ModelConfig, jax.Array], Any]
    entry: tuple[str, ...]
    exit: tuple[str, ...]
    embed: Callable[[ModelConfig, Tree, jax.Array, Shards], jax.Array]
    finish: Callable[[ModelConfig, Tree, jax.Array], jax.Array]


FAMILIES = {
    "llama": Family(
        model=llama.Llama,
        block=llama.Block,
        products=llama.PRODUCTS,
        context=llama.rotary,
        entry=("embed",),
        exit=("final_norm",),
        embed=lambda config, outer, tokens, shards: lookup(outer["embed"], tokens, shards),
        finish=lambda config, outer, y: llama.rms_norm(y, outer["final_norm"], config.norm_epsilon),
    ),
    "gpt": Family(
        model=gpt.GPT,
        block=gpt.Block,
        products=gpt.PRODUCTS,
        context=lambda config, positions: None,
        entry=("embed", "positions"),
        exit=("final_norm", "final_norm_bias"),
        embed=lambda config, outer, tokens, shards: gpt.embed(outer["embed"], outer["positions"], tokens, shards),
        finish=lambda config, outer, y: gpt.layer_norm(
            y, outer["final_norm"], outer["final_norm_bias"], config.norm_epsilon
        ),
    ),
}


def family(config: ModelConfig) -> Family:
    """The family of a model."""
    return FAMILIES[config.family]
