"""The models: Flax NNX modules that know nothing of meshes or degrees, and what a step has to know of each family."""

from jaxllm.model.families import Family, family
from jaxllm.model.gpt import GPT
from jaxllm.model.llama import Llama
from jaxllm.model.parts import WHOLE, Shards, cross_entropy

__all__ = ["GPT", "WHOLE", "Family", "Llama", "Shards", "cross_entropy", "family"]
