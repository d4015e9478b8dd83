"""Optimizers that look at one element at a time: whatever slices a weight slices all of their arrays, and nothing is sent."""

from __future__ import annotations

import optax

from jaxllm.program.transformations import Transformation

SGD = Transformation("sgd", lambda rate, _: optax.sgd(rate), "it has none")

MOMENTUM = Transformation("momentum", lambda rate, _: optax.sgd(rate, momentum=0.9), "Krizhevsky et al. 2012, section 5")

# PyTorch's: squares begin at 0, and 1e-10 is added to their root. optax adds under the root.
ADAGRAD = Transformation(
    "adagrad", lambda rate, _: optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-20), "PyTorch's defaults"
)

ADAM = Transformation("adam", lambda rate, _: optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8), "Kingma and Ba 2015, algorithm 1")

ADAMW = Transformation(
    "adamw",
    lambda rate, _: optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1),
    "Llama 2 (Touvron et al. 2023b, section 2.2)",
)

LION = Transformation(
    "lion", lambda rate, _: optax.lion(rate, b1=0.9, b2=0.99, weight_decay=0.3), "Chen et al. 2023, section 5 and algorithm 2"
)
