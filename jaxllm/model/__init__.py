"""The models: Flax NNX modules that know nothing of meshes or degrees, and what a step has to know of each family."""

from jaxllm.model.attention import ATTENTION, Attend
from jaxllm.model.families import Family, family
from jaxllm.model.gpt import GPT
from jaxllm.model.llama import Llama
from jaxllm.model.parts import WHOLE, Multiply, Shards, cross_entropy
from jaxllm.model.ring import Ring, halves, order

__all__ = [
    "ATTENTION", "GPT", "WHOLE", "Attend", "Family", "Llama", "Multiply", "Ring", "Shards", "cross_entropy", "family", "halves",
    "order",
]  # fmt: skip
