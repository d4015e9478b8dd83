"""Matmuls in 8 bits with delayed scaling: what both authors are given of them.

The formats are those of Micikevicius et al. 2022 (FP8 formats for deep learning), section 3; the scaling is that of NVIDIA's
Transformer Engine, its recipe DelayedScaling with the format HYBRID: a tensor is scaled by the largest absolute values
(amaxes) that the last steps found of it, so that a step need not look at it twice.
"""

from __future__ import annotations

# What each product of a block quantizes, and to which format by HLO's name: E4M3 for what the forward pass multiplies, E5M2
# for gradients, which need more range than digits.
FORMATS = {"input": "f8e4m3fn", "kernel": "f8e4m3fn", "gradient": "f8e5m2"}

# Steps whose amaxes are kept of each tensor: Transformer Engine's default.
HISTORY = 1024

MATMUL = "fp8"  # of a line of FLOPs whose matmuls have two operands of 8 bits
