"""How attention is computed, and the blocks of positions in which it may be: choices that both authors are given."""

from __future__ import annotations

from typing import Any

# xla: the scores of all pairs of positions are there at once. blockwise: those of two blocks at a time. The others are
# kernels that jax has: cudnn calls NVIDIA's, splash is Pallas's for TPUs.
KINDS = ("xla", "blockwise", "cudnn", "splash")

# A tile of 512 x 512 scores is 1 MiB in f32: large enough to keep a matmul unit busy, small enough for on-chip memory.
LONGEST_BLOCK = 512


def blocks(sequence: Any) -> tuple[Any, Any]:
    """(number of blocks, positions in each) of so many positions: as few blocks as can be of 512 or less, all of one size.

    Where the number does not divide the sequence the last block is filled up, by less than one position for each block.
    Takes integers, or arrays of them.
    """
    number = -(-sequence // LONGEST_BLOCK)
    return number, -(-sequence // number)
