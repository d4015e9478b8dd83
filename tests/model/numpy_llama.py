"""A Llama forward pass in NumPy and float64, from the papers alone: the oracle of the forward tests.

Sources: RMSNorm (Zhang and Sennrich 2019), RoPE (Su et al. 2021, with the halves paired as in Hugging Face's Llama),
grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), the order of the blocks (Touvron et al. 2023,
section 2), and the frequency scaling of the Llama 3.1 release.
It shares no line and no import with jaxllm.
"""

from __future__ import annotations

import math

import numpy as np


def rms_norm(x, weight, epsilon):
    """x (..., D), weight (D,)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def frequencies(config):
    """Angle per position of each of the H/2 pairs, in radians."""
    half = config.head_dim // 2
    result = np.array([config.rope_theta ** (-2.0 * i / config.head_dim) for i in range(half)], np.float64)
    scaling = config.rope_scaling
    if scaling is None:
        return result
    for i, frequency in enumerate(result):
        turns = scaling.original_sequence * frequency / (2 * math.pi)  # turns made over the original context
        if turns < scaling.low_frequency_factor:
            result[i] = frequency / scaling.factor
        elif turns <= scaling.high_frequency_factor:
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            keep = (turns - low) / (high - low)
            result[i] = keep * frequency + (1 - keep) * frequency / scaling.factor
    return result


def rotate(x, angles):
    """x (B, T, H) of one head, angles (T, H/2): turns the pair (x_i, x_{i+H/2}) by its angle."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attention(config, x, q, k, v, o):
    """x (B, T, D) -> (B, T, D), one head at a time; query head n reads key/value head n // (N/K)."""
    size, group = config.head_dim, config.heads // config.kv_heads
    sequence = x.shape[1]
    angles = np.arange(sequence)[:, None] * frequencies(config)[None, :]
    future = np.triu(np.full((sequence, sequence), -np.inf), 1)
    heads = []
    for n in range(config.heads):
        mine, shared = slice(n * size, (n + 1) * size), slice(n // group * size, (n // group + 1) * size)
        query, key = rotate(x @ q[:, mine], angles), rotate(x @ k[:, shared], angles)
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(size)
        heads.append(softmax(scores + future) @ (x @ v[:, shared]))
    return np.concatenate(heads, axis=-1) @ o


def forward(config, parameters, tokens):
    """tokens (B, T) -> logits (B, T, V) in float64."""
    layers = {name: np.asarray(value, np.float64) for name, value in parameters["layers"].items()}
    embed = np.asarray(parameters["embed"], np.float64)
    x = embed[np.asarray(tokens)]
    for i in range(config.layers):
        w = {name: value[i] for name, value in layers.items()}
        x = x + attention(
            config, rms_norm(x, w["attention_norm"], config.norm_epsilon), w["q"], w["k"], w["v"], w["o"]
        )
        h = rms_norm(x, w["mlp_norm"], config.norm_epsilon)
        gate = h @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    x = rms_norm(x, np.asarray(parameters["final_norm"], np.float64), config.norm_epsilon)
    return x @ (embed.T if config.tied else np.asarray(parameters["head"], np.float64))
