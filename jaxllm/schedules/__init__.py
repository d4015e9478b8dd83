"""Pipeline schedules as tables: made by name or read from a file, checked, counted, and timed. No JAX, and no
NumPy but for many sizes at once, in `sizes`."""

from __future__ import annotations

from functools import lru_cache

from jaxllm.schedules.named import Named, registry
from jaxllm.schedules.table import Cell, Schedule
from jaxllm.spec.errors import SpecError, nearest

__all__ = ["Cell", "Schedule", "check_size", "default_chunks", "make", "names", "source"]

# A table is written out cell by cell: beyond these it would take minutes and gigabytes.
MOST_STAGES = 1024
MOST_MICROBATCHES = 100_000
MOST_PARTS = 4096
MOST_CELLS = 1_000_000


def names() -> tuple[str, ...]:
    """The schedules that have a name, in alphabetical order."""
    return tuple(registry())


def default_chunks(name: str) -> int:
    """Chunks of a stage when none are asked for: the least that the schedule can have. Raises SpecError."""
    return _named(name).chunks[0]


def source(name: str) -> str:
    """Where a schedule is published. Raises SpecError."""
    return _named(name).source


@lru_cache(maxsize=64, typed=True)
def make(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The table of a schedule that has a name.

    Args: stages of the pipeline; microbatches of a step; chunks of the model on each stage, by default the least that
    the schedule can have.

    Raises SpecError when there is no such schedule, or it cannot have so many of one of them.
    """
    named = _named(name)
    least, most = named.chunks
    chunks = least if chunks is None else chunks
    check_size(stages, microbatches, chunks)
    if chunks < least or (most is not None and chunks > most):
        have = f"has {least}" if most == least else f"needs {least} or more"
        raise SpecError(f"schedule {name}: {chunks} chunk{'s' if chunks > 1 else ''} on a stage; it {have}: {_way_out(name, least, chunks)}.")
    if named.fills and microbatches < stages:
        raise SpecError(
            f"schedule {name}: {microbatches} microbatch{'es' if microbatches > 1 else ''} for {stages} stages; it needs as many as stages: take "
            f"{stages} microbatches or more, or 1f1b, which takes any number."
        )
    return named.build(stages, microbatches, chunks)


def check_size(stages: int, microbatches: int, chunks: int) -> None:
    """Raises SpecError when a table of this size is none, or too large to write out."""
    for what, value, least, most in (
        ("stages", stages, 2, MOST_STAGES),
        ("microbatches", microbatches, 1, MOST_MICROBATCHES),
        ("chunks", chunks, 1, MOST_PARTS),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise SpecError(f"schedule: {what}={value!r} is out of range; choose a whole number from {least} to {most:,}.")
    if stages * chunks > MOST_PARTS:
        raise SpecError(
            f"schedule: {stages:,} stages x {chunks:,} chunks are {stages * chunks:,} parts of a model, and "
            f"{MOST_PARTS:,} is the most; take {MOST_PARTS // stages} chunks or fewer."
        )
    cells = 3 * stages * chunks * microbatches
    if cells > MOST_CELLS:
        raise SpecError(
            f"schedule: {stages:,} stages x {chunks:,} chunks x {microbatches:,} microbatches are up to {cells:,} "
            f"cells, and {MOST_CELLS:,} is the most; take {MOST_CELLS // (3 * stages * chunks):,} microbatches or fewer, or "
            "fewer stages."
        )


def _named(name: str) -> Named:
    known = registry()
    if name not in known:
        raise SpecError(f"schedule: {name!r} is unknown; {nearest(name, known)}")
    return known[name]


def _way_out(name: str, least: int, chunks: int) -> str:
    if chunks < least:
        return f"take {least}, or 1f1b, which has 1"
    return f"take {least}, or interleaved, which has any number from 2 on"
