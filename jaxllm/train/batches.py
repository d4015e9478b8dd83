"""Batches: which tokens a step sees, as a function of the seed and the step alone, and each process its own shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxllm.program.build import Built
from jaxllm.train.text import Text

MOST_EVALUATED = 64  # sequences of the held-out text that an evaluation looks at

Batch = dict[str, jax.Array]


def training_batch(text: Text, built: Built, seed: int, step: int) -> Batch:
    """The batch of a step (microbatches, sequences, T), as the program takes it.

    Each sequence begins at a random token of the training part. The draw depends on the seed and the step, so that a
    run that is taken up again, on whatever layout and number of processes, sees the same sequences.
    """
    microbatches, rows, sequence = built.arguments[2]["tokens"].shape
    last = len(text.training) - sequence  # the first token behind the last possible beginning
    starts = np.random.default_rng([seed, step]).integers(0, last, microbatches * rows)
    return _batch(text.training, starts, built)


def evaluation_batches(text: Text, built: Built) -> Iterator[tuple[int, Batch]]:
    """The held-out text in sequences one after the other, up to MOST_EVALUATED: (targets in it, batch).

    The last batch is filled up with sequences without targets.
    """
    microbatches, rows, sequence = built.arguments[2]["tokens"].shape
    size = microbatches * rows
    count = min((len(text.evaluation) - 1) // sequence, MOST_EVALUATED)
    for first in range(0, count, size):
        here = min(size, count - first)
        starts = np.full(size, -1)
        starts[:here] = (first + np.arange(here)) * sequence
        yield here * sequence, _batch(text.evaluation, starts, built)


def _batch(tokens: Any, starts: Any, built: Built) -> Batch:
    """Sequences from those starts on, and what follows each token as its target; -1 starts one without targets."""
    like = built.arguments[2]
    grid = starts.reshape(like["tokens"].shape[:2])

    def part(name: str, leaf: Any) -> jax.Array:
        following = name == "targets"

        def crop(index: tuple[slice, ...]) -> Any:
            # Only the slice of this device is made: a process never holds another's sequences.
            begin = grid[index[:2]][..., None]
            places = np.maximum(begin, 0) + built.positions[index[2]] + following
            values = tokens[places].astype(np.int32)
            return np.where(begin < 0, -1, values) if following else values

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, crop)

    return {name: part(name, leaf) for name, leaf in like.items()}
