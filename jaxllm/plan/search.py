"""The search: every layout scored, the best kept, and what each choice costs."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from jaxllm.plan.score import peaks, seconds, symbols
from jaxllm.plan.space import ROWS, SCHEDULES, ZEROS, Block, Space, along, offload
from jaxllm.spec.layout import Layout
from jaxllm.theory.rates import Rates
from jaxllm.theory.time import interval, strange, widest

OBJECTIVES = ("time", "memory", "cost")
PATIENCE = 2.0  # seconds after which it is said how far a search is
MOST_CHANGES = 6  # of a layout that are looked for
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h


@dataclass(frozen=True)
class Scored:
    """A layout with its bytes at the peak, the seconds of a step, and those between which four of five steps lie."""

    layout: Layout
    peak: int
    seconds: float
    interval: tuple[float, float]


@dataclass
class Choice:
    """What there is with one value of a choice: how many layouts, how many fit, the least bytes, and the fastest that fits."""

    name: str
    value: Any
    scored: int = 0
    fits: int = 0
    least: float = np.inf
    seconds: float = np.inf


@dataclass
class Found:
    """What a search found.

    scored   layouts whose bytes and seconds have closed forms; unscored: those whose schedule has none
    fits     of those, how many have the memory
    best     the best that fit, by the objective
    front    those that fit and that none beats in both bytes and seconds, the fastest first
    least    the layout with the least bytes of all, whether it fits or not
    near     seconds of all that fit and are not slower than the fastest may be by its interval
    choices  (name, value) -> Choice
    closest  the fastest that fits with so many choices other than a layout's
    cloud    (bytes, seconds) of the fastest layout and of the smallest with each row's degrees and microbatches
    """

    scored: int = 0
    unscored: int = 0
    fits: int = 0
    best: list[Scored] = field(default_factory=list)
    front: list[Scored] = field(default_factory=list)
    least: Scored | None = None
    near: np.ndarray = field(default_factory=lambda: np.empty(0))
    choices: dict[tuple[str, Any], Choice] = field(default_factory=dict)
    closest: dict[int, Scored] = field(default_factory=dict)
    cloud: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))


def keep_memory() -> None:
    """Tells glibc to keep what is freed, where there is a glibc: a search makes and drops thousands of arrays of megabytes, and to
    get each anew from the system took a third of its time. It is for processes that search and end."""
    with contextlib.suppress(OSError, AttributeError):
        own = ctypes.CDLL(None)
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            own.mallopt(option, 2**30)


def search(
    space: Space,
    top: int = 10,
    objective: str = "time",
    progress: Callable[[str], None] = lambda text: None,
    origin: Layout | None = None,
) -> Found:
    """Scores all layouts of a space, and tells those that are close to `origin`. Raises SpecError for a machine without
    figures of speed."""
    rates = Rates.of(space.mesh, space.workload)
    capacity = space.mesh.capacity
    found = Found()
    progress("scoring layouts")
    told = time.perf_counter()
    for block in space.blocks():
        if time.perf_counter() - told > PATIENCE:
            told = time.perf_counter()
            progress(f"scored {found.scored:,} layouts, now of pipe={block.pipe}")
        s = symbols(block, space.model, space.workload)
        peak, (taken, waits) = peaks(block, s, space.model.layers, space.mesh.target), seconds(block, s, rates)
        allowed = block.allowed & ~np.isnan(taken)
        fits = allowed if capacity is None else allowed & (peak <= capacity)
        found.unscored += int(np.count_nonzero(block.allowed)) - int(np.count_nonzero(allowed))
        unlike = np.broadcast_to(strange(s)[..., 0], block.shape)
        grid = _Grid(block, rates, peak, taken, waits, unlike, allowed, fits)
        _add(found, grid, top, objective)
        if origin is not None:
            _add_closest(found, grid, origin)
    return found


@dataclass(frozen=True)
class _Grid:
    """The scores of a block, over its axes."""

    block: Block
    rates: Rates
    peak: np.ndarray
    seconds: np.ndarray
    waits: np.ndarray
    strange: np.ndarray
    allowed: np.ndarray
    fits: np.ndarray

    def at(self, place: int) -> Scored:
        index = np.unravel_index(place, self.peak.shape)
        time, waits = float(self.seconds[index]), float(self.waits[index])
        return Scored(self.block.layout(index), int(self.peak[index]), time, interval(time, waits, bool(self.strange[index]), self.rates))


def _add(found: Found, grid: _Grid, top: int, objective: str) -> None:
    count = int(np.count_nonzero(grid.allowed))
    if not count:
        return
    found.scored += count
    found.fits += int(np.count_nonzero(grid.fits))
    time = np.where(grid.fits, grid.seconds, np.inf)
    bytes_ = np.where(grid.allowed, grid.peak, np.inf)
    _add_least(found, grid, bytes_)
    _add_best(found, grid, time, top, objective)
    _add_front(found, grid, time)
    _add_choices(found, grid, time, bytes_)
    _add_cloud(found, grid, bytes_)
    fastest = min((each.seconds for each in found.front), default=np.inf)
    most = widest(grid.rates) * fastest
    near = time[time <= most] if np.isfinite(fastest) else np.empty(0)
    found.near = np.concatenate([found.near[found.near <= most], near])


def _add_least(found: Found, grid: _Grid, bytes_: np.ndarray) -> None:
    place = int(np.argmin(bytes_))
    if found.least is None or bytes_.flat[place] < found.least.peak:
        found.least = grid.at(place)


def _add_best(found: Found, grid: _Grid, time: np.ndarray, top: int, objective: str) -> None:
    """Of equals the plainer one, which has fewer words."""

    def key(each: Scored) -> tuple[Any, ...]:
        measure = (each.peak, each.seconds) if objective == "memory" else (each.seconds, each.peak)
        return (*measure, len(f"{each.layout}"), f"{each.layout}")

    smallest = objective == "memory"
    measure = np.where(grid.fits, grid.peak, np.inf) if smallest else time
    worst = np.inf
    if len(found.best) == top:
        worst = found.best[-1].peak if smallest else found.best[-1].seconds
    places = np.flatnonzero((measure <= worst) & np.isfinite(measure))
    if len(places) > 8 * top:
        limit = np.partition(measure.flat[places], top)[top]
        places = places[measure.flat[places] <= limit][: 64 * top]
    found.best = sorted([*found.best, *map(grid.at, places.tolist())], key=key)[:top]


def _add_front(found: Found, grid: _Grid, time: np.ndarray) -> None:
    """The front of what was found and of a block. What a point of the front beats is sorted out before anything is sorted."""
    first = int(np.argmin(time))
    if not np.isfinite(time.flat[first]):
        return
    known = _front([*found.front, grid.at(first)])
    bytes_, times = np.array([each.peak for each in known])[::-1], np.array([each.seconds for each in known])[::-1]
    # `known` has the fastest first, which takes the most bytes; turned round bytes go up and seconds down.
    flat, peak = time.ravel(), grid.peak.ravel()
    beaten_by = np.searchsorted(bytes_, peak, side="right") - 1
    limit = np.where(beaten_by >= 0, times[np.maximum(beaten_by, 0)], np.inf)
    places = np.flatnonzero(flat < limit)
    order = places[np.lexsort((flat[places], peak[places]))]
    faster = flat[order] < np.minimum.accumulate(np.concatenate([[np.inf], flat[order][:-1]]))
    found.front = _front([*known, *map(grid.at, order[faster].tolist())])


def _front(points: Iterable[Scored]) -> list[Scored]:
    """Those that none beats in both, the fastest first."""
    front: list[Scored] = []
    for point in sorted(points, key=lambda each: (each.peak, each.seconds)):
        if not front or point.seconds < front[-1].seconds:
            front.append(point)
    return front[::-1]


def _add_closest(found: Found, grid: _Grid, origin: Layout) -> None:
    changed = np.where(grid.fits, _changed(grid.block, origin), MOST_CHANGES + 1)
    for count in range(1, MOST_CHANGES + 1):
        time = np.where(changed == count, grid.seconds, np.inf)
        place = int(np.argmin(time))
        if np.isfinite(time.flat[place]) and (count not in found.closest or time.flat[place] < found.closest[count].seconds):
            found.closest[count] = grid.at(place)


def _changed(block: Block, origin: Layout) -> np.ndarray:
    """How many choices of each layout are others than the origin's. When a degree grows another shrinks, which counts as one
    change; so does a pipeline with its schedule."""
    rows, unlike = block.rows, lambda name, values: np.array([value != getattr(origin, name) for value in values])
    degrees = sum(unlike(name, rows[name].tolist()).astype(int) for name in ("replica", "data", "context", "tensor"))
    degrees = degrees + (block.pipe != origin.pipe)
    of_row = np.maximum(degrees - 1, 1 * (degrees > 0))
    for name in ("sequence", "microbatches"):
        of_row = of_row + unlike(name, rows[name].tolist())
    of_row = of_row + (rows["context"] > 1) * (origin.context > 1) * (block.exchange != origin.exchange)
    pairs = [(name or "", chunks) for name, chunks in block.schedules]
    own = (origin.schedule or ("1f1b" if origin.pipe > 1 else ""), origin.virtual or None)
    of_schedule = [block.pipe == origin.pipe and (name, chunks if own[1] else None) != own for name, chunks in pairs]
    kept = [
        [
            (offload(state, one) != origin.offload)
            + (one.attention != origin.attention)
            + ((one.remat, one.save) != (origin.remat, origin.save or "none"))
            for one in block.kept
        ]
        for state in block.states
    ]
    spread = (
        along(ROWS, of_row), along(SCHEDULES, of_schedule), along(ZEROS, unlike("zero", block.zeros)),
        np.array(kept).reshape(1, 1, 1, len(block.states), len(block.kept), 1),
    )  # fmt: skip
    return sum(each.astype(int) for each in spread)[..., 0]


def _add_cloud(found: Found, grid: _Grid, bytes_: np.ndarray) -> None:
    rows = len(bytes_)
    bytes_ = bytes_.reshape(rows, -1)
    time = np.where(np.isfinite(bytes_), grid.seconds.reshape(rows, -1), np.inf)
    for places in (time.argmin(1), bytes_.argmin(1)):
        points = np.stack([each[np.arange(rows), places] for each in (bytes_, time)], axis=1)
        found.cloud = np.concatenate([found.cloud, points[np.isfinite(points).all(1)]])


def _add_choices(found: Found, grid: _Grid, time: np.ndarray, bytes_: np.ndarray) -> None:
    """Each choice by its values: of the rows' columns, and of the other axes."""
    others = (1, 2, 3, 4)
    _add_values(found, _row_choices(grid.block), *_reduced(grid, time, bytes_, others))
    _add_values(found, _other_choices(grid.block), *(each.ravel() for each in _reduced(grid, time, bytes_, (0,))))


