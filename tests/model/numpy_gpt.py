"""A GPT forward pass in NumPy and float64, from the papers alone: the oracle of the forward tests.

Sources: LayerNorm (Ba et al. 2016), attention (Vaswani et al. 2017), GELU by its tanh form (Hendrycks and Gimpel 2016,
section 2), norms before each part of a block and one more at the end (Radford et al. 2019, section 2.3), learned
positions (Radford et al. 2018, section 3.1).
It shares no line and no import with jaxllm.
"""

from __future__ import annotations

import math

import numpy as np


def layer_norm(x, weight, bias, epsilon):
    """x (..., D), weight and bias (D,)."""
    result = np.empty_like(x)
    for index in np.ndindex(*x.shape[:-1]):
        row = x[index]
        result[index] = (row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + epsilon) * weight + bias
    return result


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attention(config, x, w):
    """x (B, T, D) -> (B, T, D), one head at a time."""
    size = config.head_dim
    future = np.triu(np.full((x.shape[1], x.shape[1]), -np.inf), 1)
    heads = []
    for n in range(config.heads):
        mine = slice(n * size, (n + 1) * size)
        query, key, value = (x @ w[name][:, mine] + w[f"{name}_bias"][mine] for name in ("q", "k", "v"))
        heads.append(softmax(query @ key.transpose(0, 2, 1) / math.sqrt(size) + future) @ value)
    return np.concatenate(heads, axis=-1) @ w["o"] + w["o_bias"]


def forward(config, parameters, tokens):
    """tokens (B, T) -> logits (B, T, V) in float64."""
    outer = {name: np.asarray(value, np.float64) for name, value in parameters.items() if name != "layers"}
    layers = {name: np.asarray(value, np.float64) for name, value in parameters["layers"].items()}
    tokens, epsilon = np.asarray(tokens), config.norm_epsilon
    x = np.stack([[outer["embed"][token] + outer["positions"][t] for t, token in enumerate(row)] for row in tokens])
    for i in range(config.layers):
        w = {name: value[i] for name, value in layers.items()}
        x = x + attention(config, layer_norm(x, w["attention_norm"], w["attention_norm_bias"], epsilon), w)
        h = layer_norm(x, w["mlp_norm"], w["mlp_norm_bias"], epsilon)
        x = x + gelu(h @ w["up"] + w["up_bias"]) @ w["down"] + w["down_bias"]
    x = layer_norm(x, outer["final_norm"], outer["final_norm_bias"], epsilon)
    return x @ (outer["embed"].T if config.tied else outer["head"])
