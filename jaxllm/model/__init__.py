"""The model: a Flax NNX Llama that knows nothing of meshes or degrees."""

from jaxllm.model.llama import SAVED, WHOLE, Block, Llama, Shards, cross_entropy, lookup, rms_norm, rotary

__all__ = ["SAVED", "WHOLE", "Block", "Llama", "Shards", "cross_entropy", "lookup", "rms_norm", "rotary"]
