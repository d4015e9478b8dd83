"""How long a matmul takes: the waves of its tiles, or its bytes; beside what was measured of its shape, where anything was."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from jaxllm.spec.figures import Curve
from jaxllm.spec.ledger import DTYPE_BYTES
from jaxllm.theory.rates import Rates


def product(
    r: Rates, rows: Any, inner: Any, columns: Any, size: int, many: Any = 1, *, speed: float = 1.0, spared: Any = 0
) -> Any:
    """Seconds of `many` products of (rows x inner) by (inner x columns) at once, with elements of `size` bytes: the waves in
    which their tiles go through the cores, at `speed` times the rate, or their bytes through memory, but for `spared` elements
    that a kernel keeps to itself. On a machine whose products were measured by shape, as much more or less than their waves as
    those of about this shape took, their bytes included; but for what is added to, and for sizes beyond the measured
    ones."""
    deep = -(-inner // r.deep) * r.deep + r.fill
    filled: Any = math.inf  # elements of the output, with what is left empty of tiles and waves
    for tall, wide, relative in r.tiles:
        for height, width in {(tall, wide), (wide, tall)} if r.turned else {(tall, wide)}:
            tiles = many * -(-rows // height) * -(-columns // width)
            filled = np.minimum(filled, -(-tiles // r.cores) * (r.cores * height * width / relative))
    waves = 2.0 * filled * deep / (r.peak * r.matmul * speed)
    moved = (many * (rows * inner + inner * columns + rows * columns) - spared) * (size / r.memory)
    if r.curve is None:
        return np.maximum(waves, moved) + r.kernel
    waves = waves * _beside(r, rows * many, inner, columns)
    within = _within(r.curve, rows * many, inner, columns)
    return np.maximum(waves, np.where(within, -spared * (size / r.memory), moved)) + r.kernel


def _within(curve: Curve, *shape: Any) -> Any:
    """Whether a shape lies among those that were measured, whose bytes are in what they took."""
    least, most = curve.sizes[0], curve.sizes[-1]
    return reduce(operator.and_, ((size >= least) & (size <= most) for size in shape))


def _beside(r: Rates, *shape: Any) -> Any:
    """What products of a shape take over what their waves do: between the shapes that were measured in proportion to the
    logarithms of the three sizes, and beyond them as at their edge."""
    known, ratios = _measured(r)
    places, parts = [], []
    for size in shape:
        at = np.clip(np.log(size), known[0], known[-1])
        below = np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(known) - 2)
        places.append(below)
        parts.append((at - known[below]) / (known[below + 1] - known[below]))
    found: Any = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight: Any = 1.0
        for side, part in zip(corner, parts, strict=True):
            weight = weight * (part if side else 1 - part)
        found = found + weight * ratios[tuple(place + side for place, side in zip(places, corner, strict=True))]
    return np.exp(found)


@lru_cache
def _measured(r: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the sizes that were measured, and of what their products took over what their waves do, without the launch
    of a kernel; of a product that is as short as one a hundredth is left."""
    curve = r.curve
    assert curve is not None
    sizes = np.array(curve.sizes)
    shape = np.meshgrid(sizes, sizes, sizes, indexing="ij")
    took = 2.0 * math.prod(shape) / (r.peak * np.array(curve.shares))
    waves = product(replace(r, curve=None, memory=math.inf), *shape, DTYPE_BYTES[curve.dtype]) - r.kernel
    return np.log(sizes), np.log(np.maximum(took - r.kernel, took / 100) / waves)