def _reduced(grid: _Grid, time: np.ndarray, bytes_: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return (
        np.count_nonzero(grid.allowed, axis=axes), np.count_nonzero(grid.fits, axis=axes), bytes_.min(axes), time.min(axes)
    )  # fmt: skip


def _row_choices(block: Block) -> dict[str, list[Any]]:
    names = {name: column.tolist() for name, column in block.rows.items()}
    exchange = [block.exchange if context > 1 else "" for context in names["context"]]
    return names | {"pipe": [block.pipe] * block.shape[0], "exchange": exchange}


def _other_choices(block: Block) -> dict[str, list[Any]]:
    places = list(product(block.schedules, block.zeros, block.states, block.kept))
    found: dict[str, list[Any]] = {
        "zero": [zero for _, zero, _, _ in places],
        "offload": [offload(state, kept) for _, _, state, kept in places],
        "remat": [kept.remat for *_, kept in places],
        "save": [kept.save if kept.remat == "full" else "" for *_, kept in places],
        "attention": [kept.attention for *_, kept in places],
    }
    if block.pipe > 1:
        found |= {"schedule": [name for (name, _), *_ in places], "virtual": [chunks for (_, chunks), *_ in places]}
    return found


def _add_values(
    found: Found, names: dict[str, list[Any]], scored: np.ndarray, fits: np.ndarray, least: np.ndarray, time: np.ndarray
) -> None:
    for name, values in names.items():
        known, places = np.unique(np.array(values), return_inverse=True)
        counts = np.bincount(places, scored), np.bincount(places, fits)
        smallest, fastest = np.full(len(known), np.inf), np.full(len(known), np.inf)
        np.minimum.at(smallest, places, least)
        np.minimum.at(fastest, places, time)
        for index, value in enumerate(known.tolist()):
            if counts[0][index] and value != "":
                choice = found.choices.setdefault((name, value), Choice(name, value))
                choice.scored += int(counts[0][index])
                choice.fits += int(counts[1][index])
                choice.least = min(choice.least, float(smallest[index]))
                choice.seconds = min(choice.seconds, float(fastest[index]))
