"""What the listing says of each module is what the model's own forward pass has, and caches are those of the papers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxllm.model import family
from jaxllm.spec.errors import SpecError
from jaxllm.spec.model import ModelConfig
from jaxllm.theory.shapes import cache_bytes, modules

MODELS = {
    name: replace(ModelConfig.load(base), **changes)
    for name, base, changes in (
        ("llama", "llama-tiny", {"layers": 2, "kv_heads": 2}),
        ("llama, tied", "llama-tiny", {"layers": 1, "tied": True, "head_dim": 10, "heads": 6, "kv_heads": 3}),
        ("gpt", "gpt-tiny", {"layers": 2}),
        ("gpt, not tied", "gpt-tiny", {"layers": 3, "tied": False, "d_ff": 37}),
    )
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_model(name):
    model = MODELS[name]
    built = nnx.eval_shape(lambda: family(model).model(model, rngs=nnx.Rngs(0)))
    held = nnx.to_pure_dict(nnx.state(built, nnx.Param))
    listed = {}
    for module in modules(model, 2, 8):
        names = (module.name, f"{module.name}_bias")
        stacked = (model.layers,) if module.times > 1 or module.name in held["layers"] else ()
        listed |= {weight: (*stacked, *shape) for weight, shape in zip(names, module.weights, strict=False)}
    outer = {weight: leaf.shape for weight, leaf in held.items() if weight != "layers"}
    assert listed == outer | {weight: leaf.shape for weight, leaf in held["layers"].items()}
    assert sum(module.times * module.parameters for module in modules(model, 2, 8)) == model.parameters


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_forward_pass(name):
    model, found = MODELS[name], {}
    kind = family(model)
    batch, length = 3, 8

    def saw(name, value):
        found[name] = value.shape
        return value

    def tapped(name, value, product):
        found[{"down": "hidden"}.get(name, f"into {name}")] = value.shape
        found.setdefault(name, product.shape)
        return product

    def forward(tokens):
        whole = kind.model(model, rngs=nnx.Rngs(0))
        block = kind.block(model, rngs=nnx.Rngs(0))
        x = jnp.zeros((batch, length, model.d_model))
        found["block"] = block(x, kind.context(model, jnp.arange(float(length))), save=saw, tap=tapped).shape
        found["head"] = whole(tokens).shape
        outer = {weight: getattr(whole, weight)[...] for weight in (*kind.entry, *kind.exit)}
        entered = kind.embed(model, {weight: outer[weight] for weight in kind.entry}, tokens, _whole())
        found.update(dict.fromkeys(kind.entry, entered.shape))
        found["final_norm"] = kind.finish(model, outer, entered).shape

    jax.eval_shape(forward, jax.ShapeDtypeStruct((batch, length), jnp.int32))
    found["attention_norm"], found["mlp_norm"] = found.pop("into q"), found.pop("into up")
    listed = {module.name: module.output for module in modules(model, batch, length)}
    assert listed == {name: shape for name, shape in found.items() if not name.startswith("into ")}


def _whole():
    from jaxllm.model import WHOLE

    return WHOLE


# Bytes of a token in bf16, 2 L 2 K H: Kwon et al. 2023 (vLLM), section 3, for a 13B of 40 layers and heads; the others
# from the models' own config.json.
PER_TOKEN = {"llama-2-7b": 524_288, "llama-2-13b": 819_200, "llama-2-70b": 327_680, "llama-3-8b": 131_072, "llama-3.1-405b": 516_096}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_token_of_cache(name):
    assert cache_bytes(ModelConfig.load(name), 1, 1, 2) == PER_TOKEN[name]


def test_half_a_gibibyte():
    model = ModelConfig.load("llama-2-7b")
    assert cache_bytes(model, 1, 512, 4) == 2**29
    assert cache_bytes(model, 3, 512, 4, heads=1) == 3 * 2**29 // 32


def test_a_sequence_that_is_too_long():
    with pytest.raises(SpecError, match="longer than the 1,024 tokens that gpt2 takes"):
        modules(ModelConfig.load("gpt2"), 1, 1025)
